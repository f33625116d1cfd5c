"""Launches the Triton kernels of elementwise seeds: two forward, the second of which returns at once; two backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from esper.ops.graft import elementwise_reference as reference
from esper.ops.graft.elementwise import blank, check_elementwise, is_channels_last
from esper.ops.graft.triton import cdiv, choose, contain, on_device, processors
from esper.ops.graft.triton_blend import seats_on
from esper.ops.graft.variants import ACTIVATION_CODES, DTYPE_NAMES, SEATS
from esper.ops.graft.views import extents
from esper.ops.registry import implements, unavailable

__all__: list[str] = []

_OPS = ("graft_elementwise", "graft_elementwise_backward")


class _Lanes:
    """How tensors shaped as ``like`` are seen: ``[outer, features * inner]``.

    Rows of features where features lie side by side (the last dimension, channels_last images), planes of pixels
    otherwise.
    """

    def __init__(self, like: Tensor, dim: int) -> None:
        self.permuted = is_channels_last(like, dim)
        self.outer, self.features, self.inner = extents(like, dim)
        if self.permuted:
            self.outer, self.inner = self.outer * self.inner, 1

    def flat(self, t: Tensor) -> Tensor:
        """The matrix; a view where memory allows."""
        if self.permuted:
            t = t.permute(0, 2, 3, 1)
        flat = t.reshape(self.outer, self.features * self.inner)
        return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()

    def grid(self, tiles: Mapping[str, Any], device: torch.device) -> tuple[int, int, int]:
        """(parts, stretch, splits): programs enough for the GPU, none with less than one tile of rows."""
        parts = self.features if self.inner > 1 else cdiv(self.features, tiles["BLOCK_N"])
        splits = max(1, min(cdiv(8 * processors(device), parts), cdiv(self.outer, tiles["BLOCK_M"])))
        stretch = cdiv(cdiv(self.outer, splits), tiles["BLOCK_M"]) * tiles["BLOCK_M"]
        return parts, stretch, cdiv(self.outer, stretch)


def _falls_back(h: Tensor, seeds: int) -> bool:
    # Sizes are 32-bit numbers in the kernels.
    return h.dtype not in DTYPE_NAMES or seeds > SEATS or h.numel() >= 2**31


def _register() -> None:
    from esper.kernels import graft_elementwise as kernels

    @implements("graft_elementwise", "triton")
    def graft_elementwise(
        x: Tensor,
        h: Tensor,
        alpha: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        places: Sequence[int],
        activation: str | None,
        dim: int,
    ) -> tuple[Tensor, Tensor]:
        seeds = len(check_elementwise(x, h, alpha, scale, shift, places, activation, dim).places)
        if _falls_back(h, seeds):
            plain: tuple[Tensor, Tensor] = reference.graft_elementwise(
                x, h, alpha, scale, shift, places, activation, dim
            )
            return plain
        y = blank(h, dim)
        faults = torch.zeros(seeds, dtype=torch.uint8, device=h.device)
        if h.numel() == 0:
            return y, faults
        lanes = _Lanes(h, dim)
        flat_x, flat_h, flat_y = (lanes.flat(t) for t in (x, h, y))
        planes = lanes.inner > 1
        constants, launch = choose(
            kernels.graft_elementwise_kernel,
            DTYPE_NAMES[h.dtype],
            h.device,
            {"ACT": ACTIVATION_CODES[activation], "SHIFTED": shift is not None, "PLANES": planes}
            | kernels.elementwise_blocks(planes),
            kernels.elementwise_options(planes, shift is not None),
        )
        parts, stretch, splits = lanes.grid(constants, h.device)
        alpha, scale = alpha.contiguous(), scale.contiguous()
        shift = scale if shift is None else shift.contiguous()
        with on_device(h):
            launch(
                parts * splits, flat_x, flat_h, flat_y, scale, shift, alpha, seats_on(tuple(places), h.device), faults,
                lanes.outer, lanes.features, lanes.inner, seeds, parts, stretch,
                flat_x.stride(0), flat_h.stride(0), flat_y.stride(0),
            )  # fmt: skip
            contain(flat_h, flat_y, faults)
        return y, faults

    @implements("graft_elementwise_backward", "triton")
    def graft_elementwise_backward(
        gy: Tensor,
        x: Tensor,
        alpha: Tensor,
        faults: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        places: Sequence[int],
        activation: str | None,
        dim: int,
        want_x: bool,
        want_h: bool,
        want_weights: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        seeds = len(check_elementwise(x, gy, alpha, scale, shift, places, activation, dim).places)
        if _falls_back(gy, seeds):
            plain: tuple[Tensor, Tensor, Tensor, Tensor] = reference.graft_elementwise_backward(
                gy, x, alpha, faults, scale, shift, places, activation, dim, want_x, want_h, want_weights
            )
            return plain
        gx, gh = (blank(gy, dim) if wanted else gy.new_empty(0) for wanted in (want_x, want_h))
        gscale, gshift = (
            torch.empty(0 if t is None or not want_weights else t.shape, dtype=gy.dtype, device=gy.device)
            for t in (scale, shift)
        )
        if gy.numel() == 0:
            return gx, gh, gscale.zero_(), gshift.zero_()
        if not (want_x or want_h or want_weights):
            return gx, gh, gscale, gshift
        lanes = _Lanes(gy, dim)
        flat_x, flat_gy = lanes.flat(x), lanes.flat(gy)
        flat_gx, flat_gh = (lanes.flat(g) if g.numel() else flat_gy for g in (gx, gh))
        planes = lanes.inner > 1
        dtype = DTYPE_NAMES[gy.dtype]
        wants = {"WANT_X": want_x, "WANT_H": want_h, "WANT_W": want_weights, "SEATS": SEATS}
        constants, launch = choose(
            kernels.graft_elementwise_backward_kernel,
            dtype,
            gy.device,
            {"ACT": ACTIVATION_CODES[activation], "PLANES": planes} | wants | kernels.elementwise_blocks(planes),
            kernels.elementwise_options(planes),
        )
        parts, stretch, splits = lanes.grid(constants, gy.device)
        places_there = seats_on(tuple(places), gy.device)
        alpha = alpha.contiguous()
        sums = (splits, 2, lanes.features) if want_weights else 1
        partials = torch.empty(sums, dtype=torch.float32, device=gy.device)
        with on_device(gy):
            launch(
                parts * splits, flat_x, flat_gy, flat_gx, flat_gh, scale.contiguous(), alpha, places_there, faults,
                partials, lanes.outer, lanes.features, lanes.inner, seeds, parts, stretch,
                flat_x.stride(0), flat_gy.stride(0), flat_gx.stride(0), flat_gh.stride(0),
            )  # fmt: skip
            if want_weights:
                constants, launch = choose(
                    kernels.graft_elementwise_reduce_kernel,
                    dtype,
                    gy.device,
                    {"SHIFTED": shift is not None, "SEATS": SEATS} | kernels.REDUCE_BLOCKS,
                    kernels.REDUCE_OPTIONS,
                )
                tiles = cdiv(lanes.features, constants["BLOCK_C"])
                launch(
                    tiles * seeds, partials, gscale, gshift if shift is not None else gscale, alpha, places_there,
                    faults, lanes.features, seeds, splits, tiles,
                )  # fmt: skip
        return gx, gh, gscale, gshift


try:
    _register()
except ImportError as error:
    for _name in _OPS:
        unavailable(_name, "triton", f"triton does not import: {error}")
