"""A linear map and its activation as one module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.blueprints.interpret import activate
from esper.execution.health import LayerHealth, layer_health
from esper.nn.buffers import KeepsTypes
from esper.ops.linear import kept_way, linear, tune_linear
from esper.ops.stats import ACTIVATIONS, CHUNK_FIELDS, FEATURE_FIELDS, ChunkField, activate_with_stats, stats_merge

__all__ = ["FusedLinearAct"]

_tracing = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled

#: Activations in place. The first three are differentiated from their output, so autograd allows it; the others need
#: their input, and are done in place only where nothing is to be differentiated.
_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "tanh": torch.tanh_,
    "sigmoid": torch.sigmoid_,
    "gelu": lambda z: torch._C._nn.gelu_(z),  # type: ignore[attr-defined]
    "gelu_tanh": lambda z: torch._C._nn.gelu_(z, approximate="tanh"),  # type: ignore[attr-defined]
    "silu": lambda z: F.silu(z, inplace=True),
}
_FROM_OUTPUT = ("relu", "tanh", "sigmoid")


class FusedLinearAct(KeepsTypes):
    """``activation(x @ weight.T + bias)``: ``nn.Linear`` and its activation in one module.

    The product is the library's, the activation overwrites it where autograd can do without it: with ``relu``,
    ``tanh`` and ``sigmoid`` always, with the others when nothing is to be differentiated. So no second tensor of the
    output's size is written. Under ``torch.compile`` it is the plain composition, which the compiler fuses. On a GPU
    :meth:`tune` finds out whether one kernel for both (:func:`esper.ops.linear.linear`) is faster, and from then on
    calls take the fastest way of those that were measured.

    Parameters, their names and their first values are ``nn.Linear``'s, so its ``state_dict`` loads.

    Args:
        in_features: Features of the input.
        out_features: Features of the output.
        bias: Whether a bias is added.
        device: Of the parameters.
        dtype: Of the parameters.
        activation: ``relu``, ``gelu``, ``gelu_tanh``, ``tanh``, ``sigmoid`` or ``silu``.
        statistics: Whether the statistics of the output are gathered, in the activation's own pass over memory.
        num_seeds: Into how many chunks the features are divided for :meth:`health`.

    Attributes:
        features: float64 ``[5, out_features]``, the statistics since the last :meth:`reset_statistics`
            (:mod:`esper.ops.stats.schema`); only with ``statistics``. Not in the ``state_dict``.
        chunks: float64 ``[4, num_seeds]``, the same per chunk.

    Raises:
        ValueError: unknown activation, or fewer than one seed.
    """

    kept: ClassVar[tuple[str, ...]] = ("features", "chunks")
    weight: Tensor
    bias: Tensor | None
    features: Tensor
    chunks: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "gelu",
        statistics: bool = False,
        num_seeds: int = 4,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
        if num_seeds < 1:
            raise ValueError(f"num_seeds must be at least 1, got {num_seeds}")
        linear = nn.Linear(in_features, out_features, bias, device, dtype)
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias if bias else None)
        self.in_features, self.out_features = in_features, out_features
        self.activation, self.statistics, self.num_seeds = activation, statistics, num_seeds
        self._tuned = False
        if statistics:
            shapes = {"features": (FEATURE_FIELDS, out_features), "chunks": (CHUNK_FIELDS, num_seeds)}
            for name, shape in shapes.items():
                table = torch.zeros(shape, dtype=torch.float64, device=device)
                self.register_buffer(name, table, persistent=False)

    def reset_parameters(self) -> None:
        """Draw the parameters anew, as ``nn.Linear`` does, and forget the statistics."""
        nn.Linear.reset_parameters(cast(nn.Linear, self))
        if self.statistics:
            self.reset_statistics()

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        if self.statistics:
            return self._observed(F.linear(input, self.weight, self.bias))
        if self._tuned and input.is_cuda and not _tracing() and not torch.is_autocast_enabled("cuda"):
            return self._measured(input)
        if _tracing():
            return activate(self.activation, F.linear(input, self.weight, self.bias))
        if not _grad_enabled():
            return _IN_PLACE[self.activation](F.linear(input, self.weight, self.bias))
        if self.activation not in _FROM_OUTPUT or input.dim() < 2:
            return activate(self.activation, F.linear(input, self.weight, self.bias))
        if input.dim() == 2:
            return _IN_PLACE[self.activation](F.linear(input, self.weight, self.bias))
        # PyTorch would flatten it too, and give a view, which autograd can write to only at the price of copies.
        flat = _IN_PLACE[self.activation](F.linear(input.flatten(0, -2), self.weight, self.bias))
        return flat.view(*input.shape[:-1], self.out_features)

    def tune(self, rows: int) -> None:
        """Measure on this layer's GPU which way is fastest, in training and in inference; waits for the device.

        What is found is kept on disk, and what was kept before is not measured again. Without it calls take the
        library's product.

        Args:
            rows: Rows of the batches to come; the choice holds up to the next power of two.

        Raises:
            RuntimeError: the layer is on no GPU, or gathers statistics; or a CUDA graph is being captured.
        """
        if self.statistics:
            raise RuntimeError("a layer with statistics=True has one way to run; there is nothing to measure")
        for training in (False, True):
            sizes = rows, self.in_features, self.out_features
            about: dict[str, Any] = {
                "dtype": self.weight.dtype,
                "bias": self.bias is not None,
                "activation": self.activation,
                "training": training,
                "device": self.weight.device,
            }
            if kept_way(*sizes, **about) is None:
                tune_linear(*sizes, **about)
            self._tuned |= kept_way(*sizes, **about) != "library"

    def _measured(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias, self.activation)[0]

    def _observed(self, z: Tensor) -> Tensor:
        y, features, chunks = activate_with_stats(z, self.activation, self.num_seeds)
        with torch.no_grad():
            stats_merge(self.features, self.chunks, features, chunks)
        return y

    def health(self) -> LayerHealth:
        """The health of each chunk since the last :meth:`reset_statistics`; waits for the device.

        ``window_samples`` is the number of rows seen. See docs/monitoring.md for the fields.

        Raises:
            RuntimeError: the layer gathers no statistics.
        """
        self._need_statistics()
        rows = int((self.chunks[ChunkField.ROWS] + self.chunks[ChunkField.SKIPPED]).max())
        return layer_health(type(self).__name__, rows, self.features, self.chunks)

    def reset_statistics(self) -> None:
        """Start the statistics anew.

        Raises:
            RuntimeError: the layer gathers none.
        """
        self._need_statistics()
        self.features.zero_()
        self.chunks.zero_()

    def _need_statistics(self) -> None:
        if not self.statistics:
            raise RuntimeError("this layer gathers no statistics; make it with statistics=True")

    def extra_repr(self) -> str:
        """As ``nn.Linear``'s, and the activation."""
        seen = f", statistics=True, num_seeds={self.num_seeds}" if self.statistics else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"activation={self.activation!r}{seen}"
        )
