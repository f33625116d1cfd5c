"""Keys and key rings: files, texts, and what is refused."""

from __future__ import annotations

import copy
import os
import pickle
import stat
import sys

import pytest

pytest.importorskip("cryptography")

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from esper.artifacts import KeyRing, PublicKey, SigningKey
from esper.artifacts.signing import SigningUnavailableError, TrustError
from tests.artifacts.samples import ALICE, MALLORY


def test_a_signature_is_of_one_key_and_one_message():
    signature = ALICE.sign(b"message")
    assert ALICE.public.verify(b"message", signature)
    assert not ALICE.public.verify(b"massage", signature)
    assert not MALLORY.public.verify(b"message", signature)
    for broken in (b"", signature[:-1], signature + b"\0", bytes(64)):
        assert not ALICE.public.verify(b"message", broken)
    assert ALICE.sign(b"message") == signature


def test_generated_keys_differ():
    assert SigningKey.generate().public != SigningKey.generate().public


def test_files(tmp_path):
    key = SigningKey.generate()
    previous = os.umask(0)
    try:
        key.save(tmp_path / "k.key")
    finally:
        os.umask(previous)
    key.public.save(tmp_path / "k.pub")
    assert stat.S_IMODE((tmp_path / "k.key").stat().st_mode) == 0o600
    loaded = SigningKey.load(tmp_path / "k.key")
    assert loaded.public == key.public
    assert loaded.sign(b"m") == key.sign(b"m")
    assert list(KeyRing.load(tmp_path / "k.pub")) == [key.public]
    for path, save in ((tmp_path / "k.key", key.save), (tmp_path / "k.pub", key.public.save)):
        before = path.read_bytes()
        with pytest.raises(FileExistsError, match="never overwritten"):
            save(path)
        assert path.read_bytes() == before
    with pytest.raises(OSError, match="cannot write"):
        key.save(tmp_path / "none" / "k.key")


def test_the_files_are_those_of_other_tools(tmp_path):
    ALICE.save(tmp_path / "k.key")
    private = serialization.load_pem_private_key((tmp_path / "k.key").read_bytes(), None)
    assert isinstance(private, ed25519.Ed25519PrivateKey)
    pem = private.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert pem.decode() == ALICE.public.to_pem()


def test_a_private_key_that_others_may_read_is_warned_about(tmp_path):
    ALICE.save(tmp_path / "k.key")
    (tmp_path / "k.key").chmod(0o640)
    with pytest.warns(RuntimeWarning, match="others may read"):
        SigningKey.load(tmp_path / "k.key")


def pem(key, encryption=None):
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        encryption or serialization.NoEncryption(),
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a private key"),
        (ALICE.public.to_pem().encode(), "not a private key"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "not a readable private key"),
        (pem(ec.generate_private_key(ec.SECP256R1())), "not an Ed25519 key"),
        (
            pem(ed25519.Ed25519PrivateKey.generate(), serialization.BestAvailableEncryption(b"x")),
            "under a password",
        ),
        (bytes(1 << 17), "not a file of keys"),
    ],
)
def test_files_that_are_no_private_keys(tmp_path, data, message):
    path = tmp_path / "k.key"
    path.write_bytes(data)
    path.chmod(0o600)
    with pytest.raises(TrustError, match=message):
        SigningKey.load(path)
    with pytest.raises(TrustError, match="cannot be read"):
        SigningKey.load(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TrustError, match="not a regular file"):
        SigningKey.load(tmp_path / "pipe")


def test_a_private_key_does_not_leak_by_accident():
    secret = bytes(range(32))
    assert secret.hex() not in repr(ALICE)
    for leak in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="not pickled"):
            leak(ALICE)


def test_text_of_public_keys():
    assert PublicKey.from_text(ALICE.public.to_text()) == ALICE.public
    assert ALICE.public.to_text() in repr(ALICE.public)
    for text in ("", "ed25519:", "ed25519:AAAA", ALICE.public.to_text()[:-1], ALICE.public.to_text()[8:], "rsa:AAAA"):
        with pytest.raises(TrustError, match="is not a public key"):
            PublicKey.from_text(text)
    with pytest.raises(TrustError, match="32 bytes"):
        PublicKey(b"short")
    with pytest.raises(TrustError, match="32 bytes, not 5"):
        SigningKey.from_bytes(b"short")


# -- rings


@pytest.fixture
def keys():
    return [SigningKey.from_bytes(bytes([i]) * 32).public for i in range(4)]


def test_a_ring_of_files_folders_and_texts(tmp_path, keys, monkeypatch):
    (tmp_path / "two.pub").write_text(f"# ours\n{keys[0].to_pem()}\n{keys[1].to_text()}  # the other's\n")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "c.pem").write_text(keys[2].to_pem())
    (folder / "mine.key").write_text("-----BEGIN PRIVATE KEY-----")  # not looked at
    spec = f"{tmp_path / 'two.pub'}:{keys[3].to_text()}::{folder}:"
    assert set(KeyRing.load(spec)) == set(keys)
    monkeypatch.setenv("ESPER_TRUSTED_KEYS", spec)
    ring = KeyRing.load()
    assert set(ring) == set(keys)
    assert len(ring) == 4
    assert ring.get(keys[3].key_id) == keys[3]
    assert ring.get("0" * 16) is None
    assert keys[0] in ring
    assert MALLORY.public not in ring
    for given in (ring, keys, [*map(PublicKey.to_text, keys)], spec, None, [folder, tmp_path / "two.pub", keys[3]]):
        assert set(KeyRing.of(given)) == set(keys)
    assert set(KeyRing.of(folder)) == {keys[2]}


def test_nobody_is_trusted_unless_named(tmp_path, monkeypatch):
    monkeypatch.delenv("ESPER_TRUSTED_KEYS", raising=False)
    assert len(KeyRing.load()) == 0
    monkeypatch.setenv("ESPER_TRUSTED_KEYS", "")
    assert len(KeyRing.of(None)) == 0
    assert len(KeyRing.load(tmp_path)) == 0  # an empty folder
    assert "nobody" in repr(KeyRing())


def test_one_key_named_twice_is_one():
    text = ALICE.public.to_text()
    assert len(KeyRing.load(f"{text}:{text}")) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no public key in it"),
        ("# nothing\n", "no public key in it"),
        ("hello", "a line that is no public key"),
        ("ed25519:AAAA", "is not a public key"),
        ("-----BEGIN PUBLIC KEY-----\nAAAA\n", "without its"),
        ("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----", "not an Ed25519 public key"),
        ("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----", "holds a private key"),
        ("\udcff", "not a text file"),
        ("#" * (1 << 17), "not a file of keys"),
    ],
)
def test_files_that_are_no_rings(tmp_path, text, message):
    path = tmp_path / "ring.pub"
    path.write_text(text, errors="surrogateescape")
    for spec in (path, str(path), str(tmp_path)):
        with pytest.raises(TrustError, match=rf"ring\.pub: .*{message}"):
            KeyRing.load(spec)


def test_other_things_that_are_no_rings(tmp_path):
    with pytest.raises(TrustError, match="cannot be read"):
        KeyRing.load(str(tmp_path / "none"))
    with pytest.raises(TrustError, match="cannot be read"):
        KeyRing.load("a\0b")
    with pytest.raises(TrustError, match="is not a public key"):
        KeyRing.load("ed25519")
    with pytest.raises(TrustError, match="not int"):
        KeyRing.of([1])


def test_without_the_library_keys_are_read_and_signatures_are_not(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    assert len(KeyRing.load(ALICE.public.to_text())) == 1
    with pytest.raises(SigningUnavailableError, match="pip install cryptography"):
        SigningKey.generate()
    with pytest.raises(SigningUnavailableError, match="pip install cryptography"):
        ALICE.public.verify(b"", bytes(64))
