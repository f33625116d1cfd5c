"""Artifact ids: what fits the pattern is safe as a file name, and nothing else fits."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.contracts.ids import ArtifactId, check_sha256, kernel_id, parse_artifact_id

GOOD = "0123456789abcdef-any-fast-89abcdef"


def test_parts_and_text_agree():
    parsed = parse_artifact_id(GOOD)
    assert parsed == ("0123456789abcdef", "any", "fast", "89abcdef")
    assert str(parsed) == GOOD


def test_made_from_hashes():
    blueprint, file = (hashlib.sha256(text).hexdigest() for text in (b"blueprint", b"file"))
    made = ArtifactId.of(blueprint, "sm_90", "standard", file)
    assert str(made) == f"{blueprint[:16]}-sm_90-standard-{file[:8]}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "../../etc/passwd",
        "..",
        GOOD + "\n",
        GOOD + "/x",
        GOOD.upper(),
        GOOD.replace("any", "a.b"),
        GOOD.replace("any", ""),
        GOOD.replace("any", "a" * 33),
        GOOD[1:],
        GOOD.replace("0", "\u0660"),  # a digit, but not one of ours
        "test-kernel-123",
        None,
        17,
        GOOD.encode(),
    ],
)
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match="not an artifact id"):
        parse_artifact_id(text)


@given(st.text(alphabet="0123456789abcdef-./\\\x00 anyfstz_", max_size=60))
def test_what_passes_names_no_other_folder(text):
    try:
        parse_artifact_id(text)
    except ValueError:
        return
    assert not set(text) & set("/\\.\x00")


def test_long_garbage_is_cut_in_the_message():
    with pytest.raises(ValueError) as caught:
        parse_artifact_id("x" * 10**6)
    assert len(str(caught.value)) < 300


@given(st.binary(max_size=64))
def test_kernel_id_is_the_first_63_bits(data):
    digest = hashlib.sha256(data)
    number = kernel_id(digest.hexdigest())
    assert number == int.from_bytes(digest.digest()[:8], "big") // 2
    assert 0 <= number < 2**63


@pytest.mark.parametrize("text", ["", "ab" * 31, "AB" * 32, "zz" * 32, None, "ab" * 33])
def test_sha256_pattern(text):
    with pytest.raises(ValueError, match="SHA-256"):
        check_sha256(text)
    assert check_sha256("ab" * 32) == "ab" * 32
