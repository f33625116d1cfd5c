"""Compile a blueprint to an artifact and publish it."""

from __future__ import annotations

import asyncio
import math
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from esper.artifacts.artifact import DEFAULT_MAX_BYTES
from esper.artifacts.file_registry import FileRegistry
from esper.artifacts.keys import SigningKey
from esper.artifacts.locate import open_registry
from esper.artifacts.pack import pack
from esper.blueprints.init import initialise
from esper.blueprints.ir import Blueprint
from esper.blueprints.library import get
from esper.blueprints.validation import Resolved, bind_parameters, validate
from esper.contracts.container import ITEMSIZES
from esper.contracts.errors import BlueprintError
from esper.contracts.registry import RegistryClient
from esper.services.tezzeret.pipelines import PIPELINES, CompileError, binaries_for, check_request, torch_name

__all__ = ["PIPELINES", "CompileError", "build", "compile", "compile_blueprint"]


def build(
    blueprint: Blueprint | str,
    *,
    d_in: int,
    d_out: int,
    seed: int = 0,
    pipeline: str = "fast",
    dtype: torch.dtype | str = "float32",
    architectures: Sequence[str] = (),
    compute_dtypes: Sequence[torch.dtype | str] = (),
    provenance: Mapping[str, str] | None = None,
    sign_with: SigningKey | None = None,
    **options: Any,
) -> bytes:
    """Validate a blueprint, draw its weights, and pack both: :func:`compile` without the publishing.

    The same arguments and tool versions give the same bytes. Arguments and errors are those of
    :func:`compile`.
    """
    numbers = check_request(pipeline, architectures)
    chosen = torch_name(dtype)
    computed = [torch_name(each) for each in compute_dtypes] or [chosen]
    if isinstance(blueprint, str):
        blueprint = get(blueprint, **options)
    elif isinstance(blueprint, Blueprint):
        blueprint = replace(blueprint, parameters=bind_parameters(blueprint, options))
    else:
        raise CompileError(
            f"blueprint must be a Blueprint or the name of one (esper.blueprints.names() lists them), "
            f"not {type(blueprint).__name__}"
        )
    # Sizes first: a compiler is not started for what does not fit, nor are weights drawn.
    resolved = validate(blueprint, d_in, d_out)
    _check_bytes(resolved, chosen)
    binaries = binaries_for(pipeline, blueprint, resolved, computed, numbers)
    tensors = initialise(blueprint, d_in, d_out, seed, getattr(torch, chosen))
    return pack(
        blueprint,
        tensors,
        d_in=d_in,
        d_out=d_out,
        seed=seed,
        pipeline=pipeline,
        provenance=provenance,
        binaries=binaries,
        sign_with=sign_with,
    )


def compile(
    blueprint: Blueprint | str,
    *,
    d_in: int,
    d_out: int,
    registry: RegistryClient | str | os.PathLike[str] | None = None,
    seed: int = 0,
    pipeline: str = "fast",
    dtype: torch.dtype | str = "float32",
    architectures: Sequence[str] = (),
    compute_dtypes: Sequence[torch.dtype | str] = (),
    provenance: Mapping[str, str] | None = None,
    sign_with: SigningKey | None = None,
    **options: Any,
) -> str:
    """Compile a blueprint for given sizes and publish the artifact.

    Args:
        blueprint: A blueprint, or the name of one of the library's.
        d_in: Features the sub-network reads: those of the layer's input or output, as the blueprint's tap says.
        d_out: Features it changes: the layer's, or the chunk's where the scope is ``chunk``.
        registry: Where to publish: a client, a path, a ``file://`` or ``http(s)://`` URL. None means
            ``ESPER_REGISTRY``, else the user's own registry folder.
        seed: Of the initial weights, in [0, 2**63); the same seed gives the same bits, whatever torch's global
            generator does.
        pipeline: ``fast``: weights and blueprint, run by the package's own kernels. ``standard`` adds GPU binaries for
            the architectures asked for; no GPU is needed. ``aggressive`` adds binaries tuned on the GPU of this
            machine. See docs/binaries.md.
        dtype: Of the stored weights: float64, float32, float16 or bfloat16; fp64, fp32, fp16 and bf16 for short.
        architectures: What GPU binaries are for, such as ``("sm_80", "sm_90")``; none means sm_80, sm_90 and sm_100.
        compute_dtypes: Types of the values that GPU binaries work on, where they are not that of the weights.
        provenance: Text by key for the record, stored as it is. It counts: other provenance, other id.
        sign_with: Key to sign with; binaries are used only where it is trusted.
        **options: The blueprint's parameters, such as ``rank``; for one of the library's also its other options, such
            as ``mode`` and ``activation``.

    Returns:
        The artifact's id; the artifact is in the registry.

    Raises:
        BlueprintError: the blueprint, an option or a size is not one.
        CompileError: the pipeline, the dtype or an architecture is not one of those above, or the GPU kernels do not
            compile.
        RegistryUnavailableError: the artifact could not be stored.
    """
    client = open_registry(registry)
    data = build(
        blueprint,
        d_in=d_in,
        d_out=d_out,
        seed=seed,
        pipeline=pipeline,
        dtype=dtype,
        architectures=architectures,
        compute_dtypes=compute_dtypes,
        provenance=provenance,
        sign_with=sign_with,
        **options,
    )
    return _publish(client, data)


#: The same, for modules that do not want to hide Python's ``compile``.
compile_blueprint = compile


def _check_bytes(resolved: Resolved, dtype: str) -> None:
    """An artifact that nobody would open is not built; the node with the most weights is named."""
    total = resolved.parameter_count * ITEMSIZES[dtype]
    if total > DEFAULT_MAX_BYTES:
        largest = max(resolved.tensors, key=lambda name: math.prod(resolved.tensors[name]))
        raise BlueprintError(
            f"has the most of {total} bytes of weights, and an artifact has at most {DEFAULT_MAX_BYTES}",
            node=largest.partition(".")[0],
        )


def _publish(client: RegistryClient, data: bytes) -> str:
    if isinstance(client, FileRegistry):
        return client.publish_sync(data)
    # In a thread with a loop of its own, so that this also works where a loop is running already.
    outcome: list[str] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(asyncio.run(client.publish(data)))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="esper-publish")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]
