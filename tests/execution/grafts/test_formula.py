"""Every family, mode, scope and tap, on rows and on images, against the formula and against finite differences.

Tolerance: float64 with at most 64 terms a sum of size ~1 to 10, so 1e-11 leaves a factor of a thousand over
64 * 10 * 2**-53 = 7e-14; the graft and the formula differ only in the order of additions.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from .helpers import formula, gradients, graft_set, kernel, leave_to_the_blas, parameters

ROWS = ("lowrank", "bottleneck", "normed_bottleneck", "gated", "normed_gated", "dense", "dense_gelu")
SQUARE = ("elementwise", "activated_elementwise", "residual_block")  # as many features out as in: no chunk scope
ALPHAS = (0.3, 0.0, 0.9)  # ramps on their way, one seed off; replace seeds add up to more than 1
JOINS = list(itertools.product(("input", "output"), ("residual", "replace"), ("layer", "chunk")))
CASES = [(name, *join) for name in ROWS for join in JOINS]
CASES += [
    (name, tap, mode, "layer") for name in SQUARE for tap in ("input", "output") for mode in ("residual", "replace")
]


def _close(grafts, x, h, dim=-1):
    y, expected = grafts(x, h), formula(grafts, x, h, dim)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-11)
    tensors = [x, h, *parameters(grafts)]
    for got, want in zip(gradients(y, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def _check_gradients(grafts, x, h):
    assert torch.autograd.gradcheck(lambda x, h, *_: grafts(x, h), (x, h, *parameters(grafts)), fast_mode=True)


def _tensor(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(("name", "tap", "mode", "scope"), CASES)
def test_rows(name, tap, mode, scope):
    torch.manual_seed(0)
    d_in, d_out = (5, 5) if name in SQUARE else (5, 7)
    kernels = {}
    for i in range(3):
        width = d_out if scope == "layer" else (i + 1) * d_out // 3 - i * d_out // 3
        kernels[i] = kernel(name, d_in if tap == "input" else d_out, width, seed=i, tap=tap, mode=mode, scope=scope)
    grafts = graft_set(nn.Linear(d_in, d_out).double(), ALPHAS, kernels)
    x, h = _tensor(2, 3, d_in), _tensor(2, 3, d_out)
    _close(grafts, x, h)
    _check_gradients(grafts, x, h)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "tanh", "sigmoid", "silu"])
@pytest.mark.parametrize("bias", [False, True])
def test_every_activation_of_the_bank(activation, bias):
    torch.manual_seed(0)
    kernels = {i: kernel("bottleneck", 9, 20, seed=i, activation=activation, bias=bias) for i in range(3)}
    kernels[1] = kernel("lowrank", 9, 20, seed=5, mode="replace")
    grafts = graft_set(nn.Linear(9, 20).double(), (0.3, 0.4, 0.9), kernels)
    x, h = _tensor(6, 9), _tensor(6, 20)
    _close(grafts, x, h)
    assert grafts._bank is not None
    tensors = (x, h, *parameters(grafts))
    assert torch.autograd.gradcheck(lambda x, h, *_: grafts(x, h), tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x, h, *_: grafts(x, h), tensors, fast_mode=True)


@pytest.mark.parametrize("alphas", [(0.0, 0.0, 0.0), (0.3, 0.7, 0.2), (1.0, 1.0, 1.0), (0.0, 0.5, 0.0)])
@pytest.mark.parametrize("large", [False, True])
def test_mixed_modes_and_scopes_in_one_bank(alphas, large, monkeypatch):
    if large:
        leave_to_the_blas(monkeypatch)
    torch.manual_seed(0)
    kernels = {
        0: kernel("lowrank", 40, 33, rank=3, mode="replace"),
        1: kernel("bottleneck", 40, 11, seed=1, rank=5, mode="replace", scope="chunk", activation="tanh"),
        2: kernel("lowrank", 40, 33, seed=2, rank=1),
    }
    for bound in ({0: kernels[0], 2: kernels[2]}, kernels):  # one segment, and three
        grafts = graft_set(nn.Linear(40, 33).double(), alphas, bound)
        x, h = _tensor(7, 40), _tensor(7, 33)
        _close(grafts, x, h)
        assert grafts._bank is not None
        _check_gradients(grafts, x, h)


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        ("lowrank", "layer"),
        ("gated", "chunk"),
        ("dense", "layer"),
        ("conv", "layer"),
        ("conv_relu", "chunk"),
        ("elementwise", "layer"),
        ("residual_block", "layer"),
    ],
)
@pytest.mark.parametrize("tap", ["input", "output"])
@pytest.mark.parametrize("mode", ["residual", "replace"])
def test_images(name, scope, tap, mode):
    torch.manual_seed(0)
    host = nn.Conv2d(4, 4, 3, padding=1).double()
    kernels = {}
    for i in range(2):
        kernels[i] = kernel(name, 4, 4 if scope == "layer" else 2, seed=i, tap=tap, mode=mode, scope=scope)
    grafts = graft_set(host, (0.3, 0.9), kernels)
    x, h = _tensor(2, 4, 5, 3), _tensor(2, 4, 5, 3)
    _close(grafts, x, h, 1)
    _check_gradients(grafts, x, h)


@pytest.mark.parametrize("host, shape", [
    (nn.ReLU(), (3, 6)), (nn.GELU(), (2, 3, 6)), (nn.Tanh(), (3, 6)), (nn.Sigmoid(), (2, 6, 4, 4)), (nn.ReLU(), (2, 6,
    4, 4)), (nn.LayerNorm((4, 6)), (3, 4, 6)), (nn.BatchNorm1d(6), (4, 6)), (nn.BatchNorm1d(6), (4, 6, 5)),
    (nn.BatchNorm2d(6), (2, 6, 4, 4)), (nn.Conv2d(6, 6, 3, padding="same", padding_mode="circular"), (2, 6, 4, 4)),
    (nn.Linear(6, 6), (6,)),
])  # fmt: skip
@pytest.mark.parametrize("name", ["lowrank", "dense", "gated"])
def test_every_host(host, shape, name):
    torch.manual_seed(0)
    host = host.double()
    kernels = {0: kernel(name, 6, 6, seed=0), 1: kernel(name, 6, 6, seed=1, mode="replace", tap="output")}
    grafts = graft_set(host, (0.5, 0.25, 0.0), kernels)
    x = _tensor(*shape)
    h = host(x)
    dim = 1 if len(shape) == 4 or isinstance(host, nn.BatchNorm1d) else -1
    _close(grafts, x, h, dim)
    host.eval()
    assert torch.autograd.gradcheck(lambda x, *_: grafts(x, host(x)), (x, *parameters(grafts)), fast_mode=True)


def test_attention_reads_the_query():
    torch.manual_seed(0)
    host = nn.MultiheadAttention(6, 2, batch_first=True).double()
    grafts = graft_set(host, (0.5,), {0: kernel("bottleneck", 6, 6)})
    x = _tensor(2, 5, 6)
    _close(grafts, x, host(x, x, x)[0])


@pytest.mark.parametrize(("kernel_size", "stride", "padding"), [(3, 2, 1), (1, 2, 0), (5, (3, 2), 2), (3, 1, "same")])
def test_reading_the_input_of_a_strided_convolution(kernel_size, stride, padding):
    torch.manual_seed(0)
    host = nn.Conv2d(3, 4, kernel_size, stride=stride, padding=padding).double()
    grafts = graft_set(host, (0.5, 0.7), {0: kernel("lowrank", 3, 4), 1: kernel("dense", 3, 4, mode="replace")})
    x = _tensor(2, 3, 7, 8)
    _close(grafts, x, host(x), 1)


def test_a_convolution_with_the_geometry_of_its_host():
    torch.manual_seed(0)
    host = nn.Conv2d(3, 4, 3, stride=2).double()
    grafts = graft_set(host, (0.5,), {0: kernel("conv", 3, 4, kernel_size=3, stride=2, padding=0)})
    x = _tensor(2, 3, 9, 8)
    _close(grafts, x, host(x), 1)


def test_empty_batch_and_strided_tensors():
    torch.manual_seed(0)
    grafts = graft_set(nn.Linear(6, 8).double(), (0.5,), {0: kernel("lowrank", 6, 8)})
    assert grafts(_tensor(0, 6), _tensor(0, 8)).shape == (0, 8)
    wide = _tensor(5, 12)
    _close(grafts, wide[:, ::2], _tensor(8, 5).t())
