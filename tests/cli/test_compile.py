"""``esper compile`` with GPU binaries: made without a GPU, the same bytes in every process, used only when trusted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from esper.artifacts import Artifact
from esper.artifacts.signing import SigningKey
from esper.cli.main import main
from esper.ops import binaries, cubin
from esper.services.tezzeret.forge import build

ARGUMENTS = ["bottleneck", "--d-in", "64", "--d-out", "48", "--rank", "4", "--param", "activation=gelu"]

#: Everything here would change what Triton does, if it reached it.
HOSTILE = {
    "TRITON_INTERPRET": "1",
    "TRITON_KERNEL_OVERRIDE": "1",
    "TRITON_PTXAS_PATH": "/nonexistent/ptxas",
    "DISABLE_PTXAS_OPT": "1",
    "PTXAS_OPTIONS": "--opt-level 0",
    "TRITON_DEFAULT_FP_FUSION": "0",
    "PYTHONHASHSEED": "7",
}


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "forge.key"
    SigningKey.generate().save(path)
    return path


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, key: Path) -> Path:
    """What the command wrote, in a process of its own, elsewhere, under an environment that means ill."""
    folder = tmp_path_factory.mktemp("compiled")
    command = [sys.executable, "-m", "esper.cli.main", "compile", *ARGUMENTS, "--dtype", "bf16"]
    command += ["--arch", "sm_90", "--arch", "sm_80", "--arch", "sm_90", "--sign-key", str(key), "-o", "k"]
    environment = {**os.environ, **HOSTILE, "TRITON_CACHE_DIR": str(folder / "cache")}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == Artifact.open(folder / "k").artifact_id
    assert not (folder / "cache").exists()
    return folder / "k"


@pytest.mark.aot
def test_binaries_are_recorded_with_what_they_take(compiled, key):
    artifact = Artifact.open(compiled, trusted_keys=[SigningKey.load(key).public])
    assert artifact.trusted
    assert (artifact.manifest.target, artifact.manifest.pipeline) == ("sm_80_sm_90", "standard")
    assert str(artifact.tensors()["down.weight"].dtype) == "torch.bfloat16"
    entries = [binary.entry for binary in artifact.binaries]
    assert {(entry.arch, entry.direction) for entry in entries} == {
        (arch, direction) for arch in ("sm_80", "sm_90") for direction in ("forward", "backward")
    }
    kernels = binaries.package_kernels()
    for binary in artifact.binaries:
        entry = binary.entry
        assert entry.dtype == "bf16"
        assert 0 < entry.registers <= 255
        assert entry.tools.keys() == {"triton", "ptxas"}
        assert len(binary.data) == entry.size
        # What is declared is what the machine code says, and what this version's kernel is.
        assert f"sm_{cubin.architecture(binary.data)}" == entry.arch
        assert cubin.hidden_pointers(binary.data, entry.symbol, [kind for _, kind in entry.signature]) >= 0
        assert entry.signature in kernels[entry.kernel].signatures
        assert b"/" + Path(__file__).parts[1].encode() + b"/" not in bytes(binary.data)


@pytest.mark.aot
def test_the_same_bytes_in_another_process(compiled, key):
    here = build(
        "bottleneck",
        d_in=64,
        d_out=48,
        rank=4,
        activation="gelu",
        dtype="bfloat16",
        pipeline="standard",
        architectures=["sm_80", "sm_90"],
        sign_with=SigningKey.load(key),
    )
    assert here == compiled.read_bytes()


@pytest.mark.aot
def test_without_trust_binaries_are_not_handed_out(compiled, monkeypatch):
    monkeypatch.delenv("ESPER_TRUSTED_KEYS", raising=False)
    artifact = Artifact.open(compiled)
    assert artifact.binaries == ()
    assert artifact.notes
    assert artifact.tensors()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm_90", "--pipeline", "fast"], "pipeline 'fast' builds no GPU binaries"),
        (["--arch", "90"], "unknown architecture '90'; known: sm_80, "),
        (["--arch", "sm_93"], "unknown architecture 'sm_93'"),
        (["--arch", "sm_90", "--dtype", "fp64"], "there are no GPU kernels for float64"),
        (["--arch", "sm_90", "--dtype", "bf16", "--dtype", "double"], "there are no GPU kernels for float64"),
        (["--dtype", "int8"], "dtype 'int8' cannot be stored"),
        (["--arch", "sm_90", "--sign-key", "missing.key"], "missing.key"),
        (["--arch", "sm_90", "--d-in", "0"], "d_in must be an integer"),
    ],
)
def test_errors_come_before_the_compiler_is_started(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.setattr("esper.ops.toolchain.subprocess.run", None)
    code = main(["compile", *ARGUMENTS, *arguments, "-o", str(tmp_path / "k")])
    out, err = capsys.readouterr()
    assert (code, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_tuning_without_a_gpu_says_what_to_use_instead(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("esper.ops.native.driver", lambda: None)
    monkeypatch.setattr("esper.ops.native.driver_reason", lambda: "no driver here")
    code = main(["compile", *ARGUMENTS, "--pipeline", "aggressive", "-o", str(tmp_path / "k")])
    err = capsys.readouterr().err
    assert code == 1
    assert "'aggressive': needs a GPU" in err
    assert "(no driver here)" in err
    assert "pipeline 'standard'" in err


def graph(*nodes: dict[str, object], **changes: object) -> dict[str, object]:
    ends = ({"name": "x", "op": "input"}, {"name": "y", "op": "output", "inputs": ["a"]})
    return {"schema": 1, "name": "hostile", "nodes": [*ends, *nodes], **changes}


A = {"name": "a", "op": "linear", "inputs": ["x"], "out": "d_out"}


@pytest.mark.parametrize(
    ("blueprint", "message"),
    [
        (graph({**A, "inputs": ["a"]}), "node 'a': the nodes a wait for each other in a cycle"),
        (graph({**A, "inputs": ["b"]}, {**A, "name": "b", "inputs": ["a"]}), "wait for each other in a cycle"),
        (graph({**A, "op": "exec"}), "node 'a': unknown op 'exec'"),
        (graph({**A, "out": "9**9**9"}), "node 'a': "),
        (graph({**A, "out": "__import__('os')"}), "node 'a': "),
        (graph({**A, "out": 10**30}), "node 'a': "),
        (graph({**A, "out": "d_out * 1000000000000"}), "node 'a': "),
        (graph({**A, "out": "d_in - d_in"}), "node 'a': "),
        (graph({**A, "out": "d_out + 1"}), "node 'y': gives 65 features, but d_out is 64"),
        (
            graph(
                {**A, "inputs": ["b"]},
                {**A, "name": "b", "out": 1 << 20, "inputs": ["c"]},
                {**A, "name": "c", "out": 999},
            ),
            "node 'b': weights add up to",
        ),
        (graph(A, {**A, "name": "b"}), "node 'b': its result does not reach the output"),
        (
            graph({"name": "a", "op": "add", "inputs": ["x", "b"]}, {**A, "name": "b", "out": 3}),
            "node 'a': add needs equal",
        ),
        (graph({**A, "name": "a\x1b[2J"}), "node number 2: a node's name must be an identifier"),
    ],
)
def test_hostile_blueprints_name_the_node_at_fault(capsys, monkeypatch, tmp_path, blueprint, message):
    monkeypatch.setattr("esper.ops.toolchain.subprocess.run", None)
    (tmp_path / "hostile.json").write_text(json.dumps(blueprint))
    arguments = ["compile", str(tmp_path / "hostile.json"), "--d-in", "64", "--d-out", "64", "--arch", "sm_90"]
    code = main([*arguments, "-o", str(tmp_path / "k")])
    out, err = capsys.readouterr()
    assert (code, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1
    assert err.strip().isprintable()
    assert not (tmp_path / "k").exists()


@pytest.mark.parametrize(
    ("short", "stored"),
    [("bf16", "bfloat16"), ("fp16", "float16"), ("half", "float16"), ("fp32", "float32"), ("fp64", "float64")],
)
def test_short_names_of_dtypes(tmp_path, short, stored):
    assert main(["compile", *ARGUMENTS, "--dtype", short, "-o", str(tmp_path / "k")]) == 0
    artifact = Artifact.open(tmp_path / "k")
    assert str(artifact.tensors()["down.weight"].dtype) == f"torch.{stored}"
    assert (artifact.manifest.target, artifact.manifest.pipeline) == ("any", "fast")


def test_a_strict_policy_of_loading_does_not_keep_anyone_from_compiling(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ESPER_TRUST_POLICY", "strict")
    path = tmp_path / "k.safetensors"
    assert main(["compile", "lowrank", "--d-in", "4", "--d-out", "4", "--rank", "2", "-o", str(path)]) == 0
    assert capsys.readouterr().out.strip() == Artifact.open(path, policy="standard").artifact_id
