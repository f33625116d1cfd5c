"""The manifest: strict reading, canonical writing, reserved keys."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.contracts.errors import ArtifactError
from esper.contracts.manifest import Manifest, TensorEntry


def manifest(**changes: object) -> Manifest:
    facts = {
        "blueprint": {"schema": 1, "name": "x", "nodes": []},
        "blueprint_hash": "ab" * 32,
        "d_in": 4,
        "d_out": 2,
        "family": "lowrank",
        "target": "any",
        "pipeline": "fast",
        "seed": 3,
        "tensors": {"w": TensorEntry((2, 4), "float32", "cd" * 32)},
        "tools": {"esper": "1"},
        "provenance": {"by": "a test"},
    }
    return Manifest(**{**facts, **changes})


def edited(**changes: object) -> str:
    """The manifest's JSON with keys replaced, or removed where the value is ``...``."""
    data = json.loads(manifest().to_json()) | changes
    return json.dumps({key: value for key, value in data.items() if value is not ...})


def test_round_trip():
    text = manifest().to_json()
    assert Manifest.from_json(text) == manifest()
    assert Manifest.from_json(text.encode()).to_json() == text


def test_order_of_keys_does_not_count():
    other = manifest(tools={"b": "1", "a": "2"}, provenance={})
    same = manifest(tools={"a": "2", "b": "1"}, provenance={})
    assert other.to_json() == same.to_json()


@pytest.mark.parametrize("key", [key for key in json.loads(manifest().to_json()) if key != "format"])
def test_every_key_is_needed(key):
    with pytest.raises(ArtifactError, match=f"no key '{key}'"):
        Manifest.from_json(edited(**{key: ...}))


@pytest.mark.parametrize("version", [..., 0, 2, 1.0, True, "1", None, [1]])
def test_unknown_versions_are_refused_by_number(version):
    with pytest.raises(ArtifactError, match=r"unknown artifact format version .*knows: 1"):
        Manifest.from_json(edited(format=version))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("blueprint", []),
        ("blueprint_hash", "AB" * 32),
        ("d_in", 0),
        ("d_in", True),
        ("d_in", 4.0),
        ("d_out", 2**21),
        ("family", "Low Rank"),
        ("target", "../x"),
        ("pipeline", ""),
        ("seed", 2**63),
        ("seed", None),
        ("tensors", [1]),
        ("tensors", {"w": {"shape": [1], "dtype": "float32"}}),
        ("tensors", {"w": {"shape": "1", "dtype": "float32", "sha256": "cd" * 32}}),
        ("tensors", {"w": {"shape": [True], "dtype": "float32", "sha256": "cd" * 32}}),
        ("tensors", {"w": {"shape": [1], "dtype": "int64", "sha256": "cd" * 32}}),
        ("tensors", {"w": {"shape": [1], "dtype": ["float32"], "sha256": "cd" * 32}}),
        ("tensors", {"w": {"shape": [1], "dtype": "float32", "sha256": "cd"}}),
        ("tools", {"a": 1}),
        ("provenance", "me"),
    ],
)
def test_wrong_values_name_the_key(key, value):
    with pytest.raises(ArtifactError, match=key):
        Manifest.from_json(edited(**{key: value}))


def test_unknown_keys_are_refused():
    with pytest.raises(ArtifactError, match="unknown key 'surprise'"):
        Manifest.from_json(edited(surprise=1))


def test_binaries_are_refused_and_signatures_passed_over_with_a_note():
    with pytest.raises(ArtifactError, match="GPU binaries"):
        Manifest.from_json(edited(binaries={"sm_90": "x"}))
    read = Manifest.from_json(edited(signatures=[{"key": "x"}]))
    assert read.notes == ("signatures are not checked by this version; the hashes are",)


@pytest.mark.parametrize("text", ["[]", "1", '"x"', "null", "{", "\x00"])
def test_no_object(text):
    with pytest.raises(ArtifactError):
        Manifest.from_json(text)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from([*json.loads(manifest().to_json())]), _json)
def test_fuzz_values(key, value):
    try:
        read = Manifest.from_json(edited(**{key: value}))
    except ArtifactError:
        return
    assert Manifest.from_json(read.to_json()) == read
