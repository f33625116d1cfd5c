"""The transition table is one, wherever it is written down."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from esper.execution import lifecycle
from esper.ops import native
from esper.ops.lattice import ALIGN, cpu, table
from tests.ops.lattice_model import AWAKE, LEGAL, NAMES

ROOT = Path(__file__).parents[2]


def _pairs_of_table() -> set[tuple[int, int]]:
    return {(old, new) for old in range(8) for new in range(8) if table.legal(old, new)}


def test_table_is_the_model_of_the_tests() -> None:
    assert _pairs_of_table() == {(old, new) for old, options in LEGAL.items() for new in options}
    assert {state for state in range(8) if table.AWAKE >> state & 1} == AWAKE


def test_table_is_the_one_in_the_architecture_notes() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^    ([A-Z_]+) +-> ([A-Z_, ]+)$", text, flags=re.MULTILINE)
    written = {(NAMES.index(old), NAMES.index(new.strip())) for old, options in rows for new in options.split(",")}
    assert written == _pairs_of_table()


def test_enum_has_the_numbers_and_names_of_the_design() -> None:
    assert [state.name for state in lifecycle.SeedLifecycleState] == [
        "DORMANT", "LOADING", "ACTIVE", "ERROR_RECOVERY", "FOSSILIZED", "GRAFTING", "TRAINING", "CULLED",
    ]  # fmt: skip
    assert [int(state) for state in lifecycle.SeedLifecycleState] == list(range(8))


def test_python_views_of_the_table_agree_with_it() -> None:
    pairs = {(int(old), int(new)) for old, options in lifecycle.TRANSITIONS.items() for new in options}
    assert pairs == _pairs_of_table()
    assert {int(state) for state in lifecycle.AWAKE} == AWAKE
    assert all(lifecycle.is_legal(old, new) for old, new in lifecycle.TIMED.items())
    assert sum(1 << state for state in lifecycle.TIMED) == table.TIMED


def test_what_the_device_does_by_itself_is_legal() -> None:
    grafting, training, error = table.GRAFTING, table.TRAINING, table.ERROR_RECOVERY
    own = [(grafting, training), (grafting, table.ACTIVE), (training, table.ACTIVE), (table.CULLED, table.DORMANT)]
    own += [(state, error) for state in AWAKE]
    assert set(own) <= _pairs_of_table()


def test_library_has_the_same_numbers() -> None:
    module = native.load()
    assert module is not None, native.reason()
    assert module.lattice_transitions == table.TRANSITIONS
    assert cpu.stale(module) == ""


@pytest.mark.parametrize("name", ["transitions", "awake", "timed", "max_faults", "align"])
def test_library_with_other_numbers_is_refused_by_name(name: str) -> None:
    numbers = {
        "lattice_transitions": table.TRANSITIONS,
        "lattice_awake": table.AWAKE,
        "lattice_timed": table.TIMED,
        "lattice_max_faults": table.MAX_FAULTS,
        "lattice_align": ALIGN,
    }
    numbers[f"lattice_{name}"] = 0
    assert name in cpu.stale(SimpleNamespace(**numbers))  # type: ignore[arg-type]
