"""A kernel ready to be bound to a seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from esper.artifacts.artifact import Artifact, Binary
from esper.blueprints.families import Family
from esper.blueprints.ir import Blueprint
from esper.contracts.manifest import Manifest
from esper.execution.transfer import Arrival, to_device
from esper.ops.binaries import TABLE
from esper.ops.captures import beside_captures

__all__ = ["LoadedKernel"]


@dataclass(frozen=True, slots=True, eq=False)
class LoadedKernel:
    """A verified artifact in memory, on the device it is for or on its way there.

    Two seeds may hold the same one: its tensors are read only. Call :meth:`wait_on_current_stream` before the first
    read on a stream.

    Attributes:
        artifact_id: The artifact's id.
        kernel_id: First 63 bits of its SHA-256; what the lattice stores.
        blueprint: The sub-network, parameters baked in.
        family: The fused family that runs it, with the roles of its nodes.
        tensors: Initial weights by name (``<node>.weight``, ``<node>.bias``), on one device. Copy them into parameters.
        d_in: Features it reads.
        d_out: Features it changes.
        manifest: What the artifact says about itself.
        nbytes: Length of the artifact in bytes; what it counts for in the cache.
        binaries: GPU binaries that a trusted key vouches for.
        arrival: When the tensors are on the device; None if they are.
        notes: What of the artifact is not used, and why.
    """

    artifact_id: str
    kernel_id: int
    blueprint: Blueprint
    family: Family
    tensors: Mapping[str, torch.Tensor]
    d_in: int
    d_out: int
    manifest: Manifest
    nbytes: int
    binaries: tuple[Binary, ...] = ()
    arrival: Arrival | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def from_artifact(cls, artifact: Artifact, device: torch.device | str = "cpu") -> LoadedKernel:
        """The artifact's tensors on ``device``; on the CPU they stay views of the artifact's bytes.

        On a GPU its binaries are loaded too. Call it in the thread that fetches: loading takes a while.
        """
        device = torch.device(device)
        tensors, arrival = to_device(artifact.tensors(), device)
        return cls(
            artifact_id=artifact.artifact_id,
            kernel_id=artifact.kernel_id,
            blueprint=artifact.blueprint,
            family=artifact.family,
            tensors=tensors,
            d_in=artifact.d_in,
            d_out=artifact.d_out,
            manifest=artifact.manifest,
            nbytes=artifact.nbytes,
            binaries=artifact.binaries,
            arrival=arrival,
            notes=(*artifact.notes, *_load_binaries(artifact, device)),
        )

    def ready(self) -> bool:
        """Whether the tensors are on the device; never waits."""
        return self.arrival is None or self.arrival.ready()

    def wait_on_current_stream(self) -> None:
        """Let the current stream of the device wait until the tensors are there; the calling thread goes on."""
        if self.arrival is not None:
            self.arrival.wait_on_current_stream()

    def __getstate__(self) -> list[Any]:
        """The fields in order; a view of the artifact's bytes cannot be pickled, so binaries travel as bytes."""
        plain = tuple((binary.name, binary.entry, bytes(binary.data)) for binary in self.binaries)
        return [plain if field.name == "binaries" else getattr(self, field.name) for field in fields(self)]

    def __setstate__(self, state: list[Any]) -> None:
        for field, value in zip(fields(self), state, strict=True):
            if field.name == "binaries":
                value = tuple(Binary(name, entry, memoryview(data)) for name, entry, data in value)
            object.__setattr__(self, field.name, value)


def _load_binaries(artifact: Artifact, device: torch.device) -> tuple[str, ...]:
    """Put the artifact's binaries within reach of the operations; why some, or all, are left out."""
    if device.type != "cuda" or not artifact.binaries:
        return ()
    with beside_captures():
        return TABLE.add(artifact.binaries, torch.cuda.current_device() if device.index is None else device.index)
