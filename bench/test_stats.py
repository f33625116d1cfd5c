"""Bandwidth of the statistics kernels against the same numbers from PyTorch's own operations, and the cost of a probe.

``extra_info`` holds ``gb_per_s``: bytes of the input that must be read (and of the output that must be written) over
the time.
"""

from __future__ import annotations

import pytest
import torch

from esper.execution.monitor import Monitor
from esper.ops import registry
from esper.ops.stats import CHUNK_FIELDS, FEATURE_FIELDS
from esper.ops.stats.reference import activate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OURS = ("triton", "cuda") if DEVICE == "cuda" else ("cpu",)
SHAPES = {
    "rows 4096 x 1024": ((4096, 1024), -1),
    "rows 65536 x 64": ((65536, 64), -1),
    "nchw 32 x 64 x 56 x 56": ((32, 64, 56, 56), 1),
}
SEEDS = 4


def torch_stats(x, channel_dim):
    """What a careful user would write for the per-feature half of the numbers: no chunk statistics at all."""
    dims = [d for d in range(x.dim()) if d != channel_dim % x.dim()]
    finite = x.isfinite()
    values = torch.where(finite, x, 0)
    variance, mean = torch.var_mean(values, dims, correction=0)
    return finite.sum(dims), mean, variance, values.abs().amax(dims)


def settled(function, *args):
    """Run, and on a GPU wait: benchmarks may synchronise."""
    result = function(*args)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return result


def record(benchmark, bytes_moved, backend):
    benchmark.extra_info["gb_per_s"] = round(bytes_moved / benchmark.stats.stats.median / 1e9, 2)
    benchmark.extra_info["backend"] = backend


@pytest.mark.parametrize("backend", [*OURS, "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_channel_stats(benchmark, name, dtype, backend):
    shape, channel_dim = SHAPES[name]
    x = torch.randn(shape, device=DEVICE).to(dtype)
    if backend == "torch":
        benchmark.pedantic(settled, (torch_stats, x, channel_dim), rounds=5, warmup_rounds=1)
    else:
        kernel = registry.get("channel_stats").backend(backend)
        benchmark.pedantic(settled, (kernel, x, SEEDS, channel_dim), rounds=7, warmup_rounds=1)
    record(benchmark, x.numel() * x.element_size(), backend)


@pytest.mark.parametrize("backend", [*OURS, "torch", "torch, activation alone"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
def test_act_stats(benchmark, activation, backend):
    x = torch.randn(4096, 1024, device=DEVICE)

    def composed():
        y = activate(x, activation)
        return y, torch_stats(y, -1)

    if backend == "torch":
        benchmark.pedantic(settled, (composed,), rounds=5, warmup_rounds=1)
    elif backend == "torch, activation alone":
        benchmark.pedantic(settled, (activate, x, activation), rounds=7, warmup_rounds=1)
    else:
        kernel = registry.get("act_stats").backend(backend)
        benchmark.pedantic(settled, (kernel, x, activation, SEEDS, -1), rounds=7, warmup_rounds=1)
    record(benchmark, 2 * x.numel() * x.element_size(), backend)


class _Layer:
    """A probe target without a network around it."""

    layer_name, num_seeds, channel_dim, features, telemetry_enabled = "layer", SEEDS, -1, None, True

    class state_layout:  # noqa: N801
        @staticmethod
        def submit_health(samples):
            pass

    def arm_probe(self, observer):
        self.observer = observer

    def disarm_probe(self):
        self.observer = None


@pytest.mark.parametrize("shape", [(8, 64), (32, 256), (64, 1024)], ids=str)
def test_one_probe(benchmark, shape):
    """The whole observation of one layer, windows included; on a GPU the launch, not the kernel."""
    layer = _Layer()
    monitor = Monitor([layer], None)
    monitor.sample_now()
    y = torch.randn(shape, device=DEVICE)
    benchmark.pedantic(layer.observer, (y,), rounds=200, iterations=50, warmup_rounds=5)


def test_observe_alone(benchmark):
    """The operation under a probe, at [8, 64]."""
    y = torch.randn(8, 64, device=DEVICE)
    features = torch.zeros(FEATURE_FIELDS, 64, dtype=torch.float64, device=DEVICE)
    chunks = torch.zeros(CHUNK_FIELDS, SEEDS, dtype=torch.float64, device=DEVICE)
    kernel = registry.get("observe").resolve(DEVICE)
    benchmark.pedantic(kernel, (y, SEEDS, -1, 32, 0, features, chunks), rounds=200, iterations=50, warmup_rounds=5)
