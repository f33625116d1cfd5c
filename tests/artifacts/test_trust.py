"""GPU binaries and signatures in artifacts: what each policy does with them."""

from __future__ import annotations

import base64
import hashlib
import json
import sys

import pytest

pytest.importorskip("cryptography")
pytest.importorskip("safetensors")

import safetensors.torch
import torch

from esper.artifacts import Artifact, FileRegistry, KeyRing, pack
from esper.artifacts.artifact import read_manifest
from esper.artifacts.signing import SignatureState, TrustError, sign, verify
from esper.blueprints import get, initialise
from esper.contracts.errors import ArtifactError
from esper.contracts.ids import parse_artifact_id
from esper.contracts.manifest import METADATA_KEY
from esper.contracts.signatures import SIGNATURES_KEY
from tests.artifacts.samples import (
    ALICE,
    MALLORY,
    binary,
    join,
    sample,
    sample_binaries,
    sample_with_binaries,
    split,
    with_manifest,
)

PLAIN = sample()
UNSIGNED = sample_with_binaries()
SIGNED = sample_with_binaries(ALICE)
OURS = [ALICE.public]


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("ESPER_TRUSTED_KEYS", raising=False)
    monkeypatch.delenv("ESPER_TRUST_POLICY", raising=False)


def bad(data: bytes, message: str, **options: object) -> None:
    with pytest.raises(ArtifactError, match=message):
        Artifact.open(data, **{"trusted_keys": OURS, **options})


def with_signatures(data: bytes, change) -> bytes:
    """The file with its list of signatures replaced by what ``change`` makes of it."""
    header, body = split(data)
    signatures = change(json.loads(header["__metadata__"][SIGNATURES_KEY]))
    header["__metadata__"][SIGNATURES_KEY] = signatures if isinstance(signatures, str) else json.dumps(signatures)
    return join(header, body)


# -- binaries


def test_binaries_come_back_under_a_trusted_signature():
    artifact = Artifact.open(SIGNED, trusted_keys=OURS)
    given = sample_binaries()
    assert artifact.trusted
    assert artifact.notes == ()
    assert {found.name: (found.entry, bytes(found.data)) for found in artifact.binaries} == given
    assert [check.state for check in artifact.signatures] == [SignatureState.TRUSTED]
    assert all(found.data.readonly for found in artifact.binaries)
    assert parse_artifact_id(artifact.artifact_id)[1:3] == ("sm_80_sm_90", "standard")


def test_without_one_they_are_ignored_with_the_reason():
    cases = (
        (UNSIGNED, None, "it is not signed"),
        (UNSIGNED, OURS, "it is not signed"),
        (SIGNED, None, f"signed by {ALICE.key_id}, which is not trusted here"),
        (SIGNED, [MALLORY.public], f"signed by {ALICE.key_id}, which is not trusted here"),
        (sample_with_binaries(MALLORY), OURS, f"signed by {MALLORY.key_id}, which is not trusted here"),
    )
    for data, keys, reason in cases:
        artifact = Artifact.open(data, trusted_keys=keys)
        assert artifact.binaries == ()
        assert not artifact.trusted
        assert artifact.notes == artifact.manifest.notes
        assert "3 GPU binaries are ignored" in artifact.notes[0]
        assert reason in artifact.notes[0]
        assert artifact.tensors().keys() == Artifact.open(PLAIN).tensors().keys()
        for name, tensor in Artifact.open(PLAIN).tensors().items():
            assert torch.equal(artifact.tensors()[name], tensor)


def test_weights_need_no_signature():
    assert Artifact.open(PLAIN, trusted_keys=OURS).notes == ()
    assert Artifact.open(sample_signed(), trusted_keys=()).notes == ()


def sample_signed() -> bytes:
    return sign(PLAIN, ALICE)


def test_same_inputs_same_bytes_signed_or_not():
    assert sample_with_binaries() == UNSIGNED
    assert sample_with_binaries(ALICE) == SIGNED
    assert sign(UNSIGNED, ALICE) == SIGNED
    assert sample() == PLAIN


def test_the_safetensors_library_reads_it():
    read = safetensors.torch.load(SIGNED)
    assert bytes(read["gpu/sm_90/bf16/forward"].numpy()) == b"\x7fELF90 forward"


@pytest.mark.parametrize("keys", [(), OURS])
def test_altered_binaries_are_refused_whoever_is_trusted(keys):
    data = bytearray(SIGNED)
    data[-1] ^= 1
    bad(bytes(data), r"binary 'gpu/sm_90/bf16/forward': SHA-256 is .* altered", trusted_keys=keys)


def test_what_a_signature_vouches_for_is_hashed_every_time():
    """Who can write to a disk cache can write the file's hash beside it; the signed manifest's hashes still hold."""
    data = bytearray(SIGNED)
    data[-1] ^= 1
    altered = hashlib.sha256(data).hexdigest()
    with pytest.raises(ArtifactError, match=r"SHA-256 is .* altered"):
        Artifact.adopt(data, sha256=altered, trusted_keys=OURS, seen=True)
    whole = hashlib.sha256(SIGNED).hexdigest()
    assert Artifact.adopt(bytearray(SIGNED), sha256=whole, trusted_keys=OURS, seen=True).trusted


def test_header_and_manifest_agree_about_binaries():
    name = "gpu/sm_90/bf16/forward"
    bad(with_manifest(UNSIGNED, lambda m: m["binaries"][name].update(size=13)), "the manifest 13 bytes")
    bad(with_manifest(UNSIGNED, lambda m: m["binaries"].pop(name)), "in the file but not in the manifest")
    bad(with_manifest(UNSIGNED, lambda m: m["binaries"][name].update(arch="sm_80")), "describes gpu/sm_80")
    bad(with_manifest(UNSIGNED, lambda m: m.update(target="sm_90")), "target is 'sm_90', its binaries say")
    header, body = split(UNSIGNED)
    header[name]["shape"] = [7, 2]
    bad(join(header, body), r"the header says uint8 \[7, 2\]")
    header[name]["dtype"], header[name]["shape"] = "F16", [7]
    bad(join(header, body), "dtype 'F16' is not one of U8")
    header, body = split(PLAIN)
    header["up.weight"].update(dtype="U8", shape=[32])
    bad(join(header, body), "dtype 'U8' is not one of F64")


def test_weights_cannot_pose_as_binaries_nor_binaries_as_weights():
    def moved(manifest):
        entry = manifest["binaries"].pop("gpu/sm_90/bf16/forward")
        entry = {"shape": [entry["size"]], "dtype": "float32", "sha256": entry["sha256"]}
        manifest["tensors"]["gpu/sm_90/bf16/forward"] = entry

    bad(with_manifest(UNSIGNED, moved), "the header says uint8")

    def doubled(manifest):
        manifest["tensors"]["gpu/sm_90/bf16/forward"] = manifest["tensors"]["up.weight"]

    bad(with_manifest(UNSIGNED, doubled), "the header says uint8")


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("gpu/sm_90/bf16/backward", binary(b"x"), "describes gpu/sm_90/bf16/forward"),
        ("gpu/sm_90/bf16/forward", binary(b"x", size=2), "the manifest 2 bytes"),
        ("gpu/sm_90/bf16/forward", binary(b"x", sha256="0" * 64), "SHA-256"),
        ("gpu/sm_90/bf16/forward", binary(b""), "every size of a shape"),
        ("cubin", binary(b"x"), "dtype uint8 cannot be stored"),
        ("gpu/sm_90/bf16/forward", binary(b"x", num_warps=5), "num_warps is 5"),
    ],
)
def test_pack_refuses_what_open_would(name, entry, message):
    blueprint = get("lowrank", rank=2)
    with pytest.raises(ArtifactError, match=message):
        pack(blueprint, initialise(blueprint, 4, 4, 0), d_in=4, d_out=4, seed=0, binaries={name: entry})


def test_the_manifest_alone_shows_binaries(tmp_path):
    (tmp_path / "k").write_bytes(SIGNED)
    manifest, size = read_manifest(tmp_path / "k")
    assert size == len(SIGNED)
    assert manifest.binaries == {name: entry for name, (entry, _) in sample_binaries().items()}


# -- signatures


def test_signing_changes_the_id_and_nothing_else():
    signed = Artifact.open(sample_signed(), trusted_keys=OURS)
    plain = Artifact.open(PLAIN)
    assert signed.trusted
    assert signed.artifact_id != plain.artifact_id
    assert signed.manifest == plain.manifest
    assert split(sample_signed())[1] == split(PLAIN)[1]


def test_several_signatures():
    both = sign(SIGNED, MALLORY)
    assert sign(sign(UNSIGNED, MALLORY), ALICE) == both
    assert sign(both, ALICE) == both
    states = {check.key_id: check.state for check in verify(both, OURS)}
    assert states == {ALICE.key_id: SignatureState.TRUSTED, MALLORY.key_id: SignatureState.UNKNOWN_KEY}
    for keys in ([ALICE.public], [MALLORY.public], [MALLORY.public, ALICE.public]):
        assert len(Artifact.open(both, trusted_keys=keys).binaries) == 3


def test_any_change_of_the_manifest_breaks_the_signature():
    broken = f"the signature by the trusted key {ALICE.key_id} does not verify"
    for change in ({"seed": 1}, {"provenance": {"by": "me"}}, {"pipeline": "fast"}):
        altered = with_manifest(SIGNED, lambda m, change=change: m.update(change))
        bad(altered, broken)
        bad(altered, broken, policy="strict")
        # To somebody who does not know the key it is a file like any other: sound, and without binaries.
        assert Artifact.open(altered, trusted_keys=[MALLORY.public]).binaries == ()


def test_a_binary_swapped_for_another_with_hashes_made_to_agree():
    evil = b"\x7fELFevilevile"
    header, body = split(SIGNED)
    span = header["gpu/sm_90/bf16/forward"]["data_offsets"]
    assert span[1] - span[0] == len(evil) + 1
    altered = join(header, body[: span[0]] + evil + b"!" + body[span[1] :])

    def agree(manifest):
        manifest["binaries"]["gpu/sm_90/bf16/forward"]["sha256"] = hashlib.sha256(evil + b"!").hexdigest()

    bad(with_manifest(altered, agree), "does not verify")


def test_a_signature_of_another_artifact_does_not_pass():
    header, body = split(UNSIGNED)
    header["__metadata__"][SIGNATURES_KEY] = split(sample_signed())[0]["__metadata__"][SIGNATURES_KEY]
    bad(join(header, body), "does not verify")


def test_a_signature_is_of_the_manifest_in_this_format_only():
    text = split(UNSIGNED)[0]["__metadata__"][METADATA_KEY].encode()
    for message in (text, b"esper-artifact-v2\0" + text, hashlib.sha256(text).digest()):
        forged = with_signatures(
            SIGNED,
            lambda s, message=message: [{**s[0], "signature": base64.b64encode(ALICE.sign(message)).decode()}],
        )
        bad(forged, "does not verify")


def test_a_stranger_cannot_sign_under_our_id():
    text = split(UNSIGNED)[0]["__metadata__"][METADATA_KEY].encode()
    signature = base64.b64encode(MALLORY.sign(b"esper-artifact-v1\0" + text)).decode()
    bad(with_signatures(SIGNED, lambda s: [{**s[0], "signature": signature}]), "does not verify")


def test_a_bad_signature_counts_beside_a_good_one():
    both = sign(SIGNED, MALLORY)
    index = 0 if ALICE.key_id < MALLORY.key_id else 1

    def spoil(signatures):
        signatures[index]["signature"] = base64.b64encode(bytes(64)).decode()
        return signatures

    spoiled = with_signatures(both, spoil)
    bad(spoiled, "does not verify", trusted_keys=[ALICE.public, MALLORY.public])
    assert len(Artifact.open(spoiled, trusted_keys=[MALLORY.public]).binaries) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: [], "1 to 16 signatures"),
        (lambda s: s[0], "1 to 16 signatures"),
        (lambda s: "", "not valid JSON"),
        (lambda s: "[" * 100, "not valid JSON|nested"),
        (lambda s: " " * 10_000, "more than the limit"),
        (lambda s: [*s, *s], "two signatures by one key"),
        (lambda s: [{**s[0], "key_id": f"{i:016x}"} for i in range(17)], "1 to 16 signatures"),
        (lambda s: ["x"], "exactly key_id"),
        (lambda s: [{**s[0], "more": 1}], "exactly key_id"),
        (lambda s: [{**s[0], "key_id": "xyz"}], "not 16 hex digits"),
        (lambda s: [{**s[0], "key_id": 1}], "not 16 hex digits"),
        (lambda s: [{**s[0], "algorithm": "none"}], "algorithm 'none' is not known"),
        (lambda s: [{**s[0], "algorithm": ["ed25519"]}], "is not known"),
        (lambda s: [{**s[0], "signature": None}], "not 64 bytes in base64"),
        (lambda s: [{**s[0], "signature": s[0]["signature"][:-4]}], "not 64 bytes in base64"),
        (lambda s: [{**s[0], "signature": s[0]["signature"][:-3] + "Z=="}], "not 64 bytes in base64"),
        (lambda s: [{**s[0], "signature": "é" * 88}], "not 64 bytes in base64"),
    ],
)
def test_malformed_signatures_are_refused_whoever_is_trusted(change, message):
    bad(with_signatures(SIGNED, change), message)
    bad(with_signatures(SIGNED, change), message, trusted_keys=())


def test_sign_refuses_what_is_no_artifact():
    data = bytearray(PLAIN)
    data[-1] ^= 1
    for broken in (b"", PLAIN[:100], bytes(data)):
        with pytest.raises(ArtifactError):
            sign(broken, ALICE)


# -- policies


@pytest.mark.parametrize("data", [PLAIN, UNSIGNED])
def test_strict_refuses_what_is_not_signed(data):
    bad(data, "refused by policy strict: it is not signed", policy="strict")


def test_strict_refuses_what_strangers_signed():
    bad(SIGNED, f"policy strict: it is signed by {ALICE.key_id}, which", policy="strict", trusted_keys=[MALLORY.public])
    assert len(Artifact.open(SIGNED, trusted_keys=OURS, policy="strict").binaries) == 3
    assert Artifact.open(sample_signed(), trusted_keys=OURS, policy="strict").trusted


def test_the_environment_says_whom_to_trust_and_how(monkeypatch, tmp_path):
    ALICE.public.save(tmp_path / "a.pub")
    monkeypatch.setenv("ESPER_TRUSTED_KEYS", str(tmp_path / "a.pub"))
    assert len(Artifact.open(SIGNED).binaries) == 3
    assert Artifact.open(SIGNED, trusted_keys=()).binaries == ()
    monkeypatch.setenv("ESPER_TRUST_POLICY", "strict")
    assert len(Artifact.adopt(bytearray(SIGNED)).binaries) == 3
    with pytest.raises(ArtifactError, match="policy strict"):
        Artifact.adopt(bytearray(PLAIN))
    assert not Artifact.open(PLAIN, policy="standard").trusted


def test_a_registry_keeps_what_is_sound_whatever_the_policy(monkeypatch, tmp_path):
    monkeypatch.setenv("ESPER_TRUST_POLICY", "strict")
    assert FileRegistry(tmp_path).publish_sync(sample()) == Artifact.open(PLAIN, policy="standard").artifact_id


def test_wrong_settings_are_no_fault_of_the_artifact(monkeypatch, tmp_path):
    with pytest.raises(TrustError, match="policy is 'paranoid'; possible: standard, strict"):
        Artifact.open(PLAIN, policy="paranoid")
    monkeypatch.setenv("ESPER_TRUST_POLICY", "Strict")
    with pytest.raises(TrustError, match="ESPER_TRUST_POLICY is 'Strict'"):
        Artifact.open(PLAIN)
    monkeypatch.setenv("ESPER_TRUST_POLICY", "")
    monkeypatch.setenv("ESPER_TRUSTED_KEYS", str(tmp_path / "gone"))
    assert Artifact.open(PLAIN).notes == ()  # no signature, nothing to check it with
    with pytest.raises(TrustError, match="gone: cannot be read"):
        Artifact.open(SIGNED)


def test_without_the_library_it_is_as_if_unsigned(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    artifact = Artifact.open(SIGNED, trusted_keys=OURS)
    assert artifact.binaries == ()
    assert "pip install cryptography" in artifact.notes[0]
    assert artifact.signatures[0].state is SignatureState.UNCHECKED
    bad(SIGNED, "policy strict: its signature .* is not checked", policy="strict")


def test_a_ring_may_be_given(tmp_path):
    assert len(Artifact.open(SIGNED, KeyRing(OURS)).binaries) == 3
    assert len(Artifact.open(SIGNED, [ALICE.public.to_text()]).binaries) == 3
