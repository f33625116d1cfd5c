"""The fuzzer, a few hundred examples of it; ``ESPER_FUZZ_EXAMPLES`` says how many."""

from __future__ import annotations

import contextlib
import os
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("cryptography")

from esper.artifacts import KeyRing
from esper.artifacts.signing import TrustError
from esper.contracts.errors import ArtifactError
from esper.contracts.signatures import Signature, format_signatures, parse_signatures
from tests.artifacts.samples import ALICE
from tests.fuzz.corpus import load
from tests.fuzz.mutations import mutate
from tests.fuzz.oracle import check

CORPUS = load()
SOUND = ("plain", "bare", "conv", "gated", "provenance", "binaries", "signed.", "signed-twice")
EXAMPLES = int(os.environ.get("ESPER_FUZZ_EXAMPLES", "300"))

_settings = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)


@pytest.mark.parametrize("name", CORPUS)
def test_the_corpus_itself(name):
    outcome = check(CORPUS[name])
    assert (outcome.artifact is not None) == name.startswith(SOUND), outcome.message


_FULL = (1 << 20) - 100  # what fits in a header of the largest size


@pytest.mark.parametrize(
    "text",
    [
        '{"__metadata__":{"a":"' + "x" * _FULL + '"}}',
        # One character beyond the others' range makes Python keep all of them in four bytes.
        '{"__metadata__":{"a":"' + "x" * (_FULL - 12) + '\\ud83d\\ude00"}}',
        '{"__metadata__":{"a":"' + "\\n" * (_FULL // 2) + '"}}',
        '{"__metadata__":{' + ",".join(f'"{i:40}":"{i:40}"' for i in range(9000)) + "}}",
        "{" + ",".join(f'"{i:90}":1.0' for i in range(9000)) + "}",
        '{"a":[' + ",".join(['{"a":1.5}'] * 6600) + "]}",
        '{"a":' + "[" * 10_000 + "]" * 10_000 + "}",
    ],
    ids=["text", "wide text", "escapes", "metadata", "names", "objects", "depth"],
)
def test_headers_as_large_as_they_may_be(text):
    assert check(len(text).to_bytes(8, "little") + text.encode()).artifact is None


@given(st.sampled_from([*CORPUS.values()]), st.sampled_from([*CORPUS.values()]), st.randoms(use_true_random=False))
@_settings
def test_mutations(data, other, rng):
    check(mutate(data, other, rng))


@given(st.integers(0, 2**32 - 1))
@_settings
def test_mutations_from_a_seed(seed):
    # As the long run draws them: much more varied than what hypothesis makes of its own random numbers.
    rng = random.Random(seed)
    check(mutate(rng.choice([*CORPUS.values()]), rng.choice([*CORPUS.values()]), rng))


def test_mutations_reach_every_depth():
    """A fuzzer whose files all fail the first check tests one check."""
    rng = random.Random(0)
    messages, accepted = set(), {"trusted": 0, "stranger": 0}
    for _ in range(400):
        outcome = check(mutate(rng.choice([*CORPUS.values()]), rng.choice([*CORPUS.values()]), rng))
        if outcome.artifact is not None:
            accepted["trusted" if outcome.artifact.trusted else "stranger"] += 1
        messages.add(outcome.message)
    assert min(accepted.values()) >= 3
    for depth in ("header", "manifest", "SHA-256 is", "blueprint does not hold", "signature", "binaries", "needs"):
        assert any(depth in message for message in messages), depth


@given(st.binary(max_size=300) | st.text(alphabet="ed25519:AQgw=/+ \n-#BEGINPUBLCKY", max_size=200).map(str.encode))
def test_key_files(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "ring.pub"
    path.write_bytes(data)
    with contextlib.suppress(TrustError):
        assert len(KeyRing.load(path)) >= 1


def _edited(text: str, edits: list[tuple[int, str]]) -> str:
    letters = [*text]
    for at, letter in edits:
        letters[at % len(letters)] = letter
    return "".join(letters)


_edits = st.lists(st.tuples(st.integers(0, 400), st.characters() | st.sampled_from('#\n"AZ=/:{}[],')), max_size=4)


@given(_edits)
def test_edited_key_files(tmp_path_factory, edits):
    path = tmp_path_factory.getbasetemp() / "edited.pub"
    path.write_text(_edited(ALICE.public.to_pem() + ALICE.public.to_text(), edits), errors="surrogatepass")
    with contextlib.suppress(TrustError):
        assert all(len(key.raw) == 32 for key in KeyRing.load(path))


@given(_edits)
def test_edited_signatures(edits):
    given_ = format_signatures([Signature(ALICE.key_id, ALICE.sign(b"x")), Signature("0" * 16, bytes(64))])
    with contextlib.suppress(ArtifactError):
        read = parse_signatures(_edited(given_, edits))
        assert 1 <= len(read) <= 2
        assert all(len(signature.value) == 64 for signature in read)
