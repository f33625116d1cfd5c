"""Whether the tensors of one call are ones that a layer's seeds can run on.

A kernel is compared with its layer when it is bound. What remains is what only a call can tell: an activation lets any
shape and any kind of tensor through, and its seeds have the shape of the first.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from esper.contracts.errors import ShapeMismatchError
from esper.execution.grafts.seed import BoundSeed
from esper.execution.hosts import HostSpec

__all__ = ["fitted", "needs_images", "odd_result", "odd_tensors", "unfit_seeds"]

#: Activations that PyTorch has for complex numbers, with a derivative.
_COMPLEX = frozenset({"tanh", "sigmoid"})


def needs_images(seed: BoundSeed) -> bool:
    """Whether the seed runs on [N, C, H, W] alone."""
    return any(node.op in ("depthwise", "pointwise") for node in seed.blueprint.order)


def odd_tensors(x: Tensor, h: Tensor) -> str | None:
    """Why no seed can run on tensors of this kind, whatever their sizes; None where there is no reason."""
    if h.is_nested or x.is_nested:
        return "the layer was called with a nested tensor, on which seeds do not run"
    if h.layout is not torch.strided:
        return f"the layer gave a {h.layout} tensor, and seeds need a dense one"
    if x.layout is not torch.strided and x.layout is not torch.sparse_coo:
        return f"the layer was called with a {x.layout} tensor, on which seeds do not run"
    if not h.dtype.is_floating_point and not h.dtype.is_complex:
        return f"the layer gave {h.dtype}, and seeds need floating-point numbers"
    if h.dim() == 0:
        return "the layer gave a single number, without a dimension of features"
    return None


def unfit_seeds(
    seeds: Mapping[int, BoundSeed], images: frozenset[int], spec: HostSpec, x: Tensor, h: Tensor, dim: int
) -> dict[int, str]:
    """The seeds that cannot run on these tensors, with the reason; empty in the ordinary case.

    Args:
        seeds: All that are bound and fit the layer.
        images: Those of them for which :func:`needs_images` holds.
        spec: The host, resolved.
        x: What it read; :func:`odd_tensors` has nothing to say of it.
        h: What it gave.
        dim: Dimension of the features, not negative.
    """
    if x.dim() != h.dim() or h.shape[dim] != spec.d_out or x.shape[dim] != spec.d_in:
        reason = (
            f"its kernel is for {spec.d_in} features of this {spec.type_name}, in dimension {spec.channel_dim}, to "
            f"{spec.d_out}, but a call had {_shapes(x, h)}; an activation takes the shape of its first call for all, "
            "so give calls of other shapes an activation of their own"
        )
        return dict.fromkeys(seeds, reason)
    if images and h.dim() - dim != 3:
        reason = f"its kernel needs images [N, C, H, W], but a call of this {spec.type_name} had {_shapes(x, h)}"
        return dict.fromkeys(sorted(images), reason)
    if h.dtype.is_complex:
        reasons = {i: _not_complex(seed) for i, seed in seeds.items()}
        return {i: reason for i, reason in reasons.items() if reason is not None}
    return {}


def fitted(k: Tensor, h: Tensor, seed: BoundSeed, dim: int) -> Tensor:
    """Give back k, after its shape was compared with what the blend needs: broadcasting would hide a mistake."""
    width = seed.place.end - seed.place.begin
    expected = (*h.shape[:dim], width, *h.shape[dim + 1 :])
    if k.shape != expected:
        raise ShapeMismatchError(
            f"seed {seed.place.index} ({seed.artifact_id}) gives {tuple(k.shape)}, but the layer needs "
            f"{tuple(expected)}",
            expected=expected,
            got=tuple(k.shape),
        )
    return k


def odd_result(spec: HostSpec, x: object, h: object) -> str | None:
    """Why no seed can run on what a host with a forward of its own read and gave; None where there is no reason.

    Such a forward may give anything: seeds need a tensor of the size that the base class would have given for x.
    """
    if not isinstance(x, Tensor) or not isinstance(h, Tensor):
        return (
            f"the forward of this {spec.type_name} read {type(x).__name__} first and gave {type(h).__name__}, and "
            "seeds need a tensor in and a tensor out"
        )
    if odd_tensors(x, h) is not None or not spec.is_resolved:
        return None  # said where all hosts are looked at; an activation has no size of its own
    if spec.geometry is None:
        dim = spec.channel_dim % h.dim()
        fits = x.dim() == h.dim() and x.shape[:dim] == h.shape[:dim] and x.shape[dim + 1 :] == h.shape[dim + 1 :]
    else:
        walk = zip(x.shape[-2:], spec.geometry.excess, spec.geometry.stride, strict=True)
        size = tuple((pixels + excess - 1) // stride + 1 for pixels, excess, stride in walk)
        fits = x.dim() == h.dim() and x.shape[:-3] == h.shape[:-3] and tuple(h.shape[-2:]) == size
    if fits:
        return None
    return (
        f"the forward of this {spec.type_name} made {tuple(h.shape)} of {tuple(x.shape)}, which is not the size that "
        "its base class gives"
    )


def _not_complex(seed: BoundSeed) -> str | None:
    """Why the seed does not run on complex numbers, or None."""
    for node in seed.blueprint.order:
        if node.op == "norm" or (node.op == "activation" and node.attrs["kind"] not in _COMPLEX):
            kind = node.attrs["kind"]
            return f"the layer gave complex numbers, for which there is no {kind}, the kernel's node '{node.name}'"
    return None


def _shapes(x: Tensor, h: Tensor) -> str:
    if torch.compiler.is_compiling():
        return "another shape"  # sizes may be symbols there, which writing them down would fix for the graph
    return str(tuple(h.shape)) if x.shape == h.shape else f"{tuple(x.shape)} to {tuple(h.shape)}"
