"""First weights of a sub-network: the same for the same seed everywhere.

Every tensor has a generator of its own, seeded from SHA-256 of (seed, canonical number of the node, role). So weights
do not depend on the global random state, on the number of threads, on the names of nodes, or on which tensors are drawn
first. Only uniform numbers are drawn, in float64: they come from the generator's bits by one exact multiplication,
whereas normal ones pass through vectorised logarithms that differ between processors.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Final

import torch

from esper.blueprints.canonical import canonical_order
from esper.blueprints.ir import Blueprint, Node
from esper.blueprints.sizes import shown
from esper.blueprints.validation import validate
from esper.blueprints.waking import Start, own_pixel, plan_waking
from esper.contracts.errors import BlueprintError

__all__ = ["DTYPES", "initialise"]

DTYPES: Final = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

#: Variance kept through an activation needs weights larger by this (He et al. 2015, "Delving Deep into Rectifiers", for
#: relu; gelu and silu are close to it; 5/3 is the customary value for tanh).
_GAIN: Final[Mapping[str, float]] = {
    "relu": math.sqrt(2.0),
    "gelu": math.sqrt(2.0),
    "gelu_tanh": math.sqrt(2.0),
    "silu": math.sqrt(2.0),
    "tanh": 5.0 / 3.0,
    "sigmoid": 1.0,
}


def initialise(
    blueprint: Blueprint,
    d_in: int,
    d_out: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **params: int,
) -> dict[str, torch.Tensor]:
    """Draw the first weights of ``blueprint``.

    Weights are Kaiming-uniform, biases and shifts zero, scales one, except where :mod:`esper.blueprints.waking` makes
    the sub-network zero (residual) or the identity (replace).

    Args:
        blueprint: Whose weights.
        d_in: Features of the tap.
        d_out: Features the seed changes.
        seed: In [0, 2**63); the same seed gives the same bits.
        dtype: float32, float64, float16 or bfloat16. Numbers are drawn in float64 and rounded once.
        **params: Values for the blueprint's parameters, in place of its defaults.

    Returns:
        Tensors by name, on the CPU, in the order of the nodes: linear and pointwise ``weight`` [out, in] and ``bias``
        [out], depthwise ``weight`` [C, kh, kw] and ``bias`` [C], scale ``weight`` [C], shift ``bias`` [C].

    Raises:
        BlueprintError: for a blueprint that does not fit the sizes, a bad seed or another dtype.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63:
        raise BlueprintError(f"seed must be an integer in [0, 2**63), not {shown(seed)}")
    if dtype not in DTYPES:
        raise BlueprintError(f"dtype must be one of {', '.join(map(str, DTYPES))}, not {shown(dtype)}")
    resolved = validate(blueprint, d_in, d_out, **params)
    plan = plan_waking(blueprint, resolved)
    numbers = {name: number for number, name in enumerate(canonical_order(blueprint))}
    nodes = {node.name: node for node in blueprint.order}

    tensors: dict[str, torch.Tensor] = {}
    for full_name, shape in resolved.tensors.items():
        name, role = full_name.split(".")
        node, start = nodes[name], plan.starts.get(name, Start.RANDOM)
        if start is Start.RANDOM and role == "weight" and node.op != "scale":
            bound = _gain_after(node, blueprint) * math.sqrt(3.0 / math.prod(shape[1:]))
            tensor = _uniform(shape, bound, _generator(seed, numbers[name], role))
        else:
            tensor = _fixed(node, role, start, shape)
        tensors[full_name] = tensor.to(dtype)
    return tensors


def _fixed(node: Node, role: str, start: Start, shape: tuple[int, ...]) -> torch.Tensor:
    if role == "bias" or start is Start.ZERO:
        return torch.zeros(shape, dtype=torch.float64)
    if node.op == "scale":
        return torch.ones(shape, dtype=torch.float64)
    if node.op == "depthwise":
        pixel = own_pixel(node)
        assert pixel is not None  # the plan asks for the identity only where there is such a pixel
        kernel = torch.zeros(shape, dtype=torch.float64)
        kernel[:, pixel[0], pixel[1]] = 1.0
        return kernel
    return torch.eye(shape[0], dtype=torch.float64)


def _gain_after(node: Node, blueprint: Blueprint) -> float:
    """The gain of the activations that read ``node``; the largest if they differ, 1 if there is none."""
    gains = [
        _GAIN[other.attrs["kind"]]
        for other in blueprint.order
        if other.op == "activation" and node.name in other.inputs
    ]
    return max(gains, default=1.0)


def _generator(seed: int, number: int, role: str) -> torch.Generator:
    digest = hashlib.sha256(f"esper initialise {seed} {number} {role}".encode("ascii")).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> torch.Tensor:
    draws = torch.rand(shape, dtype=torch.float64, device="cpu", generator=generator)
    return draws.mul_(2.0).sub_(1.0).mul_(bound)
