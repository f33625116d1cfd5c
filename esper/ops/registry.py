"""One place that knows every operation, its backends, and which of them runs.

An operation is declared once with :func:`define`; backends add themselves with :func:`implements` or say with
:func:`unavailable` why they cannot. :class:`Op` picks by device and by ``ESPER_BACKEND`` and remembers its choice, so
that a call costs one dictionary look-up over calling the backend's function directly.

An operation declared with a ``fake`` is also PyTorch's: ``torch.ops.esper.<name>`` (:attr:`Op.overload`) reaches the
same backends through the dispatcher, which is what ``torch.compile`` needs to see. Calling the :class:`Op` itself skips
the dispatcher (1.5 to 2.5 microseconds) except while compiling.
"""

from __future__ import annotations

import contextlib
import enum
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = [
    "Backend",
    "BackendUnavailableError",
    "Op",
    "Selection",
    "define",
    "forced_backend",
    "forget_choices",
    "get",
    "implements",
    "names",
    "route",
    "triton_interprets",
    "unavailable",
    "use_backend",
]

Kernel = Callable[..., Any]


class Backend(enum.StrEnum):
    """The four ways an operation can run."""

    TRITON = "triton"
    CUDA = "cuda"
    CPU = "cpu"
    REFERENCE = "reference"


#: Fastest first. What follows the first entry that is meant for a device is a fallback, and is announced.
PREFERENCE: Mapping[str, tuple[Backend, ...]] = {
    "cuda": (Backend.TRITON, Backend.CUDA, Backend.REFERENCE),
    "cpu": (Backend.CPU, Backend.REFERENCE),
}

#: Where a backend can run at all. Triton reaches the CPU only through its interpreter, and only when asked for by name.
#: The reference runs wherever PyTorch does.
DEVICES: Mapping[Backend, tuple[str, ...]] = {
    Backend.TRITON: ("cuda", "cpu"),
    Backend.CUDA: ("cuda",),
    Backend.CPU: ("cpu",),
}


class BackendUnavailableError(RuntimeError):
    """The backend asked for cannot run this operation on this device; the message says why."""


@dataclass(frozen=True)
class Selection:
    """What :meth:`Op.select` decided for one device, and why every other backend was passed over."""

    backend: Backend
    kernel: Kernel
    rejected: Mapping[Backend, str]


@dataclass(eq=False)
class Op:
    """One operation: a schema, its meaning, and the functions that carry it out.

    Calling an ``Op`` runs the selected backend on the device of the first tensor argument.

    Attributes:
        name: Its name, unique in the package.
        schema: Arguments and results in the dispatcher's language.
        doc: One line for ``esper env``.
        fake: Its shape function, or None.
        overload: ``torch.ops.esper.<name>.default``, or None without a ``fake``. It has no derivative: put an
            ``autograd.Function`` around the call, or give it one with ``torch.library.register_autograd``.
    """

    name: str
    schema: str
    doc: str
    fake: Kernel | None = None
    overload: Kernel | None = field(default=None, repr=False)
    _kernels: dict[Backend, Kernel] = field(default_factory=dict, repr=False)
    _reasons: dict[Backend, str] = field(default_factory=dict, repr=False)
    _chosen: dict[str, Kernel] = field(default_factory=dict, repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on the device of the first tensor among the arguments."""
        if self.overload is not None and torch.compiler.is_compiling():
            return self.overload(*args, **kwargs)
        return self.resolve(_device_type(args, kwargs))(*args, **kwargs)

    def resolve(self, device_type: str) -> Kernel:
        """The function that runs on ``device_type`` ("cpu" or "cuda"), chosen once and remembered.

        Raises:
            BackendUnavailableError: if no backend can run it there.
            ValueError: if ``ESPER_BACKEND`` names no backend.
        """
        kernel = self._chosen.get(device_type)
        if kernel is None:
            selection = self.select(device_type)
            _announce_fallback(self, device_type, selection)
            kernel = self._chosen[device_type] = selection.kernel
        return kernel

    def backend(self, backend: Backend | str) -> Kernel:
        """The function of one backend by name, whatever the environment says.

        Raises:
            BackendUnavailableError: if that backend has no such function here.
        """
        backend = Backend(backend)
        if backend not in self._kernels:
            raise BackendUnavailableError(f"{self.name}: backend {backend} is not available: {self.reason(backend)}")
        return self._kernels[backend]

    def reason(self, backend: Backend) -> str:
        """Why ``backend`` cannot run this operation ("" when it can)."""
        if backend in self._kernels:
            return ""
        return self._reasons.get(backend, "not implemented for this operation")

    def select(self, device_type: str) -> Selection:
        """Choose a backend for ``device_type``; every backend not chosen is listed with its reason.

        Raises:
            BackendUnavailableError: if no backend can run it there, or the one asked for cannot.
        """
        wanted = forced_backend()
        order = _preference(device_type) if wanted is None else (wanted,)
        rejected: dict[Backend, str] = {}
        chosen: Backend | None = None
        for backend in (*order, *(b for b in Backend if b not in order)):
            why_not = self._why_not(backend, device_type)
            if why_not:
                rejected[backend] = why_not
            elif backend not in order:
                rejected[backend] = f"{wanted} was asked for" if wanted else "only when asked for by name"
            elif chosen is None:
                chosen = backend
            else:
                rejected[backend] = f"{chosen} is preferred on {device_type}"
        if chosen is None:
            why = "; ".join(f"{backend}: {rejected[backend]}" for backend in order)
            hint = " Unset ESPER_BACKEND to let Esper choose." if wanted else ""
            raise BackendUnavailableError(f"{self.name} cannot run on {device_type} ({why}).{hint}")
        return Selection(chosen, self._kernels[chosen], rejected)

    def _why_not(self, backend: Backend, device_type: str) -> str:
        if backend is not Backend.REFERENCE and device_type not in DEVICES[backend]:
            return f"runs on {' and '.join(DEVICES[backend])}, not on {device_type}"
        if backend is Backend.TRITON and device_type == "cpu" and not triton_interprets():
            return "a CPU needs Triton's interpreter (TRITON_INTERPRET=1, for tests only)"
        return self.reason(backend)


_OPS: dict[str, Op] = {}
_OVERRIDE: list[Backend] = []
_WARNED: set[str] = set()
#: Definitions live as long as this object.
_LIBRARY = torch.library.Library("esper", "FRAGMENT")


def define(name: str, schema: str, *, doc: str, fake: Kernel | None = None, cpu_route: bool = True) -> Op:
    """Declare an operation.

    Args:
        name: Its name, unique in the package.
        schema: Arguments and results in the dispatcher's language, such as ``"(Tensor x) -> Tensor"``.
        doc: One line for ``esper env``.
        fake: Shape function for ``torch.compile``; give it to every op that is called inside a model's forward. With
            it the op joins PyTorch's dispatcher as ``torch.ops.esper.<name>``, and ``schema`` must say what it mutates.
        cpu_route: Whether the dispatcher's entry for the CPU asks :meth:`Op.resolve`. Without, the extension registers
            its own, or the module that declares the op calls :func:`route` where it cannot.

    Raises:
        ValueError: if the name is taken or no identifier.
        RuntimeError: from PyTorch, if the schema does not parse.
    """
    if not name.isidentifier():
        raise ValueError(f"operation name {name!r}: expected an identifier, such as 'lattice_step'")
    if name in _OPS:
        raise ValueError(f"operation {name!r} is declared twice")
    op = Op(name, schema, doc, fake)
    if fake is not None:
        op.overload = _add_to_dispatcher(op, fake, ("CPU", "CUDA") if cpu_route else ("CUDA",))
    _OPS[name] = op
    return op


def implements(name: str, backend: Backend | str) -> Callable[[Kernel], Kernel]:
    """Decorator: the function is ``backend``'s implementation of the operation ``name``.

    It takes and returns what the schema says. A second function for the same backend replaces the first.
    """

    def register(kernel: Kernel) -> Kernel:
        op = get(name)
        op._kernels[Backend(backend)] = kernel
        op._chosen.clear()
        return kernel

    return register


def unavailable(name: str, backend: Backend | str, reason: str) -> None:
    """Put on record why ``backend`` cannot run the operation ``name`` on this machine."""
    get(name)._reasons[Backend(backend)] = reason


def get(name: str) -> Op:
    """The operation ``name``; ``KeyError`` lists the known ones."""
    try:
        return _OPS[name]
    except KeyError:
        raise KeyError(f"unknown operation {name!r}; known: {', '.join(sorted(_OPS))}") from None


def names() -> list[str]:
    """All declared operations, sorted."""
    return sorted(_OPS)


def forced_backend() -> Backend | None:
    """The backend that :func:`use_backend` or ``ESPER_BACKEND`` asks for, or None."""
    if _OVERRIDE:
        return _OVERRIDE[-1]
    value = os.environ.get("ESPER_BACKEND", "").strip().lower()
    if not value or value == "auto":
        return None
    try:
        return Backend(value)
    except ValueError:
        raise ValueError(f"ESPER_BACKEND={value!r}: expected auto, {', '.join(Backend)}") from None


@contextlib.contextmanager
def use_backend(backend: Backend | str) -> Iterator[None]:
    """Force one backend inside a ``with`` block (tests, benchmarks); it holds for every thread."""
    _OVERRIDE.append(Backend(backend))
    forget_choices()
    try:
        yield
    finally:
        _OVERRIDE.pop()
        forget_choices()


def triton_interprets() -> bool:
    """Whether Triton kernels run in the interpreter, that is, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def forget_choices() -> None:
    """Choose anew at the next call; needed when ``ESPER_BACKEND`` changes while the program runs."""
    for op in _OPS.values():
        op._chosen.clear()


def _preference(device_type: str) -> tuple[Backend, ...]:
    return PREFERENCE.get(device_type, (Backend.REFERENCE,))


def _announce_fallback(op: Op, device_type: str, selection: Selection) -> None:
    """A GPU tensor never falls to a slower backend in silence: say so once for each set of reasons.

    On a CPU the only fast backend is ``esper._native``, whose absence :mod:`esper.ops.native` announces itself.
    """
    # A backend that was never written for this operation is none that could have run it.
    order = [b for b in _preference(device_type) if b in op._kernels or b in op._reasons]
    if device_type == "cpu" or selection.backend is order[0] or forced_backend() is not None:
        return
    faster = order[: order.index(selection.backend)]
    why = "; ".join(f"{backend}: {selection.rejected[backend]}" for backend in faster)
    message = f"esper runs on {device_type} with the slower backend {selection.backend} ({why})"
    if message not in _WARNED:
        _WARNED.add(message)
        # The caller of the op: above this function, resolve and __call__.
        warnings.warn(f"{op.name}: {message}. `esper env` shows all.", RuntimeWarning, stacklevel=4)


def route(op: Op, key: str) -> None:
    """Let the dispatcher's entry for "CPU" or "CUDA" ask :meth:`Op.resolve` at run time."""
    device_type = key.lower()
    _LIBRARY.impl(op.name, lambda *args, **kwargs: op.resolve(device_type)(*args, **kwargs), key)


def _add_to_dispatcher(op: Op, fake: Kernel, keys: Sequence[str]) -> Kernel:
    """Declare ``op`` to PyTorch."""
    _LIBRARY.define(op.name + op.schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in keys:
        route(op, key)
    torch.library.register_fake(f"esper::{op.name}", fake, lib=_LIBRARY)
    overload: Kernel = getattr(torch.ops.esper, op.name).default
    return overload


def _device_type(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value.device.type
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
            return value[0].device.type
    raise TypeError("an operation needs at least one tensor argument to know its device")
