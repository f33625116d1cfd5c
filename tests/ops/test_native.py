"""Why the extension is not there, in words that fit the place esper was imported from."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from esper.ops import native


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package folder without an extension, as which ``esper.ops.native`` takes its own."""

    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "esper" / "ops" / "native.py"))
    (tmp_path / "esper").mkdir()
    return tmp_path / "esper"


def test_installed_without_a_compiler(package: Path) -> None:
    _, reason = native._import()
    assert reason.startswith("esper._native was not built (`pip install .`")


def test_imported_from_a_checkout(package: Path) -> None:
    (package.parent / "setup.py").touch()
    (package.parent / "csrc").mkdir()
    _, reason = native._import()
    assert reason.startswith(f"esper._native was not built: esper was imported from the checkout {package.parent},")
    assert "make native" in reason


def test_built_for_another_python(package: Path) -> None:
    (package / "_native.cpython-399.so").touch()
    _, reason = native._import()
    assert "another Python (_native.cpython-399.so)" in reason
