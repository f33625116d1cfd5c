"""``graft_bank`` in Triton (its interpreter where there is no GPU) against the reference, and that against autograd.

Tolerances. Both sides round the same values to the layer's dtype: the inner values times their coefficient, and on the
way back the gradient of z. Between these points they sum in float32, in another order. So an inner value may fall to
the other side of a rounding border, which changes it by one eps, and each output is a sum of such values: the error
stays within a few eps of the sum of the terms' sizes. :func:`assert_close` takes the largest size of a tensor as the
scale of all its elements (sums of n terms of like size cancel to less than that), and allows 4 eps of it for
halves. In float32 the borders do not show; there 64 eps of the scale cover sums of up to 300 terms.
"""

from __future__ import annotations

import pytest
import torch

from esper.ops import registry
from esper.ops.graft import bank_reference, graft_bank, graft_bank_backward
from esper.ops.graft import triton as launcher
from esper.ops.graft.bank import bank_layout

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
    assert graft_bank.reason(registry.Backend.TRITON) == ""
    assert graft_bank_backward.reason(registry.Backend.TRITON) == ""


class Case:
    """A bank and what it works on.

    ``seeds``: rank, first feature, one past the last (None: all), replace.
    """

    def __init__(
        self,
        rows,
        d_in,
        d_out,
        seeds,
        dtype=torch.float32,
        *,
        activation=None,
        gated=False,
        bias=False,
        alphas=None,
    ):
        def draw(*shape, scale=1.0):
            return (torch.randn(*shape, dtype=torch.float64) * scale).to(device=DEVICE, dtype=dtype)

        ranks = sum(seed[0] for seed in seeds)
        self.x, self.h, self.gy = draw(rows, d_in), draw(rows, d_out), draw(rows, d_out)
        self.down = draw(ranks, d_in, scale=d_in**-0.5)
        self.value = draw(ranks, d_in, scale=d_in**-0.5) if gated else None
        self.up = draw(ranks, d_out, scale=ranks**-0.5)
        self.bias = draw(ranks, scale=0.3) if bias else None
        self.value_bias = draw(ranks, scale=0.3) if bias and gated else None
        self.activation = activation
        numbers = alphas or [0.25 + 0.125 * i for i in range(len(seeds))]
        self.alpha = torch.tensor([*numbers, 9.0], device=DEVICE)  # a row of alpha that is nobody's
        self.seats, row = [], 0
        for i, (rank, begin, end, replace) in enumerate(seeds):
            self.seats += [i, begin or 0, d_out if end is None else end, int(replace), row, row + rank]
            row += rank

    @property
    def weights(self):
        return self.down, self.value, self.up, self.bias, self.value_bias

    def forward(self, backend):
        return graft_bank.backend(backend)(self.x, self.h, self.alpha, *self.weights, self.seats, self.activation)

    def backward(self, backend, faults, want_x=True, want_h=True, want_weights=True):
        run = graft_bank_backward.backend(backend)
        wants = want_x, want_h, want_weights
        return run(self.gy, self.x, self.alpha, faults, *self.weights, self.seats, self.activation, *wants)

    def check(self):
        y, faults = self.forward("triton")
        want, none = self.forward("reference")
        assert faults.tolist() == none.tolist()
        assert_close(y, want)
        grads = self.backward("triton", faults)
        for got, expected in zip(grads, self.backward("reference", faults), strict=True):
            assert_close(got, expected)
        return y, faults, grads


def assert_close(got, want):
    assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device)
    if want.numel() == 0:
        return
    scale = max(1.0, want[torch.isfinite(want)].abs().max().item() if torch.isfinite(want).any() else 1.0)
    allowed = (64 if want.dtype is torch.float32 else 4) * torch.finfo(want.dtype).eps * scale
    torch.testing.assert_close(got, want, rtol=0, atol=allowed, equal_nan=True)


PLAIN = [(4, None, None, False)]
MIXED = [(3, None, None, True), (5, None, None, False), (2, None, None, True)]
CHUNKS = [(3, 0, 5, True), (2, 5, 11, False), (4, None, None, True)]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("seeds", [PLAIN, MIXED, CHUNKS], ids=["plain", "mixed", "chunks"])
def test_odd_sizes(dtype, seeds):
    Case(19, 13, 11, seeds, dtype).check()


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "tanh", "sigmoid", "silu"])
@pytest.mark.parametrize("gated", [False, True], ids=["bottleneck", "gated"])
def test_activations(activation, gated):
    Case(9, 7, 11, MIXED, activation=activation, gated=gated, bias=True).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_aligned(dtype):
    """The variant that is told of multiples of 16, with more than one tile in every direction."""
    Case(70, 80, 144, [(20, 0, 48, True), (9, 48, 144, False)], dtype, activation="silu", bias=True).check()


@pytest.mark.parametrize("gated", [False, True], ids=["bottleneck", "gated"])
def test_more_ranks_than_a_tile(gated):
    """z and its gradient go through memory; rank 256 is the largest that is promised for one seed."""
    Case(5, 7, 9, [(3, 0, 4, True), (70, None, None, False)], activation="gelu", gated=gated, bias=True).check()
    if gated:
        Case(2, 5, 4, [(256, None, None, False)], torch.bfloat16, gated=True, activation="tanh").check()


def test_tall_blocks_of_many_rows():
    Case(1030, 6, 5, [(2, None, None, False)], torch.bfloat16).check()


def test_rows_shared_by_programs(monkeypatch):
    """Few rows on a GPU of many processors: several programs take the tiles of a block in turns."""
    monkeypatch.setattr(launcher, "processors", lambda device: 3)
    Case(17, 20, 170, [(3, 0, 70, True), (4, None, None, False)]).check()


def test_rows_in_stretches(monkeypatch):
    """Sums over rows are split, and the parts added in order: twice the same bits."""
    monkeypatch.setattr(launcher, "processors", lambda device: 3)
    case = Case(260, 5, 4, PLAIN, activation="silu", gated=True, bias=True)
    _, faults, grads = case.check()
    for one, other in zip(grads, case.backward("triton", faults), strict=True):
        assert torch.equal(one, other)


def test_strided_rows_and_leading_dimensions():
    case = Case(12, 10, 8, MIXED)
    wide_x, wide_h = torch.randn(12, 23, device=DEVICE), torch.randn(12, 19, device=DEVICE)
    case.x, case.h, case.gy = wide_x[:, 5:15], wide_h[:, 2:10], wide_h[:, 11:19]
    case.check()
    case.x, case.h, case.gy = (t.unflatten(0, (2, 6)) for t in (case.x, case.h, case.gy))
    case.check()
    case.x, case.h = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (case.x, case.h))
    case.up = case.up.t().contiguous().t()
    case.check()


@pytest.mark.parametrize("rows", [0, 1])
def test_empty_and_single(rows):
    y, faults, grads = Case(rows, 3, 2, PLAIN, gated=True, bias=True, activation="relu").check()
    assert y.shape == (rows, 2) and faults.tolist() == [0]
    assert rows or not any(g.any() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_asleep_is_the_host_bit_for_bit(dtype):
    case = Case(19, 13, 11, MIXED, dtype, alphas=[0.0, 0.0, 0.0])
    case.h[3, 2], case.h[4, 1], case.h[5, 1] = float("nan"), -0.0, float("inf")
    case.gy[1, 1] = -0.0
    case.x[2], case.down[0], case.up[1] = float("nan"), float("inf"), float("nan")
    y, faults, (gx, gh, *weights) = case.check()
    assert torch.equal(bits(y), bits(case.h)) and torch.equal(bits(gh), bits(case.gy))
    assert not faults.any()
    assert not any(g.any() for g in (gx, *weights))


def bits(t):
    return t.contiguous().view(torch.int16 if t.element_size() == 2 else torch.int32)


#: NaNs that no conversion gives: quiet and signalling, with bits in them.
NANS = {torch.float32: (0x7F812345, -0x3EDCB), torch.bfloat16: (0x7F85, -0x3B), torch.float16: (0x7C15, -0x1AB)}


@pytest.mark.parametrize("dtype", NANS, ids=str)
def test_where_nothing_counts_a_nan_keeps_its_bits(dtype):
    case = Case(5, 4, 8, [(2, 0, 4, False), (2, 4, 8, False)], dtype, alphas=[0.5, 0.0])
    bits(case.h)[1:3, 4:6] = torch.tensor(NANS[dtype], dtype=bits(case.h).dtype, device=DEVICE)
    y, *_ = case.forward("triton")
    assert torch.equal(bits(y)[:, 4:], bits(case.h)[:, 4:])


@pytest.mark.parametrize("gated", [False, True], ids=["bottleneck", "gated"])
def test_a_sleeping_seed_is_not_read(gated):
    case = Case(9, 7, 11, MIXED, activation="sigmoid", gated=gated, bias=True, alphas=[0.5, 0.0, 0.25])
    for t in case.weights:
        if t is not None:
            t[3:8] = float("nan")
    y, faults, grads = case.check()
    assert torch.isfinite(y).all() and not faults.any()
    assert all(torch.isfinite(g).all() for g in grads)
    assert not grads[2][3:8].any() and not grads[4][3:8].any()


def test_a_replaced_host_is_not_read():
    case = Case(9, 7, 11, MIXED, alphas=[1.0, 0.5, 0.5])
    case.h[:] = float("nan")
    y, faults, (_, gh, *_) = case.check()
    assert torch.isfinite(y).all() and not faults.any() and not gh.any()
    # One seed at alpha 1 is the layer: its own value, of the host nothing.
    case = Case(9, 7, 11, [(3, None, None, True)], alphas=[1.0])
    y, _ = case.forward("triton")
    assert_close(y, case.x @ case.down.t() @ case.up)


def test_a_segment_without_awake_seeds_keeps_the_sign_of_zero():
    case = Case(5, 4, 8, [(2, 0, 4, False), (2, 4, 8, False)], alphas=[0.5, 0.0])
    case.h[:] = -0.0
    y, *_ = case.check()
    assert torch.signbit(y[:, 4:]).all()


FAULTS = {
    "weight": lambda c: c.up[4].__setitem__(7, float("nan")),
    "overflow of a seed": lambda c: c.down[3:8].mul_(1e38),
    "host": lambda c: c.h[2].__setitem__(1, float("inf")),
    "input": lambda c: c.x[2].__setitem__(1, float("nan")),
    "input and weight": lambda c: (c.x[2].__setitem__(1, float("nan")), c.up[1].__setitem__(3, float("inf"))),
    "host and weight": lambda c: (c.h[2].__setitem__(1, float("nan")), c.down[9].__setitem__(0, float("inf"))),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("gated", [False, True], ids=["bottleneck", "gated"])
@pytest.mark.parametrize("seeds", [MIXED, CHUNKS], ids=["layer", "chunks"])
def test_faults(fault, gated, seeds):
    if seeds is CHUNKS:
        seeds = [(3, 0, 5, True), (5, 5, 11, False), (2, None, None, True)]
    case = Case(20, 7, 11, seeds, gated=gated)
    FAULTS[fault](case)
    y, faults = case.forward("triton")
    want, expected = case.forward("reference")
    assert faults.tolist() == expected.tolist()
    assert_close(y, want)
    assert faults.any() == (fault not in ("host", "input"))
    grads = case.backward("triton", faults)
    for got, exact in zip(grads, case.backward("reference", faults), strict=True):
        if faults.any():
            assert_close(got, exact)
    if faults.any():
        assert torch.equal(bits(y), bits(case.h))
        assert torch.equal(grads[1], case.gy)
        assert not any(g.any() for g in (grads[0], *grads[2:]))


def test_a_sum_that_overflows_names_the_largest():
    """Both contributions are finite and only their sum is not; equal sizes share the blame."""
    case = Case(3, 2, 4, [(1, None, None, False), (1, None, None, False), (1, None, None, False)], torch.float16)
    case.alpha[:3] = 1.0
    case.x[:], case.down[:], case.h[:] = 1.0, 0.5, 0.0
    case.up[0], case.up[1], case.up[2] = 40000.0, 40000.0, 100.0
    y, faults = case.forward("triton")
    assert faults.tolist() == [1, 1, 0] and case.forward("reference")[1].tolist() == [1, 1, 0]
    assert torch.equal(y, case.h)


def test_a_fault_in_one_block_gives_the_host_everywhere():
    """The choice is for the layer: blocks of rows that were sound follow."""
    case = Case(70, 7, 11, MIXED)
    case.h[:] = torch.randn(70, 11, device=DEVICE)
    case.x[60] = 1e38
    case.down[:3] = 3.0
    y, faults = case.forward("triton")
    assert faults.tolist() == [1, 0, 0] == case.forward("reference")[1].tolist()
    assert torch.equal(y, case.h)


def test_only_what_is_wanted():
    case = Case(9, 7, 11, MIXED, activation="gelu", gated=True, bias=True)
    _, faults, everything = case.check()
    for wants in ((True, False, False), (False, True, False), (False, False, True)):
        some = case.backward("triton", faults, *wants)
        flags = [wants[0], wants[1], *[wants[2]] * 5]
        for got, whole, wanted in zip(some, everything, flags, strict=True):
            assert torch.equal(got, whole) if wanted else got.numel() == 0


@pytest.mark.parametrize("gated", [False, True], ids=["bottleneck", "gated"])
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "silu", "tanh", "sigmoid"])
def test_reference_has_the_true_gradients(activation, gated):
    """The reference's forward under gradcheck, and its backward equal to autograd's, in float64."""
    case = Case(3, 4, 6, [(2, 0, 3, True), (3, None, None, False), (1, None, None, True)], torch.float64,
                activation=activation, gated=gated, bias=True, alphas=[0.75, 0.5, 0.625])  # fmt: skip
    leaves = [case.x, case.h, *(t for t in case.weights if t is not None)]

    def blend(x, h, *weights):
        down, value, up, bias, value_bias = weights if gated else (weights[0], None, *weights[1:], None)
        args = x, h, case.alpha, down, value, up, bias, value_bias, case.seats, activation
        return bank_reference.bank_blend(*args)[0]

    for leaf in leaves:
        leaf.requires_grad_(True)
    assert torch.autograd.gradcheck(blend, leaves)
    truth = torch.autograd.grad(blend(*leaves), leaves, case.gy)
    for leaf in leaves:
        leaf.requires_grad_(False)
    found = case.backward("reference", torch.zeros(3, dtype=torch.uint8, device=DEVICE))
    for got, want in zip([g for g in found if g.numel()], truth, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_relu_slope():
    case = Case(6, 4, 5, PLAIN, torch.float64, activation="relu", alphas=[0.5])
    for leaf in (case.x, case.down, case.up):
        leaf.requires_grad_(True)
    y, _ = bank_reference.bank_blend(case.x, case.h, case.alpha, *case.weights, case.seats, "relu")
    truth = torch.autograd.grad(y, (case.x, case.down, case.up), case.gy)
    with torch.no_grad():
        gx, _, gdown, _, gup, *_ = case.backward("reference", torch.zeros(1, dtype=torch.uint8, device=DEVICE))
    for got, want in zip((gx, gdown, gup), truth, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_what_has_no_kernel_falls_back_to_the_reference():
    double = Case(4, 3, 5, PLAIN, torch.float64)
    many = Case(4, 3, 5, [(1, None, None, False)] * 70, alphas=[0.01] * 70)
    for case in (double, many):
        assert torch.equal(case.forward("triton")[0], case.forward("reference")[0])
        faults = torch.zeros(len(case.seats) // 6, dtype=torch.uint8, device=DEVICE)
        for got, want in zip(case.backward("triton", faults), case.backward("reference", faults), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_what_does_not_fit_is_refused(backend):
    def refused(match, **changes):
        case = Case(4, 3, 5, PLAIN)
        for name, value in changes.items():
            setattr(case, name, value)
        with pytest.raises(ValueError, match=match):
            case.forward(backend)

    like = {"device": DEVICE}
    refused("all but the last dimension", x=torch.zeros(3, 3, **like))
    refused(r"up is \(4, 6\)", up=torch.zeros(4, 6, **like))
    refused(r"down is \(4, 2\)", down=torch.zeros(4, 2, **like))
    refused("float64", down=torch.zeros(4, 3, dtype=torch.float64, **like))
    refused("row 1 of alpha", alpha=torch.zeros(1, **like), seats=[1, 0, 5, 0, 0, 4])
    refused("float32", alpha=torch.zeros(1, dtype=torch.float64, **like))
    refused("features 0 to 6", seats=[0, 0, 6, 0, 0, 4])
    refused("the bank 4", seats=[0, 0, 5, 0, 0, 3])
    refused("six for each", seats=[0, 0, 5])
    refused("swish", activation="swish")
    refused("both biases", value=torch.zeros(4, 3, **like), bias=torch.zeros(4, **like))


def test_opcheck_and_shape_functions():
    case = Case(4, 3, 5, PLAIN, activation="gelu", gated=True, bias=True)
    forward = (case.x, case.h, case.alpha, *case.weights, case.seats, "gelu")
    faults = torch.zeros(1, dtype=torch.uint8, device=DEVICE)
    backward = (case.gy, case.x, case.alpha, faults, *case.weights, case.seats, "gelu", True, False, True)
    for op, args in ((graft_bank, forward), (graft_bank_backward, backward)):
        torch.library.opcheck(op.overload, args)
    for real, fake in zip(case.forward("triton"), graft_bank.fake(*forward), strict=True):
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


def test_layout_is_made_once():
    assert bank_layout((0, 0, 5, 0, 0, 4), 5, 4) is bank_layout((0, 0, 5, 0, 0, 4), 5, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["bottleneck", "gated"])
@pytest.mark.parametrize("rows", [1, 1000, 5000])
def test_layers_of_real_size(dtype, gated, rows):
    """What the interpreter is too slow for: many blocks, tiles, ranks and stretches at once."""
    for seeds in ([(16, None, None, False)] * 4, [(64, 0, 512, True), (128, 512, 1024, False), (16, None, None, True)]):
        Case(rows, 768, 1024, seeds, dtype, activation="silu", gated=gated, bias=True).check()
