"""A driver that is recorded, for all who test what goes to it."""

from __future__ import annotations

import pytest

from . import recorder as recording
from .recorder import Recorder


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Recorder:
    return recording.build(tmp_path_factory.mktemp("recorder"))


@pytest.fixture
def recorder(library: Recorder) -> Recorder:
    """As new: nothing was asked of it yet."""
    library.reset()
    return library
