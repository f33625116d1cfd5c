"""Pack a blueprint and its weights into the bytes of an artifact."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping
from typing import TYPE_CHECKING

from esper.artifacts.artifact import Artifact
from esper.artifacts.keys import SigningKey
from esper.blueprints.canonical import blueprint_hash
from esper.blueprints.families import match
from esper.blueprints.ir import Blueprint
from esper.contracts import container
from esper.contracts.binary_entry import target_of
from esper.contracts.errors import ArtifactError
from esper.contracts.manifest import METADATA_KEY, BinaryEntry, Manifest, TensorEntry
from esper.contracts.signatures import SIGNATURES_KEY, Signature, format_signatures, signed_message

if TYPE_CHECKING:
    import torch

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
    binaries: Mapping[str, tuple[BinaryEntry, bytes]] | None = None,
    sign_with: SigningKey | None = None,
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
        binaries: GPU binaries by name (``gpu/<arch>/<dtype>/<direction>``, with ``/<kernel>`` behind it where several
            kernels make up a direction): what they are, and their bytes.
        sign_with: Key to sign with, which changes the id too.

    Returns:
        A file that :meth:`Artifact.open` accepts (it was tried).

    Raises:
        ArtifactError: if the tensors are not those the blueprint needs, or are not finite; or if a binary's name,
            size or hash is not what its entry says.
    """
    import torch

    held: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in container.ITEMSIZES:
            raise ArtifactError(
                f"tensor {name!a}: dtype {dtype} cannot be stored; possible: {', '.join(container.ITEMSIZES)}"
            )
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        held[name] = (dtype, tuple(tensor.shape), raw)
    entries = {name: entry for name, (entry, _) in (binaries or {}).items()}
    manifest = Manifest(
        blueprint=blueprint.to_dict(),
        blueprint_hash=blueprint_hash(blueprint),
        d_in=d_in,
        d_out=d_out,
        family=str(match(blueprint).name),
        target=target_of(entry.arch for entry in entries.values()),
        pipeline=pipeline,
        seed=seed,
        tensors={
            name: TensorEntry(shape, dtype, hashlib.sha256(raw).hexdigest())
            for name, (dtype, shape, raw) in held.items()
        },
        tools=tool_versions(),
        provenance=dict(provenance or {}),
        binaries=entries,
    )
    held |= {name: (container.BINARY_DTYPE, (len(raw),), raw) for name, (_, raw) in (binaries or {}).items()}
    text = manifest.to_json()
    # "format" is what Hugging Face's readers of safetensors files look for.
    metadata = {METADATA_KEY: text, "format": "pt"}
    if sign_with is not None:
        metadata[SIGNATURES_KEY] = format_signatures(
            [Signature(sign_with.key_id, sign_with.sign(signed_message(text)))]
        )
    data = container.build(metadata, held)
    # Whom this machine trusts is no matter of what is packed.
    Artifact.open(data, trusted_keys=() if sign_with is None else [sign_with.public], policy="standard")
    return data


def tool_versions() -> dict[str, str]:
    """Versions of what decides an artifact's bytes: this package, and torch, whose generator draws the weights."""
    import torch

    return {"esper": importlib.metadata.version("esper"), "torch": str(torch.__version__)}
