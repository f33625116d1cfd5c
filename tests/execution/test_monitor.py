"""The monitor: its budget under a clock of the test's own, its windows, and what it survives."""

from __future__ import annotations

import copy
import math
import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn

from esper.contracts.operational import HEALTH_SIGNAL_VERSION, HealthSignal
from esper.execution import pacing
from esper.execution.health import LayerHealth, health_signals
from esper.execution.monitor import Monitor
from esper.execution.pacing import HEADROOM, NEVER, ProbePacer


class Layout:
    """What the monitor and the signals read of a state layout."""

    def __init__(self, seeds):
        self.samples = []
        self.device = torch.device("cpu")
        self.lifecycle_states = torch.zeros(seeds, dtype=torch.uint8)
        self.alpha_blend = torch.zeros(seeds)
        self.error_count = torch.zeros(seeds, dtype=torch.int32)
        self.exec_latency_us = torch.zeros(seeds, dtype=torch.int32)

    def submit_health(self, samples):
        self.samples.append(samples.clone())


class Layer:
    """A probe target that runs when the test says so."""

    def __init__(self, name, seeds=4, channel_dim=-1):
        self.layer_name, self.num_seeds, self.channel_dim = name, seeds, channel_dim
        self.telemetry_enabled = True
        self.features = None
        self.state_layout = Layout(seeds)
        self.observer = None

    def arm_probe(self, observer):
        self.observer = observer

    def disarm_probe(self):
        self.observer = None

    def forward(self, y):
        observer, self.observer = self.observer, None
        if observer is not None:
            with torch.no_grad():
                observer(y)
        return y


class Clock:
    """Nanoseconds that pass when told to, and ``tick`` with every look at it."""

    def __init__(self):
        self.now = 0
        self.tick = 0

    def __call__(self):
        self.now += self.tick
        return self.now


class Rig:
    """A training loop in which every duration is chosen: ``run`` counts the monitor's true cost itself."""

    def __init__(self, layers=3, **options):
        self.clock = Clock()
        self.layers = [Layer(f"layer{i}") for i in range(layers)]
        self.monitor = Monitor(self.layers, object(), clock=self.clock, **options)
        self.n = 0
        self.due = 0
        self.host_ns = self.monitor_ns = 0
        self.probes = []
        self.y = torch.randn(8, 16)

    def step(self, host_ns, probe_ns, slow_path_ns=2000):
        for layer in self.layers:
            armed = layer.observer is not None
            # Two looks at the clock around the observation: what lies between them is what the probe takes.
            self.clock.tick = probe_ns if armed else 0
            before = self.clock.now
            layer.forward(self.y)
            self.clock.tick = 0
            if armed:
                # The first look advanced the clock by as much again; that is not part of the probe.
                self.clock.now = before + probe_ns
                self.monitor_ns += probe_ns
                self.probes.append((self.n, layer.layer_name))
        self.clock.now += host_ns
        self.host_ns += host_ns
        self.n += 1
        if self.n >= self.due:
            before = self.clock.now
            self.clock.tick = slow_path_ns
            self.due = self.monitor.on_due(self.n)
            self.clock.tick = 0
            if self.clock.now != before:
                self.clock.now = before + slow_path_ns
                self.monitor_ns += slow_path_ns

    def run(self, steps, host_ns, probe_ns, slow_path_ns=2000):
        for _ in range(steps):
            self.step(host_ns, probe_ns, slow_path_ns)

    @property
    def share(self):
        return self.monitor_ns / self.host_ns


@pytest.fixture(autouse=True)
def nothing_disturbed(monkeypatch):
    """The rig's probes disturb nothing beyond what its clock shows; one test says otherwise."""
    monkeypatch.setattr(pacing, "_UNSEEN_NS", 3_000.0)
    monkeypatch.setattr(pacing, "_UNSEEN_TIMES", 0.0)


def test_what_the_clock_does_not_see_is_paid_for_too(monkeypatch):
    seen = Rig(budget=0.005)
    seen.run(20_000, host_ns=300_000, probe_ns=8_000)
    monkeypatch.undo()
    rig = Rig(budget=0.005)
    rig.run(20_000, host_ns=300_000, probe_ns=8_000)
    assert 2 < len(rig.probes) < len(seen.probes) / 3
    assert rig.share + len(rig.probes) * pacing._UNSEEN_NS / rig.host_ns <= 0.005


def test_a_slow_machine_is_charged_more(monkeypatch):
    fast, slow = ProbePacer(0.005), ProbePacer(0.005)
    monkeypatch.undo()
    fast.probed(30_000.0)
    slow.probed(90_000.0)
    assert (fast.probes_ns, slow.probes_ns) == (130_000.0, 270_000.0)


def test_the_budget_is_kept_and_used():
    rig = Rig(budget=0.005)
    rig.run(20_000, host_ns=300_000, probe_ns=8_000)
    assert rig.share <= 0.005
    # It is worth something too: most of what the headroom leaves is spent, each probe charged 3 us more than measured.
    assert rig.share >= 0.005 * HEADROOM * 0.5
    assert rig.monitor.stats()["share"] <= 0.005 * HEADROOM * 1.01


def test_what_a_layer_needs_to_start_is_kept_apart():
    rig = Rig(layers=2, budget=0.005)
    # Each layer's first probe compiles something for a second; later ones are ordinary, but for one that is held up.
    while len(rig.probes) < 2:
        rig.step(300_000, 10**9)
    stats = rig.monitor.stats()
    rig.host_ns = rig.monitor_ns = 0
    rig.run(20_000, 300_000, 8_000)
    # Beside each layer's first probe its first closing of a window.
    assert rig.monitor.stats()["warm_up_ns"] == 2 * 10**9 + 2 * 8_000
    assert stats["spent_ns"] < 10**6
    assert len(rig.probes) > 100 and rig.share <= 0.005
    before = rig.monitor.stats()["period"]
    while all(layer.observer is None for layer in rig.layers):
        rig.step(300_000, 8_000)
    rig.step(300_000, 5 * 10**6)
    rig.run(10_000, 300_000, 8_000)
    # It is paid for, by waiting, and changes the period of nobody.
    assert rig.monitor.stats()["period"] == before
    assert rig.share <= 0.005


def until_a_probe(rig, host_ns, probe_ns):
    """Run until a layer was probed, for ``probe_ns``."""
    before = len(rig.probes)
    while len(rig.probes) == before:
        rig.step(host_ns, probe_ns)


def test_one_compilation_silences_nobody():
    host, long = 3_000_000, 60 * 10**6
    rig = Rig(layers=1, budget=0.005)
    rig.run(2_000, host, 8_000)
    period = rig.monitor.stats()["period"]
    until_a_probe(rig, host, long)
    seen = len(rig.probes)
    rig.run(4_000, host, 8_000)
    stats = rig.monitor.stats()
    # Half as often, and the other half pays: 1.5 us of each step's three million.
    assert period < stats["period"] <= 2 * period
    assert len(rig.probes) - seen == pytest.approx(4_000 / stats["period"], rel=0.05)
    assert stats["owed_ns"] == pytest.approx(long - 4_000 * host * 0.005 * HEADROOM / 2, rel=0.01)
    assert stats["spent_ns"] >= rig.monitor_ns - 16 * 8_000
    rig.run(40_000, host, 8_000)
    stats = rig.monitor.stats()
    # Every nanosecond of it was earned by now.
    assert stats["owed_ns"] == 0
    assert stats["period"] == period
    assert long < stats["spent_ns"] <= 0.005 * HEADROOM * stats["elapsed_ns"]
    assert rig.share <= 0.005


def test_debts_are_bounded():
    pacer = ProbePacer(0.005)
    pacer.probed(30_000.0)
    for _ in range(20):
        pacer.probed(3e9)
    assert 10e9 <= pacer.owed_ns < 10e9 + 3.1e9
    assert pacer.spent_ns > 20 * 3e9, "what is not owed is charged"


def test_what_takes_less_than_a_compilation_is_charged():
    pacer = ProbePacer(0.005)
    pacer.probed(30_000.0)
    pacer.probed(49e6)
    assert pacer.owed_ns == 0.0
    slow = ProbePacer(0.005)
    for _ in range(5):
        slow.probed(2e6)
    slow.probed(60e6)
    assert slow.owed_ns == 0.0, "30 times the others'"


def test_a_probe_that_always_fails_is_charged():
    rig = Rig(layers=1, budget=0.005)
    rig.y = torch.ones(4, 4, dtype=torch.int64)
    rig.run(20_000, 300_000, 8_000)
    stats = rig.monitor.stats()
    assert stats["skipped"] > 2
    assert stats["warm_up_ns"] == 8_000


def test_the_first_closing_of_a_window_belongs_to_the_start():
    rig = Rig(layers=2, budget=0.5, window=3)
    for turn in range(1, 13):
        # Each layer's first, third and sixth probe take long; the sixth closes its second window.
        for _ in range(2):
            until_a_probe(rig, 300_000, 10**6 if turn in (1, 3, 6) else 8_000)
    rig.step(300_000, 8_000)
    assert rig.monitor.stats()["warm_up_ns"] == 4 * 10**6


def test_what_closes_windows_runs_with_the_first_probe(monkeypatch):
    from esper.execution import monitor as module

    closings = []
    original = module.seed_health
    monkeypatch.setattr(module, "seed_health", lambda *given: closings.append(1) or original(*given))
    layer = Layer("a")
    monitor = Monitor([layer], object(), window=2)
    probe(monitor, layer, torch.randn(4, 8))
    assert len(closings) == 1 and not layer.state_layout.samples
    probe(monitor, layer, torch.randn(4, 8))
    assert len(closings) == 2 and len(layer.state_layout.samples) == 1


def test_a_kernel_that_does_not_compile_is_not_worth_a_step(monkeypatch):
    from esper.execution import monitor as module

    def broken(*given):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(module, "seed_health", broken)
    layer = Layer("a")
    layer.features = 8
    monitor = Monitor([layer], object(), window=2)
    monitor.sample_now()
    assert monitor.stats()["last_skip"] == "a: RuntimeError: no compiler"


def test_layers_take_turns():
    rig = Rig(layers=3, budget=0.05)
    rig.run(5_000, host_ns=300_000, probe_ns=8_000)
    names = [name for _, name in rig.probes]
    assert len(names) > 9
    assert names == [f"layer{i % 3}" for i in range(len(names))]


@pytest.mark.parametrize("raise_load", ["probe costs more", "host steps are faster", "slow path costs more"])
def test_raise_the_load_and_the_period_grows(raise_load):
    rig = Rig(budget=0.005)
    rig.run(20_000, host_ns=400_000, probe_ns=8_000)
    before = rig.monitor.stats()["period"]
    host, probe, slow = {
        "probe costs more": (400_000, 80_000, 2_000),
        "host steps are faster": (40_000, 8_000, 2_000),
        "slow path costs more": (400_000, 8_000, 60_000),
    }[raise_load]
    rig.host_ns = rig.monitor_ns = 0
    rig.run(60_000, host, probe, slow)
    assert rig.monitor.stats()["period"] > 3 * before
    assert rig.share <= 0.005
    # And back: the load falls, the period shrinks again.
    rig.run(60_000, 400_000, 8_000, 2_000)
    assert rig.monitor.stats()["period"] < 2 * before


def test_the_budget_is_kept_at_every_moment_under_a_noisy_load():
    rng = random.Random(1)
    rig = Rig(budget=0.01)
    rig.run(100, 200_000, 10_000)
    worst = 0.0
    for _ in range(40_000):
        rig.step(int(200_000 * rng.lognormvariate(0, 0.5)), int(10_000 * rng.lognormvariate(0, 0.5)))
        worst = max(worst, rig.share)
    assert rig.probes
    # The slow path at the first steps is all that can be above: a look of 2 us each before anything was earned.
    assert worst <= 0.01
    assert rig.share <= 0.01


def test_a_pause_saves_up_no_burst():
    rig = Rig(budget=0.005)
    rig.run(20_000, 300_000, 8_000)
    rig.clock.now += 3_600 * 10**9
    rig.host_ns = rig.monitor_ns = 0
    rig.run(20_000, 300_000, 8_000)
    assert rig.share <= 0.005


def test_the_fixed_cost_of_a_step_is_paid_first():
    cheap, dear = Rig(budget=0.005), Rig(budget=0.005, fixed_ns_per_step=1_000)
    for rig in (cheap, dear):
        rig.run(20_000, 300_000, 8_000)
    # 1 us of the 1.5 us that the budget allows a step: a third is left.
    assert dear.monitor.stats()["period"] == pytest.approx(3 * cheap.monitor.stats()["period"], rel=0.1)
    assert dear.share + 1_000 / 300_000 <= 0.005
    hopeless = Rig(budget=0.005, fixed_ns_per_step=2_000)
    hopeless.run(20_000, 300_000, 8_000)
    assert not hopeless.probes


@pytest.mark.parametrize("options", [{"budget": 0.0}, {"layers": 0}])
def test_nothing_to_do_is_never_due(options):
    rig = Rig(**options)
    assert rig.monitor.on_due(1) == NEVER
    rig.monitor.close()


def test_closed_monitor_arms_nothing():
    rig = Rig(budget=1.0)
    rig.run(2_000, 300_000, 8_000)
    assert rig.probes
    rig.monitor.sample_now()
    rig.monitor.close()
    assert all(layer.observer is None for layer in rig.layers)
    assert rig.monitor.on_due(10**9) == NEVER


def test_a_layer_that_does_not_run_is_disarmed():
    rig = Rig(layers=2, budget=0.5)
    due = rig.monitor.on_due(0)
    for n in range(1, 400):
        rig.clock.now += 1_000_000
        if n >= due:
            due = rig.monitor.on_due(n)
            assert sum(layer.observer is not None for layer in rig.layers) <= 1
    assert any(layer.observer is not None for layer in rig.layers)
    assert rig.monitor.stats()["samples"] == 0


def test_layers_without_telemetry_are_left_alone():
    rig = Rig(layers=2, budget=0.05)
    rig.layers[0].telemetry_enabled = False
    rig.run(5_000, 300_000, 8_000)
    assert {name for _, name in rig.probes} == {"layer1"}


def test_calling_early_changes_nothing():
    rig = Rig(budget=0.005)
    due = rig.monitor.on_due(0)
    before = rig.monitor.stats()
    assert [rig.monitor.on_due(n) for n in range(1, due)] == [due] * (due - 1)
    assert rig.monitor.stats() == before


def test_captured_graphs_are_not_armed(monkeypatch):
    monkeypatch.setattr(pacing, "_nanoseconds_compiling", lambda: 0)
    rig = Rig(budget=1.0)
    due = 0
    for n in range(1000):
        rig.clock.now += 300_000
        if n >= due:
            due = rig.monitor.on_due(n, eager=False)
            assert due > n
            assert all(layer.observer is None for layer in rig.layers)
    rig.monitor.sample_now()
    assert all(layer.observer is not None for layer in rig.layers)
    rig.monitor.on_due(1001, eager=False)
    assert all(layer.observer is None for layer in rig.layers)


def test_sample_now_is_not_charged():
    rig = Rig(budget=0.005)
    rig.run(2_000, 300_000, 8_000)
    rig.monitor.sample_now()
    before = rig.monitor.stats()
    for layer in rig.layers:
        rig.clock.tick = 500_000
        layer.forward(rig.y)
        rig.clock.tick = 0
    rig.monitor.on_due(rig.n + 1)
    after = rig.monitor.stats()
    assert after["samples"] == before["samples"] + 3
    assert after["spent_ns"] - before["spent_ns"] <= 10_000
    assert after["period"] <= before["period"] + 1


def probe(monitor, layer, y):
    monitor.sample_now()
    layer.forward(y)


def expect(y, seeds, eps=1e-6):
    """Mean, variance and dead ratio by NumPy."""
    rows = y.double().reshape(-1, y.shape[-1]).numpy()
    chunks = [rows[:, s * rows.shape[1] // seeds : (s + 1) * rows.shape[1] // seeds] for s in range(seeds)]
    return [(c.mean(), c.var(), (np.abs(c).max(0) <= eps).mean()) for c in chunks]


def test_health_is_that_of_the_window():
    layer = Layer("a")
    monitor = Monitor([layer], object(), rows=64, window=3)
    assert monitor.health("a").window_samples == 0
    assert np.isnan(monitor.health("a").health_score).all()
    parts = [torch.randn(8, 10).relu() for _ in range(7)]
    for part in parts[:2]:
        part[:, 1] = 0
        probe(monitor, layer, part)
    assert not layer.state_layout.samples
    health = monitor.health("a")
    assert health.window_samples == 2
    for s, (mean, variance, dead) in enumerate(expect(torch.cat(parts[:2]), 4)):
        # float64 sums over 40 values, in another order
        assert health.activation_mean[s] == pytest.approx(mean, rel=1e-13)
        assert health.activation_variance[s] == pytest.approx(variance, rel=1e-12)
        assert health.dead_neuron_ratio[s] == dead
    for part in parts[2:6]:
        probe(monitor, layer, part)
    # Two full windows: the lattice got both, and the last one is what is reported, whatever came since.
    assert len(layer.state_layout.samples) == 2
    probe(monitor, layer, parts[6])
    health = monitor.health("a")
    assert health.window_samples == 3
    assert health.samples.tolist() == [48, 72, 48, 72]
    assert health.activation_mean[0] == pytest.approx(expect(torch.cat(parts[3:6]), 4)[0][0], rel=1e-13)
    assert layer.state_layout.samples[1].tolist() == health.health_score.tolist()


def test_health_of_an_unknown_layer():
    with pytest.raises(ValueError, match="Layer 'b' not found; watched: 'a'"):
        Monitor([Layer("a")], object()).health("b")


def test_a_probe_reads_about_as_many_rows_as_asked():
    for shape, channel_dim in (((1000, 6), -1), ((50, 20, 6), -1), ((40, 6, 9, 9), 1), ((3, 6, 50, 50), 1)):
        layer = Layer("a", channel_dim=channel_dim)
        monitor = Monitor([layer], object(), rows=32)
        probe(monitor, layer, torch.randn(shape))
        assert 16 <= monitor.health("a").samples.sum() / 6 <= 32


def test_another_width_or_dtype_starts_over():
    layer = Layer("a", seeds=2)
    monitor = Monitor([layer], object())
    probe(monitor, layer, torch.randn(4, 6))
    probe(monitor, layer, torch.randn(4, 6, dtype=torch.bfloat16))
    assert monitor.health("a").samples.tolist() == [24, 24]
    probe(monitor, layer, torch.randn(4, 8))
    assert monitor.health("a").samples.tolist() == [16, 16]


@pytest.mark.parametrize(
    ("output", "why"),
    [
        (torch.arange(6).reshape(2, 3), "TypeError"),
        (torch.tensor(1.0), "IndexError"),
        (torch.randn(4, 4).to_sparse(), "Error"),
    ],
)
def test_outputs_that_cannot_be_read_are_counted(output, why):
    layer = Layer("a")
    monitor = Monitor([layer], object())
    probe(monitor, layer, output)
    stats = monitor.stats()
    assert stats["samples"] == 0 and stats["skipped"] == 1
    assert why in stats["last_skip"] and stats["last_skip"].startswith("a: ")


def test_functional_transforms_are_not_disturbed():
    layer = Layer("a")
    monitor = Monitor([layer], object())
    x = torch.randn(5, 3, 4)
    monitor.sample_now()
    assert torch.equal(torch.vmap(layer.forward)(x), x)
    assert monitor.stats()["samples"] + monitor.stats()["skipped"] == 1


def test_inference_mode_leaves_a_usable_window():
    layer = Layer("a")
    monitor = Monitor([layer], object())
    with torch.inference_mode():
        probe(monitor, layer, torch.randn(4, 8))
    probe(monitor, layer, torch.randn(4, 8, requires_grad=True))
    assert monitor.health("a").samples.tolist() == [16] * 4


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_keep_windows_and_go_on(copier):
    rig = Rig(budget=0.05)
    rig.run(3_000, 300_000, 8_000)
    rig.monitor._clock = None  # the rig's clock is the test's; what is copied must not need it
    twin = copier(rig.monitor)
    assert twin.stats() == rig.monitor.stats()
    np.testing.assert_array_equal(twin.health("layer0").activation_mean, rig.monitor.health("layer0").activation_mean)
    start = twin.on_due(rig.due)
    assert start > rig.due
    twin.on_due(start)
    twin.sample_now()
    probe_of_twin = twin._by_name["layer0"].layer
    assert probe_of_twin is not rig.layers[0]
    probe_of_twin.forward(torch.randn(8, 16))
    assert twin.stats()["samples"] == rig.monitor.stats()["samples"] + 1


def test_the_observer_traces_as_one_op():
    layer = Layer("a", seeds=2)
    monitor = Monitor([layer], object())
    y = torch.randn(4, 6)
    layer.features = 6  # known before any forward: the window exists when the graph is traced
    monitor.sample_now()
    observer = layer.observer
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def model(x):
        z = x * 2
        observer(z)
        return z

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert torch.equal(compiled(y), y * 2)
    compiled(y)
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("esper.observe" in target for target in called) == 1
    assert len(graphs) == 1
    assert monitor.health("a").samples.tolist() == [24, 24]


def test_bad_numbers_are_refused():
    for options in ({"budget": -0.1}, {"budget": math.nan}, {"budget": 1.1}, {"rows": 0}, {"window": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Monitor([Layer("a")], object(), **options)
    with pytest.raises(ValueError, match="fixed_ns_per_step"):
        ProbePacer(0.1, -1.0)
    with pytest.raises(ValueError, match="same name"):
        Monitor([Layer("a"), Layer("a")], object())


def test_a_real_layer_can_be_watched():
    from esper.execution.kasmina_layer import KasminaLayer

    host = nn.Linear(5, 8)
    layer = KasminaLayer.from_host(host, num_seeds=2, layer_name="fc")
    monitor = Monitor([layer], layer.state_layout.lattice, window=1)
    x = torch.randn(6, 5)
    plain = host(x)
    assert "forward" not in host.__dict__
    monitor.sample_now()
    assert "forward" in host.__dict__
    watched = host(x)
    assert "forward" not in host.__dict__
    assert torch.equal(plain, watched)
    health = monitor.health("fc")
    assert health.activation_mean[0] == pytest.approx(float(plain[:, :4].detach().double().mean()), rel=1e-12)
    assert layer.state_layout.lattice.needs_step
    for signal in health_signals(health, layer.state_layout, epoch=3):
        assert HealthSignal.from_dict(signal.to_dict()) == signal
        assert signal.layer_name == "fc" and signal.window_samples == 1


def signal(**changes):
    values = {
        "layer_name": "fc",
        "seed_idx": 1,
        "lifecycle_state": 0,
        "alpha": 0.5,
        "activation_mean": 0.1,
        "activation_variance": 1.0,
        "dead_neuron_ratio": 0.0,
        "avg_correlation": -0.2,
        "nonfinite_count": 0,
        "health_score": 0.9,
        "error_count": 0,
        "exec_latency_us": 12,
        "epoch": 3,
        "window_samples": 16,
        "version": HEALTH_SIGNAL_VERSION,
    }
    return values | changes


def test_signals_survive_a_round_trip():
    for values in (signal(), signal(health_score=None), signal(alpha=1)):
        record = HealthSignal.from_dict(values)
        assert record.to_dict() == values
        with pytest.raises(AttributeError):
            record.alpha = 0.1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"version": 2}, ValueError, "version 2 is unknown; this Esper reads version 1"),
        ({"version": None}, ValueError, "version None is unknown"),
        ({"version": True}, ValueError, "version True is unknown"),
        ({"alpha": 1.5}, ValueError, "alpha is 1.5"),
        ({"alpha": math.nan}, ValueError, "alpha is nan"),
        ({"alpha": "1"}, TypeError, "alpha is '1'"),
        ({"health_score": -0.1}, ValueError, "health_score is -0.1"),
        ({"seed_idx": -1}, ValueError, "seed_idx is -1"),
        ({"seed_idx": True}, TypeError, "seed_idx is True"),
        ({"lifecycle_state": 8}, ValueError, "lifecycle_state is 8"),
        ({"layer_name": ""}, TypeError, "layer_name"),
        ({"activation_variance": math.inf}, ValueError, "activation_variance is inf"),
        ({"extra": 1}, ValueError, "unknown fields: extra"),
    ],
)
def test_bad_signals_are_refused_by_name(changes, error, message):
    with pytest.raises(error, match=message):
        HealthSignal.from_dict(signal(**changes))


def test_missing_fields_are_named():
    values = signal()
    del values["alpha"], values["epoch"]
    with pytest.raises(ValueError, match="lacks alpha, epoch"):
        HealthSignal.from_dict(values)
    with pytest.raises(TypeError, match="list"):
        HealthSignal.from_dict([1])


def test_infinite_statistics_still_make_a_signal():
    table = np.zeros((7, 2))
    table[2] = np.inf
    table[6] = [np.nan, 0.5]
    signals = health_signals(LayerHealth.from_table("fc", 4, table), Layout(2), epoch=0)
    assert [s.health_score for s in signals] == [None, 0.5]
    assert all(math.isfinite(s.activation_variance) for s in signals)
