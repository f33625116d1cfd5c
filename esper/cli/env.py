"""``esper env``: what is installed here, and which backend every operation uses, with the reasons."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper.cli.main import Subparsers

__all__ = ["add_parser", "describe", "run"]

#: Everything Esper reads from the environment.
VARIABLES = (
    "ESPER_BACKEND",
    "ESPER_CACHE_DIR",
    "ESPER_CONTROL_KEY",
    "ESPER_DEBUG",
    "ESPER_REGISTRY",
    "ESPER_REGISTRY_TOKEN",
    "ESPER_RUN_ID",
    "ESPER_TRUSTED_KEYS",
    "ESPER_TRUST_POLICY",
    "ESPER_URZA_DATABASE",
    "REDIS_URL",
    "TRITON_INTERPRET",
)
#: Of these, what is shown is that they are set.
SECRETS = frozenset(("ESPER_CONTROL_KEY", "ESPER_REGISTRY_TOKEN"))
#: Of these, what is shown is where the bus is.
BUSES = frozenset(("REDIS_URL",))


def add_parser(subparsers: Subparsers) -> None:
    """Declare ``esper env``."""
    parser = subparsers.add_parser("env", help="show versions, devices, and which backend every operation uses")
    parser.add_argument("--json", action="store_true", help="print JSON for a program or a bug report")


def run(args: argparse.Namespace) -> int:
    """Print the description; always 0 unless ``ESPER_BACKEND`` names no backend."""
    description = describe()
    print(json.dumps(description, indent=2) if args.json else _text(description))
    return 0


def describe() -> dict[str, Any]:
    """All that ``esper env`` shows, as JSON types.

    Returns:
        ``versions`` (name -> version, or null), ``native`` (the C++/CUDA extension), ``gpus``, ``paths`` (cache and
        registry, credentials masked), ``environment`` (variables that are set) and ``operations`` (a list; ``devices``
        holds, for each device type here, the backend ``used`` and the reason why every other one was ``rejected``).

    Raises:
        ValueError: if ``ESPER_BACKEND`` names no backend.
    """
    import torch

    import esper.ops
    from esper.contracts.paths import cache_dir, default_registry_dir
    from esper.contracts.registry import mask_credentials
    from esper.ops import registry

    registry.forced_backend()
    has_cuda = torch.cuda.is_available()
    devices = ["cuda", "cpu"] if has_cuda else ["cpu"]
    return {
        "versions": {
            "esper": _version("esper"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "torch's CUDA": torch.version.cuda,
        },
        "location": str(Path(esper.ops.__file__).parent.parent),
        "native": _native(),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())] if has_cuda else [],
        "paths": {
            "cache": str(cache_dir()),
            "registry": mask_credentials(os.environ.get("ESPER_REGISTRY") or str(default_registry_dir())),
        },
        "environment": {name: _shown(name, os.environ[name]) for name in VARIABLES if name in os.environ},
        "operations": [_operation(registry.get(name), devices) for name in registry.names()],
    }


def _shown(name: str, value: str) -> str:
    """A variable's value without what is secret in it."""
    from esper.contracts.registry import mask_credentials
    from esper.oona.urls import mask

    if name in SECRETS:
        return "(set)"
    # An empty one is as good as none.
    return mask(value) if name in BUSES and value.strip() else mask_credentials(value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _native() -> dict[str, Any]:
    from esper.ops import native

    module = native.load()
    if module is None:
        return {"loaded": False, "reason": native.reason()}
    return {
        "loaded": True,
        "file": module.__file__,
        "cuda": module.cuda_built,
        "cuda_toolkit": module.cuda_toolkit or None,
        "cuda_archs": module.cuda_archs or None,
        "cuda_reason": native.cuda_reason(),
    }


def _gpu(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def _operation(op: Any, devices: list[str]) -> dict[str, Any]:
    from esper.ops.registry import Backend, BackendUnavailableError

    chosen: dict[str, Any] = {}
    for device in devices:
        try:
            selection = op.select(device)
        except BackendUnavailableError as error:
            chosen[device] = {"used": None, "error": str(error), "rejected": {}}
        else:
            rejected = {str(backend): reason for backend, reason in selection.rejected.items()}
            chosen[device] = {"used": str(selection.backend), "rejected": rejected}
    return {
        "name": op.name,
        "doc": op.doc,
        "available": [str(backend) for backend in Backend if not op.reason(backend)],
        "devices": chosen,
    }


def _text(description: dict[str, Any]) -> str:
    rows = [(name, value or "not installed") for name, value in description["versions"].items()]
    if description["versions"]["torch's CUDA"] is None:
        rows[-1] = ("torch's CUDA", "none: a CPU build of torch")
    rows += [("installed in", description["location"]), *_native_rows(description["native"])]
    rows += [
        (f"gpu {index}", f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gib']} GiB")
        for index, gpu in enumerate(description["gpus"])
    ] or [("gpu", "none visible")]
    rows += [*description["paths"].items(), *description["environment"].items()]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    operations = description["operations"]
    for device in next(iter(operations), {"devices": {}})["devices"]:
        lines += ["", f"Operations on {device}"]
        for operation in operations:
            lines += _operation_lines(operation, operation["devices"][device])
    return "\n".join(lines)


def _native_rows(native: dict[str, Any]) -> list[tuple[str, str]]:
    if not native["loaded"]:
        return [("C++", f"not available: {native['reason']}")]
    rows = [("C++", native["file"])]
    if native["cuda"]:
        rows.append(("CUDA", f"built with toolkit {native['cuda_toolkit']} for {native['cuda_archs']}"))
    if native["cuda_reason"]:
        rows.append(("" if native["cuda"] else "CUDA", f"cannot run: {native['cuda_reason']}"))
    return rows


def _operation_lines(operation: dict[str, Any], chosen: dict[str, Any]) -> list[str]:
    available = ", ".join(operation["available"]) or "nothing"
    lines = [f"  {operation['name']}: {operation['doc']}", f"      used       {chosen['used'] or chosen['error']}"]
    lines.append(f"      available  {available}")
    lines += [f"      rejected   {backend}: {reason}" for backend, reason in chosen["rejected"].items()]
    return lines
