"""Puts the stored ratios into ``docs/performance.md`` and its tables, and draws plots: ``make bench-report``.

The documents hold places, ``<!-- measured: NAME -->`` to ``<!-- end -->``; each is filled with the table of that name,
or, where it is ``NAME in cpu-2022``, with that of another machine, whose ratios are stored beside the first one's. The
plots are SVG files beside the documents, the same bytes for the same numbers.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.results import judge, stored_path

__all__ = ["fill", "main", "tables"]

DOCUMENTS = tuple(Path(__file__).parents[1] / "docs" / name for name in ("performance.md", "performance-tables.md"))
#: The machine on which the code of today was compared over all sizes: its numbers are plotted.
COMPARED = "cpu-2023"

Row = Mapping[str, float]
Ratios = Mapping[str, Mapping[str, Row]]

#: Place in the document -> (prefix of the measurements, their columns in order).
SIMPLE: dict[str, tuple[str, tuple[str, ...]]] = {
    "dormant": ("dormant/", ("again", "hook", "wrapped", "peft disabled")),
    "awake": ("grafts/", ("again", "grown", "peft")),
    "reserved asleep": ("reserved/asleep/", ("again", "reserved")),
    "reserved awake": ("reserved/awake/", ("elastic", "reserved")),
    "layers": ("nn/", ()),
    "lattice": ("lattice_step/", ("step",)),
    "floors": ("floors/", ("over the bytes", "over the operations")),
    "launch": ("launch/", ()),
    "training with loads": ("training with a load ", ()),
    "outage": ("training while redis is dead/", ()),
}
#: What stands beside Esper in the comparison over sizes.
BESIDE = ("esper", "peft", "composition", "esper compiled", "compiled")
#: Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = {
    "esper": "#0072B2",
    "peft": "#D55E00",
    "composition": "#999999",
    "esper compiled": "#56B4E9",
    "compiled": "#009E73",
}
#: Width and batch, and seeds, of the comparison's short table.
SHORT_SIZES = ((64, 8), (64, 512), (256, 8), (256, 512), (1024, 8), (1024, 512), (1024, 8192), (4096, 1))
SHORT_SEEDS = (1, 4)
_MODES = ("forward", "step")
_SIZE = re.compile(r"compare/(\d+)x(\d+)/seeds-(\d+)/(\w+)")


def tables(ratios: Ratios) -> dict[str, str]:
    """Every table that the stored measurements allow, by the name of its place."""
    found = {}
    for name, (prefix, columns) in SIMPLE.items():
        rows = {key.removeprefix(prefix): row for key, row in ratios.items() if key.startswith(prefix)}
        if rows:
            columns = columns or tuple(dict.fromkeys(column for row in rows.values() for column in row))
            found[name] = _markdown(
                ["measurement", *columns],
                [
                    [key, *(_cell(row.get(column)) for column in columns)]
                    for key, row in sorted(rows.items(), key=_sized)
                ],
            )
    sizes = _sizes(ratios)
    for mode in _MODES:
        rows = [
            [f"{d} x {n}", str(seeds), *_ratios(row), _ahead(row)]
            for (d, n, seeds, m), row in sorted(sizes.items())
            if m == mode
        ]
        if rows:
            found[f"compare {mode}"] = _markdown(["d x batch", "seeds", *BESIDE, "Esper is behind"], rows)
    short = [
        [f"{d} x {n}", str(seeds), *(cell for mode in _MODES for cell in _ratios(sizes[d, n, seeds, mode]))]
        for d, n in SHORT_SIZES
        for seeds in SHORT_SEEDS
        if all((d, n, seeds, mode) in sizes for mode in _MODES)
    ]
    if short:
        head = [f"{mode}: {name}" if name == BESIDE[0] else name for mode in _MODES for name in BESIDE]
        found["compare short"] = _markdown(["d x batch", "seeds", *head], short)
    memory = {key: row for key, row in ratios.items() if key.startswith("compare-memory/")}
    if memory:
        found["compare memory"] = _markdown(
            ["d x batch, seeds", *BESIDE],
            [
                [key.removeprefix("compare-memory/").replace("/seeds-", ", "), *_ratios(row)]
                for key, row in sorted(memory.items(), key=_sized)
            ],
        )
    return found


def fill(text: str, found: Mapping[str, str]) -> str:
    """The document with its places filled; a place without a measurement is left as it is.

    Raises:
        ValueError: a place does not end.
    """
    if text.count("<!-- measured:") != text.count("<!-- end -->"):
        raise ValueError("a place in the document has no end: <!-- measured: NAME --> needs <!-- end --> behind it")

    def replace(match: re.Match[str]) -> str:
        table = found.get(match[1])
        return match[0] if table is None else f"<!-- measured: {match[1]} -->\n\n{table}\n\n<!-- end -->"

    return re.sub(r"<!-- measured: (.+?) -->.*?<!-- end -->", replace, text, flags=re.DOTALL)


def _ratios(row: Mapping[str, Row]) -> list[str]:
    return [f"{row[name]['ratio']:.2f}" if name in row else "" for name in BESIDE]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    text = f"{row['ratio']:.4f} [{row['low']:.4f}, {row['high']:.4f}]"
    if row["ratio"] >= 1.5:
        text = f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
    return text if "limit" not in row else f"{text} {judge(row)} ({row['limit']})"


def _sized(item: tuple[str, Any]) -> list[Any]:
    """Numbers in a name count as numbers."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", item[0])]


def _sizes(ratios: Ratios) -> dict[tuple[int, int, int, str], Mapping[str, Row]]:
    """The comparison by width, batch, seeds and mode."""
    found = {}
    for key, row in ratios.items():
        if match := _SIZE.fullmatch(key):
            found[int(match[1]), int(match[2]), int(match[3]), match[4]] = row
    return found


def _ahead(row: Mapping[str, Row]) -> str:
    """Who is faster than Esper beyond the intervals; of what is compiled, than Esper as it is and compiled."""
    others = {"peft": ("esper",), "composition": ("esper",), "compiled": ("esper", "esper compiled")}
    behind = [
        name
        for name, ours in others.items()
        if name in row and all(row[name]["high"] < row[own]["low"] for own in ours if own in row)
    ]
    return ", ".join(behind)


# -- plots ------------------------------------------------------------------------------------------------------------


def _plot_dormant(ratios: Ratios, axes: Any) -> None:
    rows = sorted(
        ((k.removeprefix("dormant/"), r["wrapped"]) for k, r in ratios.items() if k.startswith("dormant/")), key=_sized
    )
    for y, (_, row) in enumerate(rows):
        axes.plot([row["low"], row["high"]], [y, y], color=COLOURS["esper"], linewidth=2)
        axes.plot(row["ratio"], y, "o", color=COLOURS["esper"], markersize=4)
    axes.axvline(1.005, color=COLOURS["peft"], linewidth=1, label="limit 1.005")
    axes.axvline(1.0, color="#bbbbbb", linewidth=1)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("wrapped and asleep / bare, with 95 % interval")
    axes.legend(frameon=False, fontsize=8)


def _plot_compare(ratios: Ratios, figure: Any) -> None:
    sizes = _sizes(ratios)
    batches = sorted({n for _, n, _, _ in sizes})
    grid = figure.subplots(2, len(batches), sharex=True, sharey=True, squeeze=False)
    for line, mode in zip(grid, ("forward", "step"), strict=True):
        for axes, batch in zip(line, batches, strict=True):
            for name in BESIDE:
                points = sorted(
                    (d, row[name]["ratio"])
                    for (d, n, s, m), row in sizes.items()
                    if (n, s, m) == (batch, 4, mode) and name in row
                )
                if points:
                    axes.plot(
                        *zip(*points, strict=True), "o-", color=COLOURS[name], markersize=3, linewidth=1.2, label=name
                    )
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.axhline(1.0, color="#bbbbbb", linewidth=1)
            axes.set_title(f"{mode}, batch {batch}", fontsize=8)
            axes.tick_params(labelsize=7)
    for axes in grid[-1]:
        axes.set_xlabel("d", fontsize=8)
    for line in grid:
        line[0].set_ylabel("time / bare", fontsize=8)
    grid[0][-1].legend(frameon=False, fontsize=7)


def _plot_floors(ratios: Ratios, axes: Any) -> None:
    rows = sorted(((k.removeprefix("floors/"), r) for k, r in ratios.items() if k.startswith("floors/")), key=_sized)
    shares = [1 / max(row["ratio"] for row in found.values()) for _, found in rows]
    axes.barh(range(len(rows)), shares, color=COLOURS["esper"])
    axes.axvline(1.0, color="#bbbbbb", linewidth=1)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("share of the higher floor that is reached")


def draw(ratios: Ratios, folder: Path) -> list[Path]:
    """Draw what there are measurements for."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "esper"
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    wanted: list[tuple[str, str, tuple[float, float], Callable[[Any], None]]] = [
        ("dormant", "dormant/", (7, 4), lambda f: _plot_dormant(ratios, f.subplots())),
        ("compare", "compare/", (10, 4.5), lambda f: _plot_compare(ratios, f)),
        ("floors", "floors/", (7, 3), lambda f: _plot_floors(ratios, f.subplots())),
    ]
    made = []
    for name, prefix, size, plot in wanted:
        if any(key.startswith(prefix) for key in ratios):
            figure = Figure(figsize=size, layout="tight")
            plot(figure)
            made.append(folder / f"{name}.svg")
            figure.savefig(made[-1], metadata={"Date": None})
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Fill the documents and draw the plots."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--from", dest="source", type=Path, default=stored_path(), metavar="FILE", help="stored ratios")
    parser.add_argument(
        "--into", type=Path, action="append", metavar="FILE", help="a document; repeatable (default: those in docs/)"
    )
    args = parser.parse_args(argv)
    if not args.source.exists():
        print(
            f"{args.source} is missing: run the benchmarks and keep them first (make bench ARGS=--keep)",
            file=sys.stderr,
        )
        return 1
    ratios = _stored(args.source)
    others = {path.stem: _stored(path) for path in sorted(args.source.parent.glob(f"{args.source.stem}-*.json"))}
    found = tables(ratios)
    for machine, theirs in others.items():
        found |= {f"{name} in {machine}": table for name, table in tables(theirs).items()}
    documents = args.into or DOCUMENTS
    for document in documents:
        document.write_text(fill(document.read_text(), found))
    compared = {key: row for key, row in others.get(COMPARED, {}).items() if _SIZE.fullmatch(key)}
    if compared:
        ratios = {key: row for key, row in ratios.items() if not _SIZE.fullmatch(key)} | compared
    for path in draw(ratios, documents[0].parent / "plots"):
        print(path)
    return 0


def _stored(path: Path) -> Ratios:
    ratios: Ratios = json.loads(path.read_text())["ratios"]
    return ratios


if __name__ == "__main__":
    sys.exit(main())
