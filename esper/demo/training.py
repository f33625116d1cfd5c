"""The run of the demo: a linear network learns a function that is not linear, until it grows and can."""

from __future__ import annotations

import time
from concurrent.futures import Future

import torch
from torch import nn

from esper import optim
from esper.core.model_wrapper import wrap

__all__ = ["D_IN", "D_OUT", "LAYER", "Run"]

D_IN, D_OUT, _HIDDEN = 16, 8, 12
LAYER = "0"
_SEED = 0
_BATCH = 64
_MEAN_OVER = 50


class Run:
    """Host, seeds, optimizer and data.

    Args:
        registry: Where kernels come from, with its token.
        seed: Of the weights and the data.

    Attributes:
        steps: Training steps so far.
        longest_s: The longest of them, in seconds.
        losses: Of the last steps.
    """

    def __init__(self, registry: str, seed: int) -> None:
        torch.set_num_threads(1)
        generator = torch.Generator().manual_seed(seed)
        self._generator = generator
        self._inner = torch.randn(D_IN, _HIDDEN, generator=generator)
        self._outer = torch.randn(_HIDDEN, D_OUT, generator=generator) / 3
        torch.manual_seed(seed)
        self.model = wrap(nn.Sequential(nn.Linear(D_IN, D_OUT)), registry=registry)
        optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        optim.attach(optimizer, self.model)
        self._optimizer = optimizer
        self.steps = 0
        self.longest_s = 0.0
        self.losses: list[float] = []

    def step(self) -> None:
        """One training step; this is the whole of what a training loop has to do."""
        begun = time.perf_counter()
        x = torch.randn(_BATCH, D_IN, generator=self._generator)
        self._optimizer.zero_grad()
        loss = (self.model(x) - torch.tanh(x @ self._inner) @ self._outer).square().mean()
        loss.backward()
        self._optimizer.step()
        self.model.step()
        self.losses.append(float(loss.detach()))
        del self.losses[:-_MEAN_OVER]
        self.steps += 1
        self.longest_s = max(self.longest_s, time.perf_counter() - begun)

    @property
    def loss(self) -> float:
        """Mean over the last steps."""
        return sum(self.losses) / len(self.losses) if self.losses else float("nan")

    @property
    def alpha(self) -> float:
        """How far the seed is blended in."""
        return self.model.layer(LAYER).state_layout.alpha_of(_SEED)

    @property
    def state(self) -> str:
        """The seed's."""
        return str(self.model.layer(LAYER).state_layout.state_of(_SEED).name)

    @property
    def reason(self) -> str:
        """Why the seed has no kernel."""
        return str(self.model.get_layer_stats(LAYER)["errors"].get(_SEED, "no reason on record"))

    def request(self, artifact_id: str, ramp_steps: int) -> Future[bool]:
        """Have the kernel fetched in the background."""
        return self.model.request_kernel(LAYER, _SEED, artifact_id, alpha=1.0, ramp_steps=ramp_steps)

    def fossilize(self) -> None:
        """Keep the seed."""
        self.model.fossilize(LAYER, _SEED)

    def cull(self) -> None:
        """Remove the seed."""
        self.model.cull(LAYER, _SEED)

    def close(self) -> None:
        """End background work."""
        self.model.close()
