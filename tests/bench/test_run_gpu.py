"""``bench/run_gpu.sh`` runs on a machine without a GPU, and what it writes is whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import PARTS, Row, Setting, elsewhere, measure, table

SCRIPT = Path(__file__).parents[2] / "bench" / "run_gpu.sh"


def test_the_cpu_part_of_the_script(tmp_path: Path) -> None:
    """In short mode: the same code as with a GPU, on small cases, and without building again what the tests run on."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        ["bash", str(SCRIPT), "--cpu", "--short", "--no-build", str(tmp_path / "out")],
        env={**environment, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert found["failed"] == [] and found["machine"]["device"] == "cpu"
    assert {row["part"] for row in found["rows"]} == {"dormant", "lattice", "stats", "grafts"}
    assert all(row["value"] > 0 for row in found["rows"])
    for name in ("esper", "peft", "composed", "floor of bytes and operations"):
        assert any(f": {name} / bare" in row["name"] for row in found["rows"]), name
    written = (tmp_path / "out" / "gpu.md").read_text()
    assert len(written.splitlines()) == 4 + len(found["rows"])
    assert "esper" in (tmp_path / "out" / "environment.json").read_text()


def test_an_unknown_option_is_refused() -> None:
    result = subprocess.run(["bash", str(SCRIPT), "--fast"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "unknown option --fast" in result.stderr


@pytest.mark.parametrize(
    ("value", "target", "higher", "verdict"),
    [
        (1.0, None, False, ""),
        (1.0, 1.005, False, "kept"),
        (1.005, 1.005, False, "kept"),
        (1.01, 1.005, False, "missed"),
        (0.95, 0.9, True, "kept"),
        (0.9, 0.9, True, "kept"),
        (0.8, 0.9, True, "missed"),
    ],
)
def test_verdicts(value: float, target: float | None, higher: bool, verdict: str) -> None:
    row = Row("part", "name", value, "x", target, higher)
    assert row.verdict == verdict
    assert f"| {verdict} |" in table([row], {})


def test_a_part_that_fails_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(setting: Setting):  # type: ignore[no-untyped-def]
        yield Row("one", "first", 1.0, "us")
        raise RuntimeError("out of memory")

    monkeypatch.setitem(PARTS, "dormant", broken)  # type: ignore[arg-type]
    monkeypatch.setitem(PARTS, "linear", lambda setting: iter([Row("two", "second", 2.0, "us")]))  # type: ignore[arg-type]
    import torch

    rows, failed = measure(Setting(torch.device("cpu"), True), ["dormant", "linear"])
    assert [row.name for row in rows] == ["first", "second"]
    assert failed == ["dormant: RuntimeError: out of memory"]


def test_launches_and_loads_are_taken_from_the_other_benchmarks(tmp_path: Path) -> None:
    assert list(elsewhere(tmp_path)) == []
    ratios = {"launch/few": {"native": {"ratio": 0.2, "limit": 0.25}}, "grafts/x": {"grown": {"ratio": 1.5}}}
    (tmp_path / "ratios.json").write_text(json.dumps({"ratios": ratios}))
    entries = [
        {"name": "test_memory_hit", "extra_info": {"microseconds_per_call": 0.7}},
        {"name": "test_other", "extra_info": {}},
    ]
    (tmp_path / "bench.json").write_text(json.dumps({"benchmarks": entries}))
    assert [(row.part, row.value, row.target) for row in elsewhere(tmp_path)] == [
        ("launch", 0.2, 0.25),
        ("load", 0.7, None),
    ]
