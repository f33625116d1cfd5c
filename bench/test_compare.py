"""Awake seeds beside everything a user could write instead, over sizes: time and memory.

One network, forward ("forward", with its graph for a backward) and forward and backward ("step"), one thread, over the
bare network: with 1, 4 and 16 awake rank-8 seeds on every layer ("esper"), under PEFT with as many active LoRA adapters
of the same rank ("peft"), with the straightforward composition of PyTorch operations ("composition"), and that and
Esper's under ``torch.compile`` ("compiled", "esper compiled"). All alternate within every round (see paired.py).

The network is 6 x [Linear(d), GELU] where a forward is short, and one such layer where it takes seconds.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.models import composed, mlp
from bench.paired import Ratio, compare
from bench.results import record
from bench.test_grafts import RANK, adapted, grown

WIDTHS = (64, 256, 1024, 4096)
BATCHES = (1, 8, 64, 512, 8192)
SEEDS = (1, 4, 16)
#: Multiply-adds of a bare forward with six layers above which one layer is measured.
SHORT = 1 << 31
#: Above which a forward takes a tenth of a second, and few rounds have to do; and above which a step takes ten.
LONG, HUGE = 1 << 32, 1 << 36
MEMORY_SIZES = ((256, 8192), (1024, 512), (4096, 512))


def network(width: int, batch: int) -> nn.Module:
    """Six layers, or one where six would take too long."""
    torch.manual_seed(0)
    whole = mlp(width)
    assert isinstance(whole, nn.Sequential)
    return whole if 6 * width * width * batch <= SHORT else whole[:2]


def candidates(width: int, batch: int, seeds: int, registry: Path) -> dict[str, Any]:
    """The networks by name; all train everything."""
    bare = network(width, batch)
    found: dict[str, Any] = {
        "bare": bare,
        "esper": grown(bare, width, registry, seeds=seeds),
        "esper compiled": torch.compile(grown(bare, width, registry, seeds=seeds), fullgraph=True),
        "composition": composed(bare, seeds, RANK),
        "compiled": torch.compile(composed(bare, seeds, RANK), fullgraph=True),
    }
    peft = adapted(bare, seeds=seeds)
    return found if peft is None else {**found, "peft": peft}


def run(network: Callable[[Tensor], Tensor], x: Tensor, mode: str) -> Callable[[], object]:
    """A call to time."""
    return (lambda: network(x)) if mode == "forward" else (lambda: network(x).sum().backward())


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("width", WIDTHS)
def test_beside_the_alternatives(width: int, batch: int, seeds: int, benchmark: Any, tmp_path: Path) -> None:
    work = width * width * batch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    try:
        x = torch.randn(batch, width)
        networks = candidates(width, batch, seeds, tmp_path)
        for mode in ("forward", "step"):
            calls = {name: run(found, x, mode) for name, found in networks.items()}
            rounds, warmup = (101, 2) if work <= LONG else (7, 2) if work <= HUGE else (5, 1)
            ratios = compare(calls, "bare", rounds=rounds, seconds=3.0, warmup=warmup, settle=work <= HUGE)
            record(benchmark, f"compare/{width}x{batch}/seeds-{seeds}/{mode}", ratios)
        benchmark.pedantic(calls["esper"], rounds=3 if work <= HUGE else 1, iterations=1)
    finally:
        torch.set_num_threads(before)


# -- memory -----------------------------------------------------------------------------------------------------------


def _status(field: str) -> int:
    """A field of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def _peak(name: str, width: int, batch: int, seeds: int, registry: str, answer: Any) -> None:
    """How far memory rises over a step of training, of which gradients and activations are part: in its own process."""
    torch.set_num_threads(1)
    found = candidates(width, batch, seeds, Path(registry))[name]
    for _ in range(2):  # whatever is made once: compiled code, scratch memory, gradients
        found(torch.randn(batch, width)).sum().backward()
    x = torch.randn(batch, width)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    found(x).sum().backward()
    answer.put(_status("VmHWM") - before)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize(("width", "batch"), MEMORY_SIZES)
def test_peak_memory(width: int, batch: int, seeds: int, benchmark: Any, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    peaks: dict[str, int] = {}
    for name in ("bare", "esper", "peft", "composition", "esper compiled", "compiled"):
        answer = context.Queue()
        child = context.Process(target=_peak, args=(name, width, batch, seeds, str(tmp_path), answer))
        child.start()
        peaks[name] = answer.get(timeout=600)
        child.join()
    benchmark.pedantic(lambda: None, rounds=1)
    exact = {
        name: Ratio(peak / peaks["bare"], peak / peaks["bare"], peak / peaks["bare"], 1, 1, 0.0, 0.0)
        for name, peak in peaks.items()
        if name != "bare"
    }
    print(f"\nbare: {peaks['bare'] / 2**20:.1f} MiB", end="")
    record(benchmark, f"compare-memory/{width}x{batch}/seeds-{seeds}", exact)
