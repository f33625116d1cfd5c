"""Launches the Triton kernels of a bank.

One forward, with two behind it that return at once unless something is not finite, and three backward. Nothing here
waits for the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from esper.ops import binaries
from esper.ops.graft import bank_reference as reference
from esper.ops.graft.bank import BankLayout, check_bank
from esper.ops.graft.uploads import Table
from esper.ops.graft.variants import ACTIVATION_CODES, DTYPE_NAMES, SEATS
from esper.ops.registry import implements, triton_interprets, unavailable

__all__ = [
    "FAULTS_AT",
    "blame",
    "cdiv",
    "choose",
    "contain",
    "is_aligned",
    "matrix",
    "on_device",
    "processors",
    "tables",
]

_OPS = ("graft_bank", "graft_bank_backward")
#: Where the faults begin behind the one byte that says that something is not finite: pointers are 16-byte aligned.
FAULTS_AT = 16

#: The compile-time arguments that a kernel runs with, and ``launch(programs, *arguments)``.
Choice = tuple[Mapping[str, Any], Callable[..., None]]
_HERE = contextlib.nullcontext()
#: The current stream of a device by its index, as an address: Triton asks the same function. A PyTorch without CUDA has
#: neither it nor streams.
_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)


def cdiv(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


def on_device(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    if not t.is_cuda or t.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(t.device)


@lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; the interpreter is one."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


@lru_cache(maxsize=1024)
def _uploaded(layout: BankLayout, seats: tuple[int, ...], device: torch.device) -> tuple[Table, Table, Table]:
    spans = [border for segment in layout.blend.segments for border in segment]
    return Table(layout.owner, device), Table(seats, device), Table(spans, device)


def tables(layout: BankLayout, seats: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """owner, seats and spans on the device; uploaded once for each set of seeds."""
    owner, places, spans = _uploaded(layout, seats, device)
    return owner.here(), places.here(), spans.here()


def choose(
    kernel: Any,
    dtype: str,
    device: torch.device,
    constants: Mapping[str, int],
    options: Mapping[str, int],
    *,
    tuned: bool = True,
) -> Choice:
    """How to launch a kernel: by a signed artifact's binary where one fits, else by Triton.

    The answer is made once and kept until binaries are loaded: a launch is worth a microsecond, and so is a search.

    Args:
        kernel: The ``@triton.jit`` function.
        dtype: Of the values, by Triton's name.
        device: Where.
        constants: Every compile-time argument.
        options: Triton's launch options.
        tuned: Whether the caller follows other tile sizes than those in ``constants``.

    Returns:
        The compile-time arguments that it runs with, and ``launch(programs, *arguments)``.
    """
    choices = binaries.TABLE.choices
    # By the kernel's identity, since Triton hashes its source; what is kept holds the kernel.
    key = (id(kernel), dtype, device, tuned, *constants, *constants.values(), *options, *options.values())
    found: Choice | None = choices.get(key)
    if found is None:
        found = choices[key] = _choice(kernel, dtype, device, dict(constants), dict(options), tuned)
    return found


def _choice(
    kernel: Any, dtype: str, device: torch.device, constants: dict[str, int], options: dict[str, int], tuned: bool
) -> Choice:
    binary = None
    if device.type == "cuda":
        binary = binaries.TABLE.find(kernel.__name__, dtype, constants, device.index, tuned=tuned)
    if binary is None:
        return constants, lambda programs, *arguments: kernel[(programs,)](*arguments, **constants, **options)
    index, native_launch, built = device.index, binary.launch, binary.constants

    def launch(programs: int, *arguments: Any) -> None:
        if not native_launch(programs, 1, 1, _raw_stream(index), *arguments):
            kernel[(programs,)](*arguments, **built, **options)

    return built, launch


def matrix(t: Tensor) -> Tensor:
    """[rows, features] with neighbouring features side by side; rows may lie apart."""
    flat = t.reshape(-1, t.shape[-1]) if t.dim() != 2 else t
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def is_aligned(layout: BankLayout, *numbers: int) -> bool:
    """Whether these numbers and all borders are multiples of 16."""
    borders = (border for segment in layout.blend.segments for border in segment)
    return all(number % 16 == 0 for number in (*numbers, *borders))


def _falls_back(h: Tensor, layout: BankLayout) -> bool:
    # float64 is for gradcheck and references; the rest is too large for the kernels' 32-bit sizes or lanes.
    return h.dtype not in DTYPE_NAMES or len(layout.rows) > SEATS or h.numel() // max(h.shape[-1], 1) >= 2**31 - 64


def blame(
    x: Tensor,
    h: Tensor,
    y: Tensor,
    weights: Sequence[Tensor],
    seat_tables: Sequence[Tensor],
    suspect: Tensor,
    faults: Tensor,
    layout: BankLayout,
    kind: Mapping[str, Any],
) -> None:
    """Raise the flags of the seeds at fault if ``suspect``; returns at once otherwise. The caller has set the device.

    Args:
        x: The tap, a matrix, as h and y.
        h: The host's output.
        y: The blend.
        weights: down, value, up, bias and value_bias, any tensor of their dtype for one that is missing.
        seat_tables: alpha, and what :func:`tables` gives.
        suspect: uint8, 1 where something in y is not finite.
        faults: uint8, one a seed.
        layout: Of the bank.
        kind: The constants that say which seeds they are.
    """
    from esper.kernels import graft_faults as kernels

    (rows, d_out), d_in, ranks = h.shape, x.shape[1], weights[0].shape[0]
    constants, launch = choose(
        kernels.graft_blame_kernel, DTYPE_NAMES[h.dtype], h.device, {**kind, **kernels.BLAME_BLOCKS},
        kernels.BLAME_OPTIONS,
    )  # fmt: skip
    z_row = cdiv(ranks, 16) * 16
    searchers = min(4 * processors(h.device), cdiv(rows, constants["BLOCK_M"]))
    kept = torch.empty((searchers * constants["BLOCK_M"], z_row), dtype=torch.float32, device=h.device)
    launch(
        searchers, x, h, y, *weights, *seat_tables, kept, suspect, faults,
        rows, d_in, d_out, ranks, len(layout.rows), len(layout.blend.segments),
        x.stride(0), h.stride(0), y.stride(0), z_row,
    )  # fmt: skip


def contain(h: Tensor, y: Tensor, faults: Tensor) -> None:
    """``y = h`` for two matrices if a seed is at fault; returns at once otherwise. The caller has set the device."""
    from esper.kernels import graft_faults as kernels

    rows, columns = h.shape
    constants, launch = choose(
        kernels.graft_contain_kernel,
        DTYPE_NAMES[h.dtype],
        h.device,
        {"SEATS": SEATS} | kernels.CONTAIN_BLOCKS,
        kernels.CONTAIN_OPTIONS,
    )
    tiles = cdiv(rows, constants["BLOCK_M"]) * cdiv(columns, constants["BLOCK_N"])
    launch(min(4 * processors(h.device), tiles), h, y, faults, rows, columns, len(faults), h.stride(0), y.stride(0))


def _register() -> None:
    from esper.kernels import graft_bank as forward_kernels
    from esper.kernels import graft_bank_backward as backward_kernels

    emulate = triton_interprets()

    @implements("graft_bank", "triton")
    def graft_bank(
        x: Tensor,
        h: Tensor,
        alpha: Tensor,
        down: Tensor,
        value: Tensor | None,
        up: Tensor,
        bias: Tensor | None,
        value_bias: Tensor | None,
        seats: Sequence[int],
        activation: str | None,
    ) -> tuple[Tensor, Tensor]:
        layout = check_bank(x, h, alpha, down, value, up, bias, value_bias, seats, activation)
        if _falls_back(h, layout):
            plain: tuple[Tensor, Tensor] = reference.graft_bank(
                x, h, alpha, down, value, up, bias, value_bias, seats, activation
            )
            return plain
        y = torch.empty(h.shape, dtype=h.dtype, device=h.device)
        flags = torch.zeros(FAULTS_AT + len(layout.rows), dtype=torch.uint8, device=h.device)
        suspect, faults = flags[:1], flags[FAULTS_AT:]
        if h.numel() == 0:
            return y, faults.clone()
        flat_x, flat_h, flat_y = matrix(x), matrix(h), matrix(y)
        (rows, d_out), d_in, ranks = flat_h.shape, flat_x.shape[1], down.shape[0]
        gated, biased = value is not None, bias is not None
        down, up = down.contiguous(), up.contiguous()
        value, bias, value_bias = (down if t is None else t.contiguous() for t in (value, bias, value_bias))
        z_row = cdiv(ranks, 16) * 16
        owner, places, spans = tables(layout, tuple(seats), h.device)
        weights = (down, value, up, bias, value_bias)
        seat_tables = (alpha.contiguous(), owner, places, spans)
        sizes = (rows, d_in, d_out, ranks, len(layout.rows), len(layout.blend.segments))
        strides = (flat_x.stride(0), flat_h.stride(0), flat_y.stride(0), z_row)
        kind = {"ACT": ACTIVATION_CODES[activation], "GATED": gated, "BIASED": biased, "EMULATE": emulate}
        kind |= {"SEATS": SEATS}
        many = processors(h.device)
        dtype = DTYPE_NAMES[h.dtype]
        aligned = is_aligned(layout, d_in, d_out, *strides)
        blocks, options = forward_kernels.bank_blocks(dtype, ranks, rows, gated, aligned)
        constants, launch = choose(
            forward_kernels.graft_bank_kernel, dtype, h.device, kind | {"ALIGNED": aligned} | blocks, options
        )
        z = torch.empty((rows if constants["WIDE"] else 1, z_row), dtype=torch.float32, device=h.device)
        programs = cdiv(rows, constants["BLOCK_M"])
        parts = max(1, min(2 * many // programs, cdiv(d_out, constants["BLOCK_N"])))
        with on_device(h):
            launch(
                programs * parts, flat_x, flat_h, flat_y, *weights, *seat_tables, z, suspect, *sizes, parts, *strides
            )
            blame(flat_x, flat_h, flat_y, weights, seat_tables, suspect, faults, layout, kind)
            contain(flat_h, flat_y, faults)
        return y, faults

    @implements("graft_bank_backward", "triton")
    def graft_bank_backward(
        gy: Tensor,
        x: Tensor,
        alpha: Tensor,
        faults: Tensor,
        down: Tensor,
        value: Tensor | None,
        up: Tensor,
        bias: Tensor | None,
        value_bias: Tensor | None,
        seats: Sequence[int],
        activation: str | None,
        want_x: bool,
        want_h: bool,
        want_weights: bool,
    ) -> tuple[Tensor, ...]:
        layout = check_bank(x, gy, alpha, down, value, up, bias, value_bias, seats, activation)
        if _falls_back(gy, layout):
            plain: tuple[Tensor, ...] = reference.graft_bank_backward(
                gy, x, alpha, faults, down, value, up, bias, value_bias, seats, activation,
                want_x, want_h, want_weights,
            )  # fmt: skip
            return plain
        gx = torch.empty(x.shape if want_x else 0, dtype=gy.dtype, device=gy.device)
        gh = torch.empty(gy.shape if want_h else 0, dtype=gy.dtype, device=gy.device)
        present = (down, value, up, bias, value_bias)
        grads = [
            torch.empty(0 if t is None or not want_weights else t.shape, dtype=gy.dtype, device=gy.device)
            for t in present
        ]
        if gy.numel() == 0:
            return (gx, gh, *(g.zero_() for g in grads))
        flat_x, flat_gy = matrix(x), matrix(gy)
        flat_gx = matrix(gx) if want_x else flat_x
        flat_gh = matrix(gh) if want_h else flat_gy
        (rows, d_out), d_in, ranks, seeds = flat_gy.shape, flat_x.shape[1], down.shape[0], len(layout.rows)
        gated, biased = value is not None, bias is not None
        alpha, down, up = alpha.contiguous(), down.contiguous(), up.contiguous()
        value, bias, value_bias = (down if t is None else t.contiguous() for t in (value, bias, value_bias))
        owner, places, spans = tables(layout, tuple(seats), gy.device)
        z_row = cdiv(ranks, 16) * 16
        left_behind = torch.empty((3 if gated else 2, rows, z_row), dtype=gy.dtype, device=gy.device)
        hidden, gz, gv = left_behind[0], left_behind[1], left_behind[-1]
        strides = (flat_x.stride(0), flat_gy.stride(0), flat_gx.stride(0), flat_gh.stride(0), z_row)
        aligned = is_aligned(layout, d_in, d_out, *strides)
        dtype = DTYPE_NAMES[gy.dtype]
        kind = {"GATED": gated, "BIASED": biased, "SEATS": SEATS}
        blocks, options = backward_kernels.rows_blocks(dtype, ranks, rows, gated, aligned)
        wants = {"ACT": ACTIVATION_CODES[activation], "WANT_X": want_x, "WANT_H": want_h}
        exact = {"ALIGNED": aligned, "EMULATE": emulate}
        constants, launch = choose(
            backward_kernels.graft_bank_rows_kernel, dtype, gy.device, kind | wants | exact | blocks, options
        )
        with on_device(gy):
            launch(
                cdiv(rows, constants["BLOCK_M"]),
                flat_x, flat_gy, flat_gx, flat_gh, down, value, up, bias, value_bias,
                alpha, owner, places, spans, faults, hidden, gz, gv,
                rows, d_in, d_out, ranks, seeds, len(layout.blend.segments), *strides,
            )  # fmt: skip
            if not want_weights:
                return gx, gh, *grads
            blocks, options = backward_kernels.weights_blocks(dtype, ranks)
            constants, launch = choose(
                backward_kernels.graft_bank_weights_kernel, dtype, gy.device, kind | exact | blocks, options
            )
            line = d_in * (2 if gated else 1) + d_out + (2 if biased else 0)
            tiles_in, tiles_out = (cdiv(d, constants["BLOCK_N"]) for d in (d_in, d_out))
            tiles = tiles_in * (2 if gated else 1) + tiles_out + (1 if biased else 0)
            tiles *= cdiv(ranks, constants["BLOCK_R"])
            # Twice as many programs as multiprocessors, but each with four blocks of rows at least.
            block = constants["BLOCK_M"]
            splits = max(1, min(cdiv(2 * processors(gy.device), tiles), rows // (4 * block)))
            stretch = cdiv(cdiv(rows, splits), block) * block
            splits = cdiv(rows, stretch)
            partials = torch.empty((splits, ranks, line), dtype=torch.float32, device=gy.device)
            launch(
                splits * tiles, flat_x, flat_gy, hidden, gz, gv, alpha, places, faults, partials,
                rows, d_in, d_out, ranks, seeds, stretch, splits, flat_x.stride(0), flat_gy.stride(0), z_row,
            )  # fmt: skip
            constants, launch = choose(
                backward_kernels.graft_bank_reduce_kernel, dtype, gy.device,
                kind | backward_kernels.REDUCE_BLOCKS, backward_kernels.REDUCE_OPTIONS,
            )  # fmt: skip
            gdown, gvalue, gup, gbias, gvalue_bias = grads
            launch(
                cdiv(line, constants["BLOCK_C"]) * ranks,
                partials, gdown, gvalue, gup, gbias, gvalue_bias, alpha, owner, places, faults,
                d_in, d_out, ranks, seeds, splits,
            )  # fmt: skip
        return gx, gh, *grads


try:
    _register()
except ImportError as error:
    for _name in _OPS:
        unavailable(_name, "triton", f"triton does not import: {error}")
for _name in _OPS:
    unavailable(
        _name, "cpu", "the CPU runs a bank through esper.execution.grafts.bank_kernel, which calls esper._native itself"
    )
    unavailable(_name, "cuda", "the products would be left to cuBLAS, which is what the reference does")
