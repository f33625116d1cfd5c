"""What is promised for a GPU, measured on the one at hand: ``python -m bench.gpu --out FOLDER``.

    dormant     wrapped over bare: eager, compiled, and as a CUDA graph
    lattice     one step for a million seeds that the GPU's cache does not hold, and for as many that it holds
    stats       activation and statistics: its bandwidth as a share of a copy's, as a CUDA graph and called from Python
    grafts      forward and backward of a grown Linear against PEFT, the plain composition, the compiled composition,
                and the floors that bytes and operations set
    linear      the ways of a linear layer with its seeds, as ``esper.ops.linear.tune_linear`` measures them
    launch, load    taken from the benchmarks of those names, whose results are in the same folder

``gpu.json`` gets everything, ``gpu.md`` a table. Both are written anew after every row: a run that is stopped by a time
limit leaves what it had measured. ``--part`` measures some parts; rows of the others stay, if an earlier run on this
machine left them in the folder. What fails, one layer or one of its contestants, is said under ``failed`` and takes
nothing else with it. An error that the GPU does not recover from takes the rest of the process: ``run_gpu.sh`` starts
one for each part.

Without a GPU, or with ``--cpu``, the parts that a CPU has are run in small sizes; their numbers say that the script
works, and nothing about a GPU. ``--short`` makes few rounds of the smallest case.

Times on a GPU are between two events on the stream, around so many calls that the host's part is hidden or, where it is
not, included, as it would be in a training; the median of the repetitions counts. Ratios come from ``paired.py``.
Before anything is timed it runs for a third of a second: while the host compiled, the GPU's clocks went down.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import esper
from bench.gpu_report import Report, Row, gather
from bench.models import composed, mlp, same_weights
from bench.paired import Ratio, compare
from bench.results import machine
from bench.test_dormant_overhead import stepped
from bench.test_grafts import adapted, grown

__all__ = ["PARTS", "Setting", "main", "measure"]


@dataclass(frozen=True)
class Setting:
    """Where and how much is measured, and what could not be."""

    device: torch.device
    short: bool
    failed: list[str] = field(default_factory=list)

    @property
    def gpu(self) -> bool:
        """Whether there is one."""
        return self.device.type == "cuda"

    @property
    def rounds(self) -> int:
        """Rounds of a paired comparison."""
        return 5 if self.short else 101

    @contextlib.contextmanager
    def apart(self, what: str) -> Iterator[None]:
        """What fails in here is noted, and what comes after it is measured all the same."""
        try:
            yield
        except Exception as error:
            # Some errors of compilers are pages long.
            said = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            self.failed.append(f"{what}: {said}")
            print(f"failed: {self.failed[-1]}", file=sys.stderr, flush=True)

    def warm_up(self, calls: Iterable[Callable[[], object]]) -> None:
        """Run them in turn, and wait for the GPU, until its clocks are where they stay."""
        calls, until = tuple(calls), time.perf_counter() + (0.02 if self.short else 0.3)
        while True:
            # More than one, so that a GPU which is faster than the host still has something to do.
            for call in calls * 5:
                call()
            if self.gpu:
                torch.cuda.synchronize()
            if time.perf_counter() >= until:
                return

    def ratios(self, calls: Mapping[str, Callable[[], object]], baseline: str) -> dict[str, Ratio]:
        """Compare, within the patience that the setting has."""
        self.warm_up(calls.values())
        return compare(calls, baseline, rounds=self.rounds, seconds=2.0 if self.short else 30.0)

    def seconds(self, call: Callable[[], object], calls: int = 20) -> float:
        """Median seconds of one call."""
        repetitions = 3 if self.short else 21
        self.warm_up([call])
        samples = []
        for _ in range(repetitions):
            if self.gpu:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(calls):
                    call()
                end.record()
                end.synchronize()
                samples.append(start.elapsed_time(end) / calls / 1e3)
            else:
                begin = time.perf_counter()
                for _ in range(calls):
                    call()
                samples.append((time.perf_counter() - begin) / calls)
        return statistics.median(samples)

    def captured(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call as a CUDA graph; the call itself where there is no GPU."""
        if not self.gpu:
            return call
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = call()
        replay = graph.replay

        def run(_keep: object = (graph, kept)) -> None:
            replay()

        return run


# -- parts ------------------------------------------------------------------------------------------------------------


def dormant(setting: Setting) -> Iterator[Row]:
    """Promise 1 in three modes: at most 1.005."""
    width, batch = (64, 8) if setting.short or not setting.gpu else (1024, 256)
    for mode in ("eager", "compiled", "graphed"):
        if (mode == "graphed" and not setting.gpu) or (mode == "compiled" and setting.short):
            continue
        with setting.apart(f"dormant, {mode}"):
            torch.manual_seed(0)
            bare = mlp(width).to(setting.device)
            x = torch.randn(batch, width, device=setting.device)
            again = same_weights(bare)
            # Watched, as by default; nothing is published.
            model = esper.wrap(bare, preserve_original=False)
            networks: dict[str, Any] = {"bare": bare, "again": again, "wrapped": model}
            with torch.no_grad():
                if mode == "compiled":
                    torch._dynamo.reset()
                    networks = {name: torch.compile(network, fullgraph=True) for name, network in networks.items()}
                calls: dict[str, Callable[[], object]] = {
                    name: (lambda network=network, x=x: network(x)) for name, network in networks.items()
                }
                for call in calls.values():
                    call()
                # The first sample compiles what samples, and in compiled code a second graph: not what is measured.
                model.monitor.sample_now()
                stepped(model, calls["wrapped"])()
                if mode == "graphed":
                    calls = {name: setting.captured(call) for name, call in calls.items()}
                ratios = setting.ratios({**calls, "wrapped": stepped(model, calls["wrapped"])}, "bare")
            name = f"mlp-{width}x{batch} {mode}"
            yield Row(
                "dormant", f"{name}, wrapped / bare", ratios["wrapped"].median, "x", 1.005, note=str(ratios["wrapped"])
            )
            yield Row("dormant", f"{name}, bare again / bare", ratios["again"].median, "x", note=str(ratios["again"]))
            model.close()


def lattice(setting: Setting) -> Iterator[Row]:
    """A step of a million seeds: 15 us on a GPU, whose cache has held other things since the step before."""
    from bench.test_lattice import storage_of, touched_bytes
    from esper.ops.lattice import lattice_step

    rows = 10_000 if setting.short else 1_000_000
    step = lattice_step.resolve(setting.device.type)
    for case in ("dormant", "ramping"):
        made = storage_of(rows, case)
        # Steps in turn over so many lattices that each has left the cache when its turn comes again.
        number = 2
        if setting.gpu:
            cache = torch.cuda.get_device_properties(setting.device).L2_cache_size
            number = max(8, -(-4 * cache // touched_bytes(made, rows, case)))
        for kind, count, target in (("cold", number, 15.0 if setting.gpu else None), ("in the cache", 1, None)):
            with setting.apart(f"lattice, {case}, {kind}"):
                storages = [made.to(setting.device, copy=True) for _ in range(count)]
                turns = -(-20 // count)

                def many(storages: Sequence[Tensor] = storages, turns: int = turns) -> None:
                    for storage in (*storages,) * turns:
                        step(storage, rows, 1)

                # As a graph: what is meant is the kernel, and not what it costs to launch it from Python.
                taken = setting.seconds(setting.captured(many), 5) / (turns * count)
                note = f"{count} lattices in turn"
                yield Row("lattice", f"step of {rows} seeds, {case}, {kind}", taken * 1e6, "us", target, note=note)


def copy_bandwidth(setting: Setting) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.empty((1 << 20) if setting.short else (1 << 28), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / setting.seconds(lambda: target.copy_(source))


def stats(setting: Setting) -> Iterator[Row]:
    """Activation with statistics: at least 90 % of what a copy reaches."""
    from esper.ops import registry

    copied = copy_bandwidth(setting)
    yield Row("stats", "copy", copied / 1e9, "GB/s")
    shape = (256, 256) if setting.short else (16384, 4096) if setting.gpu else (4096, 1024)
    kernel = registry.get("act_stats").resolve(setting.device.type)
    for dtype in (torch.float32, torch.bfloat16) if setting.gpu else (torch.float32,):
        x = torch.randn(shape, device=setting.device).to(dtype)
        for activation in ("relu", "gelu"):
            with setting.apart(f"stats, {activation} {dtype}"):

                def call(x: Tensor = x, activation: str = activation) -> None:
                    kernel(x, activation, 4, -1)

                def many(call: Callable[[], None] = call) -> None:
                    for _ in range(4):
                        call()

                moved = 2 * x.numel() * x.element_size()
                name = f"{activation} with statistics, {dtype} {shape[0]} x {shape[1]}, share of a copy's bandwidth"
                # Three launches and five tensors from Python take as long as the kernels do at the smaller type: that
                # is reported, and the kernels are judged.
                if setting.gpu:
                    taken = setting.seconds(setting.captured(many), 5) / 4
                    yield Row("stats", f"{name}, as a graph", moved / taken / copied, "x", 0.9, higher=True)
                share = moved / setting.seconds(call) / copied
                yield Row("stats", f"{name}, called from Python", share, "x", higher=True)


@dataclass(frozen=True)
class Layer:
    """A Linear of ``width`` features with seeds, on a batch."""

    rows: int
    width: int
    seeds: int
    rank: int
    dtype: torch.dtype

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"[{self.rows}, {self.width}] {kind}, {self.seeds} seeds of rank {self.rank}"

    def contestants(self, setting: Setting, folder: Path) -> tuple[dict[str, Any], Tensor]:
        """Bare and grown layers over the same host weights."""
        torch.manual_seed(0)
        bare: nn.Module = nn.Sequential(nn.Linear(self.width, self.width)).to(setting.device, self.dtype)
        x = torch.randn(self.rows, self.width, device=setting.device).to(self.dtype).requires_grad_()
        model = grown(bare, self.width, folder, seeds=self.seeds, rank=self.rank)
        found: dict[str, Any] = {"bare": bare, "esper": model}
        peft = adapted(bare, seeds=self.seeds, rank=self.rank)
        if peft is not None:
            found["peft"] = peft.to(setting.device, self.dtype)  # its adapters are float32 otherwise
        if setting.gpu:
            tuned = grown(bare, self.width, folder, seeds=self.seeds, rank=self.rank)
            tuned(x)
            tuned.tune(self.rows)
            found["esper, tuned"] = tuned
        found["composed"] = composed(bare, self.seeds, self.rank).to(setting.device, self.dtype)
        if not setting.short:
            torch._dynamo.reset()
            found["composed, compiled"] = torch.compile(found["composed"], fullgraph=True)
            found["esper, compiled"] = torch.compile(found["esper"], fullgraph=True)
        return found, x

    def floor(self, bare_seconds: float, bandwidth: float, backward: bool) -> float:
        """Over bare: the seeds' bytes at a copy's bandwidth or their operations at the bare layer's rate.

        What is added in the epilogue of the host's product moves no bytes but the weights'; what runs beside it has to
        read x and h and write y. The second is the floor of what there is now.
        """
        size = self.dtype.itemsize
        ranks = self.seeds * self.rank
        passes = 3 + (6 if backward else 0)  # x, h, y; and back x, gy, gx for z's gradient, x, gy again, gx of the host
        moved = size * self.width * (passes * self.rows + 2 * ranks)
        rate = 2 * self.rows * self.width * self.width * (3 if backward else 1) / bare_seconds
        operations = 2 * self.rows * ranks * 2 * self.width * (3 if backward else 1)
        return 1 + max(moved / bandwidth, operations / rate) / bare_seconds


def grafts(setting: Setting) -> Iterator[Row]:
    """Four rank-16 grafts on [8192, 4096] x [4096, 4096]: 1.06 forward, 1.10 with backward; 3 x ahead of PEFT."""
    reference = Layer(8192, 4096, 4, 16, torch.bfloat16)
    layers = [reference, Layer(8192, 4096, 16, 16, torch.bfloat16), Layer(512, 1024, 4, 8, torch.bfloat16)]
    layers += [Layer(64, 256, 4, 8, torch.float32)]
    if not setting.gpu or setting.short:
        layers = [Layer(16, 64, 2, 4, torch.float32)] if setting.short else [Layer(64, 1024, 4, 8, torch.float32)]
    bandwidth = copy_bandwidth(setting)
    for layer in layers:
        with setting.apart(f"grafts, {layer}"), tempfile.TemporaryDirectory() as folder:
            networks, x = layer.contestants(setting, Path(folder))
            yield from _layer_rows(setting, layer, networks, x, bandwidth, judged=layer is reference)
            for name, network in networks.items():
                if name in ("esper", "esper, tuned"):
                    network.close()


def _layer_rows(
    setting: Setting, layer: Layer, networks: Mapping[str, Any], x: Tensor, bandwidth: float, *, judged: bool
) -> Iterator[Row]:
    def forward(network: Any) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return network(x)

        return run

    def step(network: Any) -> Callable[[], object]:
        gy = torch.ones(layer.rows, layer.width, device=x.device, dtype=x.dtype)
        leaves = leaves_of(network)

        def run() -> None:
            # As after an optimizer's step: a gradient that is still there would be read and added to.
            for leaf in leaves:
                leaf.grad = None
            network(x).backward(gy)

        return run

    def leaves_of(*networks: Any) -> list[Tensor]:
        return [x, *(leaf for network in networks for leaf in network.parameters() if leaf.requires_grad)]

    for kind, make, limit in (("forward", forward, 1.06), ("forward and backward", step, 1.10)):
        calls: dict[str, Callable[[], object]] = {}
        for name, network in networks.items():
            with setting.apart(f"grafts, {layer}, {kind}, {name}"):
                call = make(network)
                call()
                calls[name] = call
        ratios = setting.ratios(calls, "bare")
        baseline = next(iter(ratios.values())).baseline_seconds
        yield Row("grafts", f"{layer}, {kind}: bare", baseline * 1e6, "us")
        for name, ratio in ratios.items():
            target = limit if judged and name in ("esper", "esper, tuned") else None
            yield Row("grafts", f"{layer}, {kind}: {name} / bare", ratio.median, "x", target, note=str(ratio))
        floor = layer.floor(baseline, bandwidth, kind != "forward")
        yield Row("grafts", f"{layer}, {kind}: floor of bytes and operations / bare", floor, "x")
        if "peft" in ratios and "esper" in ratios and ratios["esper"].median > 1.0:
            lead = (ratios["peft"].median - 1) / (ratios["esper"].median - 1)
            yield Row(
                "grafts", f"{layer}, {kind}: time added by peft / by esper", lead, "x", 3.0 if judged else None, True
            )
        if kind == "forward" and setting.gpu:
            graphed: dict[str, Callable[[], object]] = {}
            for name in ("bare", "esper", "esper, tuned", "composed"):
                with setting.apart(f"grafts, {layer}, {kind} as a graph, {name}"):
                    graphed[name] = setting.captured(calls[name])
            for name, ratio in setting.ratios(graphed, "bare").items():
                yield Row("grafts", f"{layer}, {kind} as a graph: {name} / bare", ratio.median, "x", note=str(ratio))
        if setting.gpu:
            for name in ("bare", "esper", "peft", "composed"):
                if name in calls:
                    # What is freed in the call would hide as much of what it allocates.
                    for leaf in leaves_of(*networks.values()):
                        leaf.grad = None
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                    calls[name]()
                    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
                    yield Row("grafts", f"{layer}, {kind}: peak memory of {name}", peak, "MiB")


def linear(setting: Setting) -> Iterator[Row]:
    """The ways of a linear layer; the fastest is kept for this machine."""
    from esper.ops.linear import tune_linear

    if not setting.gpu:
        return
    sizes = [(512, 1024)] if setting.short else [(8192, 4096), (512, 1024), (64, 4096)]
    for rows, width in sizes:
        for ranks in (0, 16, 64):
            for activation in (None, "gelu"):
                layer = f"[{rows}, {width}] bf16, {ranks} ranks, {activation}"
                with setting.apart(f"linear, {layer}"):
                    times = tune_linear(rows, width, width, ranks=ranks, activation=activation)
                    for way, milliseconds in times.items():
                        yield Row("linear", f"{layer}: {way}", milliseconds * 1e3, "us")


PARTS: Mapping[str, Callable[[Setting], Iterator[Row]]] = {
    "dormant": dormant,
    "lattice": lattice,
    "stats": stats,
    "grafts": grafts,
    "linear": linear,
}


def measure(setting: Setting, parts: Sequence[str], report: Report | None = None) -> tuple[list[Row], list[str]]:
    """Run the parts; a part that fails is said and does not stop the others.

    Args:
        setting: Where and how much.
        parts: Which.
        report: What is written after every row.

    Returns:
        The rows, and what failed.
    """
    rows: list[Row] = []
    for part in parts:
        if report is not None:
            report.write(rows, setting.failed, part)
        with setting.apart(part):
            for row in PARTS[part](setting):
                rows.append(row)
                print(f"{row.part:8} {row.name:90} {row.value:10.4g} {row.unit:5} {row.verdict}", flush=True)
                if report is not None:
                    report.write(rows, setting.failed, part)
    return rows, setting.failed


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; 1 if a part failed. A missed target is a result, not a failure."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--cpu", action="store_true", help="run the CPU parts, whether there is a GPU or not")
    parser.add_argument("--short", action="store_true", help="few rounds of small cases")
    parser.add_argument("--part", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    args = parser.parse_args(argv)
    gpu = torch.cuda.is_available() and not args.cpu
    setting = Setting(torch.device("cuda" if gpu else "cpu"), args.short)
    if not gpu:
        torch.set_num_threads(1)
    gather(args.out)
    about = {**machine(), "device": str(setting.device), "short": str(args.short).lower()}
    report = Report(args.out, about, args.part)
    rows, failed = measure(setting, args.part, report)
    report.write(rows, failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
