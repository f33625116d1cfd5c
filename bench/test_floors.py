"""How far the CPU kernels are from what bytes and operations allow, on one thread.

The floor of bytes is a copy that reads and writes as much, the floor of operations the time in which a product of
512 x 512 matrices by the BLAS does as many multiply-adds. Both are measured in the same rounds as the kernel. The
higher floor counts; statistics and blends have few multiply-adds, and only the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench.models import mlp
from bench.paired import Ratio, compare
from bench.results import record
from bench.test_grafts import RANK, SEEDS, grown
from esper.execution.grafts.bank import Bank
from esper.ops import registry
from esper.ops.graft.seeds import Plan, gradients_for, results_for

PRODUCT = 512


@dataclass(frozen=True)
class Kernel:
    """A call, the bytes it has to read and write, and its multiply-adds times two."""

    name: str
    call: Callable[[], object]
    moved: int
    operations: int = 0


def statistics() -> Iterator[Kernel]:
    """The kernels of the dormant path."""
    images = torch.randn(32, 64, 56, 56)
    for name, x, dim in (("rows 4096 x 1024", torch.randn(4096, 1024), -1), ("nchw 32 x 64 x 56 x 56", images, 1)):
        kernel = registry.get("channel_stats").backend("cpu")
        yield Kernel(f"channel_stats {name}", lambda x=x, dim=dim, k=kernel: k(x, SEEDS, dim), x.nbytes)
    x = torch.randn(4096, 1024)
    kernel = registry.get("act_stats").backend("cpu")
    for activation in ("relu", "gelu"):
        yield Kernel(f"act_stats {activation}", lambda a=activation: kernel(x, a, SEEDS, -1), 2 * x.nbytes)


def banks(folder: Path) -> Iterator[Kernel]:
    """The low-rank bank, forward and backward."""
    for width, rows in ((64, 8), (256, 32), (1024, 64)):
        model = grown(nn.Sequential(*list(mlp(width).children())[:1]), width, folder)
        x, h, gy = (torch.randn(rows, width) for _ in range(3))
        layer = model.layer(model.get_layer_names()[0])
        layer.grafts(x, h)
        bank = layer.grafts._bank
        assert isinstance(bank, Bank)
        alpha, ranks = layer.state_layout.alpha_blend, SEEDS * RANK
        done = bank.blend(bank.buffer, x, h, alpha)
        assert done is not None
        table = done[1]
        weights, product = bank.buffer.nbytes, 2 * rows * ranks * width
        yield Kernel(
            f"bank {width} x {rows}, forward",
            lambda b=bank, x=x, h=h, a=alpha: b.blend(b.buffer, x, h, a),
            3 * x.nbytes + weights,
            2 * product,
        )
        yield Kernel(
            f"bank {width} x {rows}, backward",
            lambda b=bank, x=x, g=gy, t=table: b.backward(b.buffer, x, g, t, True, True, True),
            3 * x.nbytes + 2 * weights,
            5 * product,
        )


def compiled_seeds() -> Iterator[Kernel]:
    """The same as compiled graphs call it, on the seeds' own parameters, through PyTorch's dispatcher."""
    for width, rows in ((64, 8), (256, 32), (1024, 64)):
        x, h, gy = (torch.randn(rows, width) for _ in range(3))
        downs = [torch.randn(RANK, width) / width for _ in range(SEEDS)]
        ups = [torch.randn(RANK, width).t() / width for _ in range(SEEDS)]
        plan = torch.zeros(SEEDS, len(Plan), dtype=torch.int32)
        plan[:, Plan.CODE], plan[:, Plan.RANK], plan[:, Plan.END] = 1, RANK, width
        plan[:, Plan.ROW] = torch.arange(SEEDS)
        alpha, flags = torch.full((SEEDS,), 0.5), torch.zeros(SEEDS, dtype=torch.uint8)
        forward, backward = (registry.get(name).overload for name in ("graft_seeds", "graft_seeds_backward"))
        assert forward is not None and backward is not None
        every = [*downs, *ups]
        y, effect = results_for(h, plan)
        grads = gradients_for(gy, x, every, True, True, True)
        forward(x, h, alpha, flags, plan, every, 0, y, effect)
        assert not flags.any()
        weights, product = 2 * SEEDS * downs[0].nbytes, 2 * rows * SEEDS * RANK * width
        yield Kernel(
            f"seeds {width} x {rows}, forward",
            lambda c=forward, args=(x, h, alpha, flags, plan, every, 0, y, effect): c(*args),
            3 * x.nbytes + weights,
            2 * product,
        )
        yield Kernel(
            f"seeds {width} x {rows}, backward",
            lambda b=backward, args=(gy, x, effect, every, True, True, True, grads): b(*args),
            3 * x.nbytes + 2 * weights,
            5 * product,
        )


def blends() -> Iterator[Kernel]:
    """Contributions that were computed by PyTorch, put into the host's output."""
    h, k = torch.randn(4096, 1024), torch.randn(4096, 1024)
    trusted, alpha = torch.ones(4096, 1, dtype=torch.bool), torch.full((SEEDS,), 0.5)
    blend = registry.get("graft_blend").backend("cpu")
    for seeds in (1, SEEDS):
        parts = [k.clone() for _ in range(seeds)]
        places = [int(n) for i in range(seeds) for n in (i, 0, 1024, 0)]
        yield Kernel(
            f"graft_blend 4096 x 1024 of {seeds}",
            lambda p=parts, n=places: blend(h, p, [trusted] * len(p), alpha, n, 1),
            (seeds + 2) * h.nbytes,
        )


def copying(moved: int) -> Callable[[], object]:
    """A copy that reads and writes so many bytes in all."""
    source, target = torch.ones(moved // 2, dtype=torch.uint8), torch.empty(moved // 2, dtype=torch.uint8)
    return lambda: target.copy_(source)


@pytest.mark.timeout(1800)  # two comparisons a kernel, of seconds each
def test_cpu_kernels(benchmark: Any, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a, b = torch.randn(PRODUCT, PRODUCT), torch.randn(PRODUCT, PRODUCT)
        with torch.no_grad():
            for kernel in (*statistics(), *banks(tmp_path), *compiled_seeds(), *blends()):
                found = compare({"copy": copying(kernel.moved), "kernel": kernel.call}, "copy", rounds=51, seconds=5.0)
                rows = {"over the bytes": found["kernel"]}
                if kernel.operations:
                    calls = {"product": lambda: torch.mm(a, b), "kernel": kernel.call}
                    share = kernel.operations / (2 * PRODUCT**3)
                    rows["over the operations"] = divided(compare(calls, "product", rounds=51, seconds=5.0), share)
                record(benchmark, f"floors/{kernel.name}", rows)
                seconds = found["kernel"].seconds
                print(f"  {seconds * 1e6:.1f} us, {kernel.moved / seconds / 1e9:.1f} GB/s", end="")
                if kernel.operations:
                    print(f", {kernel.operations / seconds / 1e9:.1f} GFLOP/s", end="")
        benchmark.pedantic(kernel.call, rounds=5)
    finally:
        torch.set_num_threads(before)


def divided(ratios: dict[str, Ratio], share: float) -> Ratio:
    """The kernel's time over the share of the product's time that its operations are."""
    ratio = ratios["kernel"]
    return dataclasses.replace(ratio, median=ratio.median / share, low=ratio.low / share, high=ratio.high / share)
