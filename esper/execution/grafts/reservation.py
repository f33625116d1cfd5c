"""Memory set aside for seeds before anybody knows what they will hold.

Distributed training, compiled graphs and captured ones want parameters that are there from the start, with shapes and
addresses that stay. A layer with a reservation holds, for each of its S seeds,

    down.weight [R, d_tap]    down.bias [R]    up.weight [d_out, R]

all zero while the seed sleeps. Waking copies an artifact's weights into the first r <= R rows. So a layer takes

    S * R * (d_tap + d_out + 1)

numbers, and as many again for each gradient and each moment that an optimizer keeps of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from esper.contracts.errors import ShapeMismatchError
from esper.execution.grafts.seed import SeedWeights
from esper.execution.hosts import HostSpec

if TYPE_CHECKING:
    from esper.execution.grafts.seed import BoundSeed
    from esper.execution.kernel_executor import LoadedKernel

__all__ = ["FAMILIES", "Reservation", "ReservationError", "ReservedWeights", "Tap", "store"]

Tap = Literal["input", "output"]

#: The families whose weights are two matrices of one rank and a bias between them.
FAMILIES = ("lowrank", "bottleneck")


class ReservationError(ShapeMismatchError):
    """A kernel does not fit what was reserved for it; the message says what was, and what to do."""


@dataclass(frozen=True)
class Reservation:
    """What one layer sets aside for each of its seeds.

    Attributes:
        rank: Largest rank that a kernel may have, R.
        tap: What the seeds read: the layer's ``input`` or its ``output``.
        d_tap: Features of that.
        d_out: Features of the layer.
    """

    rank: int
    tap: Tap
    d_tap: int
    d_out: int

    @classmethod
    def of(cls, spec: HostSpec, rank: int, tap: Tap, layer_name: str) -> Reservation:
        """The reservation for a host.

        Where a 1x1 sampling of the input has not the size of the output (a convolution without the padding that keeps
        the image), the seeds read the output whatever ``tap`` says: nothing else fits there.

        Raises:
            ValueError: the host's sizes are not known before its first input.
        """
        if spec.d_in is None or spec.d_out is None or spec.kind is None:
            raise ValueError(
                f"layer '{layer_name}' ({spec.type_name}) has no size of its own before its first input, so nothing "
                "can be reserved for it: name other layers in target_layers, or wrap with reserve_rank=0"
            )
        if spec.geometry is not None and not spec.geometry.pointwise_matches:
            tap = "output"
        return cls(rank, tap, spec.d_in if tap == "input" else spec.d_out, spec.d_out)

    def check(self, kernel: LoadedKernel) -> None:
        """Raise :class:`ReservationError` unless the kernel fits; its widths are checked elsewhere."""
        family, name = kernel.family, kernel.artifact_id
        if family.name not in FAMILIES:
            raise ReservationError(
                f"kernel {name} is of family {family.name.value}, but this layer has reserved memory for "
                f"{' and '.join(FAMILIES)} kernels only (a matrix down, a bias, a matrix up); "
                "wrap with reserve_rank=0 for the others"
            )
        if family.norm is not None:
            raise ReservationError(
                f"kernel {name} begins with a {family.norm}, but the seeds of a layer with reserved memory share one "
                "product with what they read, as it is; use a bottleneck without a norm, or wrap with reserve_rank=0"
            )
        if kernel.blueprint.tap != self.tap:
            raise ReservationError(
                f"kernel {name} reads the layer's {kernel.blueprint.tap}, but this layer has reserved memory for "
                f"kernels that read its {self.tap}; compile it with tap={self.tap!r}, or wrap with "
                f"reserve_tap={kernel.blueprint.tap!r}"
            )
        rank = kernel.tensors[family.tensor("down")].shape[0]
        if rank > self.rank:
            raise ReservationError(
                f"kernel {name} has rank {rank}, but this layer has reserved rank {self.rank} for each seed; "
                f"compile it with a rank of at most {self.rank}, or wrap with reserve_rank={rank}",
                expected=(self.rank, self.d_tap),
                got=tuple(kernel.tensors[family.tensor("down")].shape),
            )


class ReservedWeights(SeedWeights):
    """The memory of one seed: parameters that never come or go, and what occupies them."""

    def __init__(self, reservation: Reservation, dtype: torch.dtype, device: torch.device) -> None:
        rank, d_tap, d_out = reservation.rank, reservation.d_tap, reservation.d_out
        shapes = {"down.weight": (rank, d_tap), "down.bias": (rank,), "up.weight": (d_out, rank)}
        super().__init__({name: torch.zeros(shape) for name, shape in shapes.items()}, dtype, device)
        self._names: Mapping[str, str] = {}
        self._rank = 0
        self._begin, self._end = 0, d_out

    @property
    def rank(self) -> int:
        """Rows that are occupied."""
        return self._rank

    def whole(self) -> tuple[Tensor, Tensor, Tensor]:
        """(down, bias, up) in full, whatever occupies them; under ``functional_call`` the caller's."""
        slots = super().tensors()
        return slots["down.weight"], slots["down.bias"], slots["up.weight"]

    def occupied(self) -> dict[str, nn.Parameter]:
        """The parameters that train while the seed is awake: a kernel without a bias leaves the bias alone."""
        return {name: parameter for name, parameter in self.named_parameters() if name in self._names}

    def tensors(self) -> dict[str, Tensor]:
        """The part that the kernel occupies, by its blueprint's names: views, so gradients reach the parameters."""
        down, bias, up = self.whole()
        parts = {
            "down.weight": down[: self._rank],
            "down.bias": bias[: self._rank],
            "up.weight": up[self._begin : self._end, : self._rank],
        }
        return {theirs: parts[ours] for ours, theirs in self._names.items()}

    def fill(self, seed: BoundSeed, tensors: Mapping[str, Tensor]) -> None:
        """Copy a kernel's weights in; what it leaves of the memory is 0."""
        family = seed.family
        self._names = {"down.weight": family.tensor("down"), "up.weight": family.tensor("up")}
        if "down" in family.biases:
            self._names = {**self._names, "down.bias": family.tensor("down", "bias")}
        self._rank = tensors[family.tensor("down")].shape[0]
        self._begin, self._end = seed.place.begin, seed.place.end
        values = {name: torch.zeros(p.shape, dtype=p.dtype, device=p.device) for name, p in self.named_parameters()}
        values["down.weight"][: self._rank] = tensors[family.tensor("down")]
        values["up.weight"][self._begin : self._end, : self._rank] = tensors[family.tensor("up")]
        if "down" in family.biases:
            values["down.bias"][: self._rank] = tensors[family.tensor("down", "bias")]
        for name, parameter in self.named_parameters():
            store(parameter, values[name])

    def empty(self) -> None:
        """Make all of it 0 again."""
        self._names, self._rank = {}, 0
        for parameter in self.parameters():
            store(parameter, torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device))


def store(parameter: nn.Parameter, value: Tensor) -> None:
    """Write ``value`` into a parameter in place, and zeros into its gradient; the address stays.

    A parameter that FSDP2 has sharded gets this rank's share: every rank has the whole value, so nothing is sent.
    """
    with torch.inference_mode(False), torch.no_grad():
        parameter.copy_(_sharded_like(parameter, value))
        if parameter.grad is not None:
            parameter.grad.zero_()


def _sharded_like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    mesh: Any = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return value
    # Only a process that has sharded something gets here.
    from torch.distributed.tensor import DTensor, Replicate

    whole = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(mesh, parameter.placements)  # type: ignore[attr-defined]
