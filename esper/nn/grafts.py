"""Single grafts as modules: what an awake seed adds to a layer, for networks that are put together by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor

from esper.blueprints import get, initialise, match
from esper.execution.grafts import GraftSet
from esper.execution.hosts import HostSpec
from esper.nn.buffers import KeepsTypes

if TYPE_CHECKING:
    from esper.blueprints import Blueprint, Family
    from esper.execution.kernel_executor import LoadedKernel

__all__ = ["BottleneckGraft", "LowRankGraft"]

_compiling: Callable[[], bool] = torch.compiler.is_compiling


@dataclass
class _Kernel:
    """The part of a ``LoadedKernel`` that a graft set reads."""

    artifact_id: str
    blueprint: Blueprint
    family: Family
    tensors: dict[str, Tensor]
    d_in: int
    d_out: int


class _State:
    """The part of a layer's state that a graft set reads and writes, of one seed."""

    num_seeds: int = 1
    first_row: int = 0

    def __init__(self, alpha_blend: Tensor, fault_flags: Tensor) -> None:
        self.hold(alpha_blend, fault_flags)

    def hold(self, alpha_blend: Tensor, fault_flags: Tensor) -> None:
        """Be these from now on."""
        self.alpha_blend = self.alphas = alpha_blend
        self.fault_flags = self.faults = fault_flags


class LowRankGraft(KeepsTypes):
    """One low-rank sub-network blended into a tensor: ``y = h + alpha * up act(down x + b)``.

    With ``mode="replace"`` it is ``y = (1 - alpha) * h + alpha * up act(down x + b)``. Without activation and bias it
    is the adapter of Hu et al. 2021, "LoRA". It runs as an awake seed does (docs/grafts.md): on the CPU one native call
    forward and one backward, alpha 0 gives h bit for bit, and where the sub-network yields NaN or infinity from finite
    input, y is h and :attr:`faults` is raised. A residual graft starts at 0 with ``up``, so that it changes nothing
    before it has learnt.

    ``down.weight`` is ``[rank, d_in]``, ``down.bias`` ``[rank]``, ``up.weight`` ``[d_out, rank]``.

    Args:
        d_in: Features of x.
        d_out: Features of h.
        rank: Inner width.
        activation: ``relu``, ``gelu``, ``gelu_tanh``, ``tanh``, ``sigmoid``, ``silu``, or None.
        bias: Whether ``down`` has one.
        mode: ``residual`` or ``replace``.
        alpha: The blend factor to begin with, in [0, 1].
        channel_dim: Where the features are: -1, or 1 for images ``[N, C, H, W]``.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        alpha: float32 ``[1]``, a buffer; :meth:`set_alpha` sets it in place, which recompiles nothing.
        faults: uint8 ``[1]``, 1 after a call whose result had to be contained; set it to 0 to hear of the next.

    Raises:
        ValueError: a size below 1, an activation that is not known, ``alpha`` out of range, a bad ``mode`` or
            ``channel_dim``.
    """

    kept: ClassVar[tuple[str, ...]] = ("alpha",)
    alpha: Tensor
    faults: Tensor
    _grafts: GraftSet

    def __init__(
        self,
        d_in: int,
        d_out: int,
        rank: int,
        *,
        activation: str | None = None,
        bias: bool = False,
        mode: Literal["residual", "replace"] = "residual",
        alpha: float = 1.0,
        channel_dim: Literal[-1, 1] = -1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation is None and not bias:
            blueprint = get("lowrank", rank=rank, mode=mode)
        else:
            blueprint = get("bottleneck", rank=rank, mode=mode, activation=activation, bias=bias)
        self._grow(blueprint, d_in, d_out, alpha, channel_dim, device, dtype)

    def _grow(
        self,
        blueprint: Blueprint,
        d_in: int,
        d_out: int,
        alpha: float,
        channel_dim: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        if channel_dim not in (-1, 1):
            raise ValueError(f"channel_dim is {channel_dim!r}; features are in dimension -1, or 1 for images")
        self.d_in, self.d_out, self.channel_dim = d_in, d_out, channel_dim
        self.blueprint = blueprint
        self._first_alpha = _checked(alpha)
        weights = self._first_weights()
        if dtype is None:
            dtype = torch.get_default_dtype()
        self.register_buffer("alpha", torch.tensor([self._first_alpha], dtype=torch.float32, device=device))
        self.register_buffer("faults", torch.zeros(1, dtype=torch.uint8, device=device), persistent=False)
        kernel = _Kernel(type(self).__name__, blueprint, match(blueprint), weights, d_in, d_out)
        spec = HostSpec(type(self).__name__, "rows" if channel_dim == -1 else "nchw", d_in, d_out, dtype=dtype)
        grafts = GraftSet(spec, _State(self.alpha, self.faults))
        grafts.bind(0, cast("LoadedKernel", kernel), dtype=dtype)
        weights.clear()  # they have been copied
        # The parameters are this module's, by the blueprint's names; the set that runs them is not a child.
        self.__dict__["_grafts"] = grafts
        for name, node in grafts._weights(0).named_children():
            self.add_module(name, node)

    def _first_weights(self) -> dict[str, Tensor]:
        """From PyTorch's generator, as other modules begin, through the library's own way to draw them."""
        seed = int(torch.randint(2**62, (), device="cpu"))
        return initialise(self.blueprint, self.d_in, self.d_out, seed, torch.float64)

    def reset_parameters(self) -> None:
        """Draw the weights anew; alpha is what the constructor was given, and no fault is known."""
        self.set_alpha(self._first_alpha)
        self.faults.zero_()
        parameters = dict(self.named_parameters())
        with torch.no_grad():
            for name, tensor in self._first_weights().items():
                parameters[name].copy_(tensor)

    def set_alpha(self, alpha: float) -> None:
        """Set the blend factor in place.

        Raises:
            ValueError: ``alpha`` is not in [0, 1].
        """
        self.alpha.fill_(_checked(alpha))

    def forward(self, x: Tensor, h: Tensor | None = None, alpha: Tensor | float | None = None) -> Tensor:
        """Blend.

        Args:
            x: What the sub-network reads: ``[..., d_in]``, or ``[N, d_in, ...]`` with ``channel_dim=1``.
            h: What it is blended into, of x's other dimensions: ``[..., d_out]``, or ``[N, d_out, ...]``. None means x.
            alpha: The blend factor of this call, in place of the module's own; a tensor has one element and no
                gradient, and is not looked at.

        Returns:
            y, of h's shape and dtype.

        Raises:
            ValueError: shapes that do not fit.
        """
        if h is None:
            h = x
        self._check(x, h)
        if alpha is None:
            factor = self.alpha
        elif isinstance(alpha, Tensor):
            if alpha.requires_grad:
                raise ValueError("alpha has no gradient; to learn the size of a graft, train up.weight")
            factor = alpha.reshape(1).to(h.device, torch.float32)
        else:
            factor = torch.full((1,), _checked(alpha), dtype=torch.float32, device=h.device)
        return self._grafts.forward(x, h, factor)

    def _check(self, x: Tensor, h: Tensor) -> None:
        dim = self.channel_dim
        if x.dim() > dim and h.dim() == x.dim() and x.shape[dim] == self.d_in and h.shape[dim] == self.d_out:
            if dim == -1:
                fits = x.shape[:-1] == h.shape[:-1]
            else:
                fits = x.shape[0] == h.shape[0] and x.shape[2:] == h.shape[2:]
            if fits and x.dim() > 0:
                return
        raise ValueError(
            f"x is {tuple(x.shape)} and h {tuple(h.shape)}; this graft maps {self.d_in} features of dimension {dim} to "
            f"{self.d_out}, and all other dimensions must agree"
        )

    def extra_repr(self) -> str:
        """Sizes, and what lies between ``down`` and ``up``."""
        family = self._grafts._seeds[0].family
        rank = self.get_parameter(family.tensor("down")).shape[0]
        inside = [f"{self.d_in}, {self.d_out}, rank={rank}"]
        inside += [
            f"{key}={value!r}" for key, value in (("norm", family.norm), ("activation", family.activation)) if value
        ]
        inside += [f"bias={'down' in family.biases}", f"mode={self.blueprint.mode!r}"]
        return ", ".join(inside)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # With assign=True other tensors will stand where the packed ones stood.
        self._grafts._forget_bank()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._grafts._forget_bank()
        state = self._grafts.state_layout
        assert isinstance(state, _State)
        state.hold(self.alpha, self.faults)
        return self


class BottleneckGraft(LowRankGraft):
    """A :class:`LowRankGraft` with something in between: ``y = h + alpha * up act(down [norm] x + b)``.

    The adapter of Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP". With a norm the CPU runs it on
    PyTorch's operations.

    Args:
        d_in: Features of x.
        d_out: Features of h.
        rank: Inner width.
        activation: As for :class:`LowRankGraft`.
        norm: ``layernorm`` or ``rmsnorm`` of x, without weights of its own, or None.
        eps: The norm's.
        bias: Whether ``down`` has one.
        mode: ``residual`` or ``replace``.
        alpha: The blend factor to begin with, in [0, 1].
        channel_dim: Where the features are: -1, or 1 for images.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: as for :class:`LowRankGraft`.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        rank: int,
        *,
        activation: str | None = "gelu",
        norm: Literal["layernorm", "rmsnorm"] | None = None,
        eps: float = 1e-5,
        bias: bool = True,
        mode: Literal["residual", "replace"] = "residual",
        alpha: float = 1.0,
        channel_dim: Literal[-1, 1] = -1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        KeepsTypes.__init__(self)
        inside: dict[str, Any] = {"rank": rank, "mode": mode, "activation": activation, "bias": bias}
        name = "bottleneck" if norm is None else "normed_bottleneck"
        if norm is not None:
            inside |= {"norm": norm, "eps": eps}
        self._grow(get(name, **inside), d_in, d_out, alpha, channel_dim, device, dtype)


def _checked(alpha: float) -> float:
    if not 0.0 <= alpha <= 1.0 or math.isnan(alpha):
        raise ValueError(f"alpha is {alpha}; give a number in [0, 1]")
    return float(alpha)
