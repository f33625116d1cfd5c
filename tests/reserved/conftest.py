from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("ESPER_REGISTRY", str(tmp_path / "registry"))
