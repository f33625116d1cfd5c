"""docs/blueprints.md: its example is a blueprint, and it names every entry, operation and family there is."""

from __future__ import annotations

import re
from pathlib import Path

from esper.blueprints import FamilyName, from_json, match, names, validate
from esper.blueprints.nodes import OPS

TEXT = (Path(__file__).parents[2] / "docs" / "blueprints.md").read_text()


def test_the_example_reads() -> None:
    (example,) = re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)
    blueprint = from_json(example)
    assert match(blueprint).name == "bottleneck"
    assert validate(blueprint, 64, 128).parameter_count == 8 * (64 + 128 + 1)


def test_everything_is_named() -> None:
    for word in (*names(), *OPS, *FamilyName):
        assert f"`{word}`" in TEXT, word
