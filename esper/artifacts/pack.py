"""Pack a blueprint and its weights into the bytes of an artifact."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping

import torch

from esper.artifacts.artifact import Artifact
from esper.blueprints.canonical import blueprint_hash
from esper.blueprints.families import match
from esper.blueprints.ir import Blueprint
from esper.contracts import container
from esper.contracts.errors import ArtifactError
from esper.contracts.ids import TARGET_ANY
from esper.contracts.manifest import METADATA_KEY, Manifest, TensorEntry

__all__ = ["pack", "tool_versions"]


def pack(
    blueprint: Blueprint,
    tensors: Mapping[str, torch.Tensor],
    *,
    d_in: int,
    d_out: int,
    seed: int,
    pipeline: str = "fast",
    provenance: Mapping[str, str] | None = None,
) -> bytes:
    """The bytes of an artifact: the same inputs and tool versions always give the same bytes.

    Args:
        blueprint: With its parameters baked in: their defaults are the values in use.
        tensors: Every tensor the blueprint needs at these sizes, named ``<node>.weight`` or ``<node>.bias``, in
            float64, float32, float16 or bfloat16, on any device.
        d_in: Features the sub-network reads.
        d_out: Features it changes.
        seed: Seed the weights came from, for the record.
        pipeline: The pipeline that built it.
        provenance: Text by key, stored as it is. It counts: other provenance, other id.

    Returns:
        A file that :meth:`Artifact.open` accepts (it was tried).

    Raises:
        ArtifactError: if the tensors are not those the blueprint needs, or are not finite.
    """
    held: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in container.ITEMSIZES:
            raise ArtifactError(
                f"tensor {name!a}: dtype {dtype} cannot be stored; possible: {', '.join(container.ITEMSIZES)}"
            )
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        held[name] = (dtype, tuple(tensor.shape), raw)
    manifest = Manifest(
        blueprint=blueprint.to_dict(),
        blueprint_hash=blueprint_hash(blueprint),
        d_in=d_in,
        d_out=d_out,
        family=str(match(blueprint).name),
        target=TARGET_ANY,
        pipeline=pipeline,
        seed=seed,
        tensors={
            name: TensorEntry(shape, dtype, hashlib.sha256(raw).hexdigest())
            for name, (dtype, shape, raw) in held.items()
        },
        tools=tool_versions(),
        provenance=dict(provenance or {}),
    )
    # "format" is what Hugging Face's readers of safetensors files look for.
    data = container.build({METADATA_KEY: manifest.to_json(), "format": "pt"}, held)
    Artifact.open(data)
    return data


def tool_versions() -> dict[str, str]:
    """Versions of what decides an artifact's bytes: this package, and torch, whose generator draws the weights."""
    return {"esper": importlib.metadata.version("esper"), "torch": str(torch.__version__)}
