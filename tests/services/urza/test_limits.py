"""Settings and limits that are none."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")

from esper.services.urza.limits import WriteLimit
from esper.services.urza.settings import settings_for

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("rate", [NAN, INF, -1.0])
def test_a_rate_that_is_none(rate):
    with pytest.raises(ValueError, match=rf"rate is {rate}; need a finite number"):
        WriteLimit(rate, 200)


@pytest.mark.parametrize("burst", [0, -1, NAN])
def test_a_burst_that_is_none(burst):
    with pytest.raises(ValueError, match=f"burst is {burst}; need at least one"):
        WriteLimit(20.0, burst)


@pytest.mark.parametrize(
    "setting",
    [
        *({"write_rate": value} for value in (NAN, INF, -1.0, True)),
        *({"write_burst": value} for value in (0, -1)),
        *({"max_bytes": value} for value in (0, -1, 1 << 60)),
        *({"presign_s": value} for value in (0, 604_801)),
        *({"upload_idle_s": value} for value in (0, NAN, INF)),
        {"threads": 0},
        {"max_json_bytes": 0},
    ],
    ids=str,
)
def test_settings_that_are_none(tmp_path, setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=rf"{name} is {value!r}; need a number from"):
        settings_for(tmp_path, **setting)


def test_no_limit_is_a_rate_of_none(tmp_path):
    assert settings_for(tmp_path, write_rate=0).write_rate == 0
    limit = WriteLimit(0, 1)
    for _ in range(1000):
        limit.take("a")
