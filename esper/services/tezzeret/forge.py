"""Compile a blueprint to an artifact and publish it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import torch

from esper.artifacts.file_registry import FileRegistry
from esper.artifacts.locate import open_registry
from esper.artifacts.pack import pack
from esper.blueprints.init import initialise
from esper.blueprints.ir import Blueprint
from esper.blueprints.library import get
from esper.blueprints.validation import bind_parameters
from esper.contracts.container import ITEMSIZES
from esper.contracts.errors import EsperError
from esper.contracts.registry import RegistryClient

__all__ = ["PIPELINES", "CompileError", "build", "compile", "compile_blueprint"]

#: Every pipeline, and whether this version builds it.
PIPELINES: Final[Mapping[str, bool]] = {"fast": True, "standard": False, "aggressive": False}


class CompileError(EsperError, ValueError):
    """An artifact cannot be built as asked: an unknown pipeline, dtype or kind of blueprint."""


def build(
    blueprint: Blueprint | str,
    *,
    d_in: int,
    d_out: int,
    seed: int = 0,
    pipeline: str = "fast",
    dtype: torch.dtype | str = "float32",
    provenance: Mapping[str, str] | None = None,
    **options: Any,
) -> bytes:
    """Validate a blueprint, draw its weights, and pack both: :func:`compile_blueprint` without the publishing.

    The same arguments and tool versions give the same bytes. Arguments and errors are those of
    :func:`compile_blueprint`.
    """
    if not isinstance(pipeline, str) or pipeline not in PIPELINES:
        raise CompileError(f"unknown pipeline {pipeline!r}; known: {', '.join(PIPELINES)}")
    if not PIPELINES[pipeline]:
        built = ", ".join(name for name, done in PIPELINES.items() if done)
        raise CompileError(f"pipeline {pipeline!r} is not built in this version of Esper; built: {built}")
    chosen = _dtype(dtype)
    if isinstance(blueprint, str):
        blueprint = get(blueprint, **options)
    elif isinstance(blueprint, Blueprint):
        blueprint = replace(blueprint, parameters=bind_parameters(blueprint, options))
    else:
        raise CompileError(
            f"blueprint must be a Blueprint or the name of one (esper.blueprints.names() lists them), "
            f"not {type(blueprint).__name__}"
        )
    tensors = initialise(blueprint, d_in, d_out, seed, chosen)
    return pack(blueprint, tensors, d_in=d_in, d_out=d_out, seed=seed, pipeline=pipeline, provenance=provenance)


def compile_blueprint(
    blueprint: Blueprint | str,
    *,
    d_in: int,
    d_out: int,
    registry: RegistryClient | str | None = None,
    seed: int = 0,
    pipeline: str = "fast",
    dtype: torch.dtype | str = "float32",
    provenance: Mapping[str, str] | None = None,
    **options: Any,
) -> str:
    """Compile a blueprint for given sizes and publish the artifact.

    Args:
        blueprint: A blueprint, or the name of one of the library's.
        d_in: Features the sub-network reads: those of the layer's input or output, as the blueprint's tap says.
        d_out: Features it changes: the layer's, or the chunk's where the scope is ``chunk``.
        registry: Where to publish: a client, a ``file://`` URL or a path. None means ``ESPER_REGISTRY``, else the
            user's own registry folder.
        seed: Of the initial weights, in [0, 2**63); the same seed gives the same bits, whatever torch's global
            generator does.
        pipeline: ``fast``: weights and blueprint, run by the package's own kernels. The pipelines that add GPU
            binaries, ``standard`` and ``aggressive``, are refused by this version.
        dtype: Of the stored weights: float64, float32, float16 or bfloat16.
        provenance: Text by key for the record, stored as it is. It counts: other provenance, other id.
        **options: The blueprint's parameters, such as ``rank``; for one of the library's also its other options, such
        as
            ``mode`` and ``activation``.

    Returns:
        The artifact's id; the artifact is in the registry.

    Raises:
        BlueprintError: the blueprint, an option or a size is not one.
        CompileError: the pipeline or the dtype is not one of those above.
        RegistryUnavailableError: the artifact could not be stored.
    """
    client = open_registry(registry)
    data = build(
        blueprint, d_in=d_in, d_out=d_out, seed=seed, pipeline=pipeline, dtype=dtype, provenance=provenance, **options
    )
    return _publish(client, data)


#: The public name, ``esper.compile``.
compile = compile_blueprint


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name not in ITEMSIZES:
        raise CompileError(f"dtype {name!r} cannot be stored; possible: {', '.join(ITEMSIZES)}")
    found: torch.dtype = getattr(torch, name)
    return found


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
