"""The operations a node may name: how many inputs each takes, and which attributes.

==========  ======  =====================================  ===========================================================
op          inputs  attributes                             meaning, with ``c`` the features of the input
==========  ======  =====================================  ===========================================================
input       0                                              the tap
output      1                                              the result, ``d_out`` features
linear      1       out (size), bias (False)               ``W v + b``, ``W [out, c]``, ``b [out]``; on images 1x1
pointwise   1       out (size), bias (False)               ``linear``, on images only
depthwise   1       kernel_size, stride (1), padding (0),  each channel with its own kernel, ``W [c, kh, kw]``,
                    dilation (1), bias (False)             ``b [c]``; on images only; pads with zeros
activation  1       kind                                   relu, gelu (erf), gelu_tanh, tanh, sigmoid, silu
norm        1       kind, eps (1e-5)                       layernorm, rmsnorm over the features, nothing learned
scale       1                                              ``w * v``, ``w [c]``
shift       1                                              ``v + b``, ``b [c]`` (stored as ``<node>.bias``)
add, mul    2                                              elementwise
==========  ======  =====================================  ===========================================================

A norm has no weight of its own because the linear node after it absorbs one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from esper.blueprints.sizes import Size, check_size, shown
from esper.contracts.errors import BlueprintError

__all__ = ["ACTIVATIONS", "NORMS", "OPS", "AttrSpec", "AttrValue", "Attributes", "OpSpec"]

AttrValue = int | float | bool | str | tuple[int, int]

ACTIVATIONS: Final = ("relu", "gelu", "gelu_tanh", "tanh", "sigmoid", "silu")
NORMS: Final = ("layernorm", "rmsnorm")

_REQUIRED: Final = object()


class Attributes(Mapping[str, Any]):
    """An immutable, hashable mapping; keeps its order but is equal whatever the order; pickles and copies."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, Any] | None = None) -> None:
        self._items: dict[str, Any] = dict(items or {})

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)

    def __reduce__(self) -> tuple[type[Attributes], tuple[dict[str, Any]]]:
        return (Attributes, (dict(self._items),))


@dataclass(frozen=True)
class AttrSpec:
    """One attribute: ``check`` returns the value's normal form or raises; without a ``default`` it must be given."""

    check: Callable[[object, str], AttrValue]
    default: object = _REQUIRED

    @property
    def required(self) -> bool:
        """Whether a node has to give this attribute."""
        return self.default is _REQUIRED


@dataclass(frozen=True)
class OpSpec:
    """What a node of this operation must look like."""

    arity: int
    attrs: Mapping[str, AttrSpec]
    commutative: bool = False
    images_only: bool = False

    def normalise(self, op: str, given: Mapping[str, object]) -> Attributes:
        """All attributes, defaults filled in and values in their normal form.

        Raises:
            BlueprintError: for an unknown, a missing or a wrong attribute.
        """
        unknown = sorted(str(key) for key in given if key not in self.attrs)
        if unknown:
            known = ", ".join(self.attrs) or "none"
            raise BlueprintError(f"unknown attribute {unknown[0][:64]!r}; {op} takes: {known}")
        values: dict[str, AttrValue] = {}
        for key, spec in self.attrs.items():
            if key not in given and spec.required:
                raise BlueprintError(f"attribute {key!r} is missing; {op} needs it")
            values[key] = spec.check(given.get(key, spec.default), key)
        return Attributes(values)


def _size(value: object, what: str) -> Size:
    return check_size(value, what)


def _flag(value: object, what: str) -> bool:
    if not isinstance(value, bool):
        raise BlueprintError(f"{what} must be true or false, not {shown(value)}")
    return value


def _choice(*choices: str) -> Callable[[object, str], str]:
    def check(value: object, what: str) -> str:
        if not isinstance(value, str) or value not in choices:
            raise BlueprintError(f"{what} must be one of {', '.join(choices)}, not {shown(value)}")
        return value

    return check


def _pair(low: int, high: int) -> Callable[[object, str], tuple[int, int]]:
    def check(value: object, what: str) -> tuple[int, int]:
        pair = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
        if len(pair) != 2 or any(isinstance(v, bool) or not isinstance(v, int) or not low <= v <= high for v in pair):
            raise BlueprintError(f"{what} must be one or two integers in [{low}, {high}], not {shown(value)}")
        return (pair[0], pair[1])

    return check


def _eps(value: object, what: str) -> float:
    # Smaller ones vanish beside a float32 variance; NaN fails both comparisons.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1e-12 <= value <= 1:
        raise BlueprintError(f"{what} must be a number in [1e-12, 1], not {shown(value)}")
    return float(value)


_LINEAR: Final = {"out": AttrSpec(_size), "bias": AttrSpec(_flag, False)}

OPS: Final[Mapping[str, OpSpec]] = {
    "input": OpSpec(0, {}),
    "output": OpSpec(1, {}),
    "linear": OpSpec(1, _LINEAR),
    "pointwise": OpSpec(1, _LINEAR, images_only=True),
    "depthwise": OpSpec(
        1,
        {
            "kernel_size": AttrSpec(_pair(1, 127)),
            "stride": AttrSpec(_pair(1, 64), 1),
            "padding": AttrSpec(_pair(0, 1024), 0),
            "dilation": AttrSpec(_pair(1, 64), 1),
            "bias": AttrSpec(_flag, False),
        },
        images_only=True,
    ),
    "activation": OpSpec(1, {"kind": AttrSpec(_choice(*ACTIVATIONS))}),
    "norm": OpSpec(1, {"kind": AttrSpec(_choice(*NORMS)), "eps": AttrSpec(_eps, 1e-5)}),
    "scale": OpSpec(1, {}),
    "shift": OpSpec(1, {}),
    "add": OpSpec(2, {}, commutative=True),
    "mul": OpSpec(2, {}, commutative=True),
}
