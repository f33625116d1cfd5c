"""``graft_elementwise`` in Triton (its interpreter where there is no GPU) and on PyTorch, against autograd and loops.

Tolerances. Both sides compute in float32 (float64 for float64) and round once to the layer's dtype. The kernel forms
the sum of the scaled weights before it multiplies, so the results differ by a few roundings of terms of the size of the
largest: 16 eps of float32 times the scale, and for halves half a unit in the last place more, that is eps of the dtype
times the scale. Gradients of weights sum ``n`` terms, in another order: ``n`` eps of float32 times the largest sum's
scale.
"""

from __future__ import annotations

import pytest
import torch

from esper.ops import registry
from esper.ops.graft import (
    blend_elementwise,
    elementwise,
    elementwise_reference,
    graft_elementwise,
    graft_elementwise_backward,
    triton_elementwise,
)

DEVICE = "cpu" if registry.triton_interprets() else "cuda"
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _fresh_memory_is_full_of_nan():
    """Deterministic mode fills what torch.empty hands out with NaN: an output left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_triton_serves_this_machine():
    """Without it the rest of this file would compare nothing."""
    assert graft_elementwise.reason(registry.Backend.TRITON) == ""
    assert graft_elementwise_backward.reason(registry.Backend.TRITON) == ""


class Case:
    """Seeds (first feature, one past the last or None for all, replace) and what they work on."""

    def __init__(self, shape, dim, seeds, dtype=torch.float32, *, activation=None, shifted=True, alphas=None):
        def draw(*size):
            return torch.randn(*size, dtype=torch.float64).to(device=DEVICE, dtype=dtype)

        features = shape[dim]
        self.x, self.h, self.gy = draw(*shape), draw(*shape), draw(*shape)
        self.scale = draw(len(seeds), features)
        self.shift = draw(len(seeds), features) if shifted else None
        self.places = []
        for i, (begin, end, replace) in enumerate(seeds):
            self.places += [i, begin or 0, features if end is None else end, int(replace)]
        numbers = alphas or [0.25 + 0.125 * i for i in range(len(seeds))]
        self.alpha = torch.tensor([*numbers, 9.0], device=DEVICE)  # a row of alpha that is nobody's
        self.activation, self.dim = activation, dim

    @property
    def rest(self):
        return self.scale, self.shift, self.places, self.activation, self.dim

    def forward(self, backend):
        return graft_elementwise.backend(backend)(self.x, self.h, self.alpha, *self.rest)

    def backward(self, backend, faults, *wants):
        run = graft_elementwise_backward.backend(backend)
        return run(self.gy, self.x, self.alpha, faults, *self.rest, *(wants or (True, True, True)))

    def check(self):
        y, faults = self.forward("triton")
        want, expected = self.forward("reference")
        assert faults.tolist() == expected.tolist()
        assert_close(y, want, 1)
        grads = self.backward("triton", faults)
        terms = self.x.numel() // self.x.shape[self.dim]
        exact = self.backward("reference", faults)
        for got, other, sums in zip(grads, exact, (1, 1, terms, terms), strict=True):
            assert_close(got, other, sums)
        return y, faults, grads


def assert_close(got, want, terms):
    assert (got.shape, got.dtype, got.device, got.stride()) == (want.shape, want.dtype, want.device, want.stride())
    if want.numel() == 0:
        return
    finite = want[torch.isfinite(want)]
    scale = max(1.0, finite.abs().max().item()) if finite.numel() else 1.0
    eps = torch.finfo(torch.float32).eps
    allowed = scale * (16 * eps + terms * eps)
    if want.dtype is not torch.float32:
        allowed += scale * torch.finfo(want.dtype).eps
    torch.testing.assert_close(got, want, rtol=0, atol=allowed, equal_nan=True)


PLAIN = [(None, None, False)]
MIXED = [(None, None, True), (None, None, False), (None, None, True)]
CHUNKS = [(0, 3, True), (3, 7, False), (None, None, True)]
SHAPES = {"rows": ((5, 7), 1), "tokens": ((2, 3, 7), 2), "images": ((2, 7, 3, 5), 1), "vector": ((7,), 0)}


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("seeds", [PLAIN, MIXED, CHUNKS], ids=["plain", "mixed", "chunks"])
@pytest.mark.parametrize("shape", SHAPES)
def test_odd_sizes(dtype, seeds, shape):
    Case(*SHAPES[shape], seeds, dtype).check()


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "tanh", "sigmoid", "silu"])
@pytest.mark.parametrize("shifted", [False, True])
def test_activations(activation, shifted):
    Case((5, 7), 1, MIXED, activation=activation, shifted=shifted).check()


def test_more_features_than_a_tile():
    Case((3, 300), 1, [(0, 270, False), (270, 300, True)], torch.bfloat16).check()
    Case((1, 2, 17, 16), 1, PLAIN).check()


def test_rows_in_stretches(monkeypatch):
    """Sums over rows are split, and the parts added in order: twice the same bits."""
    monkeypatch.setattr(triton_elementwise, "processors", lambda device: 3)
    case = Case((70, 5), 1, MIXED, activation="silu")
    _, faults, grads = case.check()
    for one, other in zip(grads, case.backward("triton", faults), strict=True):
        assert torch.equal(one, other)
    Case((9, 3, 2, 2), 1, MIXED).check()


def test_channels_last_stays_and_nothing_is_copied_back():
    case = Case((2, 5, 3, 4), 1, MIXED, activation="gelu")
    case.x, case.h, case.gy = (t.to(memory_format=torch.channels_last) for t in (case.x, case.h, case.gy))
    y, _, (gx, gh, *_) = case.check()
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (y, gx, gh))
    case.x = case.x.contiguous()  # formats need not agree
    case.check()


def test_strided_rows():
    case = Case((6, 5), 1, MIXED)
    wide = torch.randn(6, 17, device=DEVICE)
    case.x, case.h, case.gy = wide[:, 1:6], wide[:, 6:11], wide[:, 12:17]
    case.check()
    case.h = torch.randn(5, 6, device=DEVICE).t()
    case.check()


def test_alpha_with_a_stride():
    case = Case((5, 7), 1, MIXED)
    want = case.check()
    apart = torch.full((8,), float("nan"), device=DEVICE)
    apart[::2] = case.alpha
    case.alpha = apart[::2]
    y, faults, grads = case.check()
    assert torch.equal(y, want[0]) and torch.equal(faults, want[1])
    assert all(torch.equal(a, b) for a, b in zip(grads, want[2], strict=True))


def test_the_layout_is_made_once(monkeypatch):
    case = Case((5, 7), 1, CHUNKS)
    case.forward("triton")
    monkeypatch.setattr(elementwise.BlendLayout, "from_flat", lambda *_: pytest.fail("made again"))
    y, faults = case.forward("triton")
    case.backward("triton", faults)
    assert torch.isfinite(y).all()


def test_empty():
    y, faults, grads = Case((0, 3), 1, PLAIN).check()
    assert y.shape == (0, 3) and faults.tolist() == [0] and not any(g.any() for g in grads)


def bits(t):
    return t.contiguous().view(torch.int16 if t.element_size() == 2 else torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_asleep_is_the_host_bit_for_bit(dtype):
    case = Case((5, 7), 1, MIXED, dtype, alphas=[0.0, 0.0, 0.0])
    case.h[3, 2], case.h[4, 1], case.h[1, 1] = float("nan"), -0.0, float("inf")
    case.gy[1, 1] = -0.0
    case.x[2], case.scale[0], case.shift[1] = float("nan"), float("inf"), float("nan")
    y, faults, (gx, gh, *weights) = case.check()
    assert torch.equal(bits(y), bits(case.h)) and torch.equal(bits(gh), bits(case.gy))
    assert not faults.any() and not any(g.any() for g in (gx, *weights))


#: NaNs that no conversion gives: quiet and signalling, with bits in them.
NANS = {torch.float32: (0x7F812345, -0x3EDCB), torch.bfloat16: (0x7F85, -0x3B), torch.float16: (0x7C15, -0x1AB)}


@pytest.mark.parametrize("dtype", NANS, ids=str)
def test_where_nothing_counts_a_nan_keeps_its_bits(dtype):
    case = Case((5, 7), 1, [(0, 4, False), (4, 7, False)], dtype, alphas=[0.5, 0.0])
    bits(case.h)[1:3, 4:6] = torch.tensor(NANS[dtype], dtype=bits(case.h).dtype, device=DEVICE)
    y, _ = case.forward("triton")
    assert torch.equal(bits(y)[:, 4:], bits(case.h)[:, 4:])


def test_a_sleeping_seed_is_not_read():
    case = Case((5, 7), 1, MIXED, alphas=[0.5, 0.0, 0.25])
    case.scale[1], case.shift[1] = float("nan"), float("inf")
    y, faults, grads = case.check()
    assert torch.isfinite(y).all() and not faults.any()
    assert all(torch.isfinite(g).all() for g in grads) and not grads[2][1].any()


def test_a_replaced_host_is_not_read():
    case = Case((5, 7), 1, [(None, None, True)], alphas=[1.0], activation="relu")
    case.h[:] = float("nan")
    y, faults, (_, gh, *_) = case.check()
    assert not faults.any() and not gh.any()
    # One product and one sum, which the kernel may round together: one eps of the larger term.
    torch.testing.assert_close(y, case.x.relu() * case.scale + case.shift, rtol=0, atol=8 * 2**-23)
    case.shift = None
    case.scale[:] = -0.0
    y, _ = case.forward("triton")
    assert torch.equal(bits(y), bits(case.x.relu() * case.scale))  # the sign of zero is the seed's


FAULTS = {
    "scale": lambda c: c.scale[1].__setitem__(4, float("nan")),
    "shift": lambda c: c.shift[2].__setitem__(5, float("inf")),
    "overflow of a seed": lambda c: (c.scale[1].mul_(3e38), c.x.mul_(100)),
    "host": lambda c: c.h[2].__setitem__(1, float("inf")),
    "input": lambda c: c.x[2].__setitem__(1, float("nan")),
    "input and weight elsewhere": lambda c: (
        c.x[2].__setitem__(1, float("nan")),
        c.scale[0].__setitem__(0, float("inf")),
    ),
    "host and weight": lambda c: (c.h[2].__setitem__(1, float("nan")), c.scale[0].__setitem__(0, float("inf"))),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("seeds", [MIXED, CHUNKS], ids=["layer", "chunks"])
def test_faults(fault, seeds):
    case = Case((5, 7), 1, seeds)
    FAULTS[fault](case)
    y, faults = case.forward("triton")
    want, expected = case.forward("reference")
    assert faults.tolist() == expected.tolist()
    assert faults.any() == (fault not in ("host", "input"))
    assert_close(y, want, 1)
    if faults.any():
        assert torch.equal(bits(y), bits(case.h))
        gx, gh, *weights = case.backward("triton", faults)
        assert torch.equal(gh, case.gy) and not any(g.any() for g in (gx, *weights))


def test_a_sum_that_overflows_names_the_largest():
    case = Case((2, 3), 1, [(None, None, False)] * 3, torch.float16, shifted=False, alphas=[1.0, 1.0, 1.0])
    case.x[:], case.h[:] = 1.0, 0.0
    case.scale[0], case.scale[1], case.scale[2] = 40000.0, 40000.0, 100.0
    y, faults = case.forward("triton")
    assert faults.tolist() == [1, 1, 0] == case.forward("reference")[1].tolist()
    assert torch.equal(y, case.h)


def test_only_what_is_wanted():
    case = Case((5, 7), 1, MIXED, activation="gelu")
    _, faults, everything = case.check()
    for backend in ("triton", "reference"):
        for wants in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
            some = case.backward(backend, faults, *wants)
            for got, whole, wanted in zip(some, everything, (*wants[:2], wants[2], wants[2]), strict=True):
                assert got.shape == whole.shape if wanted else got.numel() == 0


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid"])
@pytest.mark.parametrize("shape", ["tokens", "images"])
def test_true_gradients(activation, shape):
    """The reference under gradcheck, the same twice, and its backward equal to autograd's, in float64."""
    case = Case(*SHAPES[shape], CHUNKS, torch.float64, activation=activation)
    leaves = [t.requires_grad_() for t in (case.x, case.h, case.scale, case.shift)]

    def blend(x, h, scale, shift):
        return blend_elementwise(x, h, case.alpha, scale, shift, case.places, activation, case.dim)[0]

    with registry.use_backend("reference"):
        assert torch.autograd.gradcheck(blend, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(blend, leaves, fast_mode=True)
    x, h, scale, shift = leaves
    y = elementwise_reference.elementwise_blend(x, h, case.alpha, scale, shift, case.places, activation, case.dim)
    truth = torch.autograd.grad(y, leaves, case.gy)
    with torch.no_grad():
        found = case.backward("reference", torch.zeros(3, dtype=torch.uint8, device=DEVICE))
    for got, want in zip(found, truth, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_the_cuda_fallback_composes_the_same(monkeypatch):
    """Its blend is the CUDA kernel's; here the reference stands in for that one."""
    from esper.ops.graft import graft_blend

    kernels = dict(graft_elementwise._kernels)
    try:
        elementwise_reference._on_cuda(graft_blend.backend("reference"))
        case = Case((2, 7, 3, 5), 1, MIXED, activation="silu")
        case.h = case.h.to(memory_format=torch.channels_last)
        y, faults = graft_elementwise._kernels[registry.Backend.CUDA](case.x, case.h, case.alpha, *case.rest)
        want, _ = case.forward("reference")
        assert_close(y, want, 1)
        assert not faults.any()
    finally:
        graft_elementwise._kernels.clear()
        graft_elementwise._kernels.update(kernels)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_what_does_not_fit_is_refused(backend):
    def refused(match, **changes):
        case = Case((4, 3), 1, PLAIN)
        for name, value in changes.items():
            setattr(case, name, value)
        with pytest.raises(ValueError, match=match):
            case.forward(backend)

    like = {"device": DEVICE}
    refused("must agree", x=torch.zeros(3, 3, **like))
    refused("dimension 2", dim=2)
    refused(r"scale is \(2, 3\)", scale=torch.zeros(2, 3, **like))
    refused("float64", shift=torch.zeros(1, 3, dtype=torch.float64, **like))
    refused("row 1 of alpha", alpha=torch.zeros(1, **like), places=[1, 0, 3, 0])
    refused("must be float32", alpha=torch.zeros(1, dtype=torch.float64, **like))
    refused("features 0 to 4", places=[0, 0, 4, 0])
    refused("holds 3 numbers", places=[0, 0, 3])
    refused("swish", activation="swish")


def test_opcheck():
    case = Case((4, 3), 1, PLAIN, activation="gelu")
    leaves = [t.requires_grad_() for t in (case.x, case.h, case.scale, case.shift)]
    x, h, scale, shift = leaves
    torch.library.opcheck(graft_elementwise.overload, (x, h, case.alpha, scale, shift, case.places, "gelu", 1))
    faults = torch.zeros(1, dtype=torch.uint8, device=DEVICE)
    args = (case.gy, x.detach(), case.alpha, faults, scale.detach(), shift.detach(), case.places, "gelu", 1)
    torch.library.opcheck(graft_elementwise_backward.overload, (*args, True, False, True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("shape", [((8192, 1024), 1), ((32, 96, 56, 56), 1)], ids=["rows", "images"])
def test_layers_of_real_size(dtype, shape):
    """What the interpreter is too slow for."""
    case = Case(*shape, MIXED, dtype, activation="gelu")
    case.check()
    case.x, case.h = (t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in (case.x, case.h))
    case.check()
