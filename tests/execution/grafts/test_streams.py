"""On which stream the gradients of a bank's parameters are added up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from esper.execution.grafts import GraftSet, device_bank, fused

from .helpers import graft_set, kernel, parameters

D = 6


def layer(device: str = "cpu") -> tuple[nn.Linear, GraftSet]:
    torch.manual_seed(0)
    host = nn.Linear(D, D).to(device)
    grafts = graft_set(
        host.cpu(), (0.3, 0.6), {i: kernel("lowrank", D, D, seed=i, rank=2, dtype=torch.float32) for i in range(2)}
    )
    grafts.state_layout.to(device)
    return host.to(device), grafts.to(device)


def accumulators(y: Tensor) -> set[object]:
    """The nodes that add up leaves' gradients, as far down as they go."""
    found, todo, seen = set(), [y.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            found.add(node)
        todo += [following for following, _ in node.next_functions]
    return found


def test_another_stream_gets_nodes_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which stream a node belongs to is PyTorch's affair, and is that of its making; so it must be made there."""
    monkeypatch.setattr(fused, "serves", lambda device: True)
    now = [7]
    monkeypatch.setattr(device_bank, "_stream", lambda device: now[0])
    host, grafts = layer()
    x = torch.randn(5, D)

    def nodes() -> set[object]:
        return {node for node in accumulators(grafts(x, host(x).detach())) if node.variable is not None}

    first = nodes()
    assert {id(node.variable) for node in first} == {id(p) for p in parameters(grafts)}
    assert nodes() == first, "one set for all calls on a stream"
    # With the last graph of the first stream the nodes go, and the second stream's are others.
    made = grafts._bank._weights
    now[0] = 8
    del first
    second = nodes()
    assert grafts._bank._weights is not made
    assert {id(node.variable) for node in second} == {id(p) for p in parameters(grafts)}
    assert nodes() == second


@pytest.mark.gpu
def test_a_capture_of_forward_and_backward_after_eager_steps() -> None:
    host, grafts = layer("cuda")
    x = torch.randn(8, D, device="cuda", requires_grad=True)
    leaves = [x, *host.parameters(), *parameters(grafts)]

    def step() -> Tensor:
        loss = grafts(x, host(x)).square().mean()
        loss.backward()
        return loss

    for _ in range(3):  # on the default stream
        step()
    for leaf in leaves:
        leaf.grad = None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    want = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    torch.cuda.synchronize()
    for leaf, expected in zip(leaves, want, strict=True):
        torch.testing.assert_close(leaf.grad, expected, rtol=0, atol=0)
