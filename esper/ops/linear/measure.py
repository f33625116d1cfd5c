"""Which way a linear layer takes, found by running all of them on the device.

Measuring waits for the device, so it never happens by itself: :func:`tune_linear` is for before the training. What it
finds is kept on disk (:mod:`esper.ops.choices`), and calls of that shape take it from then on, in this process and the
next. A shape that was not measured takes the library's way.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from esper.ops.choices import CHOICES
from esper.ops.graft.variants import DTYPE_NAMES
from esper.ops.linear.schema import WAYS
from esper.ops.linear.triton import choice_key, runs_fused

__all__ = ["kept_way", "tune_linear"]


def tune_linear(
    rows: int,
    d_in: int,
    d_out: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = True,
    activation: str | None = None,
    ranks: int = 0,
    graft_activation: str | None = None,
    training: bool = True,
    stats: bool = False,
    device: torch.device | str = "cuda",
) -> Mapping[str, float]:
    """Measure the ways of one layer and keep the fastest; the library's is left only for a gain of 2 percent.

    Args:
        rows: Rows of x; the choice holds up to the next power of two.
        d_in: Features of x.
        d_out: Features of y.
        dtype: bfloat16, float16 or float32.
        bias: Whether the layer has one.
        activation: The layer's, or None.
        ranks: Rows of the bank of seeds, all together; 0 for none.
        graft_activation: The seeds'; with one, they have a bias too.
        training: Whether there will be a backward.
        stats: Whether statistics are gathered.
        device: A GPU.

    Returns:
        Milliseconds of each way; a way that does not run on this device, or gives something else, is left out.

    Raises:
        RuntimeError: ``device`` is no GPU, or a CUDA graph is being captured.
    """
    from esper.ops.tuning import WORTH, Workload, agree, time_of  # The compiler, which calls do without.

    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        raise RuntimeError(f"the ways of a linear layer are measured on a GPU, and {device} is none")
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a CUDA graph is being captured; measure before the capture")
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, device=device)).to(dtype)

    x, weight = drawn(rows, d_in), drawn(d_out, d_in, scale=d_in**-0.5)
    host = x, weight, drawn(d_out) if bias else None
    keep = training and activation is not None
    graft: tuple[Tensor | None, ...] = (None, None, None, None)
    if ranks:
        graft_bias = drawn(ranks) if graft_activation is not None else None
        alpha = torch.full((1,), 0.5, device=device)
        graft = alpha, drawn(ranks, d_in, scale=d_in**-0.5), drawn(ranks, d_out, scale=ranks**-0.5), graft_bias
    seats = [0, 0, d_out, 0, 0, ranks] if ranks else []
    rest = (*graft, seats, graft_activation if ranks else None, keep, stats)
    times: dict[str, float] = {}
    expected: list[Tensor] = []
    # Events are recorded, and Triton launches, on the current device.
    with torch.cuda.device(device):
        for way in WAYS if ranks else WAYS[:2]:

            def run(way: str = way) -> list[Tensor]:
                y, before, _, _ = runs_fused(way, *host, activation, *rest)  # type: ignore[arg-type]
                return [y, before]

            try:
                results = [t.clone() for t in run()]
                torch.cuda.synchronize(device)
            except Exception:
                # Triton raises many things where a GPU has too little shared memory or too few registers: no candidate.
                # A library that fails is the caller's to hear of.
                if way == "library":
                    raise
                continue
            expected = expected or results
            if agree(results, expected, DTYPE_NAMES[dtype]):
                times[way] = time_of(Workload(run, DTYPE_NAMES[dtype]))
    best = min(times, key=times.__getitem__)
    if times[best] > WORTH * times["library"]:
        best = "library"
    key = choice_key(*host, activation, ranks, graft_activation if ranks else None, keep, stats)
    CHOICES.put(key, best, device)
    return times


def kept_way(
    rows: int,
    d_in: int,
    d_out: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = True,
    activation: str | None = None,
    ranks: int = 0,
    graft_activation: str | None = None,
    training: bool = True,
    stats: bool = False,
    device: torch.device | str = "cuda",
) -> str | None:
    """What :func:`tune_linear` found for such a layer, in this process or another; None where nobody measured it."""
    x, weight, there = (
        torch.empty(shape, dtype=dtype, device="meta") for shape in ((rows, d_in), (d_out, d_in), d_out)
    )
    keep = training and activation is not None
    key = choice_key(
        x, weight, there if bias else None, activation, ranks, graft_activation if ranks else None, keep, stats
    )
    return CHOICES.get(key, torch.device(device))
