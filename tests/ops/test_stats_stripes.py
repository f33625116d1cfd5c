"""How the Triton kernels divide the statistics of many rows: long stripes, several levels of joins, every layout."""

from __future__ import annotations

import math

import pytest
import torch

from esper.kernels import stats as kernels
from esper.ops import registry
from esper.ops.stats import stripes
from esper.ops.stats.stripes import plan
from esper.ops.stats.views import view3

from .test_stats import assert_stats, call, rows_of

pytestmark = [
    pytest.mark.skipif(bool(registry.get("channel_stats").reason(registry.Backend.TRITON)), reason="needs Triton"),
    # The interpreter's NumPy, of sums and of a largest value that are not used.
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered", "ignore:invalid value encountered in reduce"),
]
APART, FEATURES, ROWS = (kind.value for kind in (kernels.APART, kernels.FEATURES, kernels.ROWS))


def divided(x, seeds, channel_dim):
    base, view = view3(x, channel_dim)
    return plan(base, view, base, view, seeds)


@pytest.fixture
def long_stripes(monkeypatch):
    """Two programs, so that few rows make stripes of many blocks."""
    monkeypatch.setattr(stripes, "_PROGRAMS", 2)


LAYOUTS = {
    "wide rows": ((900, 128), lambda x: x, -1, FEATURES, 4),
    "narrow rows": ((3000, 8), lambda x: x, -1, FEATURES, 4),
    "rows of odd width": ((1100, 15), lambda x: x, -1, FEATURES, 1),
    "images": ((12, 8, 9, 8), lambda x: x, 1, ROWS, 4),
    "images of odd size": ((12, 8, 7, 7), lambda x: x, 1, ROWS, 1),
    "channels last": ((9, 8, 16, 16), lambda x: x.contiguous(memory_format=torch.channels_last), 1, FEATURES, 4),
    "every other step": ((30, 40, 16), lambda x: x[:, ::2], -1, FEATURES, 4),
    "every other feature": ((1200, 16), lambda x: x[:, ::2], -1, APART, 1),
    "transposed": ((16, 2400), lambda x: x.t(), -1, ROWS, 4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_long_stripes(name, dtype, long_stripes):
    shape, view, channel_dim, unit, vector = LAYOUTS[name]
    x = view((torch.randn(shape) * 3 + 2).to(dtype))
    p = divided(x, 2, channel_dim)
    assert p.unit == unit and p.turns > 1
    if dtype is torch.float32:
        assert p.blocks["VECTOR"] == vector
    features, chunks = call("channel_stats", "triton", x, 2, channel_dim)
    assert_stats(features, chunks, rows_of(x, channel_dim), 2, "triton", dtype)
    y, features, chunks = call("act_stats", "triton", x, "relu", 2, channel_dim)
    assert torch.equal(y, x.relu())
    assert_stats(features, chunks, rows_of(y, channel_dim), 2, "triton", dtype)


@pytest.mark.parametrize("channel_dim", [-1, 1])
def test_values_that_are_not_finite_in_long_stripes(channel_dim, long_stripes):
    # The shift must come from values that are finite, however late: a mean of 1e4 about 0 would cost every digit.
    x = torch.randn(1000, 12) + 1e4
    x[:500, 0] = math.nan  # a stripe's first blocks
    x[3, 1], x[999, 1], x[500:, 2], x[:, 3] = math.inf, -math.inf, math.inf, math.nan
    x[0, 11] = math.nan
    if channel_dim == 1:
        x = x.view(2, 500, 12).transpose(1, 2).contiguous()
    features, chunks = call("channel_stats", "triton", x, 3, channel_dim)
    assert_stats(features, chunks, rows_of(x, channel_dim), 3, "triton", torch.float32)
    assert chunks[0, 1] == 1000 and chunks[0, 0] == 0


def test_a_sigmoid_beside_the_chunk_adds_nothing(long_stripes):
    # Lanes outside the chunk hold sigmoid(0), which is not 0.
    x = torch.randn(300, 33)
    y, features, chunks = call("act_stats", "triton", x, "sigmoid", 2, -1)
    assert_stats(features, chunks, rows_of(y, -1), 2, "triton", torch.float32)


@pytest.mark.parametrize("seeds", [1, 4])
def test_more_stripes_than_one_program_joins(seeds):
    x = torch.randn(5 + 32 * (kernels.JOIN["FAN"] + 2), 128) + 100
    p = divided(x, seeds, -1)
    if seeds == 1:
        assert p.stripes > kernels.JOIN["FAN"]
    features, chunks = call("channel_stats", "triton", x, seeds, -1)
    assert_stats(features, chunks, rows_of(x, -1), seeds, "triton", torch.float32)


def test_more_tiles_than_are_read_at_once():
    x = torch.randn(70, kernels.JOIN["BLOCK_T"] * 128 + 260)
    assert divided(x, 1, -1).tiles > kernels.JOIN["BLOCK_T"]
    features, chunks = call("channel_stats", "triton", x, 1, -1)
    assert_stats(features, chunks, rows_of(x, -1), 1, "triton", torch.float32)


def test_few_rows_of_a_wide_chunk_are_shared():
    x = torch.randn(3, 1100)
    features, chunks = call("channel_stats", "triton", x, 1, -1)
    assert_stats(features, chunks, rows_of(x, -1), 1, "triton", torch.float32)


@pytest.mark.parametrize(("rows", "dtype"), [(16384, torch.float32), (16384, torch.bfloat16), (8192, torch.bfloat16)])
def test_partial_results_are_a_few_per_cent_and_programs_fill_a_gpu(rows, dtype):
    x = torch.empty(rows, 4096, dtype=dtype)
    p = divided(x, 4, -1)
    tiles = 4 * p.tiles
    written = 4 * (5 * p.stripes * 4096 + tiles * rows) + 8 * tiles * p.stripes
    assert p.blocks["VECTOR"] == 16 // x.element_size()
    assert 256 <= p.stripes * tiles < 512
    # Written once and read once, of a tensor that is read and, with an activation, written.
    assert written <= 0.03 * x.nbytes


def test_eps_reaches_the_kernel_in_full():
    features, chunks = torch.zeros(5, 3, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64)
    eps = 1.0 + 2.0**-40  # not a float32
    features[0], features[3] = 1, torch.tensor([1.0, eps, 1.0 + 2.0**-39], dtype=torch.float64)
    assert call("seed_health", "triton", features, chunks, eps)[3, 0] == pytest.approx(2 / 3)
    assert call("seed_health", "triton", features, chunks, 0.0)[3, 0] == 0
    assert call("seed_health", "triton", features, chunks, 5e-324)[3, 0] == 0
    assert call("seed_health", "triton", features, chunks, -1.0)[3, 0] == 0


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")
@pytest.mark.parametrize("rows", [20, 80])
def test_gelu_keeps_its_digits_far_below_zero(rows):
    # Both kernels. 1 + erf has none left at -6; erfc, whose exponent is off by w^2 u for w = |x|, has nearly all. A
    # polynomial of nine terms, coefficients that add up to 12 and an exponential good to 2 ulps make the rest: 64 u.
    x = torch.linspace(-12, 12, rows * 50).reshape(rows, 50)
    y, _, _ = call("act_stats", "triton", x, "gelu", 1, -1)
    wide = x.double()
    exact = wide * 0.5 * torch.special.erfc(wide * -math.sqrt(0.5))
    assert ((y.double() - exact).abs() <= (64 + 2 * wide**2) * 2.0**-24 * exact.abs()).all()
    edge = torch.tensor([math.inf, -math.inf, math.nan, 0.0]).expand(rows, 4).contiguous()
    y, features, _ = call("act_stats", "triton", edge, "gelu", 1, -1)
    assert y[0, 0] == math.inf and y[0, 1:3].isnan().all() and y[0, 3] == 0  # as the CPU's
    assert features[4].tolist() == [rows, rows, rows, 0]
