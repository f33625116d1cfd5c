"""Binding, growing, and everything that takes parameters out of the bank: the result stays that of the formula."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from esper.contracts.errors import ShapeMismatchError
from esper.execution.grafts import GraftSet
from esper.execution.hosts import describe_host

from .helpers import State, formula, gradients, graft_set, kernel, parameters


def _grown(bound=(0, 1, 2), name="lowrank", dtype=torch.float32):
    torch.manual_seed(0)
    kernels = {i: kernel(name, 6, 8, seed=i, dtype=dtype) for i in bound}
    return graft_set(nn.Linear(6, 8).to(dtype), (0.3, 0.5, 0.2), kernels)


def _batch(dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(5, 6, dtype=dtype, requires_grad=True), torch.randn(5, 8, dtype=dtype, requires_grad=True)


def _agrees(grafts, dtype=torch.float32):
    """Sums of at most 8 terms of size up to ~5 in another order: 64 eps is ample; for halves see test_exact_ends."""
    x, h = _batch(dtype)
    tolerance = 64 * torch.finfo(dtype).eps
    y, expected = grafts(x, h), formula(grafts, x, h)
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    tensors = [x, h, *parameters(grafts)]
    for got, want in zip(gradients(y, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(got, want, rtol=4 * tolerance, atol=4 * tolerance)


def test_names_and_leaves():
    grafts = _grown()
    x, h = _batch()
    grafts(x, h)
    assert grafts.bound == (0, 1, 2)
    assert list(grafts.seed_parameters(1)) == ["down.weight", "up.weight"]
    names = {f"seed{i}.{role}.weight" for i in range(3) for role in ("down", "up")}
    assert {n for n, _ in grafts.named_parameters()} == names
    assert all(p.is_leaf and isinstance(p, nn.Parameter) for p in grafts.parameters())
    assert grafts._bank is not None
    storages = {p.untyped_storage().data_ptr() for p in grafts.parameters()}
    assert len(storages) == 1
    assert grafts.seed_parameters(1)["up.weight"].shape == (8, 2)


def test_parameters_and_optimizer_state_survive_growth():
    grafts = _grown((0,))
    old = dict(grafts.seed_parameters(0))
    optimizer = torch.optim.Adam(grafts.parameters(), lr=0.01)

    def step():
        x, h = _batch()
        optimizer.zero_grad()
        grafts(x, h).pow(2).sum().backward()
        optimizer.step()

    step()
    values = {n: p.detach().clone() for n, p in old.items()}
    moments = {n: optimizer.state[p]["exp_avg"].clone() for n, p in old.items()}
    grafts.bind(2, kernel("bottleneck", 6, 8, seed=7, dtype=torch.float32))
    _agrees(grafts)
    for name, p in grafts.seed_parameters(0).items():
        assert p is old[name]
        assert torch.equal(p, values[name])
        assert torch.equal(optimizer.state[p]["exp_avg"], moments[name])
    optimizer.add_param_group({"params": list(grafts.seed_parameters(2).values())})
    step()
    assert all(not torch.equal(p, values[n]) for n, p in old.items())
    grafts.unbind(2)
    assert grafts.bound == (0,)
    assert grafts.seed_parameters(2) == {}
    _agrees(grafts)


def test_binding_again_replaces():
    grafts = _grown()
    before = grafts.seed_parameters(1)["down.weight"]
    grafts.bind(1, kernel("gated", 6, 8, seed=9, dtype=torch.float32))
    assert grafts.seed_parameters(1).get("down.weight") is not before
    _agrees(grafts)


@pytest.mark.parametrize("name", ["lowrank", "gated"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "double", "load", "assign", "data", "inplace", "new parameter"])
def test_whatever_moves_the_parameters(how, name):
    grafts = _grown(name=name)
    dtype = torch.float32
    _agrees(grafts)
    state = {k: torch.randn_like(v) for k, v in grafts.state_dict().items()}
    if how == "deepcopy":
        twin = copy.deepcopy(grafts)
        with torch.no_grad():
            for p in grafts.parameters():
                p.zero_()
        grafts = twin
        assert all(p.any() for p in grafts.parameters())
    elif how == "pickle":
        grafts = pickle.loads(pickle.dumps(grafts))
    elif how == "double":
        grafts, dtype = grafts.double(), torch.float64
    elif how in ("load", "assign"):
        grafts.load_state_dict(state, assign=how == "assign")
    elif how == "data":
        for p in grafts.parameters():
            p.data = torch.randn_like(p)
    elif how == "inplace":
        with torch.no_grad():
            for p in grafts.parameters():
                p.add_(torch.randn_like(p))
    else:
        module = next(m for m in grafts.modules() if "weight" in m._parameters)
        module.weight = nn.Parameter(torch.randn_like(module.weight))
    for _ in range(2):
        _agrees(grafts, dtype)


@pytest.mark.parametrize("how", ["load", "assign"])
def test_loading_through_a_parent(how):
    """A parent's ``load_state_dict`` reaches the seeds without calling their own."""
    model = nn.Sequential(_grown())
    _agrees(model[0])
    model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()}, assign=how == "assign")
    _agrees(model[0])


def test_torch_save_needs_no_native_object():
    grafts = _grown()
    _agrees(grafts)
    buffer = io.BytesIO()
    torch.save(grafts.state_dict(), buffer)
    buffer.seek(0)
    other = _grown()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    _agrees(other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_keeps_working_and_comes_back(dtype):
    grafts = _grown()
    _agrees(grafts)
    grafts.to(dtype)
    x, h = _batch(dtype)
    assert grafts(x, h).dtype is dtype
    grafts.bind(1, kernel("lowrank", 6, 8, dtype=torch.float32))
    assert grafts.seed_parameters(1)["down.weight"].dtype is dtype  # new seeds follow the model
    grafts.float()
    _agrees(grafts)


@pytest.mark.parametrize("name", ["lowrank", "dense"])
def test_functional_call(name):
    grafts = _grown(name=name)
    x, h = _batch()
    before = grafts(x, h)
    swapped = {n: torch.randn_like(p).requires_grad_() for n, p in grafts.named_parameters()}
    y = torch.func.functional_call(grafts, swapped, (x, h))
    other = copy.deepcopy(grafts)
    other.load_state_dict({n: t.detach() for n, t in swapped.items()})
    tolerance = 64 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(y, other(x, h), rtol=tolerance, atol=tolerance)
    assert all(g is not None and g.any() for g in torch.autograd.grad(y.sum(), list(swapped.values())))
    assert torch.equal(grafts(x, h), before)


def test_func_transforms():
    grafts = _grown(dtype=torch.float64)
    x, h = _batch(torch.float64)
    grafts(x, h)
    x, h = x.detach(), h.detach()
    one = torch.func.vmap(lambda a, b: grafts(a[None], b[None])[0])(x, h)
    torch.testing.assert_close(one, grafts(x, h), rtol=0, atol=1e-12)
    weights = {n: p.detach() for n, p in grafts.named_parameters()}
    got = torch.func.grad(lambda w: torch.func.functional_call(grafts, w, (x, h)).pow(2).sum())(weights)
    grafts(x, h).pow(2).sum().backward()
    for name, p in grafts.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["lowrank", "bottleneck", "gated", "dense", "elementwise", "residual_block"])
def test_compiled_fullgraph(name):
    torch.manual_seed(0)
    host = nn.Linear(8, 8)
    modes = ("residual", "replace")
    kernels = {
        i: kernel(name, 8, 8, seed=i, tap="input", dtype=torch.float32, mode=mode) for i, mode in enumerate(modes)
    }
    grafts = graft_set(host, (0.3, 0.5), kernels)
    x = torch.randn(5, 8, requires_grad=True)
    compiled = torch.compile(lambda x: grafts(x, host(x)), fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    tolerance = 128 * torch.finfo(torch.float32).eps
    for alphas in ((0.3, 0.5), (0.0, 0.0), (0.9, 1.0)):  # alpha moves in place, nothing recompiles
        grafts.state_layout.alpha_blend.copy_(torch.tensor(alphas))
        with torch._dynamo.config.patch(error_on_recompile=True):
            y = compiled(x)
        expected = formula(grafts, x, host(x))
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
        tensors = [x, *parameters(grafts), *host.parameters()]
        for got, want in zip(gradients(y, tensors), gradients(expected, tensors), strict=True):
            torch.testing.assert_close(got, want, rtol=8 * tolerance, atol=8 * tolerance)
    assert not grafts.state_layout.fault_flags.any()
    with torch.no_grad():
        parameters(grafts)[0].view(-1)[0] = torch.nan
    grafts.state_layout.alpha_blend.fill_(0.5)
    y = compiled(x)
    assert torch.equal(y, host(x))
    assert grafts.state_layout.fault_flags.tolist() == [1, 0]
    (gx,) = torch.autograd.grad(y.sum(), [x])
    assert torch.equal(gx, torch.autograd.grad(host(x).sum(), [x])[0])


def test_freezing_and_thawing():
    grafts = _grown()
    x, h = _batch()
    grafts(x, h)
    first, second = grafts.seed_parameters(0)["down.weight"], grafts.seed_parameters(1)["down.weight"]
    first.requires_grad_(False)
    grafts(x, h).sum().backward()
    assert first.grad is None
    assert second.grad is not None
    first.requires_grad_(True)
    grafts(x, h).sum().backward()
    assert first.grad is not None


def test_all_frozen_needs_no_graph():
    grafts = _grown().requires_grad_(False)
    x, h = (t.detach() for t in _batch())
    assert not grafts(x, h).requires_grad
    grafts.requires_grad_(True)
    assert grafts(x, h).requires_grad


def test_stepping_between_forward_and_backward_is_refused():
    grafts = _grown()
    x, h = _batch()
    y = grafts(x, h)
    with torch.no_grad():
        grafts.seed_parameters(1)["up.weight"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified in place"):
        y.sum().backward()


def test_alpha_may_move_between_forward_and_backward():
    grafts = _grown()
    x, h = _batch()
    expected = torch.autograd.grad(grafts(x, h).sum(), [x])[0]
    y = grafts(x, h)
    grafts.state_layout.alpha_blend.zero_()
    assert torch.equal(torch.autograd.grad(y.sum(), [x])[0], expected)


def test_growing_between_forward_and_backward():
    grafts = _grown((0,))
    x, h = _batch()
    p = grafts.seed_parameters(0)["down.weight"]
    expected = torch.autograd.grad(grafts(x, h).sum(), [p])[0]
    y = grafts(x, h)
    grafts.bind(1, kernel("lowrank", 6, 8, seed=3, dtype=torch.float32))
    grafts(x, h)
    assert torch.equal(torch.autograd.grad(y.sum(), [p])[0], expected)


def test_nothing_keeps_the_result_alive():
    """A cycle through the graph would hold every activation until the collector runs."""
    import gc
    import weakref

    grafts = _grown()
    x, h = _batch()
    grafts(x, h)
    gc.disable()
    try:
        y = weakref.ref(grafts(x, h))
        assert y() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(("d_in", "d_out", "params"), [
    (5, 8, {}), (6, 7, {}), (6, 8, {"tap": "output"}), (6, 8, {"scope": "chunk"}),
])  # fmt: skip
def test_what_does_not_fit_is_refused_with_both_shapes(d_in, d_out, params):
    grafts = _grown((0,))
    needed = (8 if params.get("tap") == "output" else 6, 3 if params.get("scope") == "chunk" else 8)
    with pytest.raises(ShapeMismatchError) as error:
        grafts.bind(2, kernel("lowrank", d_in, d_out, dtype=torch.float32, **params))
    for number in (d_in, d_out, *needed):
        assert str(number) in str(error.value)
    assert grafts.bound == (0,)
    _agrees(grafts)


def test_images_are_refused_on_rows_and_sizes_on_convolutions():
    with pytest.raises(ShapeMismatchError, match="needs images"):
        graft_set(nn.Linear(4, 4), (0.5,), {0: kernel("conv", 4, 4, tap="input")})
    with pytest.raises(ShapeMismatchError, match="stride"):
        graft_set(nn.Conv2d(4, 4, 3), (0.5,), {0: kernel("lowrank", 4, 4, tap="input")})
    graft_set(nn.Conv2d(4, 4, 3), (0.5,), {0: kernel("lowrank", 4, 4, tap="output")})


@pytest.mark.parametrize("seed_idx", [-1, 3, "0", None])
def test_bad_seed_index(seed_idx):
    with pytest.raises(ValueError, match="Invalid seed index"):
        _grown().bind(seed_idx, kernel("lowrank", 6, 8, dtype=torch.float32))


def test_a_misfit_on_an_activation_is_found_at_the_first_forward():
    grafts = GraftSet(describe_host(nn.ReLU()), State((0.5, 0.5)))
    grafts.bind(0, kernel("lowrank", 6, 6, dtype=torch.float32), dtype=torch.float32)
    grafts.bind(1, kernel("lowrank", 5, 5, dtype=torch.float32), dtype=torch.float32)
    x = torch.randn(3, 6)
    y = grafts(x, x.relu())
    assert grafts.state_layout.fault_flags.tolist() == [0, 1]
    assert "5" in grafts.misfits[1] and "6" in grafts.misfits[1]
    grafts.state_layout.fault_flags.zero_()
    grafts(x, x.relu())
    assert grafts.state_layout.fault_flags.tolist() == [0, 1]  # until the lattice has counted three
    grafts.unbind(1)
    torch.testing.assert_close(grafts(x, x.relu()), y)


def test_a_first_forward_in_inference_mode_leaves_seeds_trainable():
    grafts = _grown()
    x, h = _batch()
    with torch.inference_mode():
        grafts(x.detach(), h.detach())
    optimizer = torch.optim.SGD(grafts.parameters(), lr=0.1)
    grafts(x, h).pow(2).sum().backward()
    optimizer.step()
    _agrees(grafts)


def test_a_first_forward_under_autocast_does_not_decide_for_good():
    grafts = _grown()
    x, h = _batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert grafts(x, h.bfloat16()).dtype is torch.bfloat16
    assert grafts._bank is not None
    _agrees(grafts)


def test_checkpointing_recomputes_the_same():
    from torch.utils.checkpoint import checkpoint

    grafts = _grown()
    x, h = _batch()
    expected = gradients(grafts(x, h), [x, h, *parameters(grafts)])
    got = gradients(checkpoint(grafts, x, h, use_reentrant=False), [x, h, *parameters(grafts)])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
