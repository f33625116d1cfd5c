"""Getting tensors to the device: at once on the CPU, on a stream of their own on a GPU."""

from __future__ import annotations

import contextlib
import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from esper.artifacts import Artifact
from esper.execution import kernel_executor, transfer
from esper.execution.kernel_executor import LoadedKernel
from esper.execution.transfer import Arrival, to_device
from esper.ops import native
from tests.artifacts.samples import sample

from .pinned import Unpinned, stand_for_cuda


def test_on_the_cpu_nothing_is_copied_and_nothing_waited_for():
    artifact = Artifact.open(sample())
    kernel = LoadedKernel.from_artifact(artifact)
    assert kernel.arrival is None
    assert kernel.ready()
    kernel.wait_on_current_stream()
    for name, tensor in artifact.tensors().items():
        assert kernel.tensors[name].data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_has_arrived(copied):
    arrival = copied(Arrival())
    assert arrival.ready()
    arrival.wait_on_current_stream()


def test_only_a_gpu_is_asked_to_leave_graphs_alone_and_all_the_while(monkeypatch):
    """Which CUDA calls a load makes needs a GPU; that they lie inside of the block does not."""
    told = []

    @contextlib.contextmanager
    def beside_captures():
        told.append("begin")
        yield
        told.append("end")

    class Table:
        def add(self, binaries, device):
            told.append(f"binaries for {device}")
            return ()

    def send(tensors, device):
        told.append(f"tensors for {device}")
        return dict(tensors), Arrival()

    for module in (transfer, kernel_executor):
        monkeypatch.setattr(module, "beside_captures", beside_captures)
    monkeypatch.setattr(transfer, "_send", send)
    monkeypatch.setattr(kernel_executor, "TABLE", Table())
    to_device({"a": torch.ones(1)}, torch.device("cpu"))
    to_device({}, torch.device("cuda"))
    assert told == []
    device = torch.device("cuda:1")
    to_device({"a": torch.ones(1)}, device)
    kernel_executor._load_binaries(SimpleNamespace(binaries=(None,)), device)
    assert told == ["begin", "tensors for cuda:1", "end", "begin", "binaries for 1", "end"]


def test_a_default_device_does_not_move_what_is_pinned(monkeypatch):
    stand_for_cuda(monkeypatch)
    monkeypatch.setattr(transfer, "_side_stream", lambda device: None)
    tensors = {"a": torch.arange(5.0), "b": torch.ones(2, 3, dtype=torch.bfloat16)}
    # What says nothing of its device is on meta here, and would be on the GPU under a default device "cuda".
    with torch.device("meta"), Unpinned() as mode:
        placed, _ = transfer._send(tensors, torch.device("cpu"))
    assert [memory.device.type for memory in mode.pinned] == ["cpu"]
    for name, tensor in tensors.items():
        assert torch.equal(placed[name], tensor)


@pytest.mark.gpu
def test_a_load_leaves_a_graph_alone_that_another_thread_captures():
    if native.driver() is None:
        pytest.skip(native.driver_reason())
    device = torch.device("cuda")
    x = torch.ones(8, device=device)
    graph = torch.cuda.CUDAGraph()
    # To begin a capture PyTorch gives its idle memory back, so what is loaded needs new memory.
    with ThreadPoolExecutor(1) as threads, torch.cuda.graph(graph):
        y = x * 2
        placed, arrival = threads.submit(to_device, {"a": torch.ones(1 << 24)}, device).result()
        z = y + 1
    graph.replay()
    assert arrival is not None
    arrival.wait_on_current_stream()
    assert placed["a"].sum().item() == 1 << 24
    assert z.tolist() == [3.0] * 8


@pytest.mark.gpu
def test_a_copy_on_a_side_stream_is_waited_for_where_it_is_read():
    device = torch.device("cuda")
    tensors = {"a": torch.randn(1 << 20), "b": torch.randn(3, 5).bfloat16(), "c": torch.ones(7, dtype=torch.float64)}
    stream = torch.cuda.Stream()
    for _ in range(20):
        placed, arrival = to_device(tensors, device)
        assert arrival is not None
        with torch.cuda.stream(stream):
            arrival.wait_on_current_stream()
            doubled = {name: tensor * 2 for name, tensor in placed.items()}
        del placed, arrival  # the memory may not be handed out before `stream` has read it
        to_device({"x": torch.zeros(1 << 20)}, device)
        stream.synchronize()
        for name, tensor in tensors.items():
            assert torch.equal(doubled[name].cpu(), tensor * 2), name
            assert doubled[name].dtype == tensor.dtype


@pytest.mark.gpu
def test_starting_a_copy_does_not_wait_for_the_training_stream():
    # About a second of work on the training stream; the copy is done while it runs.
    torch.cuda._sleep(2_000_000_000)
    busy = torch.cuda.Event()
    busy.record()
    _, arrival = to_device({"a": torch.randn(1 << 16)}, torch.device("cuda"))
    assert arrival is not None
    while not arrival.ready():
        pass
    assert not busy.query()
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_a_kernel_on_a_gpu():
    kernel = LoadedKernel.from_artifact(Artifact.open(sample()), "cuda")
    kernel.wait_on_current_stream()
    for name, tensor in Artifact.open(sample()).tensors().items():
        assert torch.equal(kernel.tensors[name].cpu(), tensor)
    other = pickle.loads(pickle.dumps(kernel))
    assert other.ready()
