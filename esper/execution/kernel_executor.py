"""A kernel ready to be bound to a seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from esper.artifacts.artifact import Artifact
from esper.blueprints.families import Family
from esper.blueprints.ir import Blueprint
from esper.contracts.manifest import Manifest

__all__ = ["LoadedKernel"]


@dataclass(frozen=True, slots=True, eq=False)
class LoadedKernel:
    """A verified artifact in memory, on the device it is for.

    Two seeds may hold the same one: its tensors are read only.

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

    @classmethod
    def from_artifact(cls, artifact: Artifact, device: torch.device | str = "cpu") -> LoadedKernel:
        """The artifact's tensors on ``device``; on the CPU they stay views of the artifact's bytes."""
        return cls(
            artifact_id=artifact.artifact_id,
            kernel_id=artifact.kernel_id,
            blueprint=artifact.blueprint,
            family=artifact.family,
            tensors={name: tensor.to(device) for name, tensor in artifact.tensors().items()},
            d_in=artifact.d_in,
            d_out=artifact.d_out,
            manifest=artifact.manifest,
            nbytes=artifact.nbytes,
        )
