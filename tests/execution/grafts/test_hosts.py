"""What ``describe_host`` says of each layer is what the layer does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import esper
from esper.execution.hosts import SUPPORTED_HOSTS, ConvGeometry, describe_host


@pytest.mark.parametrize(("host", "shape"), [
    (nn.Linear(3, 5, bias=False), (2, 3)), (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7)),
    (nn.LayerNorm((2, 5)), (3, 2, 5)),
    (nn.BatchNorm1d(4), (3, 4)), (nn.BatchNorm1d(4), (3, 4, 5)), (nn.BatchNorm2d(4), (2, 4, 3, 3)),
    (nn.ReLU(), (2, 3, 5)), (nn.GELU("tanh"), (2, 5, 3, 3)), (nn.Tanh(), (4,)), (nn.Sigmoid(), (2, 3)),
])  # fmt: skip
def test_features(host, shape):
    x = torch.randn(shape)
    y = host(x)
    spec = describe_host(host)
    assert spec.is_resolved == (not isinstance(host, nn.ReLU | nn.GELU | nn.Tanh | nn.Sigmoid))
    resolved = spec.resolve(tuple(y.shape))
    assert resolved.d_out == y.shape[resolved.channel_dim]
    assert resolved.d_in == x.shape[resolved.channel_dim]
    assert resolved.resolve((9, 9, 9, 9)) is resolved  # the first shape decides for good
    assert resolved.kind == ("nchw" if len(shape) == 4 or isinstance(host, nn.BatchNorm1d) else "rows")


def test_attention_and_subclasses():
    class Odd(nn.Linear):
        pass

    assert describe_host(nn.MultiheadAttention(6, 2)).d_out == 6
    spec = describe_host(Odd(2, 3).double())
    assert (spec.type_name, spec.d_in, spec.d_out, spec.dtype) == ("Odd", 2, 3, torch.float64)
    assert describe_host(nn.ReLU()).dtype is None


@pytest.mark.parametrize("host", [nn.Dropout(), nn.Conv1d(2, 2, 1), nn.LSTM(2, 2), nn.Embedding(3, 2)])
def test_what_is_not_supported_is_named(host):
    with pytest.raises(NotImplementedError, match=type(host).__name__):
        describe_host(host)
    assert not isinstance(host, SUPPORTED_HOSTS)


@pytest.mark.parametrize(("host", "shape"), [
    (nn.LazyLinear(5), (2, 3)), (nn.LazyConv2d(6, 3), (2, 4, 7, 7)), (nn.LazyBatchNorm1d(), (3, 4)),
    (nn.LazyBatchNorm2d(), (2, 4, 3, 3)),
])  # fmt: skip
def test_a_lazy_layer_has_sizes_after_its_first_batch(host, shape):
    network = nn.Sequential(host)
    # torch itself refuses to copy a lazy buffer, as a batch norm has it.
    for preserve in (False, True) if not list(network.buffers()) else (False,):
        with pytest.raises(ValueError, match=rf"{type(host).__name__}\(.* has no sizes .* one batch"):
            esper.wrap(network, ["0"], preserve_original=preserve)
    kind = type(host)
    y = network(torch.randn(shape))
    spec = describe_host(host)
    assert (spec.d_in, spec.d_out) == (shape[spec.channel_dim], y.shape[spec.channel_dim])
    assert not isinstance(host, kind)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kernel", [1, 2, 3, (5, 1)])
@pytest.mark.parametrize("stride", [1, 2, (3, 1)])
@pytest.mark.parametrize("padding", [0, 1, 2, (2, 0), "same", "valid"])
@pytest.mark.parametrize("dilation", [1, 2])
def test_geometry(kernel, stride, padding, dilation):
    if padding == "same":
        stride = 1  # PyTorch has no strided convolution with this padding
    host = nn.Conv2d(2, 2, kernel, stride=stride, padding=padding, dilation=dilation)
    geometry = describe_host(host).geometry
    assert isinstance(geometry, ConvGeometry)
    matches = True
    for size in (9, 10, 11, 12, 13):
        y = host(torch.zeros(1, 2, size, size))
        sampled = torch.zeros(1, 2, size, size)[..., :: geometry.stride[0], :: geometry.stride[1]]
        expected = tuple((size + e - 1) // s + 1 for e, s in zip(geometry.excess, geometry.stride, strict=True))
        assert tuple(y.shape[2:]) == expected
        matches = matches and y.shape == sampled.shape
    # Five sizes in a row meet every remainder of the strides, so agreement on all of them is agreement for good.
    assert geometry.pointwise_matches == matches
