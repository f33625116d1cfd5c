"""Multi-head attention with grafts, as ``esper.export`` leaves it; imports nothing but torch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["GraftedAttention"]


class GraftedAttention(nn.MultiheadAttention):
    """An ``nn.MultiheadAttention`` whose output goes through a graft.

    Attributes, ``state_dict`` keys, arguments and the second result (attention weights) are those of
    ``nn.MultiheadAttention``; the graft's own entries stand under ``graft.``. This class is the one thing of Esper that
    an exported model may need when it is unpickled.
    """

    graft: nn.Module

    @classmethod
    def from_host(cls, host: nn.MultiheadAttention, graft: nn.Module) -> GraftedAttention:
        """Take over ``host``'s weights and settings.

        Args:
            host: The attention; do not use it any further.
            graft: Maps (query ``[..., embed_dim]``, output ``[..., embed_dim]``) to the output in its place.
        """
        grafted = cls.__new__(cls)
        grafted.__dict__.update(host.__dict__)
        grafted.add_module("graft", graft)
        return grafted

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention.forward``."""
        output, weights = super().forward(query, *args, **kwargs)
        return self.graft(query, output), weights
