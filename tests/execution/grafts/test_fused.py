"""Seeds of one kind as one operation, as on a GPU: what is promised of every other way, here on the CPU.

The fixture ``as_on_a_gpu`` makes a layer believe that its device has the operations; the reference then runs them, in
float64, or Triton in its interpreter. Tolerances in float64 are those of ``test_formula``, for the same reason.
"""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from esper.blueprints import interpret
from esper.execution.grafts import fused
from esper.execution.grafts.device_bank import DeviceBank
from esper.ops.graft import graft_bank, graft_elementwise
from esper.ops.registry import triton_interprets, use_backend

from .helpers import formula, gradients, graft_set, kernel, parameters

BANKS = ("lowrank", "bottleneck", "normed_bottleneck", "gated", "normed_gated")
FUSED = (*BANKS, "elementwise", "activated_elementwise")


class Calls(list):
    """Names of the operations that ran."""


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(fused, "serves", lambda device: True)


@pytest.fixture
def calls(monkeypatch):
    """Counts what the reference is asked for, so that a test cannot pass on the traced way."""
    made = Calls()
    for op in (graft_bank, graft_elementwise):
        real = op.backend("reference")

        def count(*args, _real=real, _name=op.name):
            made.append(_name)
            return _real(*args)

        monkeypatch.setitem(op._kernels, "reference", count)
        op._chosen.clear()
    yield made
    for op in (graft_bank, graft_elementwise):
        op._chosen.clear()


def _tensor(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def _close(grafts, x, h, dim=-1):
    y, expected = grafts(x, h), formula(grafts, x, h, dim)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-11)
    tensors = [x, h, *parameters(grafts)]
    for got, want in zip(gradients(y, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def _layer(name, *, alphas=(0.3, 0.0, 0.9), tap="input", mode="residual", scope="layer", dtype=torch.float64):
    torch.manual_seed(0)
    d_in, d_out = (5, 5) if "elementwise" in name else (5, 7)
    kernels = {}
    for i in range(3):
        width = d_out if scope == "layer" else (i + 1) * d_out // 3 - i * d_out // 3
        d_tap = d_in if tap == "input" else d_out
        kernels[i] = kernel(name, d_tap, width, seed=i, tap=tap, mode=mode, scope=scope, dtype=dtype)
    return graft_set(nn.Linear(d_in, d_out).to(dtype), alphas, kernels), d_in, d_out


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("tap", ["input", "output"])
@pytest.mark.parametrize("mode", ["residual", "replace"])
@pytest.mark.parametrize("scope", ["layer", "chunk"])
def test_the_formula_and_its_gradients(name, tap, mode, scope, calls):
    if scope == "chunk" and "elementwise" in name:
        pytest.skip("an elementwise seed has as many features out as in: no chunk scope")
    grafts, d_in, d_out = _layer(name, tap=tap, mode=mode, scope=scope)
    x, h = _tensor(2, 3, d_in), _tensor(2, 3, d_out)
    _close(grafts, x, h)
    assert calls == ["graft_elementwise" if "elementwise" in name else "graft_bank"]
    assert isinstance(grafts._bank, DeviceBank) == (name in BANKS)
    tensors = (x, h, *parameters(grafts))
    assert torch.autograd.gradcheck(lambda x, h, *_: grafts(x, h), tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x, h, *_: grafts(x, h), tensors, fast_mode=True)
    # The same where the weights are joined at every call.
    assert torch.autograd.gradcheck(lambda x, h, *_: grafts._traced(x, h), tensors, fast_mode=True)
    torch.testing.assert_close(grafts._traced(x, h), grafts(x, h), rtol=0, atol=1e-12)


def test_mixed_biases_and_modes_are_one_bank(calls):
    torch.manual_seed(0)
    kernels = {
        0: kernel("bottleneck", 5, 7, activation="tanh", bias=True, mode="replace"),
        2: kernel("bottleneck", 5, 7, seed=1, activation="tanh", bias=False, rank=3),
    }
    grafts = graft_set(nn.Linear(5, 7).double(), (0.4, 1.0, 0.7), kernels)
    _close(grafts, _tensor(4, 5), _tensor(4, 7))
    assert calls == ["graft_bank"]
    grafts = graft_set(
        nn.Linear(5, 5).double(),
        (0.4, 0.7),
        {0: kernel("elementwise", 5, 5, shift=True), 1: kernel("elementwise", 5, 5, seed=1, shift=False)},
    )
    _close(grafts, _tensor(4, 5), _tensor(4, 5))
    assert calls == ["graft_bank", "graft_elementwise"]


@pytest.mark.parametrize(
    "kernels",
    [
        {0: ("lowrank", {}), 1: ("gated", {})},
        {0: ("lowrank", {}), 1: ("dense", {})},
        {0: ("lowrank", {}), 1: ("lowrank", {"tap": "output"})},
        {0: ("bottleneck", {"activation": "relu"}), 1: ("bottleneck", {"activation": "gelu"})},
        {0: ("bottleneck", {}), 1: ("normed_bottleneck", {})},
        {0: ("elementwise", {}), 1: ("activated_elementwise", {})},
        {0: ("elementwise", {}), 1: ("lowrank", {})},
    ],
    ids=str,
)
def test_seeds_of_several_kinds_take_the_traced_way(kernels, calls):
    """A fault of one kind gives the host for the layer, and so for the other kind's seeds too."""
    torch.manual_seed(0)
    made = {i: kernel(name, 6, 6, seed=i, **params) for i, (name, params) in kernels.items()}
    grafts = graft_set(nn.Linear(6, 6).double(), (0.3, 0.5), made)
    x, h = _tensor(4, 6), _tensor(4, 6)
    _close(grafts, x, h)
    assert not calls
    with torch.no_grad():
        next(iter(grafts.seed_parameters(1).values())).fill_(math.nan)
    y = grafts(x, h)
    assert torch.equal(y, h)
    assert grafts.state_layout.fault_flags.tolist() == [0, 1]
    for p, g in zip(
        parameters(grafts), torch.autograd.grad(y.sum(), parameters(grafts), allow_unused=True), strict=True
    ):
        assert g is None or not g.any(), p.shape


@pytest.mark.parametrize("name", ["lowrank", "gated", "normed_bottleneck"])
def test_images_in_channels_last_are_rows(name, calls):
    torch.manual_seed(0)
    host = nn.Conv2d(4, 6, 3, padding=1).double()
    grafts = graft_set(host, (0.3, 0.9), {0: kernel(name, 4, 6), 1: kernel(name, 4, 6, seed=1, mode="replace")})
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    h = torch.randn(2, 6, 5, 3, dtype=torch.float64)
    _close(grafts, x.clone().requires_grad_(), h.clone().requires_grad_(), 1)
    assert not calls  # PyTorch's default format: the traced way
    last = [t.to(memory_format=torch.channels_last).requires_grad_() for t in (x, h)]
    _close(grafts, *last, 1)
    assert calls == ["graft_bank"]
    assert grafts(*last).is_contiguous(memory_format=torch.channels_last)


def test_elementwise_seeds_take_images_as_they_are(calls):
    torch.manual_seed(0)
    grafts = graft_set(
        nn.Conv2d(4, 4, 3, padding=1).double(),
        (0.3, 0.9),
        {0: kernel("elementwise", 4, 4), 1: kernel("elementwise", 4, 4, seed=1)},
    )
    _close(grafts, _tensor(2, 4, 5, 3), _tensor(2, 4, 5, 3), 1)
    assert calls == ["graft_elementwise"]


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("mode", ["residual", "replace"])
@pytest.mark.parametrize("poisoned", [False, True])
def test_alpha_zero_is_the_host_bit_for_bit(name, mode, poisoned):
    grafts, d_in, d_out = _layer(name, alphas=(0.0, 0.0, 0.0), mode=mode)
    if poisoned:
        with torch.no_grad():
            for p in parameters(grafts):
                p.fill_(math.nan)
    special = [0.0, -0.0, 1e-310, -3.5, math.inf, -math.inf, math.nan][:d_out]
    x, h = _tensor(3, d_in), torch.tensor(special, dtype=torch.float64).repeat(3, 1).requires_grad_()
    gy = torch.tensor([-0.0, 0.0, 1.0, -1.0, 2.0, 3.0, -0.0][:d_out], dtype=torch.float64).repeat(3, 1)
    for run in (grafts, grafts._traced):
        y = run(x, h)
        assert torch.equal(y.view(torch.int64), h.view(torch.int64))
        gx, gh, *rest = torch.autograd.grad(y, [x, h, *parameters(grafts)], gy)
        assert torch.equal(gh.contiguous().view(torch.int64), gy.view(torch.int64))
        assert not gx.any() and all(not g.any() for g in rest)
    assert not grafts.state_layout.fault_flags.any()


@pytest.mark.parametrize("name", FUSED)
def test_alpha_one_in_mode_replace_is_the_seed(name):
    grafts, d_in, d_out = _layer(name, alphas=(0.0, 1.0, 0.0), mode="replace")
    x, h = _tensor(3, d_in), torch.full((3, d_out), math.nan, dtype=torch.float64)
    k = interpret.run(grafts.kernel(1).blueprint, grafts.seed_parameters(1), x)
    # Products over 5 and 2 terms of size ~1, in another order: far below 1e-13.
    torch.testing.assert_close(grafts(x, h), k, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("grads", [True, False])
def test_a_fault_is_contained(name, value, grads):
    grafts, d_in, d_out = _layer(name, alphas=(0.3, 0.5, 0.2))
    with torch.no_grad():
        list(grafts.seed_parameters(1).values())[-1][..., 0] = value
    x, h = _tensor(4, d_in), _tensor(4, d_out)
    for run in (grafts, grafts._traced):
        grafts.state_layout.fault_flags.zero_()
        with torch.set_grad_enabled(grads):
            y = run(x, h)
        assert torch.equal(y, h)
        assert grafts.state_layout.fault_flags.tolist() == [0, 1, 0]
        if grads:
            gx, gh, *rest = torch.autograd.grad(y.sum(), [x, h, *parameters(grafts)])
            assert torch.equal(gh, torch.ones_like(gh))
            assert not gx.any() and all(not g.any() for g in rest)


def test_flags_are_added_to_not_overwritten():
    grafts, d_in, d_out = _layer("lowrank")
    grafts.state_layout.fault_flags[0] = 1
    grafts(_tensor(4, d_in), _tensor(4, d_out))
    assert grafts.state_layout.fault_flags.tolist() == [1, 0, 0]


def test_flags_of_seeds_that_are_not_neighbours():
    torch.manual_seed(0)
    kernels = {i: kernel("lowrank", 5, 7, seed=i) for i in (0, 2, 3)}
    grafts = graft_set(nn.Linear(5, 7).double(), (0.5, 0.5, 0.5, 0.5), kernels)
    assert fused.runs_of((0, 2, 3)) == ((0, 1, 0), (2, 4, 1))
    with torch.no_grad():
        for i in (0, 3):
            grafts.seed_parameters(i)["up.weight"].fill_(math.inf)
    x = torch.ones(4, 5, dtype=torch.float64)
    grafts(x, torch.zeros(4, 7, dtype=torch.float64))
    assert grafts.state_layout.fault_flags.tolist() == [1, 0, 0, 1]


def test_parameters_are_leaves_in_one_buffer_and_gradients_are_views():
    grafts, d_in, d_out = _layer("bottleneck")
    x, h = _tensor(4, d_in), _tensor(4, d_out)
    before = dict(grafts.named_parameters())
    grafts(x, h).sum().backward()
    assert dict(grafts.named_parameters()).keys() == before.keys()
    assert all(p is before[n] and p.is_leaf for n, p in grafts.named_parameters())
    assert len({p.untyped_storage().data_ptr() for p in grafts.parameters()}) == 1
    for i in range(3):
        up = grafts.seed_parameters(i)["up.weight"]
        # Laid out alike, so that nothing was copied on the way.
        assert up.grad.stride() == up.stride() == (1, d_out)
    assert all(region.data_ptr() % 16 == 0 for region in grafts._bank.regions)


@pytest.mark.parametrize("name", ["lowrank", "gated", "elementwise"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "float", "load", "assign", "data", "inplace", "rebind"])
def test_whatever_moves_the_parameters(how, name):
    grafts, d_in, d_out = _layer(name)
    x, h = _tensor(4, d_in), _tensor(4, d_out)
    _close(grafts, x, h)
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
    elif how == "float":
        grafts = grafts.float().double()
    elif how in ("load", "assign"):
        grafts.load_state_dict(state, assign=how == "assign")
        assert all(torch.equal(v, state[k]) for k, v in grafts.state_dict().items())
    elif how == "data":
        for p in grafts.parameters():
            p.data = torch.randn_like(p)
    elif how == "inplace":
        with torch.no_grad():
            for p in grafts.parameters():
                p.add_(torch.randn_like(p))
    else:
        grafts.bind(1, kernel(name, d_in, d_out, seed=9), dtype=torch.float64)
    _close(grafts, x, h)
    _close(grafts, x, h)  # packed again


def test_swapped_parameters_are_used_and_packed_ones_stay():
    grafts, d_in, d_out = _layer("lowrank")
    x, h = _tensor(4, d_in), _tensor(4, d_out)
    y = grafts(x, h)
    other = {n: torch.randn_like(p, requires_grad=True) for n, p in grafts.named_parameters()}
    swapped = torch.func.functional_call(grafts, other, (x, h))
    assert not torch.equal(swapped, y)
    assert all(g is not None for g in torch.autograd.grad(swapped.sum(), list(other.values())))
    assert torch.equal(grafts(x, h), y)


def test_torch_func():
    grafts, d_in, d_out = _layer("lowrank")
    x, h = torch.randn(4, d_in).double(), torch.randn(4, d_out).double()
    one = torch.func.vmap(lambda a, b: grafts(a[None], b[None])[0])(x, h)
    torch.testing.assert_close(one, grafts(x, h), rtol=0, atol=1e-12)


def test_frozen_and_thawed():
    grafts, d_in, d_out = _layer("lowrank")
    x, h = _tensor(4, d_in), _tensor(4, d_out)
    first = grafts.seed_parameters(0)["down.weight"]
    first.requires_grad_(False)
    grafts(x, h).sum().backward()
    assert first.grad is None and grafts.seed_parameters(2)["down.weight"].grad is not None
    first.requires_grad_(True)
    grafts(x, h).sum().backward()
    assert first.grad is not None
    grafts.requires_grad_(False)
    assert not grafts(x.detach(), h.detach()).requires_grad


def test_a_parameter_written_to_between_forward_and_backward_is_refused():
    grafts, d_in, d_out = _layer("lowrank")
    y = grafts(_tensor(4, d_in), _tensor(4, d_out))
    with torch.no_grad():
        grafts.seed_parameters(0)["up.weight"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified in place"):
        y.sum().backward()


def test_alpha_that_moves_before_the_backward():
    grafts, d_in, d_out = _layer("lowrank")
    x, h = _tensor(4, d_in), _tensor(4, d_out)
    expected = gradients(grafts(x, h), [x, *parameters(grafts)])
    y = grafts(x, h)
    grafts.state_layout.alpha_blend.fill_(0.05)
    for got, want in zip(gradients(y, [x, *parameters(grafts)]), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["lowrank", "normed_bottleneck", "elementwise"])
def test_autocast(name):
    """The host gives bfloat16 while tap and parameters are float32: the seeds follow the host."""
    grafts, d_in, d_out = _layer(name, dtype=torch.float32)
    host = nn.Linear(d_in, d_out)
    x = torch.randn(4, d_in, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grafts(x, host(x))
    assert y.dtype is torch.bfloat16
    with torch.no_grad():
        want = formula(grafts, x, host(x))
    # bfloat16 has a unit roundoff of 2^-9; values of order 1 to 4 pass three roundings.
    torch.testing.assert_close(y.float(), want, rtol=0.03, atol=0.03)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in parameters(grafts))


@pytest.mark.parametrize("name", FUSED)
def test_compiled_fullgraph_goes_through_the_operation_and_never_recompiles(name, calls):
    grafts, d_in, d_out = _layer(name, dtype=torch.float32, mode="replace")
    host = nn.Linear(d_in, d_out)
    x = torch.randn(5, d_in, requires_grad=True)
    grafts(x, host(x))  # an eager call packs; strides, on which graphs depend, stay after that
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: grafts(x, host(x)), fullgraph=True, backend="aot_eager")
    # Sums of at most 7 terms of size up to ~10 in another order.
    tolerance = 256 * torch.finfo(torch.float32).eps
    for alphas in ((0.3, 0.5, 0.0), (0.0, 0.0, 0.0), (0.9, 1.0, 0.4)):  # alpha moves in place
        grafts.state_layout.alpha_blend.copy_(torch.tensor(alphas))
        calls.clear()
        with torch._dynamo.config.patch(error_on_recompile=True):
            y = compiled(x)
        assert calls == ["graft_elementwise" if "elementwise" in name else "graft_bank"]
        expected = formula(grafts, x, host(x))
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
        tensors = [x, *parameters(grafts), *host.parameters()]
        for got, want in zip(gradients(y, tensors), gradients(expected, tensors), strict=True):
            torch.testing.assert_close(got, want, rtol=8 * tolerance, atol=8 * tolerance)
    assert not grafts.state_layout.fault_flags.any()
    with torch.no_grad():
        parameters(grafts)[0][..., 0] = torch.nan
    grafts.state_layout.alpha_blend.fill_(0.5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        y = compiled(x)
    assert torch.equal(y, host(x))
    assert grafts.state_layout.fault_flags.tolist() == [1, 0, 0]
    (gx,) = torch.autograd.grad(y.sum(), [x])
    assert torch.equal(gx, torch.autograd.grad(host(x).sum(), [x])[0])


def test_a_compiled_backward_uses_alpha_as_it_was():
    grafts, d_in, d_out = _layer("lowrank", dtype=torch.float32)
    h = torch.randn(5, d_out)
    x = torch.randn(5, d_in, requires_grad=True)
    grafts(x, h)
    torch._dynamo.reset()
    compiled = torch.compile(grafts, fullgraph=True, backend="aot_eager")
    expected = gradients(compiled(x, h), [x, *parameters(grafts)])
    y = compiled(x, h)
    # By address, as the lattice's kernels write: PyTorch sees no change of version.
    grafts.state_layout.alpha_blend.numpy()[:] = 0.05
    for got, want in zip(gradients(y, [x, *parameters(grafts)]), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_dynamic_rows():
    grafts, d_in, d_out = _layer("bottleneck", dtype=torch.float32)
    grafts(torch.randn(2, d_in), torch.randn(2, d_out))
    torch._dynamo.reset()
    compiled = torch.compile(grafts, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 3, 8):
        x, h = torch.randn(rows, d_in), torch.randn(rows, d_out)
        torch.testing.assert_close(compiled(x, h), grafts(x, h), rtol=1e-5, atol=1e-5)


interpreted = pytest.mark.skipif(
    not triton_interprets(), reason="on the CPU Triton runs in its interpreter alone; test_on_gpu.py has a GPU's"
)


@interpreted
@pytest.mark.parametrize("name", ["lowrank", "gated", "activated_elementwise"])
def test_through_triton(name):
    """The whole way on the kernels themselves, in float32, small enough for the interpreter."""
    grafts, d_in, d_out = _layer(name, dtype=torch.float32, alphas=(0.3, 0.5, 0.2), mode="replace")
    x, h = torch.randn(3, d_in, requires_grad=True), torch.randn(3, d_out, requires_grad=True)
    tensors = [x, h, *parameters(grafts)]
    expected = formula(grafts, x, h)
    wanted = gradients(expected, tensors)
    with use_backend("triton"):
        y = grafts(x, h)
        # Sums of at most 7 terms of size up to ~10 in another order.
        torch.testing.assert_close(y, expected, rtol=0, atol=3e-5)
        for got, want in zip(gradients(y, tensors), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=3e-4)


@interpreted
@pytest.mark.parametrize("name", ["lowrank", "elementwise"])
def test_compiled_through_triton(name):
    """A forced backend has every operation that a compiled layer is made of, alpha's copy too."""
    grafts, d_in, d_out = _layer(name, dtype=torch.float32)
    x, h = torch.randn(3, d_in, requires_grad=True), torch.randn(3, d_out)
    tensors = [x, *parameters(grafts)]
    torch._dynamo.reset()
    with use_backend("triton"):
        expected = grafts(x, h)
        y = torch.compile(grafts, fullgraph=True, backend="aot_eager")(x, h)
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
        for got, want in zip(gradients(y, tensors), gradients(expected, tensors), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_without_the_extension_the_weights_are_joined(monkeypatch, calls):
    monkeypatch.setattr(DeviceBank, "available", staticmethod(lambda: False))
    grafts, d_in, d_out = _layer("lowrank")
    _close(grafts, _tensor(4, d_in), _tensor(4, d_out))
    assert grafts._bank is None and calls == ["graft_bank"]


def test_nothing_is_packed_while_a_graph_is_captured(monkeypatch, calls):
    from esper.execution.grafts import graft_set as module

    monkeypatch.setattr(module, "capturing", lambda device: True)
    grafts, d_in, d_out = _layer("lowrank")
    addresses = [p.data_ptr() for p in parameters(grafts)]
    _close(grafts, _tensor(4, d_in), _tensor(4, d_out))
    monkeypatch.undo()
    monkeypatch.setattr(fused, "serves", lambda device: True)
    _close(grafts, _tensor(4, d_in), _tensor(4, d_out))
    assert addresses == [p.data_ptr() for p in parameters(grafts)]
