"""The examples run and say what they promise."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import esper

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, tmp_path: Path) -> str:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(EXAMPLES / name)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ten_lines(tmp_path: Path) -> None:
    printed = run("ten_lines.py", tmp_path)
    assert "seed awake: True" in printed
    before, now = (float(part.split()[0]) for part in (printed.split("loss ")[1], printed.split("for, ")[1]))
    assert now < before
    # float32 sums of some ten terms of size one.
    assert float(printed.split("off by ")[1]) < 1e-4


def test_custom_blueprint(tmp_path: Path) -> None:
    printed = run("custom_blueprint.py", tmp_path)
    assert "keeps the network's function: True" in printed
    assert "awake: True - same output: True" in printed
    assert "loaded: True FOSSILIZED" in printed


def test_huggingface(tmp_path: Path) -> None:
    printed = run("huggingface.py", tmp_path)
    assert "seed awake: True" in printed
    # It has learnt to count.
    assert printed.strip().endswith("[5, 6, 7, 8, 9, 10, 11, 12, 13]")


def test_the_ten_lines_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (EXAMPLES.parent / "README.md").read_text()
    (lines,) = [block.partition("```")[0] for block in page.split("```python")[1:] if "esper.wrap" in block]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}

    def data() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while not names["model"].morphogenetic_active:
            time.sleep(0.002)
            yield torch.randn(32, 64), torch.randint(10, (32,))

    names["data"] = data()
    exec(compile(lines, "README.md", "exec"), names)
    assert names["model"].layer("0").grafts.bound
    esper.load("grown.safetensors", names["network"])


def test_the_page_for_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (EXAMPLES.parent / "docs" / "using.md").read_text()
    blocks = [block.partition("```")[0] for block in page.split("```python\n")[1:]]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile("\n".join(blocks), "using.md", "exec"), names)
    assert capsys.readouterr().out == "DORMANT\nTrue {}\n"
    assert names["awake"]
    assert names["again"].layer("0").state_layout.state_of(0).name == "FOSSILIZED"


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_every_example_is_tested(name: str) -> None:
    assert name in Path(__file__).read_text()
