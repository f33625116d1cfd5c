"""Put a blueprint to concrete sizes: every width, every tensor's shape, the map of image sizes; or a reason why not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from esper.blueprints.ir import Blueprint, Node, check_parameter
from esper.blueprints.nodes import Attributes
from esper.blueprints.sizes import MAX_SIZE, evaluate, shown
from esper.contracts.errors import BlueprintError, BlueprintShapeError

__all__ = ["MAX_PARAMETER_COUNT", "Resolved", "SpatialMap", "bind_parameters", "validate"]

#: Most weights one blueprint may have, all tensors together.
MAX_PARAMETER_COUNT: Final = 1 << 28


@dataclass(frozen=True)
class SpatialMap:
    """How an image's height (or width) changes: ``size -> floor((size + offset) / stride)``.

    A convolution is the map with ``offset = 2 padding - dilation (kernel - 1) - 1 + stride``, and such maps are closed
    under composition (floors of floors of integers nest), so that any two paths can be compared for all image sizes at
    once.
    """

    offset: int = 0
    stride: int = 1

    def __call__(self, size: int) -> int:
        """The size after the map; below 1 where the image is too small."""
        return (size + self.offset) // self.stride

    def then(self, after: SpatialMap) -> SpatialMap:
        """This map followed by ``after``."""
        return SpatialMap(self.offset + after.offset * self.stride, self.stride * after.stride)

    @property
    def is_identity(self) -> bool:
        """Whether every size stays what it is."""
        return self == SpatialMap()

    @staticmethod
    def of_convolution(kernel: int, stride: int, padding: int, dilation: int) -> SpatialMap:
        """The map of one axis of a convolution."""
        return SpatialMap(2 * padding - dilation * (kernel - 1) - 1 + stride, stride)


@dataclass(frozen=True)
class Resolved:
    """A blueprint at given sizes.

    Attributes:
        d_in: Features of the tap.
        d_out: Features that ``k`` gives.
        parameters: Every parameter with the value used.
        widths: Features of each node's result, by node.
        tensors: Shape of each tensor, by name (``<node>.weight``, ``<node>.bias``), in the order of the nodes.
        spatial: How height and width change from the tap to ``k``.
        images_only: Whether the blueprint runs on images ([N, C, H, W]) only.
    """

    d_in: int
    d_out: int
    parameters: Mapping[str, int]
    widths: Mapping[str, int]
    tensors: Mapping[str, tuple[int, ...]]
    spatial: tuple[SpatialMap, SpatialMap]
    images_only: bool

    @property
    def parameter_count(self) -> int:
        """Number of weights, all tensors together."""
        return sum(_volume(shape) for shape in self.tensors.values())


def bind_parameters(blueprint: Blueprint, given: Mapping[str, object]) -> dict[str, int]:
    """The blueprint's parameters, defaults replaced by what is ``given``.

    Raises:
        BlueprintError: for a parameter the blueprint has not, listing those it has, or a value out of range.
    """
    for name in given:
        if name not in blueprint.parameters:
            known = ", ".join(blueprint.parameters) or "none"
            raise BlueprintError(f"blueprint {blueprint.name!r} has no parameter {name!r}; it has: {known}")
    return {name: check_parameter(name, given.get(name, value)) for name, value in blueprint.parameters.items()}


def validate(blueprint: Blueprint, d_in: int, d_out: int, **params: int) -> Resolved:
    """Check that the blueprint fits the sizes, and resolve it.

    Args:
        blueprint: What to check.
        d_in: Features of the tap: the last dimension of row-major tensors, the channels of images. In [1, 2**20].
        d_out: Features the seed changes: the layer's, or the chunk's where the scope is ``chunk``. In [1, 2**20].
        **params: Values for the blueprint's parameters, in place of its defaults.

    Returns:
        All widths and tensor shapes.

    Raises:
        BlueprintError: for sizes or parameters out of range, or too many weights in all; it names the node at fault.
        BlueprintShapeError: where two widths, or two image sizes, should agree and do not; it names both.
    """
    if not isinstance(blueprint, Blueprint):
        raise BlueprintError(f"expected a Blueprint, not {shown(blueprint)}; read one with esper.blueprints.from_json")
    for name, value in (("d_in", d_in), ("d_out", d_out)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
            raise BlueprintError(f"{name} must be an integer in [1, {MAX_SIZE}], not {shown(value)}")
    parameters = bind_parameters(blueprint, params)
    values = {**parameters, "d_in": d_in, "d_out": d_out}

    widths: dict[str, int] = {}
    spatial: dict[str, tuple[SpatialMap, SpatialMap]] = {}
    tensors: dict[str, tuple[int, ...]] = {}
    images_only = False
    total = 0
    for node in blueprint.order:
        widths[node.name] = _width(node, widths, values)
        spatial[node.name] = _spatial(node, spatial)
        images_only |= node.op in ("pointwise", "depthwise")
        for role, shape in _tensors(node, widths).items():
            tensors[f"{node.name}.{role}"] = shape
            total += _volume(shape)
            if total > MAX_PARAMETER_COUNT:
                raise BlueprintError(f"weights add up to {total} here, beyond {MAX_PARAMETER_COUNT}", node=node.name)

    end = blueprint.order[-1]
    if widths[end.name] != d_out:
        raise BlueprintShapeError(
            f"gives {widths[end.name]} features, but d_out is {d_out} (d_in is {d_in}, {_named(parameters)})",
            node=end.name,
            expected=(d_out,),
            got=(widths[end.name],),
        )
    return Resolved(
        d_in, d_out, Attributes(parameters), Attributes(widths), Attributes(tensors), spatial[end.name], images_only
    )


def _width(node: Node, widths: Mapping[str, int], values: Mapping[str, int]) -> int:
    if node.op == "input":
        return values["d_in"]
    if "out" in node.attrs:
        try:
            return evaluate(node.attrs["out"], values)
        except BlueprintError as error:
            raise BlueprintError(str(error), node=node.name) from None
    found = [widths[source] for source in node.inputs]
    if len(set(found)) > 1:
        (a, b), (first, second) = node.inputs, found
        raise BlueprintShapeError(
            f"{node.op} needs equal widths, but {a!r} has {first} features and {b!r} has {second}",
            node=node.name,
            expected=(first,),
            got=(second,),
        )
    return found[0]


def _spatial(node: Node, known: Mapping[str, tuple[SpatialMap, SpatialMap]]) -> tuple[SpatialMap, SpatialMap]:
    if node.op == "input":
        return (SpatialMap(), SpatialMap())
    found = [known[source] for source in node.inputs]
    if len(set(found)) > 1:
        (a, b), (first, second) = node.inputs, found
        raise BlueprintShapeError(
            f"{node.op} needs equal image sizes, but {a!r} gives {_sizes(first)} and {b!r} gives {_sizes(second)}",
            node=node.name,
        )
    height, width = found[0]
    if node.op == "depthwise":
        steps = zip(*(node.attrs[key] for key in ("kernel_size", "stride", "padding", "dilation")), strict=True)
        down, across = (SpatialMap.of_convolution(*step) for step in steps)
        height, width = height.then(down), width.then(across)
        if max(height.stride, width.stride) > MAX_SIZE:
            raise BlueprintError(f"strides multiply to more than {MAX_SIZE}", node=node.name)
    return height, width


def _tensors(node: Node, widths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    width = widths[node.name]
    if node.op in ("linear", "pointwise"):
        shapes: dict[str, tuple[int, ...]] = {"weight": (width, widths[node.inputs[0]])}
    elif node.op == "depthwise":
        shapes = {"weight": (width, *node.attrs["kernel_size"])}
    elif node.op == "scale":
        shapes = {"weight": (width,)}
    elif node.op == "shift":
        return {"bias": (width,)}
    else:
        return {}
    if node.attrs.get("bias"):
        shapes["bias"] = (width,)
    return shapes


def _volume(shape: tuple[int, ...]) -> int:
    volume = 1
    for size in shape:
        volume *= size
    return volume


def _sizes(maps: tuple[SpatialMap, SpatialMap]) -> str:
    return " x ".join(f"floor(({axis}{m.offset:+d})/{m.stride})" for axis, m in zip("HW", maps, strict=True))


def _named(parameters: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in parameters.items()) or "no parameters"
