"""What is promised for a GPU, measured on the one at hand: ``python -m bench.gpu --out FOLDER``.

    dormant     wrapped over bare: eager, compiled, and as a CUDA graph
    lattice     one step for a million seeds
    stats       activation and statistics: its bandwidth as a share of a copy's
    grafts      forward and backward of a grown Linear against PEFT, the plain composition, the compiled composition,
                and the floors that bytes and operations set
    linear      the ways of a linear layer with its seeds, as ``esper.ops.linear.tune_linear`` measures them
    launch, load    taken from the benchmarks of those names, whose results are in the same folder

``gpu.json`` gets everything, ``gpu.md`` a table. Without a GPU, or with ``--cpu``, the parts that a CPU has are run in
small sizes; their numbers say that the script works, and nothing about a GPU. ``--short`` makes few rounds of the
smallest case.

Times on a GPU are between two events on the stream, around so many calls that the host's part is hidden or, where it is
not, included, as it would be in a training; the median of the repetitions counts. Ratios come from ``paired.py``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import esper
from bench.models import composed, mlp, same_weights
from bench.paired import Ratio, compare
from bench.results import machine
from bench.test_dormant_overhead import stepped
from bench.test_grafts import adapted, grown

__all__ = ["Row", "main", "measure", "table"]


@dataclass(frozen=True)
class Row:
    """One measured number.

    Attributes:
        part: Which part of the script.
        name: What was measured, with its sizes.
        value: The number.
        unit: Of it; ``x`` for ratios.
        target: What it is meant to be, or None.
        higher: Whether more is better.
        note: What else there is to say.
    """

    part: str
    name: str
    value: float
    unit: str
    target: float | None = None
    higher: bool = False
    note: str = ""

    @property
    def verdict(self) -> str:
        """``kept`` or ``missed``; nothing without a target."""
        if self.target is None:
            return ""
        return "kept" if (self.value >= self.target) == self.higher or self.value == self.target else "missed"


@dataclass(frozen=True)
class Setting:
    """Where and how much is measured."""

    device: torch.device
    short: bool

    @property
    def gpu(self) -> bool:
        """Whether there is one."""
        return self.device.type == "cuda"

    @property
    def rounds(self) -> int:
        """Rounds of a paired comparison."""
        return 5 if self.short else 101

    def ratios(self, calls: Mapping[str, Callable[[], object]], baseline: str) -> dict[str, Ratio]:
        """Compare, within the patience that the setting has."""
        return compare(calls, baseline, rounds=self.rounds, seconds=2.0 if self.short else 30.0)

    def seconds(self, call: Callable[[], object], calls: int = 20) -> float:
        """Median seconds of one call."""
        repetitions = 3 if self.short else 21
        for _ in range(3):
            call()
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
        torch.manual_seed(0)
        bare = mlp(width).to(setting.device)
        x = torch.randn(batch, width, device=setting.device)
        again = same_weights(bare)
        model = esper.wrap(bare, preserve_original=False, telemetry_enabled=False)
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
    """A step of a million seeds: 15 us on a GPU."""
    from bench.test_lattice import storage_of
    from esper.ops.lattice import lattice_step

    rows = 10_000 if setting.short else 1_000_000
    step = lattice_step.resolve(setting.device.type)
    for case in ("dormant", "ramping"):
        storage = storage_of(rows, case).to(setting.device)
        steps = 20

        def many(storage: Tensor = storage, steps: int = steps) -> None:
            for _ in range(steps):
                step(storage, rows, 1)

        # As a graph: what is meant is the kernel, and not what it costs to launch it from Python.
        taken = setting.seconds(setting.captured(many), 5) / steps
        yield Row("lattice", f"step of {rows} seeds, {case}", taken * 1e6, "us", 15.0 if setting.gpu else None)


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
            taken = setting.seconds(lambda x=x, activation=activation: kernel(x, activation, 4, -1))
            share = 2 * x.numel() * x.element_size() / taken / copied
            name = f"{activation} with statistics, {dtype} {shape[0]} x {shape[1]}, share of a copy's bandwidth"
            yield Row("stats", name, share, "x", 0.9 if setting.gpu else None, higher=True)


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
        with tempfile.TemporaryDirectory() as folder:
            networks, x = layer.contestants(setting, Path(folder))
            yield from _layer_rows(setting, layer, networks, x, bandwidth, judged=layer is reference)
            networks["esper"].close()


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
        return lambda: network(x).backward(gy)

    for kind, make, limit in (("forward", forward, 1.06), ("forward and backward", step, 1.10)):
        calls = {name: make(network) for name, network in networks.items()}
        ratios = setting.ratios(calls, "bare")
        baseline = next(iter(ratios.values())).baseline_seconds
        yield Row("grafts", f"{layer}, {kind}: bare", baseline * 1e6, "us")
        for name, ratio in ratios.items():
            target = limit if judged and name == "esper" else None
            yield Row("grafts", f"{layer}, {kind}: {name} / bare", ratio.median, "x", target, note=str(ratio))
        floor = layer.floor(baseline, bandwidth, kind != "forward")
        yield Row("grafts", f"{layer}, {kind}: floor of bytes and operations / bare", floor, "x")
        if "peft" in ratios and ratios["esper"].median > 1.0:
            lead = (ratios["peft"].median - 1) / (ratios["esper"].median - 1)
            yield Row(
                "grafts", f"{layer}, {kind}: time added by peft / by esper", lead, "x", 3.0 if judged else None, True
            )
        if kind == "forward" and setting.gpu:
            graphed = {name: setting.captured(calls[name]) for name in ("bare", "esper", "composed")}
            for name, ratio in setting.ratios(graphed, "bare").items():
                yield Row("grafts", f"{layer}, {kind} as a graph: {name} / bare", ratio.median, "x", note=str(ratio))
        if setting.gpu:
            for name in ("bare", "esper", "peft", "composed"):
                if name in calls:
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
                times = tune_linear(rows, width, width, ranks=ranks, activation=activation)
                for way, milliseconds in times.items():
                    name = f"[{rows}, {width}] bf16, {ranks} ranks, {activation}: {way}"
                    yield Row("linear", name, milliseconds * 1e3, "us")


PARTS: Mapping[str, Callable[[Setting], Iterator[Row]]] = {
    "dormant": dormant,
    "lattice": lattice,
    "stats": stats,
    "grafts": grafts,
    "linear": linear,
}


def elsewhere(folder: Path) -> Iterator[Row]:
    """What the benchmarks beside this one left in the folder: launches and loads."""
    ratios = folder / "ratios.json"
    if ratios.exists():
        for key, found in json.loads(ratios.read_text())["ratios"].items():
            if key.startswith("launch/"):
                for name, row in found.items():
                    yield Row("launch", f"{key}: {name} / triton", row["ratio"], "x", row.get("limit"))
    bench = folder / "bench.json"
    if bench.exists():
        for entry in json.loads(bench.read_text())["benchmarks"]:
            taken = entry.get("extra_info", {}).get("microseconds_per_call")
            if taken is not None:
                yield Row("load", entry["name"], taken, "us")


def measure(setting: Setting, parts: Sequence[str]) -> tuple[list[Row], list[str]]:
    """Run the parts; a part that fails is said and does not stop the others.

    Returns:
        The rows, and what failed.
    """
    rows: list[Row] = []
    failed: list[str] = []
    for part in parts:
        try:
            for row in PARTS[part](setting):
                rows.append(row)
                print(f"{row.part:8} {row.name:90} {row.value:10.4g} {row.unit:5} {row.verdict}", flush=True)
        except Exception as error:
            failed.append(f"{part}: {type(error).__name__}: {error}")
            print(f"{part}: failed: {error}", file=sys.stderr, flush=True)
    return rows, failed


def table(rows: Sequence[Row], about: Mapping[str, str]) -> str:
    """The rows in Markdown."""
    lines = [", ".join(f"{key}: {value}" for key, value in about.items()), ""]
    lines += ["| part | measurement | value | target | |", "|---|---|---|---|---|"]
    for row in rows:
        target = "" if row.target is None else f"{'>=' if row.higher else '<='} {row.target:g}"
        lines.append(f"| {row.part} | {row.name} | {row.value:.4g} {row.unit} | {target} | {row.verdict} |")
    return "\n".join(lines) + "\n"


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
    rows, failed = measure(setting, args.part)
    rows += elsewhere(args.out)
    about = {**machine(), "device": str(setting.device), "short": str(args.short).lower()}
    args.out.mkdir(parents=True, exist_ok=True)
    document = {"machine": about, "failed": failed, "rows": [{**asdict(row), "verdict": row.verdict} for row in rows]}
    (args.out / "gpu.json").write_text(json.dumps(document, indent=1) + "\n")
    (args.out / "gpu.md").write_text(table(rows, about))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
