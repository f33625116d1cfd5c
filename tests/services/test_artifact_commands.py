"""``esper compile`` and ``esper inspect``."""

from __future__ import annotations

import json

import pytest

from esper.artifacts import Artifact, FileRegistry
from esper.blueprints import get
from esper.cli.main import main
from tests.artifacts.samples import sample, with_manifest

SIZES = ["--d-in", "6", "--d-out", "4"]


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main([*arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_compile_to_a_file(capsys, tmp_path):
    path = tmp_path / "k.safetensors"
    options = ["--rank", "2", "--param", "activation=tanh", "--param", "bias=true", "--seed", "5", "--dtype", "float16"]
    code, out, _ = run(capsys, "compile", "bottleneck", *SIZES, *options, "-o", str(path))
    artifact = Artifact.open(path)
    assert (code, out) == (0, artifact.artifact_id + "\n")
    assert artifact.blueprint == get("bottleneck", rank=2, activation="tanh", bias=True)
    assert artifact.manifest.seed == 5
    assert [entry.name for entry in tmp_path.iterdir()] == ["k.safetensors"]


def test_compile_to_a_registry_and_inspect_by_id(capsys, tmp_path):
    registry = FileRegistry(tmp_path)
    code, out, _ = run(capsys, "compile", "lowrank", *SIZES, "--registry", registry.url)
    artifact_id = out.strip()
    assert code == 0
    code, out, _ = run(capsys, "inspect", artifact_id, "--registry", registry.url, "--json", "--verify")
    facts = json.loads(out)
    assert code == 0
    assert facts["artifact_id"] == artifact_id
    assert facts["verified"] is True
    assert facts["file"] == str(registry.blob_path(artifact_id))


def test_compile_a_json_file(capsys, tmp_path):
    blueprint = get("gated", rank=3)
    path = tmp_path / "mine.json"
    path.write_text(blueprint.to_json())
    code, _, _ = run(capsys, "compile", str(path), *SIZES, "-o", str(tmp_path / "k"))
    assert code == 0
    assert Artifact.open(tmp_path / "k").blueprint == blueprint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing", *SIZES], "nothing"),
        (["missing.json", *SIZES], "cannot read the blueprint missing.json"),
        (["lowrank", *SIZES, "--param", "rank"], "expected KEY=VALUE"),
        (["lowrank", *SIZES, "--param", "rank=2", "--rank", "3"], "rank is given twice"),
        (["lowrank", *SIZES, "--rank", "0"], "rank"),
        (["lowrank", *SIZES, "--pipeline", "standard", "--dtype", "fp64"], "there are no GPU kernels for float64"),
        (["lowrank", *SIZES, "--dtype", "int8"], "cannot be stored"),
        (["lowrank", *SIZES, "--registry", "ftp://u:secret@h"], "unknown scheme"),
        (["lowrank", *SIZES, "-o", "/nonexistent/folder/k"], "cannot write /nonexistent/folder/k"),
    ],
)
def test_compile_errors_are_one_line(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.delenv("ESPER_DEBUG", raising=False)
    monkeypatch.setenv("ESPER_REGISTRY", str(tmp_path / "registry"))
    code, out, err = run(capsys, "compile", *arguments)
    assert (code, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1
    assert "secret" not in err
    assert not (tmp_path / "registry").exists()


def test_inspect_shows_what_matters(capsys, tmp_path):
    path = tmp_path / "k"
    path.write_bytes(sample())
    artifact = Artifact.open(path)
    code, out, _ = run(capsys, "inspect", str(path))
    assert code == 0
    for text in (artifact.artifact_id, artifact.sha256, "bottleneck", "down.weight", "2x6", "residual", "activation"):
        assert text in out


def test_inspect_reads_no_weight_unless_asked(capsys, tmp_path):
    path = tmp_path / "k"
    data = bytearray(sample())
    data[-1] ^= 1
    path.write_bytes(data)
    assert run(capsys, "inspect", str(path))[0] == 0
    code, out, err = run(capsys, "inspect", str(path), "--verify")
    assert (code, out) == (1, "")
    assert "altered" in err


def test_inspect_sends_no_control_characters_to_the_terminal(capsys, tmp_path):
    path = tmp_path / "k"

    def change(manifest):
        manifest["provenance"] = {"by": "\x1b]0;owned\x07", "\x1b[2J": "x"}
        manifest["blueprint"]["nodes"][0]["name"] = "\x1b[31m"
        manifest["tools"]["\x9b31m"] = "y"

    path.write_bytes(with_manifest(sample(), change))
    code, out, _ = run(capsys, "inspect", str(path))
    assert code == 0
    assert all(line.isprintable() for line in out.splitlines())


@pytest.mark.parametrize("data", [b"", b"rubbish", sample()[:100], bytes(50)])
def test_inspect_other_files(capsys, tmp_path, data):
    path = tmp_path / "k"
    path.write_bytes(data)
    code, out, err = run(capsys, "inspect", str(path))
    assert (code, out) == (1, "")
    assert err.count("\n") == 1


def test_inspect_what_is_not_there(capsys, tmp_path):
    known = Artifact.open(sample()).artifact_id
    for given, message in (("nothing", "no such file, and not an artifact id"), (known, "does not exist")):
        code, _, err = run(capsys, "inspect", given, "--registry", str(tmp_path / "none"))
        assert code == 1
        assert message in err
