"""What every test runs under: threads, Triton's interpreter where there is no GPU, and hypothesis profiles."""

from __future__ import annotations

import os

# Read once, when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A backend forced by the developer's environment would change what the tests compare.
os.environ.pop("ESPER_BACKEND", None)
# And a bus of the developer's is none of the tests' business.
os.environ.pop("REDIS_URL", None)
os.environ.pop("ESPER_CONTROL_KEY", None)

from collections.abc import Iterator

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
