"""A Linear host and its seeds as one operation, where that was measured to be the fastest way on this GPU.

Without a measurement a layer runs its host's own product and then its seeds. :func:`tune` measures both ways, and a
third, for the sizes that a layer has; what it finds is kept on disk (:mod:`esper.ops.choices`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from esper.execution.grafts import GraftSet
from esper.ops.choices import bucket
from esper.ops.linear import kept_way, tune_linear

__all__ = ["FusedHost", "tune"]


class FusedHost:
    """Calls the one operation where it was found to be fastest, and says None everywhere else.

    Args:
        host: Whose product it takes over; its forward is ``nn.Linear``'s own.
        grafts: The layer's seeds.
    """

    def __init__(self, host: nn.Linear, grafts: GraftSet) -> None:
        self._host = host
        self._grafts = grafts
        #: By rows (as choices know them) and the bank of seeds.
        self._known: dict[tuple[int, tuple[int, str | None]], bool] = {}

    def __call__(self, x: Tensor) -> Tensor | None:
        """``grafts(x, host(x))``, or None."""
        bank = self._grafts.bank_of_seeds
        if bank is None or x.is_nested or not x.numel() or torch.is_autocast_enabled(x.device.type):
            return None
        rows = bucket(x.numel() // x.shape[-1])
        fastest = self._known.get((rows, bank))
        if fastest is None:
            fastest = self._known[rows, bank] = way_of(self._host, rows, bank) not in (None, "library")
        return self._grafts.with_host(x, self._host.weight, self._host.bias) if fastest else None


def way_of(host: nn.Linear, rows: int, bank: tuple[int, str | None]) -> str | None:
    """What was measured to be fastest for this host with this bank; None where nobody measured it."""
    sizes, about = _case(host, rows, bank)
    return kept_way(*sizes, **about)  # type: ignore[arg-type]


def tune(host: nn.Linear, rows: int, banks: Sequence[tuple[int, str | None]]) -> dict[tuple[int, str | None], str]:
    """Measure, for each bank of seeds, which way is fastest, unless that is known; waits for the device.

    Args:
        host: On a GPU.
        rows: Rows of the batches to come; what is found holds up to the next power of two.
        banks: Rows and activation of the seeds, all of the layer together.

    Returns:
        The way for each bank: ``library`` is the host's own product and then the seeds.

    Raises:
        RuntimeError: the host is on no GPU, or a CUDA graph is being captured.
    """
    found: dict[tuple[int, str | None], str] = {}
    for bank in banks:
        if way_of(host, rows, bank) is None:
            sizes, about = _case(host, rows, bank)
            tune_linear(*sizes, **about)  # type: ignore[arg-type]
        found[bank] = way_of(host, rows, bank) or "library"
    return found


def _case(host: nn.Linear, rows: int, bank: tuple[int, str | None]) -> tuple[tuple[int, int, int], dict[str, object]]:
    about: dict[str, object] = {
        "dtype": host.weight.dtype,
        "bias": host.bias is not None,
        "ranks": bank[0],
        "graft_activation": bank[1],
        "device": host.weight.device,
    }
    return (rows, host.in_features, host.out_features), about
