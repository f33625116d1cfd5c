"""Grafts on a GPU: the kernels inside a layer, under compilers and graphs. What a CPU can show is in ``test_fused.py``.

Tolerances: products over up to 256 terms of size ~1 in float32, split in three on the tensor cores: 2^-20 of the sum
of sizes, some 16, gives 1.6e-5, and 1e-4 leaves room for the seeds' second product. bfloat16 passes three roundings
of 2^-9 of values up to ~4: 0.03.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esper.execution.grafts.device_bank import DeviceBank
from esper.ops.graft import triton, triton_blend
from esper.ops.registry import use_backend

from .helpers import formula, gradients, graft_set, kernel, parameters

pytestmark = pytest.mark.gpu

FUSED = ("lowrank", "bottleneck", "normed_bottleneck", "gated", "normed_gated", "elementwise", "activated_elementwise")
TRACED = ("dense", "residual_block")


def _layer(name, alphas=(0.3, 0.0, 0.9), dtype=torch.float32, width=256, rank=8, mode="residual"):
    torch.manual_seed(0)
    params = {"rank": rank} if name in ("lowrank", "bottleneck", "normed_bottleneck", "gated", "normed_gated") else {}
    kernels = {i: kernel(name, width, width, seed=i, dtype=dtype, tap="input", mode=mode, **params) for i in range(3)}
    for k in kernels.values():
        for t in k.tensors.values():
            if t.dim() == 2:
                t.div_(t.shape[1] ** 0.5)
    host = nn.Linear(width, width).to("cuda", dtype)
    grafts = graft_set(host, alphas, kernels)
    grafts.state_layout.to("cuda")
    return grafts.cuda(), host


def _batch(width=256, rows=70, dtype=torch.float32):
    return torch.randn(rows, width, device="cuda").to(dtype).requires_grad_()


def _exact(grafts, x, h):
    """The formula in float64 on the CPU, and its gradients."""
    copy = graft_set_of(grafts)
    x, h = (t.detach().cpu().double().requires_grad_() for t in (x, h))
    y = formula(copy, x, h)
    return y, gradients(y, [x, h, *parameters(copy)])


def graft_set_of(grafts):
    """The same seeds on the CPU in float64."""
    import copy

    from .helpers import State

    twin = copy.deepcopy(grafts).cpu().double()
    twin.state_layout = State(grafts.state_layout.alpha_blend.tolist())
    return twin


@pytest.mark.parametrize("name", [*FUSED, *TRACED])
@pytest.mark.parametrize("mode", ["residual", "replace"])
@pytest.mark.parametrize("backend", ["triton", "cuda", "reference"])
def test_every_family_on_every_backend(name, mode, backend):
    if backend == "cuda" and name not in (*TRACED, "elementwise", "activated_elementwise"):
        pytest.skip("a bank without Triton is left to the reference, whose products are cuBLAS's")
    grafts, host = _layer(name, mode=mode)
    x = _batch()
    h = host(x).detach().requires_grad_()
    want, exact = _exact(grafts, x, h)
    with use_backend(backend):
        y = grafts(x, h)
        torch.testing.assert_close(y.cpu().double(), want, rtol=0, atol=1e-4)
        for got, expected in zip(gradients(y, [x, h, *parameters(grafts)]), exact, strict=True):
            scale = max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(got.cpu().double(), expected, rtol=0, atol=1e-4 * scale)
    assert not grafts.state_layout.fault_flags.any()


@pytest.mark.parametrize("name", FUSED)
def test_nothing_waits_for_the_device(name):
    grafts, host = _layer(name)
    x = _batch()
    grafts(x, host(x)).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        grafts(x, host(x)).sum().backward()
        grafts._traced(x, host(x)).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", FUSED)
def test_a_captured_graph_follows_alpha_and_contains_faults(name):
    """One capture serves a whole life: asleep, ramping, awake, at fault."""
    grafts, host = _layer(name, alphas=(0.0, 0.0, 0.0))
    x = _batch().detach()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        grafts(x, host(x))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = grafts(x, host(x))
    h = host(x)
    graph.replay()
    assert torch.equal(y, h)
    for alpha in (0.25, 1.0):
        grafts.state_layout.alpha_blend.fill_(alpha)
        graph.replay()
        with torch.no_grad():
            torch.testing.assert_close(y, grafts(x, h), rtol=0, atol=0)
    with torch.no_grad():
        next(iter(grafts.seed_parameters(1).values())).view(-1)[0] = torch.nan
    graph.replay()
    assert torch.equal(y, h)
    assert grafts.state_layout.fault_flags.tolist() == [0, 1, 0]


def test_capture_before_any_eager_call_leaves_the_parameters_where_they_are():
    grafts, host = _layer("lowrank")
    x = _batch().detach()
    torch.cuda.synchronize()
    with use_backend("triton"), torch.no_grad():
        _layer("lowrank")[0](x, host(x))  # compiles the kernels
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            y = grafts(x, host(x))
        addresses = [p.data_ptr() for p in parameters(grafts)]
        eager = grafts(x, host(x))
        assert addresses == [p.data_ptr() for p in parameters(grafts)]
        assert not isinstance(grafts._bank, DeviceBank)
        graph.replay()
        torch.testing.assert_close(y, eager, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("name", [*FUSED, "dense"])
def test_compiled_without_recompiling(name, mode):
    grafts, host = _layer(name)
    x = _batch()
    grafts(x, host(x))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: grafts(x, host(x)), fullgraph=True, mode=mode)
    for i, alphas in enumerate(((0.3, 0.5, 0.0), (0.0, 0.0, 0.0), (0.9, 1.0, 0.4))):
        grafts.state_layout.alpha_blend.copy_(torch.tensor(alphas))
        torch.compiler.cudagraph_mark_step_begin()
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            y = compiled(x)
        found = gradients(y, [x, *parameters(grafts)])
        want = grafts(x, host(x))
        torch.testing.assert_close(y, want, rtol=0, atol=1e-4)
        for got, expected in zip(found, gradients(want, [x, *parameters(grafts)]), strict=True):
            scale = max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("name", ["lowrank", "gated", "elementwise"])
def test_the_first_run_of_all_may_be_one_that_becomes_a_graph(name):
    """All memory of that run is the graph's, and PyTorch refuses what is kept of it: tables must be there before."""
    triton._uploaded.cache_clear()
    triton_blend._uploaded.cache_clear()
    grafts, host = _layer(name)
    x = _batch().detach()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: grafts(x, host(x)), fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            y = compiled(x).clone()
        torch.testing.assert_close(y, grafts(x, host(x)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["lowrank", "elementwise"])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_compiled_with_a_backend_that_was_asked_for(name, backend):
    grafts, host = _layer(name)
    x = _batch()
    torch._dynamo.reset()
    with use_backend(backend):
        want = grafts(x, host(x))
        y = torch.compile(lambda x: grafts(x, host(x)), fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(y, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FUSED)
def test_autocast_and_gradient_scaler(name):
    grafts, host = _layer(name)
    optimizer = torch.optim.AdamW([*host.parameters(), *grafts.parameters()], lr=1e-3)
    scaler = torch.amp.GradScaler("cuda")
    x = _batch().detach()
    before = [p.detach().clone() for p in parameters(grafts)]
    for _ in range(3):
        with torch.autocast("cuda", dtype=torch.float16):
            y = grafts(x, host(x))
            loss = y.float().square().mean()
        assert y.dtype is torch.float16
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert not grafts.state_layout.fault_flags.any()
    assert any(not torch.equal(p, b) for p, b in zip(parameters(grafts), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FUSED)
def test_halves(name, dtype):
    grafts, host = _layer(name, dtype=dtype)
    x = _batch(dtype=dtype)
    h = host(x).detach().requires_grad_()
    y = grafts(x, h)
    want, _ = _exact(grafts, x, h)
    torch.testing.assert_close(y.cpu().double(), want, rtol=0.03, atol=0.03)


def test_images_in_both_formats():
    torch.manual_seed(0)
    host = nn.Conv2d(16, 32, 3, padding=1).cuda()
    kernels = {
        0: kernel("lowrank", 16, 32, dtype=torch.float32),
        1: kernel("lowrank", 16, 32, seed=1, dtype=torch.float32),
    }
    grafts = graft_set(host, (0.5, 0.25), kernels)
    grafts.state_layout.to("cuda")
    grafts.cuda()
    x = torch.randn(4, 16, 9, 7, device="cuda")
    h = host(x).detach()
    y = grafts(x, h)
    last = grafts(x.to(memory_format=torch.channels_last), h.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    # cuDNN's convolutions may use TF32: 2^-11 of sums of size ~10.
    torch.testing.assert_close(last, y, rtol=0, atol=0.02)
