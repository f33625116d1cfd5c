"""What several files here need."""

from __future__ import annotations

import pytest

from esper.execution.grafts import bank


@pytest.fixture
def native_calls() -> None:
    """The calls in C are there: a file that is about them must not pass on Python's way."""
    assert bank._bank_call() is not None, (
        "no call in C: an old extension, or a torch older than pyproject.toml asks for"
    )
