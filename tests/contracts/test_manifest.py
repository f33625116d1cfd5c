"""The manifest: strict reading, canonical writing, the table of GPU binaries."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.contracts.binary_entry import target_of
from esper.contracts.errors import ArtifactError
from esper.contracts.manifest import BinaryEntry, Manifest, TensorEntry


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


def binary(**changes: object) -> BinaryEntry:
    facts = {
        "arch": "sm_90",
        "dtype": "bf16",
        "direction": "forward",
        "kernel": "bank_kernel",
        "symbol": "bank_kernel",
        "signature": (("x", "*bf16"), ("n", "i32"), ("scale", "fp32")),
        "constants": {"BLOCK": 64, "EXACT": True, "EPS": 1e-5, "ACTIVATION": "gelu", "NOTHING": None},
        "num_warps": 4,
        "shared": 4096,
        "registers": 96,
        "spills": 0,
        "tools": {"triton": "3.9.0", "ptxas": "13.0.88"},
        "sha256": "ef" * 32,
        "size": 10_000,
    }
    return BinaryEntry(**{**facts, **changes})


NAME = "gpu/sm_90/bf16/forward"


def with_binary(**changes: object) -> str:
    """The JSON of a manifest with one binary, whose keys are replaced, or removed where the value is ``...``."""
    data = json.loads(manifest(target="sm_90", binaries={NAME: binary()}).to_json())
    entry = data["binaries"][NAME] | changes
    data["binaries"][NAME] = {key: value for key, value in entry.items() if value is not ...}
    return json.dumps(data)


def test_binaries_come_back_as_they_were():
    names = {
        NAME + "/bank_kernel": binary(),
    }
    names["gpu/sm_80/fp32/backward"] = binary(arch="sm_80", dtype="fp32", direction="backward", signature=())
    given = manifest(target="sm_80_sm_90", binaries=names)
    assert Manifest.from_json(given.to_json()) == given


def test_without_binaries_the_manifest_has_no_such_key():
    assert "binaries" not in json.loads(manifest().to_json())
    with pytest.raises(ArtifactError, match="binaries has 0 entries"):
        Manifest.from_json(edited(binaries={}))
    for value in (None, [], "gpu", 1):
        with pytest.raises(ArtifactError, match=r"binaries is .*not an object"):
            Manifest.from_json(edited(binaries=value))


@pytest.mark.parametrize("key", [*json.loads(with_binary())["binaries"][NAME]])
def test_every_key_of_a_binary_is_needed(key):
    with pytest.raises(ArtifactError, match=f"has no key '{key}'"):
        Manifest.from_json(with_binary(**{key: ...}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("arch", "sm_9"),
        ("arch", "sm_90/.."),
        ("arch", 90),
        ("dtype", "float32"),
        ("direction", "sideways"),
        ("kernel", "a b"),
        ("kernel", "class"),
        ("kernel", None),
        ("symbol", ""),
        ("symbol", "a\n"),
        ("signature", {"x": "i32"}),
        ("signature", [["x"]]),
        ("signature", [["x", "i32", 1]]),
        ("signature", [["x", "**i32"]]),
        ("signature", [["x", "i32"], ["x", "i32"]]),
        ("signature", [["x-y", "i32"]]),
        ("signature", [[f"x{i}", "i32"] for i in range(129)]),
        ("constants", []),
        ("constants", {"A": [1]}),
        ("constants", {"A": {}}),
        ("constants", {"A b": 1}),
        ("constants", {"A": 2**63}),
        ("constants", {"A": "x" * 257}),
        ("num_warps", 3),
        ("num_warps", 64),
        ("num_warps", True),
        ("shared", -1),
        ("shared", 2**21),
        ("registers", 256),
        ("registers", 1.0),
        ("spills", None),
        ("tools", {"triton": 3}),
        ("sha256", "EF" * 32),
        ("size", 0),
        ("size", 2**30),
    ],
)
def test_wrong_values_in_a_binary_name_the_key(key, value):
    with pytest.raises(ArtifactError, match=key):
        Manifest.from_json(with_binary(**{key: value}))


def test_unknown_keys_of_a_binary_are_refused():
    with pytest.raises(ArtifactError, match="unknown key 'surprise'"):
        Manifest.from_json(with_binary(surprise=1))


@pytest.mark.parametrize("change", [{"arch": "sm_80"}, {"dtype": "fp16"}, {"direction": "backward"}])
def test_the_name_of_a_binary_agrees_with_its_entry(change):
    with pytest.raises(ArtifactError, match=r"describes gpu/.*not a tensor of this name"):
        Manifest.from_json(with_binary(**change))


@pytest.mark.parametrize(
    "name", ["", "gpu/", "gpu/sm_90/bf16/forward/", NAME + "/other", NAME + "/bank_kernel/x", "GPU/sm_90/bf16/forward"]
)
def test_other_names_of_binaries(name):
    data = json.loads(with_binary())
    data["binaries"] = {name: data["binaries"][NAME]}
    with pytest.raises(ArtifactError, match="not a tensor of this name"):
        Manifest.from_json(json.dumps(data))


@pytest.mark.parametrize("target", ["any", "sm_80", "sm_90_sm_90", "sm_80_sm_90"])
def test_the_target_agrees_with_the_binaries(target):
    data = json.loads(with_binary()) | {"target": target}
    with pytest.raises(ArtifactError, match="target is"):
        Manifest.from_json(json.dumps(data))
    with pytest.raises(ArtifactError, match="target is 'sm_90', its binaries say 'any'"):
        Manifest.from_json(edited(target="sm_90"))


def test_targets_are_ordered_by_number():
    assert target_of(["sm_100", "sm_90a", "sm_80", "sm_90", "sm_80"]) == "sm_80_sm_90_sm_90a_sm_100"
    assert target_of([]) == "any"


def test_too_many_binaries():
    entry = json.loads(with_binary())["binaries"][NAME]
    with pytest.raises(ArtifactError, match="binaries has 129 entries"):
        Manifest.from_json(edited(binaries={f"gpu/{i}": {**entry, "signature": []} for i in range(129)}))


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


@given(st.sampled_from([*json.loads(with_binary())["binaries"][NAME]]), _json)
def test_fuzz_values_of_binaries(key, value):
    try:
        read = Manifest.from_json(with_binary(**{key: value}))
    except ArtifactError:
        return
    assert Manifest.from_json(read.to_json()) == read
