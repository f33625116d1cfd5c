"""What came out of the comparison: numbers for ``report.json``, a table and a sentence for people."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from esper.grow.data import Task
from esper.grow.experiment import NETWORKS, NetworkName, NetworkResult

__all__ = ["FORMAT_VERSION", "build_report", "table_rows", "verdict", "write_report"]

FORMAT_VERSION = 1

DESCRIPTION: dict[NetworkName, str] = {
    "host": "same host, trained as long, no growth",
    "grown": "the host, grown by seeds",
    "static": "static network of the grown size",
}


def build_report(
    task: Task,
    results: Sequence[NetworkResult],
    *,
    epochs: int,
    device: str,
    registry: str,
    seconds: float,
    interrupted: bool,
) -> dict[str, Any]:
    """Everything the run showed, as plain JSON values.

    ``networks`` holds, per kind of network, mean, sample standard deviation, smallest and largest over the seeds that
    finished training, of test accuracy (share), test loss (nats), parameters and seconds. ``paired`` holds differences
    of the grown network to each other kind on the same seed. ``runs`` holds every network with its history. Networks
    cut short by an interruption are in ``runs`` only.
    """
    finished = [result for result in results if len(result.history) == epochs]
    return {
        "format_version": FORMAT_VERSION,
        "data": {
            "name": task.name,
            "samples": len(task.labels),
            "features": task.features.shape[1],
            "classes": task.classes,
        },
        "epochs": epochs,
        "device": device,
        "registry": registry,
        "interrupted": interrupted,
        "seconds": seconds,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "networks": {
            name: {"description": DESCRIPTION[name], **_summary([r for r in finished if r.network == name])}
            for name in NETWORKS
        },
        "paired": {f"grown_minus_{name}": _paired(finished, name) for name in NETWORKS if name != "grown"},
        "verdict": verdict(finished),
        "runs": [_run(result, epochs) for result in results],
    }


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write ``report`` as JSON; a number that is not finite becomes null."""
    path.write_text(json.dumps(_finite(report), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def table_rows(report: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Rows for a table: network, parameters, test accuracy, test loss, seconds (mean, spread); finished kinds only."""
    rows = []
    for name in NETWORKS:
        entry = report["networks"][name]
        if entry["count"]:
            accuracy, loss = entry["test_accuracy"], entry["test_loss"]
            rows.append(
                (
                    f"{name}: {entry['description']}",
                    f"{entry['parameters']['mean']:.0f}",
                    f"{100 * accuracy['mean']:.1f} ± {100 * accuracy['std']:.1f} %",
                    f"{loss['mean']:.3f} ± {loss['std']:.3f}",
                    f"{entry['seconds']['mean']:.1f}",
                )
            )
    return rows


def verdict(finished: Sequence[NetworkResult]) -> str:
    """The outcome in one or two sentences, whatever it is."""
    sentences = []
    for name, what in (("host", "the same host without growth"), ("static", "a static network of its size")):
        pairs = _pairs(finished, name)
        if not pairs:
            continue
        gaps = [100 * (grown.test_accuracy - other.test_accuracy) for grown, other in pairs]
        mean = statistics.fmean(gaps)
        side = "above" if mean > 0 else "below" if mean < 0 else "level with"
        amount = f"{abs(mean):.1f} points " if mean else ""
        ahead = sum(gap > 0 for gap in gaps)
        sentences.append(
            f"The grown network ends {amount}{side} {what} in test accuracy "
            f"(ahead in {ahead} of {len(gaps)} paired runs)."
        )
    if not sentences:
        return "No pair of networks was finished; there is nothing to compare."
    return " ".join([*sentences, *_ungrown(finished)])


def _ungrown(finished: Sequence[NetworkResult]) -> list[str]:
    """Why growing networks are what their hosts are, where that is so."""
    grown = [result for result in finished if result.network == "grown"]
    idle = [result for result in grown if not result.seeds_asked]
    if not idle:
        return []
    where = "" if len(idle) == len(grown) else f" in {len(idle)} of {len(grown)} runs"
    never = not any(result.levels for result in idle)
    why = "never levelled off" if never else "levelled off too late for a seed to be judged before the end"
    return [f"No seed was asked for{where}: the validation loss {why}; train longer (--epochs)."]


def _summary(results: Sequence[NetworkResult]) -> dict[str, Any]:
    summary: dict[str, Any] = {"count": len(results)}
    if results:
        for key in ("test_accuracy", "test_loss", "parameters", "seconds"):
            summary[key] = _spread([float(getattr(result, key)) for result in results])
        summary["seeds_kept"] = _spread([float(result.seeds_kept) for result in results])
        summary["seeds_culled"] = _spread([float(result.seeds_culled) for result in results])
    return summary


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, sample standard deviation (n - 1; 0 for one value), smallest, largest."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": deviation, "min": min(values), "max": max(values)}


def _pairs(finished: Sequence[NetworkResult], other: str) -> list[tuple[NetworkResult, NetworkResult]]:
    by_key = {(result.network, result.seed): result for result in finished}
    seeds = sorted({result.seed for result in finished})
    return [
        (by_key["grown", seed], by_key[other, seed])  # type: ignore[index]
        for seed in seeds
        if ("grown", seed) in by_key and (other, seed) in by_key
    ]


def _paired(finished: Sequence[NetworkResult], other: str) -> dict[str, Any]:
    pairs = _pairs(finished, other)
    if not pairs:
        return {"count": 0}
    return {
        "count": len(pairs),
        "grown_ahead": sum(grown.test_accuracy > rival.test_accuracy for grown, rival in pairs),
        "test_accuracy": _spread([grown.test_accuracy - rival.test_accuracy for grown, rival in pairs]),
        "test_loss": _spread([grown.test_loss - rival.test_loss for grown, rival in pairs]),
    }


def _run(result: NetworkResult, epochs: int) -> dict[str, Any]:
    run = asdict(result)
    run["complete"] = len(result.history) == epochs
    return run


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
