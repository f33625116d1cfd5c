"""Keeping measured ratios, and telling a regression from noise.

Every benchmark that measures a ratio calls :func:`record`. The ratios of a run gather in
``bench/results/latest.json``; ``python -m bench.results check`` compares them with the stored ones of this kind of
machine and with the promised limits, and ``python -m bench.results keep`` makes them the stored ones. Ratios of two
machines say nothing about each other: then ``check`` judges the limits alone, and ``keep`` wants to be told
``--replace`` before it drops what another machine has measured.
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


def differences(latest: Mapping[str, Any], stored: Mapping[str, Any]) -> str:
    """In what the machines of two sets of ratios differ; "" if in nothing, or if nothing is stored."""
    if not stored["ratios"] or latest.get("machine") == stored.get("machine"):
        return ""
    here, there = latest.get("machine", {}), stored.get("machine", {})
    names = [name for name in dict.fromkeys((*here, *there)) if here.get(name) != there.get(name)]
    return ", ".join(f"{name} {here.get(name, '?')} and not {there.get(name, '?')}" for name in names)


def check(latest: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """Every ratio that misses its limit, or got worse beyond noise on the same machine, as a line of text."""
    problems = []
    before_here: Mapping[str, Any] = {} if differences(latest, stored) else stored["ratios"]
    for key, rows in latest["ratios"].items():
        for name, row in rows.items():
            if "limit" in row and judge(row) == "missed":
                problems.append(
                    f"{key}: {name} {row['ratio']:.4f} [{row['low']:.4f}, {row['high']:.4f}] is over {row['limit']}"
                )
            before = before_here.get(key, {}).get(name)
            if before is not None and row["low"] > before["high"] and row["ratio"] > before["ratio"] * (1 + DRIFT):
                problems.append(f"{key}: {name} went from {before['ratio']:.4f} to {row['ratio']:.4f}")
    return problems


def kept(latest: Mapping[str, Any], stored: Mapping[str, Any], *, replace: bool = False) -> dict[str, Any]:
    """What is stored after ``latest``: all of one machine.

    Args:
        latest: The ratios of a run.
        stored: What is stored until now.
        replace: Whether the stored ratios may go if another machine measured them.

    Raises:
        ValueError: another machine measured what is stored, and it may not go.
    """
    others = differences(latest, stored)
    if others and not replace:
        raise ValueError(f"{len(stored['ratios'])} measurements of another machine are stored ({others})")
    before = {} if others else stored["ratios"]
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
    parser.add_argument("--replace", action="store_true", help="keep: even if another machine's ratios are dropped")
    args = parser.parse_args(argv)
    if not LATEST.exists():
        print(f"{LATEST} is missing: run the benchmarks first (make bench)", file=sys.stderr)
        return 1
    latest = json.loads(LATEST.read_text())
    if args.action == "table":
        print(table(latest))
        return 0
    path = stored_path()
    stored = json.loads(path.read_text()) if path.exists() else {"ratios": {}}
    if args.action == "keep":
        try:
            found = kept(latest, stored, replace=args.replace)
        except ValueError as error:
            print(
                f"nothing was kept: in {path} {error}. Give that file another name, as {path.stem}-2022.json, or drop "
                "what is in it: python -m bench.results keep --replace",
                file=sys.stderr,
            )
            return 1
        path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        return 0
    others = differences(latest, stored)
    if others:
        print(f"{path.name} is of another machine, so that only the limits are judged: here {others}")
    problems = check(latest, stored)
    judged = "no limit missed" if others else "none worse beyond noise"
    print("\n".join(problems) if problems else f"{len(latest['ratios'])} measurements, {judged}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
