"""Running a network by the way: what a forward leaves behind is put back as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.state_layout import Lattice

__all__ = ["in_mode_of", "unchanged", "unobserved"]


@contextmanager
def unchanged(*networks: nn.Module) -> Iterator[None]:
    """A block after which the networks' buffers, and the generators of all devices, are as they were."""
    kept = [
        (module._buffers, name, buffer, buffer.detach().clone())
        for network in networks
        for module in network.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if cuda else ()):
            yield
    finally:
        for buffers, name, buffer, before in kept:
            # Past the version: a backward that is still to come may have saved it, and finds what it saved.
            buffer.data.copy_(before)
            buffers[name] = buffer


@contextmanager
def unobserved(layers: Iterable[KasminaLayer], lattice: Lattice) -> Iterator[None]:
    """A block whose forwards no probe sees and no counter counts, and whose faults are forgotten."""
    layers = tuple(layers)
    probes = [(layer, layer._observer) for layer in layers if layer._observer is not None]
    counts = [layer._counters.executions for layer in layers]
    faults = lattice.fault_flags.clone()
    for layer, _ in probes:
        layer.disarm_probe()
    for layer in layers:
        layer._counters.executions = 0  # far from the next one that is timed
    try:
        yield
    finally:
        for layer, count in zip(layers, counts, strict=True):
            layer._counters.executions = count
        for layer, observer in probes:
            layer.arm_probe(observer)
        lattice.fault_flags.copy_(faults)


@contextmanager
def in_mode_of(network: nn.Module, twin: nn.Module) -> Iterator[None]:
    """A block in which every module of ``twin`` trains or does not as the one of that name in ``network``."""
    modes = {name: module.training for name, module in network.named_modules()}
    other = [
        (module, module.training)
        for name, module in twin.named_modules()
        if modes.get(name, module.training) != module.training
    ]
    for module, training in other:
        module.training = not training
    try:
        yield
    finally:
        for module, training in other:
            module.training = training
