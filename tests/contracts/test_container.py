"""The safetensors container: agreement with the safetensors library, and refusal of every malformed header."""

from __future__ import annotations

import contextlib
import json
import struct

import numpy as np
import pytest

pytest.importorskip("safetensors")

import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from esper.contracts import container
from esper.contracts.errors import ArtifactError


def file(header: object, data: bytes = b"", *, raw: bool = False) -> bytes:
    """A file with this header (JSON value, or its bytes if ``raw``) and data."""
    text = header if raw else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def padded(header: dict, data: bytes = b"") -> bytes:
    """As :func:`file`, the header padded so that the data is 8-byte aligned."""
    text = json.dumps(header).encode()
    return file(text + b" " * (-len(text) % 8), data, raw=True)


def parse(data: bytes) -> container.Container:
    return container.parse(data, len(data))


def entry(shape=(2,), offsets=(0, 8), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def arrays() -> dict[str, np.ndarray]:
    return {
        "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(3, dtype=np.float16),
        "c": np.array(2.5, dtype=np.float64),
    }


def test_what_we_write_the_library_reads():
    given = arrays()
    data = container.build({"k": "v"}, {name: (a.dtype.name, a.shape, a.tobytes()) for name, a in given.items()})
    read = safetensors.numpy.load(data)
    assert read.keys() == given.keys()
    for name, array in given.items():
        np.testing.assert_array_equal(read[name], array)
        assert read[name].dtype == array.dtype


def test_what_the_library_writes_we_read():
    given = arrays()
    data = safetensors.numpy.save(given, metadata={"k": "v"})
    held = parse(data)
    assert held.metadata == {"k": "v"}
    for name, array in given.items():
        span = held.tensors[name]
        assert (span.dtype, span.shape) == (array.dtype.name, array.shape)
        assert data[span.begin : span.end] == array.tobytes()


def test_same_contents_same_bytes_and_aligned_data():
    given = {name: (a.dtype.name, a.shape, a.tobytes()) for name, a in arrays().items()}
    backwards = dict(reversed(given.items()))
    assert container.build({"x": "1", "a": "2"}, given) == container.build({"a": "2", "x": "1"}, backwards)
    assert parse(container.build({}, given)).data_begin % 64 == 0


@pytest.mark.parametrize("prefix", [b"", b"\x01", b"\x00" * 7])
def test_too_short_for_a_length(prefix):
    with pytest.raises(ArtifactError, match="too few"):
        parse(prefix)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (struct.pack("<Q", 2**63) + b"{}", "more than the limit.*is it a safetensors file at all"),
        (b"# Esper\n\nEsper lets a network grow", "more than the limit.*is it a safetensors file at all"),
        (struct.pack("<Q", container.MAX_HEADER_BYTES + 1) + b"{}", "more than the limit"),
        (struct.pack("<Q", 3) + b"{}", "truncated"),
        (struct.pack("<Q", 0), "shortest possible"),
        (struct.pack("<Q", 1) + b"{", "shortest possible"),
        (file([1]), "does not begin with"),
        (file(b"  {}", raw=True), "does not begin with"),
        (file(b"\x80\x04K\x01.", raw=True), "does not begin with"),  # a pickle
        (file(b"{\xff}", raw=True), "not ASCII"),
        (file('{"ä":1}'.encode(), raw=True), "not ASCII"),
        (file(b'{"a":1,"a":2}', raw=True), "duplicate key"),
        (file({"__metadata__": [1]}), "__metadata__ is not"),
        (file({"__metadata__": {"a": 1}}), "int, not text"),
        (file({"": entry()}, b"\0" * 8), "tensor name"),
        (file({"a\n": entry()}, b"\0" * 8), "tensor name"),
        (file({"a" * 257: entry()}, b"\0" * 8), "tensor name"),
        (file({"a": 1}), "exactly dtype"),
        (file({"a": {**entry(), "more": 1}}), "exactly dtype"),
        (file({"a": entry(dtype="I64")}, b"\0" * 8), "dtype 'I64' is not one of"),
        (file({"a": entry(dtype="F8_E4M3")}, b"\0" * 8), "is not one of"),
        (file({"a": {**entry(), "dtype": ["F32"]}}, b"\0" * 8), "is not one of"),
        (file({"a": {**entry(), "shape": 2}}, b"\0" * 8), "shape must be a list"),
        (file({"a": entry(shape=[1] * 9)}, b"\0" * 8), "at most 8"),
        (file({"a": entry(shape=[-2])}, b"\0" * 8), "every size"),
        (file({"a": entry(shape=[0])}), "every size"),
        (file({"a": entry(shape=[True, 2])}, b"\0" * 8), "every size"),
        (file({"a": entry(shape=[2.0])}, b"\0" * 8), "every size"),
        (file({"a": entry(shape=[10**30])}, b"\0" * 8), "every size"),
        (file({"a": entry(shape=[2**31] * 8)}, b"\0" * 8), "needs .* bytes"),
        (file({"a": entry(offsets=[0])}, b"\0" * 8), "two integers"),
        (file({"a": entry(offsets=[0, True])}, b"\0" * 8), "two integers"),
        (file({"a": entry(offsets=[0.0, 8.0])}, b"\0" * 8), "two integers"),
        (file({"a": entry(offsets=[-8, 0])}, b"\0" * 8), "lie outside"),
        (file({"a": entry(offsets=[8, 0])}, b"\0" * 8), "lie outside"),
        (file({"a": entry(offsets=[0, 8])}, b"\0" * 7), "lie outside"),
        (file({"a": entry(offsets=[2**64, 2**64 + 8])}, b"\0" * 8), "lie outside"),
        (file({"a": entry(shape=[3])}, b"\0" * 8), "needs 12 bytes, data_offsets span 8"),
        (padded({"a": entry(), "b": entry()}, b"\0" * 8), "overlap"),
        (padded({"a": entry(), "b": entry(offsets=[4, 12])}, b"\0" * 12), "overlap"),
        (padded({"a": entry(), "b": entry(offsets=[12, 20])}, b"\0" * 20), "4 bytes before tensor 'b'"),
        (padded({"a": entry(offsets=[4, 12])}, b"\0" * 12), "4 bytes before tensor 'a'"),
        (padded({"a": entry()}, b"\0" * 9), "1 bytes at the end"),
        (padded({}, b"\0"), "1 bytes at the end"),
        (padded({"a": entry((1,), (0, 2), "F16"), "b": entry(offsets=[2, 10])}, b"\0" * 10), "multiple of its 4-byte"),
        (file({"gpu/a": entry(dtype="F32")}, b"\0" * 8), "dtype 'F32' is not one of U8"),
        (file({"gpu": entry((8,), dtype="U8")}, b"\0" * 8), "dtype 'U8' is not one of F64"),
        (file({"a/gpu/b": entry((8,), dtype="U8")}, b"\0" * 8), "dtype 'U8' is not one of F64"),
        (file({f"t{i}": {} for i in range(513)}), "513 tensors"),
    ],
)
def test_malformed_headers(data, message):
    with pytest.raises(ArtifactError, match=message):
        parse(data)


def test_misaligned_data_section():
    header = json.dumps({"a": entry()}).encode()
    header += b" " * (-len(header) % 8 + 1)
    with pytest.raises(ArtifactError, match="not a multiple"):
        parse(file(header, b"\0" * 8, raw=True))


def test_a_dtype_that_cannot_be_stored():
    with pytest.raises(ArtifactError, match="int64 cannot be stored"):
        container.build({}, {"a": ("int64", (1,), b"\0" * 8)})


def test_bytes_are_for_binaries_only():
    data = container.build({"k": "v"}, {"gpu/b": ("uint8", (3,), b"abc"), "a": ("float16", (1,), b"\0\0")})
    held = parse(data)
    assert {name: (span.dtype, span.shape) for name, span in held.tensors.items()} == {
        "a": ("float16", (1,)),
        "gpu/b": ("uint8", (3,)),
    }
    assert data.endswith(b"\0\0abc")
    assert safetensors.numpy.load(data)["gpu/b"].tobytes() == b"abc"
    for name, dtype in (("a", "uint8"), ("gpu/b", "float32")):
        with pytest.raises(ArtifactError, match=f"{dtype} cannot be stored"):
            container.build({}, {name: (dtype, (4,), b"\0" * 4)})


def test_other_metadata_over_the_same_tensors():
    given = {name: (a.dtype.name, a.shape, a.tobytes()) for name, a in arrays().items()}
    data = container.build({"k": "v"}, given)
    changed = container.with_metadata(data, {"other": "x" * 100})
    assert changed == container.build({"other": "x" * 100}, given)
    assert container.with_metadata(changed, {"k": "v"}) == data
    foreign = safetensors.numpy.save(arrays(), metadata={"k": "v"})
    assert safetensors.numpy.load(container.with_metadata(foreign, {}))["b"].tobytes() == arrays()["b"].tobytes()
    with pytest.raises(ArtifactError, match="truncated"):
        container.with_metadata(data[:20], {})


def test_build_checks_what_it_writes():
    with pytest.raises(ArtifactError, match="needs 8 bytes"):
        container.build({}, {"a": ("float32", (2,), b"\0" * 12)})


@given(st.binary(max_size=64))
def test_fuzz_bytes(data):
    with contextlib.suppress(ArtifactError):
        parse(data)


_numbers = st.integers(-9, 40) | st.sampled_from([2**31, 2**63, -(2**64), 10**40])
_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "F64", "BF16", "I8", "", None]),
        "shape": st.lists(_numbers, max_size=3) | st.none(),
        "data_offsets": st.lists(_numbers, min_size=2, max_size=2) | st.lists(_numbers | st.booleans(), max_size=3),
    }
)


@given(st.dictionaries(st.text("ab", max_size=2), _entries, max_size=3), st.integers(0, 40))
def test_fuzz_headers_accept_only_what_the_library_accepts(header, length):
    data = padded(header, b"\0" * length)
    try:
        held = parse(data)
    except ArtifactError:
        return
    spans = sorted((span.begin, span.end) for span in held.tensors.values())
    # Exact cover: sorted spans join end to end from the first data byte to the last byte of the file.
    assert [begin for begin, _ in spans] + [len(data)] == [held.data_begin] + [end for _, end in spans]
    safetensors.deserialize(data)
