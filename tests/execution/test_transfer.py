"""Getting tensors to the device: at once on the CPU, on a stream of their own on a GPU."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from esper.artifacts import Artifact
from esper.execution.kernel_executor import LoadedKernel
from esper.execution.transfer import Arrival, to_device
from tests.artifacts.samples import sample


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
