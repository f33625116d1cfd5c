"""Sampling inside compiled graphs: the budget earns the compilation first, then each sample."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import esper
from esper.execution import pacing
from esper.execution.pacing import HEADROOM, GraphPacer

STEP_NS = 1_000_000
COMPILE_NS = 40_000_000


class Host:
    """A training loop under a clock of the test's own: steps take 1 ms, a sample what the test says."""

    def __init__(self, pacer: GraphPacer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pacer = pacer
        self.n = 0
        self.now = 0
        self.compiled = COMPILE_NS
        monkeypatch.setattr(pacing, "_nanoseconds_compiling", lambda: self.compiled)

    def until_sample(self, limit: int = 100_000) -> int | None:
        """Steps until the pacer says yes; None if it does not within ``limit``."""
        start = self.n
        while self.n - start < limit:
            if self.pacer.look(self.n, self.now):
                return self.n - start
            self.n += self.pacer.period
            self.now += self.pacer.period * STEP_NS
        return None

    def sample(self, extra_ns: int) -> None:
        self.n += 1
        self.now += STEP_NS + extra_ns
        assert not self.pacer.look(self.n, self.now)


def test_the_first_sample_waits_until_the_budget_has_earned_the_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(GraphPacer(0.005), monkeypatch)
    waited = host.until_sample()
    assert waited is not None
    needed = COMPILE_NS / (HEADROOM * 0.005) / STEP_NS
    assert needed <= waited <= needed + host.pacer.period


def test_samples_stay_within_the_budget_and_get_rarer_when_they_cost_more(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(GraphPacer(0.005), monkeypatch)
    host.until_sample()
    host.compiled += COMPILE_NS
    host.sample(COMPILE_NS)
    waits = []
    for extra in (STEP_NS, STEP_NS, 20 * STEP_NS, 20 * STEP_NS, 20 * STEP_NS):
        waited = host.until_sample()
        assert waited is not None
        waits.append(waited)
        host.sample(extra)
        assert host.pacer.spent_ns <= 0.005 * host.now
    assert waits[-1] > 5 * waits[1]


def test_looks_are_as_far_apart_as_they_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    for step_ns in (50_000, 5_000_000):
        pacer = GraphPacer(0.005)
        pacer.look(0, 0)
        pacer.look(16, 16 * step_ns)
        # A look and what it disturbs, some 150 us, stay under a tenth of the budget.
        assert 150_000 <= 0.1 * 0.01 * pacer.period * step_ns <= 400_000


def test_a_graph_that_does_not_see_the_probes_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(GraphPacer(0.005), monkeypatch)
    host.until_sample()
    host.sample(0)
    assert host.until_sample() is None


def test_nothing_compiled_means_nothing_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(GraphPacer(0.005), monkeypatch)
    host.compiled = 0
    assert host.until_sample() is None


def test_compiled_model_is_sampled_by_one_second_graph() -> None:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4))
    model = esper.wrap(host)
    x = torch.randn(8, 16)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    plain = compiled(x)
    model.step()
    model.monitor.sample_now()
    assert torch.equal(compiled(x), plain)
    model.step()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(10):
            compiled(x)
            model.monitor.sample_now()
            compiled(x)
            model.step()
    assert model.monitor.stats()["samples"] == 11 * len(model.kasmina_layers)
    health = model.monitor.health("0")
    # The mean of float32 activations, accumulated in float64: only the rows' own rounding remains.
    expected = host[0](x).detach().double().view(8, 4, 4).mean((0, 2))
    torch.testing.assert_close(torch.as_tensor(health.activation_mean), expected, rtol=1e-6, atol=1e-7)
    assert all("forward" not in module.__dict__ for module in model.wrapped_model.modules())
