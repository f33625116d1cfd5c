"""Kernels without artifacts, a layer's state without a lattice, and the formula of the blend written out feature by
feature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.blueprints import Blueprint, families, get, init, interpret
from esper.execution.grafts import GraftSet, bank_kernel
from esper.execution.hosts import describe_host


@dataclass(frozen=True)
class Kernel:
    """The part of ``LoadedKernel`` that grafts use."""

    artifact_id: str
    kernel_id: int
    blueprint: Blueprint
    family: families.Family
    tensors: Mapping[str, Tensor]
    d_in: int
    d_out: int


class State:
    """The part of ``KasminaStateLayout`` that grafts use."""

    def __init__(self, alphas: Sequence[float]) -> None:
        self.num_seeds = len(alphas)
        self.first_row = 2
        self.alphas = torch.tensor([torch.nan, torch.nan, *alphas, torch.nan], dtype=torch.float32)
        self.faults = torch.zeros(len(self.alphas), dtype=torch.uint8)
        self._bind()

    def to(self, device: torch.device | str) -> None:
        """Move the rows of all layers; this layer's are parts of them there too, as after a model's ``to``."""
        self.alphas, self.faults = self.alphas.to(device), self.faults.to(device)
        self._bind()

    def _bind(self) -> None:
        rows = slice(self.first_row, self.first_row + self.num_seeds)
        self.alpha_blend, self.fault_flags = self.alphas[rows], self.faults[rows]


def kernel(
    blueprint: Blueprint | str,
    d_in: int,
    d_out: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **params: Any,
) -> Kernel:
    """A kernel whose weights are all away from zero: the library's own start leaves some gradients zero."""
    if isinstance(blueprint, str):
        if "rank" in get(blueprint).parameters:
            params.setdefault("rank", 2)
        blueprint = get(blueprint, **params)
    start = init.initialise(blueprint, d_in, d_out, seed, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    tensors = {n: t + 0.3 * torch.randn(t.shape, generator=generator, dtype=dtype) for n, t in start.items()}
    return Kernel(f"{blueprint.name}-{seed}", seed, blueprint, families.match(blueprint), tensors, d_in, d_out)


def graft_set(host: nn.Module, alphas: Sequence[float], kernels: Mapping[int, Kernel]) -> GraftSet:
    """A graft set on a host with these kernels bound."""
    grafts = GraftSet(describe_host(host), State(alphas))
    for seed_idx, k in kernels.items():
        grafts.bind(seed_idx, k, dtype=next(iter(k.tensors.values())).dtype)
    return grafts


def leave_to_the_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let banks take the way of large products, whatever the size."""
    for limit in ("NATIVE_LIMIT", "NATIVE_LIMIT_ALONE"):
        monkeypatch.setattr(bank_kernel, limit, 0)


def parameters(grafts: GraftSet) -> list[nn.Parameter]:
    return [p for seed_idx in grafts.bound for p in grafts.seed_parameters(seed_idx).values()]


def formula(grafts: GraftSet, x: Tensor, h: Tensor, dim: int = -1) -> Tensor:
    """DESIGN section 5, one feature at a time, k from the interpreter; a chunk's seeds count in A' only in their
    chunk."""
    features, num_seeds = h.shape[dim], grafts.state_layout.num_seeds
    alpha = grafts.state_layout.alpha_blend.double().tolist()
    seeds = []
    for seed_idx in grafts.bound:
        k = grafts.kernel(seed_idx)
        tap = x if k.blueprint.tap == "input" else h
        sampled = tap
        geometry = grafts.spec.geometry
        pointwise = all(node.op != "depthwise" for node in k.blueprint.order)
        if geometry is not None and k.blueprint.tap == "input" and pointwise:
            sampled = tap[..., :: geometry.stride[0], :: geometry.stride[1]]
        out = interpret.run(k.blueprint, grafts.seed_parameters(seed_idx), sampled, channel_dim=dim)
        begin, end = 0, features
        if k.blueprint.scope == "chunk":
            begin, end = seed_idx * features // num_seeds, (seed_idx + 1) * features // num_seeds
        seeds.append((alpha[seed_idx], k.blueprint.mode, begin, end, out))
    columns = []
    for c in range(features):
        here = [(a, mode, out.select(dim, c - begin)) for a, mode, begin, end, out in seeds if begin <= c < end]
        total = sum(a for a, mode, _ in here if mode == "replace")
        y = (1 - min(1.0, total)) * h.select(dim, c)
        for a, mode, k in here:
            y = y + (a if mode == "residual" else a / max(1.0, total)) * k
        columns.append(y)
    return torch.stack(columns, dim)


def gradients(y: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a fixed nonlinear function of y; zeros where there is no path."""
    found = torch.autograd.grad((y * y * 0.5 + y).sum(), tensors, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, tensors, strict=True)]
