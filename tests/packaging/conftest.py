"""A copy of the checkout to build from, and fresh environments to install into."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: What a clone does not have.
NOT_TRACKED = shutil.ignore_patterns(
    ".git", ".venv*", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache", ".hypothesis", "runs", "results"
)


def clean_environment(**extra: str) -> dict[str, str]:
    """The process's environment without what would steer a build or an import."""
    steering = {"ESPER_CUDA", "ESPER_CUDA_ARCHS", "CUDACXX", "PYTHONPATH", "TRITON_INTERPRET"}
    return {key: value for key, value in os.environ.items() if key not in steering} | extra


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a clone, in a folder of their own: builds leave the checkout as it is."""
    copy = tmp_path_factory.mktemp("clone") / "esper"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=NOT_TRACKED)
    return copy


@dataclass(frozen=True)
class Environment:
    """A fresh virtual environment that sees the dependencies of the one the tests run in, but not its Esper."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def packages(self) -> Path:
        return Path(sysconfig.get_path("purelib", vars={"base": str(self.folder)}))

    def install(self, source: Path, **environ: str) -> subprocess.CompletedProcess[str]:
        """``pip install SOURCE``, with build isolation, as a user runs it."""
        command = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "-v", str(source)]
        return subprocess.run(
            command, env=clean_environment(**environ), cwd=self.folder, capture_output=True, text=True, check=False
        )

    def run(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """This environment's Python, far from the checkout."""
        return subprocess.run(
            [str(self.python), *arguments],
            env=clean_environment(**environ),
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="session")
def new_environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Environment]:
    def make() -> Environment:
        environment = Environment(tmp_path_factory.mktemp("environment"))
        venv.create(environment.folder, with_pip=False, symlinks=True)
        # A path file adds the folder and runs none of its own path files: the editable Esper there stays out of sight.
        (environment.packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        return environment

    return make
