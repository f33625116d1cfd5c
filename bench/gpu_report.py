"""What ``bench/gpu.py`` and the benchmarks beside it have measured, as ``gpu.json`` and ``gpu.md``.

``python -m bench.gpu_report --out FOLDER`` measures nothing and takes in what the benchmarks left in the folder.
PyTorch is not imported: in the last seconds of a machine that is lent there is no time for it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["ORDER", "Report", "Row", "elsewhere", "gather", "main", "table"]

#: Of the parts in the table.
ORDER = ("dormant", "lattice", "stats", "grafts", "linear", "launch", "load")


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


def _read(path: Path) -> dict[str, Any]:
    """A JSON file; nothing where there is none, or only half of one because its writer was stopped."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found


def _write(path: Path, text: str) -> None:
    """In one step: whoever is stopped here leaves the file as it was."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def gather(folder: Path) -> None:
    """Put together what each file of benchmarks left under ``bench/`` in the folder: all of it in ``bench.json``."""
    found = [document for path in sorted((folder / "bench").glob("*.json")) if (document := _read(path))]
    if found:
        benchmarks = [entry for document in found for entry in document.get("benchmarks", [])]
        _write(folder / "bench.json", json.dumps({**found[-1], "benchmarks": benchmarks}, indent=1) + "\n")


def elsewhere(folder: Path) -> Iterator[Row]:
    """What the benchmarks beside this one left in the folder: launches and loads."""
    for key, found in _read(folder / "ratios.json").get("ratios", {}).items():
        if key.startswith("launch/"):
            for name, row in found.items():
                yield Row("launch", f"{key}: {name} / triton", row["ratio"], "x", row.get("limit"))
    for entry in _read(folder / "bench.json").get("benchmarks", []):
        found = entry.get("extra_info", {})
        if "driver_microseconds" in found:
            yield Row("launch", f"{entry['name']}: the driver's own part", found["driver_microseconds"], "us")
        if "microseconds_per_call" in found:
            yield Row("load", entry["name"], found["microseconds_per_call"], "us")


class Report:
    """``gpu.json`` and ``gpu.md`` in a folder, written anew whenever there is more to say.

    Args:
        folder: Where. What an earlier run on the same machine and device left there about other parts stays.
        about: The machine, the device, and whether the cases were short.
        parts: What this run measures.
    """

    def __init__(self, folder: Path, about: Mapping[str, str], parts: Sequence[str]) -> None:
        self._folder = folder
        self._about = dict(about)
        folder.mkdir(parents=True, exist_ok=True)
        before = _read(folder / "gpu.json")
        if before.get("machine") != self._about:
            before = {}
        others = [row for row in before.get("rows", []) if row["part"] not in (*parts, "launch", "load")]
        self._rows = [Row(**{key: row[key] for key in row if key != "verdict"}) for row in others]
        self._failed = [text for text in before.get("failed", []) if not text.startswith(tuple(parts))]

    def write(self, rows: Sequence[Row], failed: Sequence[str], unfinished: str = "") -> None:
        """Write what is known now.

        Args:
            rows: What this run has measured until now.
            failed: What could not be measured.
            unfinished: The part that is being measured.
        """
        order = {part: number for number, part in enumerate(ORDER)}
        found = sorted([*self._rows, *rows, *elsewhere(self._folder)], key=lambda row: order.get(row.part, len(order)))
        said = [*self._failed, *failed, *([f"{unfinished}: not finished"] if unfinished else [])]
        whole = [{**asdict(row), "verdict": row.verdict} for row in found]
        document = {"machine": self._about, "failed": said, "rows": whole}
        _write(self._folder / "gpu.json", json.dumps(document, indent=1) + "\n")
        _write(self._folder / "gpu.md", table(found, self._about))


def table(rows: Sequence[Row], about: Mapping[str, str]) -> str:
    """The rows in Markdown."""
    lines = [", ".join(f"{key}: {value}" for key, value in about.items()), ""]
    lines += ["| part | measurement | value | target | |", "|---|---|---|---|---|"]
    for row in rows:
        target = "" if row.target is None else f"{'>=' if row.higher else '<='} {row.target:g}"
        lines.append(f"| {row.part} | {row.name} | {row.value:.4g} {row.unit} | {target} | {row.verdict} |")
    return "\n".join(lines) + "\n"


def about(folder: Path) -> dict[str, str]:
    """The machine that the numbers in the folder are of: where they are of two, that of the benchmarks."""
    measured = _read(folder / "gpu.json").get("machine", {})
    benched = _read(folder / "ratios.json").get("machine", {})
    same = all(measured.get(key) == value for key, value in benched.items())
    found: dict[str, str] = measured if measured and same else benched
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Take in what the benchmarks left."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    folder = parser.parse_args(argv).out
    gather(folder)
    Report(folder, about(folder), ()).write([], [])
    return 0


if __name__ == "__main__":
    sys.exit(main())
