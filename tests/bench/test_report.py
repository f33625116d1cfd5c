"""The report fills its places with tables, and draws plots that are the same for the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.report import draw, fill, main, tables


def row(ratio: float, **more: float) -> dict[str, float]:
    return {"ratio": ratio, "low": ratio - 0.01, "high": ratio + 0.01, **more}


RATIOS: dict[str, Any] = {
    "dormant/mlp-256x32/eager/threads-1": {"wrapped": row(1.002, limit=1.005), "again": row(1.0)},
    "dormant/mlp-64x8/eager/threads-1": {"wrapped": row(1.001, limit=1.02), "again": row(1.0)},
    "compare/64x8/seeds-4/forward": {
        "esper": row(1.7),
        "peft": row(6.0),
        "composition": row(3.0),
        "compiled": row(1.5),
        "esper compiled": row(1.6),
    },
    "compare/64x8/seeds-16/forward": {"esper": row(1.7), "compiled": row(1.5), "esper compiled": row(1.4)},
    "compare/1024x8/seeds-4/forward": {"esper": row(1.1), "peft": row(1.4), "composition": row(1.3)},
    "compare-memory/64x8/seeds-4": {name: row(1.0) for name in ("esper", "peft", "composition", "compiled")},
    "floors/bank": {"over the bytes": row(3.0), "over the operations": row(1.3)},
}


def test_tables_have_rows_in_the_order_of_sizes_and_verdicts() -> None:
    dormant = tables(RATIOS)["dormant"].splitlines()
    assert dormant[0] == "| measurement | again | hook | wrapped | peft disabled |"
    assert dormant[2].startswith("| mlp-64x8/eager/threads-1 |") and "kept (1.02)" in dormant[2]
    assert dormant[3].startswith("| mlp-256x32/") and "undecided (1.005)" in dormant[3]


def test_who_is_ahead_is_named() -> None:
    compare = tables(RATIOS)["compare forward"].splitlines()
    assert compare[2] == "| 64 x 8 | 4 | 1.70 | 6.00 | 3.00 | 1.60 | 1.50 | compiled |"
    # Of what is compiled, Esper's own counts too.
    assert compare[3] == "| 64 x 8 | 16 | 1.70 |  |  | 1.40 | 1.50 |  |"
    assert compare[4] == "| 1024 x 8 | 4 | 1.10 | 1.40 | 1.30 |  |  |  |"


def test_places_are_filled_again_and_again() -> None:
    text = "before <!-- measured: floors --> old <!-- end --> <!-- measured: lattice --> kept <!-- end --> after"
    once = fill(text, tables(RATIOS))
    assert "| bank | 3.00 [2.99, 3.01] |" in once
    assert " old " not in once
    assert "<!-- measured: lattice --> kept <!-- end --> after" in once
    assert fill(once, tables(RATIOS)) == once


def test_a_place_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match="has no end"):
        fill("<!-- measured: floors -->", {})


def test_plots_are_the_same_for_the_same_numbers(tmp_path: Path) -> None:
    one, two = draw(RATIOS, tmp_path / "a"), draw(RATIOS, tmp_path / "b")
    assert [path.name for path in one] == ["dormant.svg", "compare.svg", "floors.svg"]
    for a, b in zip(one, two, strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document, stored = tmp_path / "performance.md", tmp_path / "cpu.json"
    document.write_text("<!-- measured: floors --><!-- end -->")
    assert main(["--from", str(stored), "--into", str(document)]) == 1
    assert "is missing" in capsys.readouterr().err
    stored.write_text(json.dumps({"ratios": RATIOS}))
    assert main(["--from", str(stored), "--into", str(document)]) == 0
    assert "| bank |" in document.read_text()
    assert (tmp_path / "plots" / "floors.svg").exists()


def test_other_machines_have_places_of_their_own(tmp_path: Path) -> None:
    for name, ratio in (("cpu", 3.0), ("cpu-2022", 4.0)):
        ratios = {**RATIOS, "floors/bank": {"over the bytes": row(ratio)}}
        (tmp_path / f"{name}.json").write_text(json.dumps({"ratios": ratios}))
    documents = [tmp_path / "performance.md", tmp_path / "tables.md"]
    for document in documents:
        document.write_text(
            "<!-- measured: floors --><!-- end --> <!-- measured: floors in cpu-2022 --><!-- end -->"
            "<!-- measured: floors in cpu-2017 -->as it was<!-- end -->"
        )
    into = [argument for document in documents for argument in ("--into", str(document))]
    assert main(["--from", str(tmp_path / "cpu.json"), *into]) == 0
    for document in documents:
        first, second, third = document.read_text().split("<!-- end -->")[:3]
        assert "3.00 [2.99, 3.01]" in first and "4.00 [3.99, 4.01]" in second and "as it was" in third


def test_the_short_table_has_both_modes_side_by_side() -> None:
    step = {"esper": row(1.9), "peft": row(5.0)}
    short = tables({**RATIOS, "compare/64x8/seeds-4/step": step})["compare short"].splitlines()
    assert (
        short[0].startswith("| d x batch | seeds | forward: esper | peft | ") and "| step: esper | peft |" in short[0]
    )
    assert short[2:] == ["| 64 x 8 | 4 | 1.70 | 6.00 | 3.00 | 1.60 | 1.50 | 1.90 | 5.00 |  |  |  |"]
