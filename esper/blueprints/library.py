"""Ready-made blueprints.

``get("bottleneck", rank=16)`` builds one; ``names()`` lists them; ``describe(name)`` tells formula, source and cost.
Every entry takes ``tap``, ``mode`` and ``scope`` besides its own parameters. Here ``v`` is the tap, with ``d_in``
features, ``k`` has ``d_out`` features, and ``r`` is the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from esper.blueprints.ir import Blueprint, Node
from esper.blueprints.nodes import Attributes
from esper.blueprints.sizes import shown
from esper.contracts.errors import BlueprintError

__all__ = ["Entry", "describe", "get", "names"]


@dataclass(frozen=True)
class Entry:
    """What the library knows of one blueprint.

    Attributes:
        name: As :func:`get` takes it.
        family: The family it belongs to with its default parameters.
        formula: ``k`` as a function of the tap ``v``.
        source: The paper the form comes from.
        weights: Number of weights with the default parameters.
        preserving: When waking it leaves the network's function unchanged.
        defaults: Parameters and their default values.
    """

    name: str
    family: str
    formula: str
    source: str
    weights: str
    preserving: str
    defaults: Mapping[str, Any]
    build: Callable[..., tuple[Node, ...]]


_JOIN: Final[Mapping[str, Any]] = {"tap": "input", "mode": "residual", "scope": "layer"}
_LORA = "Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models"
_ADAPTER = "Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP"
_GLU = "Shazeer 2020, GLU Variants Improve Transformer"
_NET2NET = "Chen et al. 2015, Net2Net: Accelerating Learning via Knowledge Transfer"
_IA3 = (
    "Liu et al. 2022, Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning ((IA)^3)"
)
_MOBILENET = "Howard et al. 2017, MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications"
_RESNET = "He et al. 2016, Identity Mappings in Deep Residual Networks"

_RESIDUAL = "residual: always"


def names() -> tuple[str, ...]:
    """The names that :func:`get` knows."""
    return tuple(_ENTRIES)


def describe(name: str) -> Entry:
    """Formula, source, cost and parameters of the blueprint ``name``.

    Raises:
        BlueprintError: for an unknown name; the message lists the known ones.
    """
    if not isinstance(name, str) or name not in _ENTRIES:
        raise BlueprintError(f"unknown blueprint {shown(name)}; known: {', '.join(_ENTRIES)}")
    return _ENTRIES[name]


def get(name: str, **params: Any) -> Blueprint:
    """Build the blueprint ``name``.

    Args:
        name: One of :func:`names`.
        **params: ``tap`` ("input" or "output"), ``mode`` ("residual" or "replace"), ``scope`` ("layer" or "chunk"),
            and the entry's own: ``rank`` (int), ``activation`` (a kind, or None for none), ``bias``, ``shift`` (bool),
            ``norm`` (a kind, or None), ``eps`` (float), ``kernel_size``, ``stride``, ``padding``, ``dilation`` (int or
            two ints; no padding given means the one that keeps the image's size).

    Returns:
        A blueprint with the values as its parameters' defaults; ``rank`` can still be set when it is put to sizes.

    Raises:
        BlueprintError: for an unknown name or parameter, listing the known ones, or a bad value.
    """
    entry = describe(name)
    for key in params:
        if key not in entry.defaults:
            raise BlueprintError(f"blueprint {name!r} has no parameter {key!r}; it has: {', '.join(entry.defaults)}")
    values = {**entry.defaults, **params}
    join = {key: values.pop(key) for key in _JOIN}
    parameters = {"rank": values.pop("rank")} if "rank" in values else {}
    return Blueprint(name, entry.build(**values), parameters=parameters, **join)


_X = Node("x", "input")


def _end(source: str) -> Node:
    return Node("y", "output", (source,))


def _linear(name: str, source: str, out: int | str, *, bias: bool = False) -> Node:
    return Node(name, "linear", (source,), {"out": out, "bias": bias})


def _act(source: str, kind: object) -> tuple[Node, ...]:
    """An activation node called ``act``, or none."""
    return () if kind is None else (Node("act", "activation", (source,), {"kind": kind}),)


def _norm(kind: object, eps: object) -> tuple[Node, ...]:
    """A norm node of the tap called ``norm``, or none."""
    return () if kind is None else (Node("norm", "norm", ("x",), {"kind": kind, "eps": eps}),)


def _lowrank() -> tuple[Node, ...]:
    return (_X, _linear("down", "x", "rank"), _linear("up", "down", "d_out"), _end("up"))


def _bottleneck(activation: object, bias: bool, norm: object = None, eps: object = 1e-5) -> tuple[Node, ...]:
    normed, act = _norm(norm, eps), _act("down", activation)
    down = _linear("down", "norm" if normed else "x", "rank", bias=bias)
    return (_X, *normed, down, *act, _linear("up", "act" if act else "down", "d_out"), _end("up"))


def _gated(activation: object, bias: bool, norm: object = None, eps: object = 1e-5) -> tuple[Node, ...]:
    normed, act = _norm(norm, eps), _act("gate", activation)
    source = "norm" if normed else "x"
    return (
        _X,
        *normed,
        _linear("gate", source, "rank", bias=bias),
        *act,
        _linear("value", source, "rank", bias=bias),
        Node("product", "mul", ("act" if act else "gate", "value")),
        _linear("up", "product", "d_out"),
        _end("up"),
    )


def _dense(activation: object, bias: bool) -> tuple[Node, ...]:
    act = _act("linear", activation)
    return (_X, _linear("linear", "x", "d_out", bias=bias), *act, _end("act" if act else "linear"))


def _elementwise(activation: object, shift: bool) -> tuple[Node, ...]:
    act = _act("x", activation)
    scale = Node("scale", "scale", ("act" if act else "x",))
    if not isinstance(shift, bool):
        raise BlueprintError(f"shift must be true or false, not {shown(shift)}")
    tail = (Node("shift", "shift", ("scale",)), _end("shift")) if shift else (_end("scale"),)
    return (_X, *act, scale, *tail)


def _conv(
    activation: object, bias: bool, kernel_size: object, stride: object, padding: object, dilation: object
) -> tuple[Node, ...]:
    geometry = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
    depthwise = Node("depthwise", "depthwise", ("x",), geometry)
    if padding is None:  # half the kernel's reach, which keeps the size when the kernel is odd and the stride 1
        reach = zip(depthwise.attrs["kernel_size"], depthwise.attrs["dilation"], strict=True)
        padding = [d * (k - 1) // 2 for k, d in reach]
    depthwise = Node("depthwise", "depthwise", ("x",), {**geometry, "padding": padding})
    act = _act("depthwise", activation)
    pointwise = Node("pointwise", "pointwise", ("act" if act else "depthwise",), {"out": "d_out", "bias": bias})
    return (_X, depthwise, *act, pointwise, _end("pointwise"))


def _residual_block(activation: object, bias: bool, norm: object, eps: object) -> tuple[Node, ...]:
    *branch, _ = _bottleneck(activation, bias, norm, eps)
    return (*branch, Node("sum", "add", ("x", "up")), _end("sum"))


def _entry(
    name: str,
    build: Callable[..., tuple[Node, ...]],
    *,
    family: str | None = None,
    formula: str,
    source: str,
    weights: str,
    preserving: str = _RESIDUAL,
    **defaults: Any,
) -> Entry:
    return Entry(name, family or name, formula, source, weights, preserving, Attributes({**_JOIN, **defaults}), build)


_ENTRIES: Final[dict[str, Entry]] = {
    entry.name: entry
    for entry in (
        _entry(
            "lowrank",
            _lowrank,
            formula="k = U D v",
            source=_LORA,
            weights="r (d_in + d_out)",
            rank=8,
        ),
        _entry(
            "bottleneck",
            _bottleneck,
            formula="k = U act(D v + b)",
            source=_ADAPTER,
            weights="r (d_in + d_out + 1)",
            rank=8,
            activation="gelu",
            bias=True,
        ),
        _entry(
            "normed_bottleneck",
            _bottleneck,
            family="bottleneck",
            formula="k = U act(D norm(v) + b)",
            source=_ADAPTER,
            weights="r (d_in + d_out + 1)",
            rank=8,
            activation="gelu",
            bias=True,
            norm="layernorm",
            eps=1e-5,
        ),
        _entry(
            "gated",
            _gated,
            formula="k = U (act(G v) * (V v))",
            source=_GLU,
            weights="r (2 d_in + d_out)",
            rank=8,
            activation="silu",
            bias=False,
        ),
        _entry(
            "normed_gated",
            _gated,
            family="gated",
            formula="k = U (act(G norm(v)) * (V norm(v)))",
            source=_GLU,
            weights="r (2 d_in + d_out)",
            rank=8,
            activation="silu",
            bias=False,
            norm="rmsnorm",
            eps=1e-5,
        ),
        _entry(
            "dense",
            _dense,
            formula="k = W v + b",
            source=_NET2NET,
            weights="d_out (d_in + 1)",
            preserving="residual: always; replace: with tap=output",
            activation=None,
            bias=True,
        ),
        _entry(
            "dense_relu",
            _dense,
            family="dense",
            formula="k = relu(W v + b)",
            source=_NET2NET,
            weights="d_out (d_in + 1)",
            preserving="residual: never (at 0 relu has no slope); replace: with tap=output behind a ReLU",
            activation="relu",
            bias=True,
        ),
        _entry(
            "dense_gelu",
            _dense,
            family="dense",
            formula="k = gelu(W v + b)",
            source=_NET2NET,
            weights="d_out (d_in + 1)",
            activation="gelu",
            bias=True,
        ),
        _entry(
            "elementwise",
            _elementwise,
            formula="k = s * v + t",
            source=_IA3,
            weights="2 d_out",
            preserving="residual: always; replace: with tap=output",
            tap="output",
            activation=None,
            shift=True,
        ),
        _entry(
            "activated_elementwise",
            _elementwise,
            family="elementwise",
            formula="k = s * act(v) + t",
            source=_IA3,
            weights="2 d_out",
            tap="output",
            activation="silu",
            shift=True,
        ),
        _entry(
            "conv",
            _conv,
            formula="k = P (D conv v) + b",
            source=_MOBILENET,
            weights="d_in kh kw + d_out (d_in + 1)",
            preserving="residual: always; replace: with tap=output, no activation and the image's size kept",
            activation=None,
            bias=True,
            kernel_size=3,
            stride=1,
            padding=None,
            dilation=1,
        ),
        _entry(
            "conv_relu",
            _conv,
            family="conv",
            formula="k = P relu(D conv v) + b",
            source=_MOBILENET,
            weights="d_in kh kw + d_out (d_in + 1)",
            activation="relu",
            bias=True,
            kernel_size=3,
            stride=1,
            padding=None,
            dilation=1,
        ),
        _entry(
            "residual_block",
            _residual_block,
            family="graph",
            formula="k = v + U act(D norm(v) + b)",
            source=_RESNET,
            weights="r (d_in + d_out + 1)",
            preserving="residual: never (v itself remains); replace: with tap=output",
            tap="output",
            mode="replace",
            rank=8,
            activation="gelu",
            bias=True,
            norm="layernorm",
            eps=1e-5,
        ),
    )
}
