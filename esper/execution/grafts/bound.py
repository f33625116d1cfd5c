"""The kernels of one layer's seeds and their parameters, as seeds come and go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from esper.execution.grafts.seed import SeedWeights, bind_seed
from esper.execution.hosts import HostSpec

if TYPE_CHECKING:
    from esper.execution.kernel_executor import LoadedKernel

__all__ = ["BoundSeeds", "SeedState"]


class SeedState(Protocol):
    """The part of a layer's ``KasminaStateLayout`` that grafts read and write."""

    num_seeds: int
    alpha_blend: Tensor
    fault_flags: Tensor
    alphas: Tensor
    faults: Tensor
    first_row: int


class BoundSeeds(nn.Module):
    """The seeds of one layer that have a kernel; how they run is up to :class:`~esper.execution.grafts.GraftSet`.

    Args:
        spec: The host, from :func:`esper.execution.hosts.describe_host`.
        state_layout: The layer's rows of the lattice.

    Attributes:
        misfits: Seeds whose kernel turned out not to fit the layer, with the reason.
    """

    def __init__(self, spec: HostSpec, state_layout: SeedState) -> None:
        super().__init__()
        self.spec = spec
        self.state_layout = state_layout
        self.misfits: dict[int, str] = {}
        self._refused: dict[int, str] = {}
        self._kernels: dict[int, LoadedKernel] = {}
        self._like: Tensor
        # Empty; follows `.half()` and `.to()` with the rest of the model, so that seeds bound later have its dtype.
        dtype = spec.dtype if spec.dtype is not None else torch.get_default_dtype()
        self.register_buffer("_like", torch.empty(0, dtype=dtype), persistent=False)

    def _changed(self) -> None:
        """Another set of seeds is bound from now on."""
        raise NotImplementedError

    @property
    def bound(self) -> tuple[int, ...]:
        """Indices of the bound seeds, ascending."""
        return tuple(sorted(self._kernels))

    @property
    def kernels(self) -> dict[int, LoadedKernel]:
        """The bound seeds' kernels, a copy."""
        return dict(self._kernels)

    @property
    def dtype(self) -> torch.dtype:
        """Of the host, and so of new parameters."""
        return self._like.dtype

    def bind(
        self,
        seed_idx: int,
        kernel: LoadedKernel,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Give a seed its kernel; a kernel it had is replaced.

        Args:
            seed_idx: Which seed.
            kernel: What to run.
            dtype: Of the new parameters; by default that of the host.
            device: Of the new parameters; by default that of ``alpha_blend``.

        Raises:
            ValueError: bad seed index.
            ShapeMismatchError: the kernel does not fit the layer; the message names both shapes. Nothing has changed
                then. On an activation that has seen no input yet any kernel is taken; one that turns out not to fit is
                put in :attr:`misfits` with the reason at the first forward, and its fault flag is raised.
        """
        self.check(seed_idx, kernel)
        # A seed may wake in the middle of an evaluation, and no optimizer may write to what is made in inference mode.
        with torch.inference_mode(False):
            self._hold(seed_idx, kernel, dtype, device)
            self._kernels[seed_idx] = kernel
            self._forget_reasons(seed_idx)
            self._changed()

    def unbind(self, seed_idx: int) -> None:
        """Drop a seed's kernel and parameters; one that is not bound is left as it is."""
        if seed_idx in self._kernels:
            self._drop(seed_idx)
            del self._kernels[seed_idx]
            self._forget_reasons(seed_idx)
            self._changed()

    def check(self, seed_idx: int, kernel: LoadedKernel) -> None:
        """Raise what :meth:`bind` raises."""
        if not isinstance(seed_idx, int) or not 0 <= seed_idx < self.state_layout.num_seeds:
            raise ValueError(f"Invalid seed index {seed_idx!r}: this layer has {self.state_layout.num_seeds} seeds")
        if self.spec.is_resolved:
            bind_seed(seed_idx, kernel, self.spec, self.state_layout.num_seeds)

    def _hold(
        self, seed_idx: int, kernel: LoadedKernel, dtype: torch.dtype | None, device: torch.device | None
    ) -> None:
        """Make the seed's parameters."""
        # That of a chunk keeps memory of its own in a bank, and lies there as it comes.
        whole = kernel.blueprint.scope == "layer" or self.state_layout.num_seeds == 1
        weights = SeedWeights(
            kernel.tensors,
            self._like.dtype if dtype is None else dtype,
            self.state_layout.alpha_blend.device if device is None else device,
            kernel.family.tensor("up") if whole and "up" in kernel.family.roles else None,
        )
        weights.train(self.training)
        setattr(self, f"seed{seed_idx}", weights)

    def _drop(self, seed_idx: int) -> None:
        """Take the seed's parameters away."""
        delattr(self, f"seed{seed_idx}")

    def kernel(self, seed_idx: int) -> LoadedKernel:
        """What the seed was bound with; its tensors are those of the artifact, not the trained ones."""
        return self._kernels[seed_idx]

    def reason_of(self, seed_idx: int) -> str | None:
        """Why the seed did not fit the layer, or the last call that it did not fit; None where it always has."""
        return self.misfits.get(seed_idx) or self._refused.get(seed_idx)

    def _forget_reasons(self, seed_idx: int) -> None:
        self.misfits.pop(seed_idx, None)
        self._refused.pop(seed_idx, None)

    def seed_parameters(self, seed_idx: int) -> dict[str, nn.Parameter]:
        """The seed's parameters by the blueprint's names, such as ``down.weight``; empty for a seed that is not bound.

        They are leaves, and stay the same objects while other seeds come and go.
        """
        if seed_idx not in self._kernels:
            return {}
        return dict(self._weights(seed_idx).named_parameters())

    def seed_tensors(self, seed_idx: int) -> dict[str, Tensor]:
        """The seed's trained weights by the blueprint's names, as large as its blueprint says; empty if not bound."""
        return self._weights(seed_idx).tensors() if seed_idx in self._kernels else {}

    def _weights(self, seed_idx: int) -> SeedWeights:
        weights = self._modules[f"seed{seed_idx}"]
        assert isinstance(weights, SeedWeights)
        return weights
