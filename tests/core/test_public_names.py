"""What ``import esper`` offers is there when it is asked for."""

import pytest

import esper


@pytest.mark.parametrize("name", [*esper.__all__, *esper._PACKAGES])
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(esper, name) is not None
