"""Keeping measured ratios, and telling a regression from noise.

Every benchmark that measures a ratio calls :func:`record`. The ratios of a run gather in
``bench/results/latest.json``; ``python -m bench.results check`` compares them with the stored ones of this kind of
machine and with the promised limits, and ``python -m bench.results keep`` makes them the stored ones.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bench.paired import Ratio

FOLDER = Path(__file__).parent / "results"
LATEST = FOLDER / "latest.json"

#: A median that moved by less than this is not a regression, whatever its interval says: two runs on one machine
#: differ by as much through memory layout and clock speed alone.
DRIFT = 0.03


def record(benchmark: Any, key: str, ratios: Mapping[str, Ratio], limits: Mapping[str, float] | None = None) -> None:
    """Put measured ratios into pytest-benchmark's record and into ``latest.json``, and print them.

    Args:
        benchmark: pytest-benchmark's fixture.
        key: Name of the measurement, the same in every run.
        ratios: Candidate name -> ratio to the baseline.
        limits: Candidate name -> promised upper bound of its ratio.
    """
    limits = limits or {}
    rows = {
        name: {"ratio": ratio.median, "low": ratio.low, "high": ratio.high}
        | ({"limit": limits[name]} if name in limits else {})
        for name, ratio in ratios.items()
    }
    benchmark.extra_info["ratios"] = rows
    for name, row in rows.items():
        verdict = "" if "limit" not in row else f"  limit {row['limit']}: {judge(row)}"
        print(f"\n{key:44} {name:16} {row['ratio']:.4f} [{row['low']:.4f}, {row['high']:.4f}]{verdict}", end="")
    out = Path(os.environ.get("ESPER_BENCH_OUT", LATEST))
    out.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(out.read_text()) if out.exists() else {"machine": machine(), "ratios": {}}
    known["machine"] = machine()
    known["ratios"][key] = rows
    out.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def judge(row: Mapping[str, float]) -> str:
    """ "kept" when the whole interval is under the limit, "missed" when all of it is above, "undecided" between."""
    if row["high"] <= row["limit"]:
        return "kept"
    return "missed" if row["low"] > row["limit"] else "undecided"


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    processor = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = dict(
            (part.strip() for part in line.split(":", 1)) for line in info.read_text().splitlines() if ":" in line
        )
        processor = found.get("model name", processor)
        if "cpu family" in found:  # a hypervisor may hide which of a maker's processors it is
            processor += f", family {found['cpu family']} model {found.get('model', '?')}"
        processor += f", {torch.backends.cpu.get_cpu_capability()}"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "processor": processor,
        "cores": str(os.cpu_count()),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def check(latest: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """Every ratio that got worse beyond noise, or misses its limit, as a line of text."""
    problems = []
    for key, rows in latest["ratios"].items():
        for name, row in rows.items():
            if "limit" in row and judge(row) == "missed":
                problems.append(
                    f"{key}: {name} {row['ratio']:.4f} [{row['low']:.4f}, {row['high']:.4f}] is over {row['limit']}"
                )
            before = stored["ratios"].get(key, {}).get(name)
            if before is not None and row["low"] > before["high"] and row["ratio"] > before["ratio"] * (1 + DRIFT):
                problems.append(f"{key}: {name} went from {before['ratio']:.4f} to {row['ratio']:.4f}")
    return problems


def kept(latest: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """What is stored after ``latest``: all of one machine. Rows of another machine go."""
    before = stored["ratios"] if stored.get("machine") == latest["machine"] else {}
    return {"machine": latest["machine"], "ratios": {**before, **latest["ratios"]}}


def table(results: Mapping[str, Any]) -> str:
    """The ratios as a table in Markdown: a row for each measurement, a column for each candidate."""
    names = list(dict.fromkeys(name for rows in results["ratios"].values() for name in rows))
    lines = ["| measurement | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for key, rows in results["ratios"].items():
        cells = [
            f"{rows[name]['ratio']:.3f} [{rows[name]['low']:.3f}, {rows[name]['high']:.3f}]" if name in rows else ""
            for name in names
        ]
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def stored_path() -> Path:
    """The stored ratios for this kind of machine: with a GPU and without are two kinds."""
    return FOLDER / ("gpu.json" if torch.cuda.is_available() else "cpu.json")


def main(argv: list[str] | None = None) -> int:
    """Command line: ``check``, ``keep`` or ``table``."""
    parser = argparse.ArgumentParser(prog="python -m bench.results", description=__doc__)
    parser.add_argument("action", choices=["check", "keep", "table"])
    action = parser.parse_args(argv).action
    if not LATEST.exists():
        print(f"{LATEST} is missing: run the benchmarks first (make bench)", file=sys.stderr)
        return 1
    latest = json.loads(LATEST.read_text())
    if action == "table":
        print(table(latest))
        return 0
    stored = json.loads(stored_path().read_text()) if stored_path().exists() else {"ratios": {}}
    if action == "keep":
        stored_path().write_text(json.dumps(kept(latest, stored), indent=1, sort_keys=True) + "\n")
        return 0
    problems = check(latest, stored)
    print("\n".join(problems) if problems else f"{len(latest['ratios'])} measurements, none worse beyond noise")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
