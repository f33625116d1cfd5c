"""setup.py's decision about CUDA, for every setting and every compiler it may find."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from setuptools.errors import OptionError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("esper_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name while it is being executed.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def nvcc(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Makes a compiler that reports what it is told to, and the environment that leads to it."""

    def make(release: str, archs: str = "75 80 90 100") -> dict[str, str]:
        script = tmp_path / "nvcc"
        listing = " ".join(f"compute_{arch}" for arch in archs.split())
        version = f"Cuda compilation tools, release {release}, V{release}.1" if release else "no idea"
        script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "{version}" || echo "{listing}"\n')
        script.chmod(0o755)
        return {"CUDACXX": str(script), "PATH": os.environ["PATH"]}

    return make


def test_default_is_everything(build: ModuleType, nvcc: Callable[..., dict[str, str]]) -> None:
    environ = nvcc("13.0")
    choice = build.choose_cuda(environ)
    assert choice == build.CudaChoice(nvcc=environ["CUDACXX"], archs="80-real;90-real;100")


@pytest.mark.parametrize("value", ["80;90", "80,90", " 80 90 "])
def test_architectures_in_any_notation(build: ModuleType, nvcc: Callable[..., dict[str, str]], value: str) -> None:
    assert build.choose_cuda(nvcc("12.0") | {"ESPER_CUDA_ARCHS": value}).archs == "80-real;90"


def test_best_effort_drops_what_the_compiler_does_not_know(
    build: ModuleType, nvcc: Callable[..., dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert build.choose_cuda(nvcc("12.4", archs="80 90")).archs == "80-real;90"
    assert "12.4 cannot build for 100: left out" in capsys.readouterr().out


def test_architecture_features_keep_their_letter(build: ModuleType, nvcc: Callable[..., dict[str, str]]) -> None:
    assert build.choose_cuda(nvcc("13.0") | {"ESPER_CUDA_ARCHS": "90a"}).archs == "90a"


def test_zero_leaves_it_out_without_looking(build: ModuleType) -> None:
    assert build.choose_cuda({"ESPER_CUDA": "0", "CUDACXX": "/nowhere"}).reason == "ESPER_CUDA=0 at build time"


@pytest.mark.parametrize(
    ("release", "archs", "wanted", "reason"),
    [
        ("11.8", "80 90", "", "is version 11.8, and 12.0 or newer is needed"),
        ("", "80", "", "gave no version"),
        ("12.4", "80 90", "100;120", "cannot build for 100, 120; change ESPER_CUDA_ARCHS"),
    ],
)
def test_unusable_compiler(
    build: ModuleType, nvcc: Callable[..., dict[str, str]], release: str, archs: str, wanted: str, reason: str
) -> None:
    environ = nvcc(release, archs) | {"ESPER_CUDA_ARCHS": wanted}
    choice = build.choose_cuda(environ)
    assert not choice.archs
    assert reason in choice.reason
    with pytest.raises(OptionError, match="ESPER_CUDA=1 asks for the CUDA kernels, but ") as error:
        build.choose_cuda(environ | {"ESPER_CUDA": "1"})
    assert reason in str(error.value)


def test_required_drops_nothing_that_was_asked_for(build: ModuleType, nvcc: Callable[..., dict[str, str]]) -> None:
    with pytest.raises(OptionError, match="cannot build for 100; change ESPER_CUDA_ARCHS"):
        build.choose_cuda(nvcc("12.4", archs="80 90") | {"ESPER_CUDA": "1", "ESPER_CUDA_ARCHS": "80;90;100"})


@pytest.mark.parametrize("archs", [{}, {"ESPER_CUDA_ARCHS": ""}, {"ESPER_CUDA_ARCHS": " "}], ids=str)
def test_required_drops_what_nobody_asked_for(
    build: ModuleType, nvcc: Callable[..., dict[str, str]], capsys: pytest.CaptureFixture[str], archs: dict[str, str]
) -> None:
    """``make`` insists on CUDA wherever there is an nvcc, and one of 12.0 to 12.7 knows no sm_100."""
    choice = build.choose_cuda(nvcc("12.0", archs="80 90") | {"ESPER_CUDA": "1"} | archs)
    assert (choice.archs, choice.required) == ("80-real;90", True)
    assert "12.0 cannot build for 100: left out" in capsys.readouterr().out
    with pytest.raises(OptionError, match="cannot build for 80, 90, 100"):
        build.choose_cuda(nvcc("12.0", archs="75") | {"ESPER_CUDA": "1"} | archs)


def test_no_compiler(build: ModuleType) -> None:
    choice = build.choose_cuda({"CUDACXX": "/nowhere/nvcc"})
    assert "nvcc was not found (CUDA 12.0 or newer is needed" in choice.reason


def test_home_comes_before_path(build: ModuleType, nvcc: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    nvcc("13.0")
    home = tmp_path / "toolkit"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "nvcc").symlink_to(tmp_path / "nvcc")
    environ = {"CUDA_HOME": str(home), "PATH": str(tmp_path)}
    assert build.find_nvcc(environ) == str(home / "bin" / "nvcc")
    assert build.find_nvcc({"PATH": str(tmp_path)}) == str(tmp_path / "nvcc")


@pytest.mark.parametrize(
    "environ", [{"ESPER_CUDA": "yes"}, {"ESPER_CUDA_ARCHS": "sm_90"}, {"ESPER_CUDA_ARCHS": "80;;9.0"}], ids=str
)
def test_nonsense_is_refused_even_in_best_effort(build: ModuleType, environ: dict[str, str]) -> None:
    ((name, _),) = environ.items()
    with pytest.raises(OptionError, match=name):
        build.choose_cuda(environ)


def test_packages_map_kernels_once(build: ModuleType) -> None:
    packages = build.packages()
    assert packages.count("esper.kernels") == 1
    assert "esper" in packages
    assert not [name for name in packages if name.startswith(("tests", "kernels", "bench"))]
