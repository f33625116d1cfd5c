"""``esper keygen``, ``esper sign``, ``esper verify``, and what ``esper inspect`` says about binaries and signatures."""

from __future__ import annotations

import json
import stat
import subprocess
import sys

import pytest

pytest.importorskip("cryptography")

from esper.artifacts import Artifact, FileRegistry, KeyRing, SigningKey
from esper.cli.main import main
from tests.artifacts.http_server import running_server
from tests.artifacts.samples import ALICE, MALLORY, sample, sample_with_binaries, with_manifest


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("ESPER_TRUSTED_KEYS", "ESPER_TRUST_POLICY", "ESPER_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def files(tmp_path):
    """Artifacts and keys in the current folder."""
    ALICE.save(tmp_path / "alice.key")
    ALICE.public.save(tmp_path / "alice.pub")
    MALLORY.public.save(tmp_path / "mallory.pub")
    (tmp_path / "plain").write_bytes(sample())
    (tmp_path / "unsigned").write_bytes(sample_with_binaries())
    (tmp_path / "signed").write_bytes(sample_with_binaries(ALICE))
    return tmp_path


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main([*arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_keygen(capsys, tmp_path):
    code, out, _ = run(capsys, "keygen", "-o", "mine")
    assert code == 0
    key = SigningKey.load("mine.key")
    assert stat.S_IMODE((tmp_path / "mine.key").stat().st_mode) == 0o600
    assert [*KeyRing.load("mine.pub")] == [key.public]
    assert key.key_id in out
    assert f"ESPER_TRUSTED_KEYS={key.public.to_text()}" in out
    assert "PRIVATE" not in out


@pytest.mark.parametrize("present", ["mine.key", "mine.pub"])
def test_keygen_overwrites_nothing_and_leaves_no_half_pair(capsys, tmp_path, present):
    (tmp_path / present).write_text("precious")
    code, out, err = run(capsys, "keygen", "-o", "mine")
    assert (code, out) == (1, "")
    assert f"{present} exists" in err
    assert [path.name for path in tmp_path.iterdir()] == [present]
    assert (tmp_path / present).read_text() == "precious"


def test_sign_a_file(capsys, files):
    code, out, _ = run(capsys, "sign", "unsigned", "--key", "alice.key", "-o", "new")
    assert code == 0
    assert (files / "new").read_bytes() == (files / "signed").read_bytes()
    assert out == Artifact.open("new").artifact_id + "\n"


def test_sign_in_a_registry(capsys, files):
    registry = FileRegistry(files / "registry")
    artifact_id = registry.publish_sync(sample_with_binaries())
    code, out, _ = run(capsys, "sign", artifact_id, "--key", "alice.key", "--registry", registry.url)
    signed = out.strip()
    assert code == 0
    assert signed != artifact_id
    assert len(Artifact.open(registry.blob_path(signed), [ALICE.public]).binaries) == 3
    assert run(capsys, "verify", signed, "--registry", registry.url, "--trusted-keys", "alice.pub", "--strict")[0] == 0
    assert run(capsys, "verify", artifact_id, "--registry", registry.url, "--strict")[0] == 1


def test_over_http(capsys, files):
    with running_server() as server:
        artifact_id = server.add(sample_with_binaries())
        code, out, _ = run(capsys, "sign", artifact_id, "--key", "alice.key", "--registry", server.url)
        signed = out.strip()
        assert code == 0
        code, out, _ = run(
            capsys, "verify", signed, "--registry", server.url, "--trusted-keys", "alice.pub", "--strict"
        )
        assert code == 0
        assert f"id: {signed}" in out
        code, out, _ = run(capsys, "inspect", signed, "--registry", server.url)
        assert code == 0
        assert f"{ALICE.key_id} unknown key" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plain", "--key", "alice.key"], "where to?"),
        (["plain", "--key", "alice.pub", "-o", "x"], "alice.pub: not a private key"),
        (["plain", "--key", "none", "-o", "x"], "none: cannot be read"),
        (["none", "--key", "alice.key", "-o", "x"], "none: no such file, and not an artifact id"),
        (["alice.pub", "--key", "alice.key", "-o", "x"], "not an artifact|more than the limit"),
        (["plain", "--key", "alice.key", "-o", "none/x"], "cannot write none/x"),
    ],
)
def test_sign_errors_are_one_line(capsys, files, arguments, message):
    code, out, err = run(capsys, "sign", *arguments)
    assert (code, out) == (1, "")
    assert any(part in err for part in message.split("|"))
    assert err.count("\n") == 1
    assert not (files / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "findings"),
    [
        (["plain"], 0, ["note  signature: none"]),
        (["plain", "--strict"], 1, ["FAIL  policy strict refuses it: it is not signed"]),
        (["unsigned"], 0, ["note  its 3 GPU binaries are not used here", "hashes: 3 tensors, 3 GPU binaries"]),
        (["signed", "--trusted-keys", "alice.pub"], 0, [f"ok    signature: by {ALICE.key_id}, a trusted key"]),
        (["signed", "--trusted-keys", "alice.pub", "--strict"], 0, ["ok    signature"]),
        (["signed", "--trusted-keys", "mallory.pub"], 0, ["note  signature: it is signed by", "not used here"]),
        (["signed", "--trusted-keys", "mallory.pub", "--strict"], 1, ["FAIL  policy strict refuses it"]),
        (["signed", "--trusted-keys", f"mallory.pub:{ALICE.public.to_text()}", "--strict"], 0, ["ok    signature"]),
        (["altered", "--trusted-keys", "alice.pub"], 1, ["FAIL  the signature by the trusted key", "ok    hashes"]),
        (["broken"], 1, ["FAIL", "SHA-256"]),
        (["alice.pub"], 1, ["FAIL"]),
    ],
)
def test_verify(capsys, files, arguments, code, findings):
    (files / "altered").write_bytes(with_manifest(sample_with_binaries(ALICE), lambda m: m.update(seed=5)))
    (files / "broken").write_bytes(sample()[:-1] + b"\x01")
    status, out, err = run(capsys, "verify", *arguments)
    assert (status, err) == (code, "")
    for finding in findings:
        assert finding.replace("FAIL  the", "FAIL  signature: the") in out
    assert all(line[:6] in ("ok    ", "note  ", "FAIL  ") for line in out.splitlines())


def test_verify_finds_another_artifact_under_an_id(capsys, tmp_path):
    registry = FileRegistry(tmp_path / "registry")
    artifact_id = registry.publish_sync(sample())
    registry.blob_path(artifact_id).write_bytes(sample(seed=1))
    code, out, _ = run(capsys, "verify", artifact_id, "--registry", registry.url)
    assert code == 1
    assert f", not {artifact_id}" in out


def test_verify_without_knowing_whom_to_trust(capsys, files, monkeypatch):
    code, out, err = run(capsys, "verify", "signed", "--trusted-keys", "none")
    assert (code, out) == (1, "")
    assert "none: cannot be read" in err
    monkeypatch.setenv("ESPER_TRUST_POLICY", "strict")
    assert run(capsys, "verify", "signed")[0] == 1
    monkeypatch.setenv("ESPER_TRUSTED_KEYS", "alice.pub")
    assert run(capsys, "verify", "signed")[0] == 0


def test_inspect_shows_binaries_and_signatures(capsys, files):
    code, out, _ = run(capsys, "inspect", "signed")
    assert code == 0
    assert f"{ALICE.key_id} unknown key" in out
    row = next(line for line in out.splitlines() if line.startswith("gpu/sm_90/bf16/forward "))
    assert row.split() == ["gpu/sm_90/bf16/forward", "bank_kernel", "14", "96", "0", "4096", "4"]
    code, out, _ = run(capsys, "inspect", "signed", "--json", "--trusted-keys", "alice.pub", "--verify")
    facts = json.loads(out)
    assert facts["signatures"] == {ALICE.key_id: "trusted"}
    assert facts["binaries"]["gpu/sm_80/bf16/forward"]["registers"] == 96
    assert facts["target"] == "sm_80_sm_90"


def test_inspect_shows_a_bad_signature_and_verify_refuses_it(capsys, files):
    (files / "altered").write_bytes(with_manifest(sample_with_binaries(ALICE), lambda m: m.update(seed=5)))
    code, out, _ = run(capsys, "inspect", "altered", "--trusted-keys", "alice.pub")
    assert code == 0
    assert f"{ALICE.key_id} bad" in out
    code, _, err = run(capsys, "inspect", "altered", "--trusted-keys", "alice.pub", "--verify")
    assert code == 1
    assert "does not verify" in err


def test_inspect_loads_no_torch(files):
    script = "import sys; from esper.cli.main import main; main(['inspect', 'signed']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
