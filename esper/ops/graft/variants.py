"""Which Triton kernels a family needs and how each is compiled: what compiler and launchers share.

Importing this module does not import Triton; :func:`variants` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch

__all__ = ["ACTIVATION_CODES", "BANK_FAMILIES", "DTYPE_NAMES", "SEATS", "KernelVariant", "shipped", "variants"]

#: As ``csrc/graft_bank.h`` and ``kernels/graft_math.py`` number them.
ACTIVATION_CODES: Mapping[str | None, int] = {
    None: 0,
    "relu": 1,
    "gelu": 2,
    "gelu_tanh": 3,
    "tanh": 4,
    "sigmoid": 5,
    "silu": 6,
}

#: Triton's names of the dtypes that have kernels.
DTYPE_NAMES: Mapping[torch.dtype, str] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

#: Lanes for the seeds of one launch: the most there can be.
SEATS = 64

#: Families whose seeds run as one bank.
BANK_FAMILIES = ("lowrank", "bottleneck", "gated")


@dataclass(frozen=True)
class KernelVariant:
    """One kernel as it is compiled.

    Attributes:
        kernel: The ``@triton.jit`` function; ``kernel.__name__`` is its name.
        direction: ``forward`` or ``backward``.
        signature: Run-time argument -> Triton type, in the order of the arguments.
        constants: Compile-time argument -> value.
        options: ``num_warps``, ``num_stages``, ``enable_fp_fusion``.
    """

    kernel: Any
    direction: Literal["forward", "backward"]
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]


def variants(
    family: str,
    activation: str | None,
    norm: str | None,
    dtype: str,
    *,
    rank: int = 64,
    biased: bool = True,
    aligned: bool = True,
    replaces: bool = False,
) -> list[KernelVariant]:
    """The kernels that seeds of a family run on.

    Args:
        family: Its name, such as ``lowrank``.
        activation: Its activation, or None.
        norm: Its norm, or None.
        dtype: ``fp32``, ``bf16`` or ``fp16``.
        rank: Rows of the bank to expect; up to 16, up to 64 and beyond are three layouts.
        biased: Whether the way down has a bias, or an elementwise seed a shift.
        aligned: Whether all widths are multiples of 16.
        replaces: Whether the seed is for mode replace; without, the gradient of h is y's and no kernel computes it.

    Returns:
        At most one variant of a kernel in a direction, in the order in which they are launched.

    Raises:
        ValueError: unknown activation or dtype.
    """
    if activation not in ACTIVATION_CODES:
        known = ", ".join(str(name) for name in ACTIVATION_CODES)
        raise ValueError(f"unknown activation {activation!r}; known: {known}")
    if dtype not in ("fp32", "bf16", "fp16"):
        raise ValueError(f"no graft kernel for dtype {dtype!r}; there are kernels for fp32, bf16 and fp16")
    if family in BANK_FAMILIES:
        # A norm is applied in front of the bank, by PyTorch.
        biased = biased and family != "lowrank"
        return _bank(ACTIVATION_CODES[activation], family == "gated", biased, dtype, rank, aligned, replaces)
    if family == "elementwise":
        return _elementwise(ACTIVATION_CODES[activation], biased, dtype, replaces)
    return _blend(dtype)


def shipped() -> list[KernelVariant]:
    """Every variant that the forge can put into an artifact, each once, in a fixed order."""
    found: dict[object, KernelVariant] = {}
    # One rank of each layout.
    for (family, activation), dtype, rank in product(_shipped_kinds(), DTYPE_NAMES.values(), (16, 64, 256)):
        for biased, aligned, replaces in product((True, False), repeat=3):
            for one in variants(
                family, activation, None, dtype, rank=rank, biased=biased, aligned=aligned, replaces=replaces
            ):
                parts = (one.signature, one.constants, one.options)
                found.setdefault((one.kernel.__name__, *(tuple(part.items()) for part in parts)), one)
    return list(found.values())


def _shipped_kinds() -> Iterator[tuple[str, str | None]]:
    """Families with the activations that they can have; whatever else there is ends in the blend."""
    for activation in ACTIVATION_CODES:
        yield "bottleneck", activation
        yield "elementwise", activation
        if activation is not None:
            yield "gated", activation
    yield from (("lowrank", None), ("dense", None))


#: Rows that a binary is laid out for; it takes any number.
_ROWS = 8192


def _bank(
    act: int, gated: bool, biased: bool, dtype: str, rank: int, aligned: bool, replaces: bool
) -> list[KernelVariant]:
    from esper.kernels import graft_bank as forward
    from esper.kernels import graft_bank_backward as backward
    from esper.kernels import graft_faults as faults

    exact = {"EMULATE": False, "SEATS": SEATS}
    kind = {"GATED": gated, "BIASED": biased}
    bank, bank_options = forward.bank_blocks(dtype, rank, _ROWS, gated, aligned)
    rows, rows_options = backward.rows_blocks(dtype, rank, _ROWS, gated, aligned)
    weights, weights_options = backward.weights_blocks(dtype, rank)
    wants = {"WANT_X": True, "WANT_H": replaces}
    return [
        KernelVariant(
            forward.graft_bank_kernel,
            "forward",
            forward.bank_signature(dtype),
            {"ACT": act, **kind, **exact, "ALIGNED": aligned, **bank},
            bank_options,
        ),
        KernelVariant(
            faults.graft_blame_kernel,
            "forward",
            faults.blame_signature(dtype),
            {"ACT": act, **kind, **exact, **faults.BLAME_BLOCKS},
            faults.BLAME_OPTIONS,
        ),
        _contain(dtype),
        KernelVariant(
            backward.graft_bank_rows_kernel,
            "backward",
            backward.rows_signature(dtype),
            {"ACT": act, **kind, **wants, **exact, "ALIGNED": aligned, **rows},
            rows_options,
        ),
        KernelVariant(
            backward.graft_bank_weights_kernel,
            "backward",
            backward.weights_signature(dtype),
            {**kind, **exact, "ALIGNED": aligned, **weights},
            weights_options,
        ),
        KernelVariant(
            backward.graft_bank_reduce_kernel,
            "backward",
            backward.reduce_signature(dtype),
            {**kind, "SEATS": SEATS, **backward.REDUCE_BLOCKS},
            backward.REDUCE_OPTIONS,
        ),
    ]


def _blend(dtype: str) -> list[KernelVariant]:
    """For one seed; the products before the blend are the libraries' own."""
    from esper.kernels import graft_blend as blend

    constants: dict[str, Any] = {"SEEDS": 1, **blend.BLEND_BLOCKS}
    return [
        KernelVariant(
            blend.graft_blend_kernel, "forward", blend.blend_signature(dtype), constants, blend.BLEND_OPTIONS
        ),
        _contain(dtype),
        KernelVariant(
            blend.graft_blend_backward_kernel,
            "backward",
            blend.blend_backward_signature(dtype),
            {**constants, "SEATS": SEATS},
            blend.BLEND_OPTIONS,
        ),
    ]


def _elementwise(act: int, shifted: bool, dtype: str, replaces: bool) -> list[KernelVariant]:
    """For rows of features."""
    from esper.kernels import graft_elementwise as elementwise

    tiles = {"PLANES": False, **elementwise.elementwise_blocks(False)}
    wants = {"WANT_X": True, "WANT_H": replaces, "WANT_W": True, "SEATS": SEATS}
    return [
        KernelVariant(
            elementwise.graft_elementwise_kernel,
            "forward",
            elementwise.elementwise_signature(dtype),
            {"ACT": act, "SHIFTED": shifted, **tiles},
            elementwise.elementwise_options(False, shifted),
        ),
        _contain(dtype),
        KernelVariant(
            elementwise.graft_elementwise_backward_kernel,
            "backward",
            elementwise.elementwise_backward_signature(dtype),
            {"ACT": act, **wants, **tiles},
            elementwise.elementwise_options(False),
        ),
        KernelVariant(
            elementwise.graft_elementwise_reduce_kernel,
            "backward",
            elementwise.elementwise_reduce_signature(dtype),
            {"SHIFTED": shifted, "SEATS": SEATS, **elementwise.REDUCE_BLOCKS},
            elementwise.REDUCE_OPTIONS,
        ),
    ]


def _contain(dtype: str) -> KernelVariant:
    from esper.kernels import graft_faults as faults

    constants = {"SEATS": SEATS, **faults.CONTAIN_BLOCKS}
    return KernelVariant(
        faults.graft_contain_kernel, "forward", faults.contain_signature(dtype), constants, faults.CONTAIN_OPTIONS
    )
