"""Artifact.open: an artifact or an ArtifactError, whatever the bytes."""

from __future__ import annotations

import hashlib
import os
import struct
import tracemalloc
import warnings

import pytest

pytest.importorskip("safetensors")

import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

import esper
from esper.artifacts import Artifact, pack
from esper.artifacts.artifact import hash_file, read_manifest
from esper.blueprints import Blueprint, Node, blueprint_hash, get, initialise, names
from esper.contracts.errors import ArtifactError
from esper.contracts.ids import parse_artifact_id
from tests.artifacts.samples import forged, join, sample, split, with_manifest

GOOD = sample()
OUT = Node("y", "output", ("a",))


def bad(data: bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        Artifact.open(data)


# -- good ones


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_round_trip(dtype, tmp_path):
    blueprint = get("bottleneck", rank=2)
    weights = {name: w + 0.5 for name, w in initialise(blueprint, 6, 4, 1, dtype).items()}
    data = pack(blueprint, weights, d_in=6, d_out=4, seed=1, provenance={"why": "test"})
    path = tmp_path / "k.safetensors"
    path.write_bytes(data)
    for source in (data, bytearray(data), memoryview(data), path, str(path)):
        artifact = Artifact.open(source)
        assert artifact.blueprint == blueprint
        assert (artifact.d_in, artifact.d_out, artifact.nbytes) == (6, 4, len(data))
        assert artifact.family.name == "bottleneck"
        assert artifact.manifest.provenance == {"why": "test"}
        opened = artifact.tensors()
        assert opened.keys() == weights.keys()
        for name, weight in weights.items():
            assert opened[name].dtype is dtype
            assert torch.equal(opened[name], weight)


@pytest.mark.parametrize("name", names())
def test_every_ready_blueprint(name):
    blueprint = get(name)
    data = pack(blueprint, initialise(blueprint, 12, 12, 0), d_in=12, d_out=12, seed=0)
    assert Artifact.open(data).blueprint == blueprint


def test_a_blueprint_without_weights():
    blueprint = Blueprint("bare", (Node("x", "input"), Node("a", "activation", ("x",), {"kind": "tanh"}), OUT))
    artifact = Artifact.open(pack(blueprint, {}, d_in=4, d_out=4, seed=0))
    assert artifact.tensors() == {}
    assert "4 -> 4, no weights" in repr(artifact)


def test_large_weights_are_looked_at_to_the_end():
    blueprint = get("dense")
    weights = initialise(blueprint, 300, 300, 0)
    weights["linear.weight"][-1, -1] = torch.inf
    with pytest.raises(ArtifactError, match=r"'linear\.weight' has values that are NaN or infinite"):
        pack(blueprint, weights, d_in=300, d_out=300, seed=0)


def test_ids_follow_the_bytes():
    artifact = Artifact.open(GOOD)
    digest = hashlib.sha256(GOOD).hexdigest()
    assert artifact.sha256 == digest
    assert artifact.kernel_id == int(digest, 16) >> (256 - 63)
    assert parse_artifact_id(artifact.artifact_id) == (
        blueprint_hash(artifact.blueprint)[:16],
        "any",
        "fast",
        digest[:8],
    )


def test_whatever_differs_has_another_id():
    blueprint = get("lowrank", rank=2)
    weights = initialise(blueprint, 4, 4, 0)
    other = {**weights, "down.weight": weights["down.weight"] + 1}
    ids = [
        Artifact.open(pack(blueprint, weights, d_in=4, d_out=4, seed=0)).artifact_id,
        Artifact.open(pack(blueprint, weights, d_in=4, d_out=4, seed=1)).artifact_id,
        Artifact.open(pack(blueprint, other, d_in=4, d_out=4, seed=0)).artifact_id,
        Artifact.open(pack(blueprint, weights, d_in=4, d_out=4, seed=0, provenance={"a": "b"})).artifact_id,
        Artifact.open(pack(blueprint, initialise(blueprint, 4, 5, 0), d_in=4, d_out=5, seed=0)).artifact_id,
        Artifact.open(pack(blueprint, initialise(blueprint, 5, 4, 0), d_in=5, d_out=4, seed=0)).artifact_id,
    ]
    assert len(set(ids)) == len(ids)


def test_same_inputs_same_bytes():
    assert sample() == GOOD


def test_the_safetensors_library_reads_it():
    read = safetensors.torch.load(GOOD)
    for name, tensor in Artifact.open(GOOD).tensors().items():
        assert torch.equal(read[name], tensor)


def test_tensors_are_views_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        artifact = Artifact.adopt(bytearray(GOOD))
        first, second = artifact.tensors(), artifact.tensors()
    for name in first:
        assert first[name].data_ptr() == second[name].data_ptr()
        assert first[name].data_ptr() % first[name].element_size() == 0


def test_bytes_given_are_never_written_to():
    data = bytes(bytearray(GOOD))
    for tensor in Artifact.open(data).tensors().values():
        tensor.fill_(7)
    assert data == GOOD


def test_a_bytearray_changed_afterwards_changes_nothing():
    data = bytearray(GOOD)
    artifact = Artifact.open(data)
    data[-4:] = b"\xff" * 4
    assert all(torch.isfinite(tensor).all() for tensor in artifact.tensors().values())


def test_weights_with_non_contiguous_memory():
    blueprint = get("lowrank", rank=2)
    weights = initialise(blueprint, 4, 4, 0)
    turned = {name: weight.t().contiguous().t() for name, weight in weights.items()}
    assert pack(blueprint, turned, d_in=4, d_out=4, seed=0) == pack(blueprint, weights, d_in=4, d_out=4, seed=0)


def test_memory_stays_below_twice_the_file(tmp_path):
    blueprint = get("lowrank", rank=64)
    weights = initialise(blueprint, 8192, 8192, 0)
    path = tmp_path / "k.safetensors"
    path.write_bytes(pack(blueprint, weights, d_in=8192, d_out=8192, seed=0))
    size = path.stat().st_size
    data = path.read_bytes()
    assert size > 4 << 20
    # The parsed header and the interpreter's own objects are small beside a file of 4 MiB: half a MiB is allowed for.
    for source, files in ((path, 1), (data, 1)):
        tracemalloc.start()
        try:
            artifact = Artifact.open(source)
            artifact.tensors()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak <= files * size + (1 << 19)  # for bytes, the caller's own copy is the other file's worth


def test_it_is_the_public_name():
    assert esper.Artifact is Artifact


# -- bad ones


def test_truncated_anywhere():
    for length in range(len(GOOD)):
        with pytest.raises(ArtifactError):
            Artifact.open(GOOD[:length])


def test_every_flipped_byte_is_found_or_changes_the_id():
    good = Artifact.open(GOOD)
    body = struct.unpack("<Q", GOOD[:8])[0] + 8
    for position in range(len(GOOD)):
        data = bytearray(GOOD)
        data[position] ^= 0x10
        try:
            artifact = Artifact.open(bytes(data))
        except ArtifactError:
            continue
        # What is not under a hash of its own (provenance, tool versions, seed) is under the file's: the id differs.
        assert position < body, "an altered weight went through"
        assert artifact.artifact_id != good.artifact_id
        assert artifact.manifest.tensors == good.manifest.tensors
        # A node may have got another name; what it means is under the blueprint's hash.
        assert blueprint_hash(artifact.blueprint) == blueprint_hash(good.blueprint)


def test_a_flipped_weight_names_the_tensor():
    data = bytearray(GOOD)
    data[-1] ^= 1
    bad(bytes(data), r"tensor 'up\.weight': SHA-256 is [0-9a-f]{64}, the manifest says [0-9a-f]{64}")


def test_wrong_shape_names_both_shapes():
    bad(forged(GOOD, "up.weight", torch.zeros(2, 4)), r"'up\.weight' has shape \[2, 4\].*needs \[4, 2\]")


@pytest.mark.parametrize("change", [{"d_in": 7}, {"d_out": 5}])
def test_wrong_sizes_in_the_manifest(change):
    bad(with_manifest(GOOD, lambda m: m.update(change)), "has shape .* needs")


def test_missing_and_extra_tensors():
    bad(forged(GOOD, "more.weight", torch.zeros(2)), "'more.weight' is in the file but not in the blueprint")
    header, body = split(GOOD)
    last = max((entry["data_offsets"], name) for name, entry in header.items() if name != "__metadata__")[1]
    cut = header.pop(last)["data_offsets"][0]
    bad(join(header, body[:cut]), f"'{last}' is in the manifest but not in the file")
    bad(with_manifest(GOOD, lambda m: m["tensors"].pop(last)), f"'{last}' is in the file but not in the manifest")


def test_header_and_manifest_disagree():
    bad(with_manifest(GOOD, lambda m: m["tensors"]["up.weight"].update(shape=[2, 4])), "header says float32 .*manifest")
    bad(with_manifest(GOOD, lambda m: m["tensors"]["up.weight"].update(dtype="float16")), "header says float32")


def test_wrong_dtype():
    header, body = split(GOOD)
    header["up.weight"]["dtype"] = "I32"
    bad(join(header, body), "dtype 'I32' is not one of F64, F32, F16, BF16")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite(value, dtype):
    weight = torch.zeros(4, 2, dtype=dtype)
    weight[3, 1] = value
    bad(forged(GOOD, "up.weight", weight), "'up.weight' has values that are NaN or infinite")


def test_blueprint_and_its_hash():
    bad(with_manifest(GOOD, lambda m: m.update(blueprint_hash="0" * 64)), "hash is .*the manifest says 0000")
    bad(with_manifest(GOOD, lambda m: m["blueprint"].update(mode="replace")), "the blueprint's hash is")
    bad(with_manifest(GOOD, lambda m: m["blueprint"].update(schema=99)), "unknown blueprint schema version 99")
    bad(with_manifest(GOOD, lambda m: m["blueprint"].update(surprise=1)), "the blueprint does not hold")
    bad(with_manifest(GOOD, lambda m: m["blueprint"]["nodes"].pop()), "the blueprint does not hold")


def test_unknown_format_version():
    bad(with_manifest(GOOD, lambda m: m.update(format=2)), "unknown artifact format version 2")


def test_a_safetensors_file_that_is_no_artifact():
    bad(safetensors.torch.save({"w": torch.zeros(2)}), "no artifact")


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04" + b"\0" * 100, b"\x80\x02}q\x00.", b"{}", bytes(8), bytes(1000)])
def test_other_files(data):
    with pytest.raises(ArtifactError):
        Artifact.open(data)


def test_size_limit_comes_first(tmp_path):
    path = tmp_path / "big"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # sparse: a TiB that nobody could read
    with pytest.raises(ArtifactError, match="more than the limit"):
        Artifact.open(path)
    with pytest.raises(ArtifactError, match="more than the limit of 100"):
        Artifact.open(GOOD, max_bytes=100)


def test_paths_that_hold_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("none", "pipe", "."):
        with pytest.raises(ArtifactError, match=r"cannot be read|not a regular file"):
            Artifact.open(tmp_path / name)
    with pytest.raises(ArtifactError, match="cannot be read"):
        Artifact.open("a\0b")


def test_pack_refuses_what_open_would():
    blueprint = get("lowrank", rank=2)
    weights = initialise(blueprint, 4, 4, 0)
    with pytest.raises(ArtifactError, match="dtype int64 cannot be stored"):
        pack(blueprint, {**weights, "up.weight": torch.zeros(4, 2, dtype=torch.int64)}, d_in=4, d_out=4, seed=0)
    with pytest.raises(ArtifactError, match="NaN or infinite"):
        pack(blueprint, {**weights, "up.weight": torch.full((4, 2), torch.nan)}, d_in=4, d_out=4, seed=0)
    with pytest.raises(ArtifactError, match=r"\[4, 2\]"):
        pack(blueprint, {**weights, "up.weight": torch.zeros(2, 2)}, d_in=4, d_out=4, seed=0)
    with pytest.raises(ArtifactError, match=r"'up\.weight' is in the blueprint"):
        pack(blueprint, {"down.weight": weights["down.weight"]}, d_in=4, d_out=4, seed=0)


def test_manifest_alone(tmp_path):
    path = tmp_path / "k"
    path.write_bytes(GOOD)
    manifest, size = read_manifest(path)
    assert (manifest, size) == (Artifact.open(GOOD).manifest, len(GOOD))
    assert hash_file(path) == hashlib.sha256(GOOD).hexdigest()
    path.write_bytes(GOOD[:40])
    with pytest.raises(ArtifactError, match="truncated"):
        read_manifest(path)


# -- fuzz


@given(st.binary(max_size=300))
def test_fuzz_bytes(data):
    with pytest.raises(ArtifactError):
        Artifact.open(data)


@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=5))
def test_fuzz_edits(edits):
    data = bytearray(GOOD)
    for position, value in edits:
        data[position] = value
    try:
        artifact = Artifact.open(bytes(data))
    except ArtifactError:
        return
    assert artifact.manifest.tensors == Artifact.open(GOOD).manifest.tensors


_paths = st.sampled_from(
    [
        ("blueprint",),
        ("blueprint", "mode"),
        ("blueprint", "nodes"),
        ("blueprint", "nodes", 1),
        ("blueprint", "nodes", 1, "out"),
        ("blueprint", "parameters"),
        ("tensors",),
        ("tensors", "up.weight"),
        ("tensors", "up.weight", "shape"),
        ("d_in",),
    ]
)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(_paths, _json)
def test_fuzz_manifest_values(path, value):
    def change(manifest):
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = value

    try:
        artifact = Artifact.open(with_manifest(GOOD, change))
    except ArtifactError:
        return
    # What went through means the same as before.
    assert artifact.manifest.blueprint_hash == Artifact.open(GOOD).manifest.blueprint_hash


_numbers = st.integers(-1, 200) | st.sampled_from([2**31, 2**63, 10**40, -(2**64)])


@given(
    st.sampled_from(["down.weight", "down.bias", "up.weight"]),
    st.one_of(
        st.tuples(st.just("dtype"), st.sampled_from(["F64", "F32", "F16", "BF16", "I8", None])),
        st.tuples(st.just("shape"), st.lists(_numbers, max_size=4)),
        st.tuples(st.just("data_offsets"), st.lists(_numbers, min_size=2, max_size=2)),
        st.tuples(st.sampled_from(["dtype", "shape", "data_offsets", "more"]), _json),
    ),
)
def test_fuzz_headers(name, change):
    header, body = split(GOOD)
    before = dict(header[name])
    header[name][change[0]] = change[1]
    if header[name] == before:
        return
    with pytest.raises(ArtifactError):
        Artifact.open(join(header, body))
