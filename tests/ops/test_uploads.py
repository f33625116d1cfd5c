"""Tables that a GPU reads: at the end of the stream that asks first, and waited for by the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from esper.ops.graft.uploads import Table


def test_on_a_cpu_they_are_there() -> None:
    with torch.inference_mode():
        table = Table([[1, 2], [3, 4]], torch.device("cpu"))
    assert table.here().tolist() == [[1, 2], [3, 4]]
    assert table.here() is table.here() and table.here().dtype is torch.int32
    assert not table.here().is_inference(), "it outlives the call that made it"


class Stream:
    def __init__(self) -> None:
        self.waits: list[Any] = []

    def wait_event(self, event: Any) -> None:
        self.waits.append(event)


class Event:
    passed = False

    def query(self) -> bool:
        return self.passed


def test_streams_wait_while_it_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decision alone; that copies are made this way needs a GPU."""
    table, event, mine, other = Table([1], torch.device("cpu")), Event(), Stream(), Stream()
    now, capturing, told = [mine], [False], []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: told.append(stream))
    table._event, table._stream = event, mine  # type: ignore[assignment]
    table.here()
    assert mine.waits == [], "what this stream does next comes after it anyway"
    now[0] = other
    table.here()
    assert other.waits == [event] and told == [other]
    capturing[0] = True
    event.query = lambda: pytest.fail("asked inside of a capture")  # type: ignore[method-assign]
    table.here()
    capturing[0] = False
    event.query = lambda: True  # type: ignore[method-assign]
    table.here()
    event.query = lambda: pytest.fail("asked again")  # type: ignore[method-assign]
    table.here()
    assert other.waits == [event] and mine.waits == []


@pytest.mark.gpu
def test_no_thread_waits_for_an_upload() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    Table([1], device)  # pins its first memory
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        table = Table(list(range(100)), device)
        found = table.here() + 1
        with torch.cuda.stream(torch.cuda.Stream()):
            elsewhere = table.here() + 2
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert found.tolist() == list(range(1, 101)) and elsewhere.tolist() == list(range(2, 102))


@pytest.mark.gpu
def test_a_capture_of_seeds_that_never_ran_says_so() -> None:
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="run the model once before the capture"), torch.cuda.graph(graph):
        Table([1], torch.device("cuda"))
