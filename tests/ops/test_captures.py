"""What a thread asks of the driver so that its CUDA calls leave the graphs of other threads alone."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from esper.ops import captures, native
from esper.ops.captures import beside_captures
from tests.ops.recorder import Recorder

extension = native.load()
needs_extension = pytest.mark.skipif(extension is None, reason=f"needs the extension: {native.reason()}")
GLOBAL, THREAD_LOCAL, RELAXED = range(3)


@pytest.fixture
def driver(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> Any:
    driver = extension.Driver(recorder.path)
    monkeypatch.setattr(native, "driver", lambda: driver)
    return driver


@needs_extension
def test_the_threads_mode_is_exchanged_and_put_back(driver, recorder):
    with beside_captures(), beside_captures():
        assert recorder.take() == ["captures 1", "captures 1"]
    assert recorder.take() == ["captures 1", "captures 0"]
    with pytest.raises(KeyError), beside_captures():
        raise KeyError
    assert recorder.take() == ["captures 1", "captures 0"]


@needs_extension
def test_a_callers_own_mode_comes_back(driver):
    assert driver.exchange_capture_mode(RELAXED) == GLOBAL
    with beside_captures():
        pass
    assert driver.exchange_capture_mode(GLOBAL) == RELAXED


@needs_extension
def test_other_threads_keep_theirs(driver):
    seen = []
    with beside_captures():
        thread = threading.Thread(target=lambda: seen.append(driver.exchange_capture_mode(GLOBAL)))
        thread.start()
        thread.join()
    assert seen == [GLOBAL]


@needs_extension
def test_a_refusal_is_told_in_the_drivers_words(driver, recorder):
    recorder.fail("cuThreadExchangeStreamCaptureMode", 4)
    with pytest.raises(extension.DriverError, match=r"cuThreadExchangeStreamCaptureMode: CUDA_ERROR_TEST \(4\)"):
        driver.exchange_capture_mode(RELAXED)


@needs_extension
def test_a_refusal_fails_nothing_and_is_said_once(driver, recorder, caplog):
    """Whoever loads a seed or sends a window has no use for the error: only a capture elsewhere would."""
    captures._refused.cache_clear()
    recorder.fail("cuThreadExchangeStreamCaptureMode", 4)
    ran = []
    for _ in range(2):
        with beside_captures():
            ran.append(True)
    assert len(ran) == 2
    (said,) = caplog.messages
    assert "may fail: cuThreadExchangeStreamCaptureMode: CUDA_ERROR_TEST (4)" in said
    with pytest.raises(RuntimeError, match="of the block"), beside_captures():
        raise RuntimeError("of the block")


@needs_extension
def test_a_refusal_on_the_way_out_fails_nothing_either(driver, recorder, caplog):
    captures._refused.cache_clear()
    with beside_captures():
        recorder.fail("cuThreadExchangeStreamCaptureMode", 4)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("driver", [None, SimpleNamespace()], ids=["no driver", "an older extension"])
def test_nothing_happens_where_there_is_nothing_to_ask(monkeypatch, driver):
    monkeypatch.setattr(native, "driver", lambda: driver)
    with beside_captures():
        pass
