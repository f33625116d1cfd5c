"""JSON from strangers: every freedom that Python's parser takes is refused by name."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.contracts import strict_json
from esper.contracts.errors import ArtifactError


def loads(data, max_bytes=1 << 20):
    return strict_json.loads(data, what="the text", max_bytes=max_bytes)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a":1,"a":2}', "duplicate key 'a'"),
        (b'{"x":[{"a":1,"b":2,"a":1}]}', "duplicate key 'a'"),
        (b"NaN", "NaN"),
        (b"[-Infinity]", "Infinity"),
        (b"[1e999]", "out of the range"),
        (b'"\xff"', "not UTF-8"),
        (b'"\\ud800"', "lone surrogate"),
        (b'{"\\udfff": 1}', "lone surrogate"),
        (b'[["\\udfff"]]', "lone surrogate"),
        (b"[" * 30 + b"]" * 30, "nested deeper"),
        (b"[" * 19_000 + b"]" * 19_000, "nested deeper"),
        (b'{"a":' * 9_000, "nested deeper|not valid JSON"),
        (b"[" * 25_000, "JSON elements"),
        (b"[" + b"1," * 25_000 + b"1]", "JSON elements"),
        (b"9" * 5000, "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"1 2", "not valid JSON"),
        (b"\x00", "not valid JSON"),
    ],
)
def test_refused(data, message):
    with pytest.raises(ArtifactError, match=message):
        loads(data)


def test_length_is_checked_first():
    with pytest.raises(ArtifactError, match="limit of 10"):
        loads(b"[1,2,3,4,5,6]", max_bytes=10)


def test_a_paired_surrogate_is_a_character():
    assert loads(b'"\\ud83c\\udf31"') == "\U0001f331"


_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # Surrogates cannot be written as UTF-8; hypothesis draws them unless told not to.
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=4),
    max_leaves=12,
)


@given(_values)
def test_canonical_text_reads_back_and_is_stable(value):
    text = strict_json.canonical(value)
    assert loads(text) == value
    assert strict_json.canonical(loads(text.encode())) == text


@given(st.binary(max_size=200))
def test_any_bytes_parse_or_end_in_artifact_error(data):
    with contextlib.suppress(ArtifactError):
        loads(data)
