"""The activation that gathers statistics is, to a training step, the activation."""

from __future__ import annotations

import pytest
import torch

from esper.ops.stats import ACTIVATIONS, activate_with_stats, channel_stats
from esper.ops.stats.reference import activate


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_the_true_ones(activation):
    # Away from 0, where relu has none.
    x = torch.randn(3, 4, dtype=torch.float64)
    x = (x + 0.1 * x.sign()).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: activate_with_stats(t, activation, 2)[0], (x,))
    assert torch.autograd.gradgradcheck(lambda t: activate_with_stats(t, activation, 2)[0], (x,))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "channel_dim"), [((5, 7), -1), ((2, 6, 3, 3), 1)])
def test_agrees_with_torch_in_training(activation, dtype, shape, channel_dim):
    x = torch.randn(shape).to(dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, features, chunks = activate_with_stats(ours, activation, 2, channel_dim)
    expected = activate(theirs, activation)
    upstream = torch.randn(shape).to(dtype)
    y.backward(upstream)
    expected.backward(upstream)
    # Ours is within half an ulp of the exact value, torch's within a few: of the result, or of x where it cancels.
    eps = torch.finfo(dtype).eps
    assert ((y - expected).abs() <= 4 * eps * (expected.abs() + x.abs())).all()
    assert ours.grad is not None and ours.grad.dtype is dtype
    # tanh and sigmoid are differentiated from the output: its difference passes on, with slope 2 at most.
    assert ((ours.grad - theirs.grad).abs() <= 16 * eps * upstream.abs()).all()
    assert not features.requires_grad and not chunks.requires_grad
    again = channel_stats(y.detach(), 2, channel_dim)
    assert torch.equal(features, again[0]) and torch.equal(chunks, again[1])


def test_no_gradient_asked_for_none_computed():
    x = torch.randn(4, 3, requires_grad=True)
    _, features, _ = activate_with_stats(x, "gelu", 1)
    assert features.grad_fn is None
    assert not activate_with_stats(torch.randn(4, 3), "gelu", 1)[0].requires_grad


def test_compiles_without_a_break():
    def model(x):
        y, features, _ = activate_with_stats(x * 2, "gelu", 2)
        return y.sum() + features[1].sum().float()

    torch._dynamo.reset()
    x = torch.randn(4, 6, requires_grad=True)
    eager = torch.autograd.grad(model(x), x)[0]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(torch.autograd.grad(compiled(x), x)[0], eager)


def test_inference_mode():
    with torch.inference_mode():
        y, _, _ = activate_with_stats(torch.randn(4, 3), "silu", 1)
    assert y.shape == (4, 3)
