"""The C++/CUDA extension, if it is there; and if it is not, why."""

from __future__ import annotations

import importlib
import warnings
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["cuda_reason", "driver", "driver_reason", "load", "reason", "torch_library"]


def _import() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("esper._native"), ""
    except ModuleNotFoundError as error:
        if error.name != "esper._native":
            return None, f"esper._native does not load: {error}"
        package = Path(__file__).parent.parent
        others = sorted(path.name for path in package.glob("_native*"))
        if others:
            return None, f"esper._native was built for another Python ({', '.join(others)}); reinstall it for this one"
        checkout = package.parent
        if (checkout / "setup.py").is_file() and (checkout / "csrc").is_dir():
            return None, (
                f"esper._native was not built: esper was imported from the checkout {checkout}, which has no "
                "extension. Run `make native` there, or work in another folder to use the installed package"
            )
        return None, "esper._native was not built (`pip install .` builds it; it needs a C++ compiler)"
    except ImportError as error:
        return None, f"esper._native does not load: {error}"


_module, _reason = _import()
if _module is None:
    warnings.warn(f"{_reason}. Esper goes on with its other backends.", RuntimeWarning, stacklevel=2)


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
        return f"esper._native was built without CUDA: {_module.cuda_reason}"
    import torch

    return "" if torch.cuda.is_available() else "no CUDA device is visible"


def torch_library() -> str:
    """Where torch's shared library is, whose C interface the extension looks up."""
    import torch

    libraries = Path(torch.__file__).parent / "lib"
    names = ("libtorch_cpu.so", "libtorch_cpu.dylib")
    return str(next((libraries / name for name in names if (libraries / name).exists()), libraries / names[0]))


@lru_cache(maxsize=1)
def _driver() -> tuple[Any, str]:
    if _module is None:
        return None, _reason
    try:
        driver = _module.Driver()
        count = driver.device_count()
    except _module.DriverError as error:
        return None, str(error)
    return (driver, "") if count else (None, "the CUDA driver sees no device")


def driver() -> Any:
    """The CUDA driver (``esper._native.Driver``), opened at the first call; None: :func:`driver_reason` says why."""
    return _driver()[0]


def driver_reason() -> str:
    """Why :func:`driver` gave None; "" when it did not."""
    return _driver()[1]
