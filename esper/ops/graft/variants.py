"""Which Triton kernels a family needs and how each is compiled: what compiler and launchers share.

Importing this module does not import Triton; :func:`variants` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

__all__ = ["ACTIVATION_CODES", "BANK_FAMILIES", "DTYPE_NAMES", "SEATS", "KernelVariant", "variants"]

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

#: Families whose seeds run as one bank, unless they have a norm.
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
    family: str, activation: str | None, norm: str | None, dtype: str, *, rank: int = 64, biased: bool = True
) -> list[KernelVariant]:
    """The kernels that seeds of a family run on.

    Args:
        family: Its name, such as ``lowrank``.
        activation: Its activation, or None.
        norm: Its norm, or None.
        dtype: ``fp32``, ``bf16`` or ``fp16``.
        rank: Rows of the bank to expect, 64 or fewer fit the same kernels.
        biased: Whether the way down has a bias.

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
    from esper.kernels import graft_bank as kernels

    bank = family in BANK_FAMILIES and norm is None
    if not bank:
        return []
    signature = {name: f"*{dtype}" for name in ("x", "h", "y", "down", "value", "up", "bias", "value_bias")}
    signature |= {"alpha": "*fp32", "owner": "*i32", "seats": "*i32", "spans": "*i32", "z": "*fp32", "suspect": "*u8"}
    signature |= dict.fromkeys(("rows", "d_in", "d_out", "ranks", "seeds", "groups", "parts"), "i32")
    signature |= dict.fromkeys(("x_row", "h_row", "y_row", "z_row"), "i64")
    constants = {
        "ACT": ACTIVATION_CODES[activation],
        "GATED": family == "gated",
        "BIASED": biased and family != "lowrank",
        "WIDE": rank > 64,
        "ALIGNED": True,
        "EMULATE": False,
        "SEATS": 64,
        "BLOCK_M": 64,
        "BLOCK_N": 32 if dtype == "fp32" else 64,
        "BLOCK_K": 32 if dtype == "fp32" else 64,
        "BLOCK_R": 64,
    }
    return [
        KernelVariant(kernels.graft_bank_kernel, "forward", signature, constants, {"num_warps": 4, "num_stages": 3})
    ]
