"""What the driver itself takes for a launch: the loop in C, on a driver that only writes down what it is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.driver_loop import launch_seconds, without_driver
from bench.paired import Ratio
from tests.ops.recorder import Recorder, build


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return build(tmp_path)


def measured(recorder: Recorder, folder: Path, symbol: str = "k") -> tuple[float, list[int]]:
    waits = [0]
    seconds = launch_seconds(
        b"code", symbol, folder=folder, wait=lambda: waits.append(0), num_warps=2, shared=16, library=recorder.path,
        launches=4, rounds=3,
    )  # fmt: skip
    return seconds, waits


def test_every_launch_is_made_with_zeros(recorder: Recorder, tmp_path: Path) -> None:
    recorder.sizes(4, 8)
    seconds, waits = measured(recorder, tmp_path)
    assert 0 < seconds < 1e-3
    assert len(waits) - 1 == 4, "before every round, and before the binary goes"
    launched = [line for line in recorder.take() if line.startswith("launch")]
    assert len(launched) == 12
    assert all(" grid 1 1 1 block 64 1 1 shared 16 stream 0 extra 0 " in line for line in launched)
    assert all(line.split(" args ")[1].strip() == f"{'00' * 4} {'00' * 8}" for line in launched)


def test_an_error_of_the_driver_is_told(recorder: Recorder, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cuModuleGetFunction: CUDA error 500"):
        measured(recorder, tmp_path, "missing")
    recorder.fail("cuLaunchKernel", 700)
    with pytest.raises(OSError, match="cuLaunchKernel: CUDA error 700"):
        measured(recorder, tmp_path)


def test_without_a_compiler_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match="no C compiler"):
        launch_seconds(b"", "k", folder=tmp_path, wait=lambda: None)


def test_what_remains_without_the_driver() -> None:
    """10 us and 3 us, 2 us of each the driver's: 1 of 8."""
    whole = Ratio(0.3, 0.29, 0.31, 201, 200, 3e-6, 10e-6)
    rest = without_driver(whole, 2e-6)
    assert (rest.median, rest.low, rest.high) == pytest.approx((1 / 8, 0.9 / 8, 1.1 / 8))
    assert (rest.seconds, rest.baseline_seconds) == pytest.approx((1e-6, 8e-6))
    with pytest.raises(ValueError, match=r"takes 10\.00 us of the baseline's 10\.00"):
        without_driver(whole, 10e-6)
