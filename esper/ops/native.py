"""The C++/CUDA extension, if it is there; and if it is not, why."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

__all__ = ["cuda_reason", "load", "reason"]

_module: ModuleType | None = None
_reason = ""


def _import() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("esper._native"), ""
    except ModuleNotFoundError:
        return None, "esper._native was not built (`pip install .` builds it; it needs a C++ compiler)"
    except ImportError as error:
        return None, f"esper._native does not load: {error}"


_module, _reason = _import()
if _module is None:
    warnings.warn(f"{_reason}; Esper goes on with its Python backends.", RuntimeWarning, stacklevel=2)


def load() -> ModuleType | None:
    """``esper._native``, or None when it is missing or broken (:func:`reason` says which)."""
    return _module


def reason() -> str:
    """Why :func:`load` gave None; "" when it did not."""
    return _reason


def cuda_reason() -> str:
    """Why the CUDA kernels of the extension cannot run; "" when they can."""
    if _module is None:
        return _reason
    if not _module.cuda_built:
        return "esper._native was built without CUDA (nvcc not found, or ESPER_CUDA=0)"
    import torch

    return "" if torch.cuda.is_available() else "no CUDA device is visible"
