"""``graft_blend`` on every backend that runs here, against the reference and against the formula.

Tolerance: a sum of at most 5 terms of size up to ~4 in the same order; only the replace scale (1 / A' against a
division) may differ, by 1 unit in the last place of each term: 16 eps.
"""

from __future__ import annotations

import itertools

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from esper.ops import registry
from esper.ops.graft import graft_blend, graft_blend_backward
from esper.ops.graft.layout import BlendLayout, Place, chunk_span

NATIVE = [b for b in ("cpu", "cuda", "triton") if not graft_blend.reason(registry.Backend(b))]
#: Triton runs in its interpreter where there is no GPU.
DEVICES = {
    "reference": "cpu",
    "cpu": "cpu",
    "cuda": "cuda",
    "triton": "cpu" if registry.triton_interprets() else "cuda",
}


def _inputs(shape, dim, places, dtype, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    parts = []
    for p in places:
        size = (*shape[:dim], p.end - p.begin, *shape[dim + 1 :])
        parts.append(torch.randn(size, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype))
    mask = torch.ones((*shape[:dim], 1, *shape[dim + 1 :]), dtype=torch.bool, device=device)
    return h.to(device), parts, [mask] * len(places)


def _run(backend, h, parts, trusted, alpha, flat, dim):
    """Forward where the backend runs; the results come back to the CPU."""
    device = DEVICES[backend]
    there = h.to(device), [p.to(device) for p in parts], [m.to(device) for m in trusted], alpha.to(device)
    y, blamed = graft_blend.backend(backend)(*there, flat, dim)
    return y.cpu(), blamed.cpu()


PLACES = [
    [Place(0, 0, 7, False)],
    [Place(0, 0, 7, True), Place(1, 0, 7, True), Place(2, 0, 7, False)],
    [Place(0, *chunk_span(0, 3, 7), True), Place(1, *chunk_span(1, 3, 7), False), Place(2, 0, 7, True)],
]


def test_the_extension_serves_this_machine():
    """Without it the rest of this file would compare the reference with itself."""
    assert NATIVE == ["cpu", "triton"] or "cuda" in NATIVE


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize(("shape", "dim"), [((3, 7), 1), ((2, 5, 7), 2), ((2, 7, 3, 3), 1), ((7,), 0), ((0, 7), 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("alphas", [(0.25, 0.5, 1.0), (0.0, 0.0, 0.0), (1.0, 0.0, 0.0)])
def test_backends_agree(backend, places, shape, dim, dtype, alphas):
    device = DEVICES[backend]
    h, parts, trusted = _inputs(shape, dim, places, dtype, device=device)
    alpha = torch.tensor(alphas, device=device)
    flat = BlendLayout(places, 7).flat
    y, blamed = graft_blend.backend(backend)(h, parts, trusted, alpha, flat, dim)
    want, none = graft_blend.backend("reference")(h, parts, trusted, alpha, flat, dim)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y, want, rtol=16 * eps, atol=16 * eps)
    assert not blamed.any() and not none.any()
    gh, gparts = graft_blend_backward.backend(backend)(h, alpha, blamed, flat, dim)
    want_h, want_parts = graft_blend_backward.backend("reference")(h, alpha, blamed, flat, dim)
    for got, expected in zip((gh, *gparts), (want_h, *want_parts), strict=True):
        torch.testing.assert_close(got, expected, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize(
    ("dtype", "nans"),
    # Of every kind one that no conversion gives: quiet or signalling, with bits in it.
    [(torch.float32, (0x7F812345, -0x3EDCB)), (torch.bfloat16, (0x7F85, -0x3B)), (torch.float16, (0x7C15, -0x1AB))],
    ids=str,
)
def test_where_nothing_counts_a_nan_keeps_its_bits(dtype, nans):
    """In Triton, whose conversions on a GPU know one NaN only; the others multiply h by 1."""
    places = [Place(0, 0, 4, False), Place(1, 4, 7, False)]
    h, parts, trusted = _inputs((5, 7), 1, places, dtype)
    whole = torch.int32 if dtype is torch.float32 else torch.int16
    h.view(whole)[1:3, 4:6] = torch.tensor(nans, dtype=whole)
    y, _ = _run("triton", h, parts, trusted, torch.tensor([0.5, 0.0]), BlendLayout(places, 7).flat, 1)
    assert torch.equal(y.view(whole)[:, 4:], h.view(whole)[:, 4:])


@hypothesis.given(st.data())
def test_faults_agree(data):
    """Random places for NaN, infinities and huge numbers in h, the parts and the masks: the same seeds are named."""
    count = data.draw(st.integers(1, 4))
    places = []
    for index in range(count):
        begin, end = chunk_span(index, count, 5) if data.draw(st.booleans()) else (0, 5)
        places.append(Place(index, begin, end, data.draw(st.booleans())))
    places = [p for p in places if p.begin < p.end]
    h, parts, _ = _inputs((2, 5), 1, places, torch.float64, seed=data.draw(st.integers(0, 9)))
    largest = torch.finfo(torch.float64).max
    bad = st.sampled_from([float("nan"), float("inf"), -float("inf"), 0.9 * largest, -0.9 * largest])
    for tensor in (h, *parts):
        for _ in range(data.draw(st.integers(0, 2))):
            tensor.view(-1)[data.draw(st.integers(0, tensor.numel() - 1))] = data.draw(bad)
    trusted = [torch.tensor([[data.draw(st.booleans())], [True]]) for _ in places]
    # Exact products and sums, so that all backends overflow at the same places.
    alphas = st.sampled_from([0.0, 0.5, 1.0])
    alpha = torch.tensor([data.draw(alphas) for _ in range(count)])
    hypothesis.assume(sum(a for a, p in zip(alpha.tolist(), places, strict=False) if p.replace) in (0.0, 0.5, 1.0, 2.0))
    flat = BlendLayout(places, 5).flat
    results = [_run(b, h, parts, trusted, alpha, flat, 1) for b in ("reference", *NATIVE)]
    for (y, blamed), (want, expected) in itertools.pairwise(results):
        assert blamed.tolist() == expected.tolist()
        torch.testing.assert_close(y, want, rtol=1e-15, atol=0, equal_nan=True)
        if blamed.any():
            torch.testing.assert_close(y, h, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", NATIVE)
def test_what_the_kernels_may_not_trust_is_refused(backend):
    device = DEVICES[backend]
    h, parts, trusted = _inputs((3, 7), 1, PLACES[0], torch.float32, device=device)
    alpha = torch.ones(3, device=device)
    run = graft_blend.backend(backend)
    with pytest.raises(ValueError, match=r"\(3, 4\)"):
        run(h, parts, trusted, alpha, [0, 0, 4, 0], 1)
    with pytest.raises(ValueError, match="places"):
        run(h, parts, trusted, alpha, [0, 0, 7], 1)
    with pytest.raises(ValueError, match=r"float64"):
        run(h, [parts[0].double()], trusted, alpha, [0, 0, 7, 0], 1)
    with pytest.raises(ValueError, match=r"int32"):
        run(h.int(), parts, trusted, alpha, [0, 0, 7, 0], 1)


def test_many_seeds_fall_back_to_the_reference():
    places = [Place(i, 0, 3, False) for i in range(70)]
    h, parts, trusted = _inputs((2, 3), 1, places, torch.float64)
    y, _ = graft_blend(h, parts, trusted, torch.full((70,), 0.5), BlendLayout(places, 3).flat, 1)
    torch.testing.assert_close(y, h + 0.5 * torch.stack(parts).sum(0))


def test_shape_functions():
    h, parts, trusted = _inputs((3, 7), 1, PLACES[2], torch.float32)
    flat = BlendLayout(PLACES[2], 7).flat
    alpha = torch.ones(3)
    y, blamed = graft_blend(h, parts, trusted, alpha, flat, 1)
    gh, gparts = graft_blend_backward(h, alpha, blamed, flat, 1)
    fake_y, fake_blamed = graft_blend.fake(h, parts, trusted, alpha, flat, 1)
    fake_gh, fake_parts = graft_blend_backward.fake(h, alpha, blamed, flat, 1)
    for real, fake in zip((y, blamed, gh, *gparts), (fake_y, fake_blamed, fake_gh, *fake_parts), strict=True):
        assert (real.shape, real.dtype) == (fake.shape, fake.dtype)
