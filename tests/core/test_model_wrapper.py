"""wrap, unwrap and MorphableModel: what is found, what is named, what is refused, and waking seeds through the public
names."""

from __future__ import annotations

import copy
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.core.model_wrapper import MorphableModel, find_targets, unwrap, wrap
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.lifecycle import LifecycleError, SeedLifecycleState

State = SeedLifecycleState


@pytest.fixture
def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))


@pytest.fixture
def registry(tmp_path: Path) -> str:
    return (tmp_path / "registry").as_uri()


@pytest.fixture
def model(network: nn.Sequential, registry: str) -> MorphableModel:
    return wrap(network, registry=registry)


@pytest.fixture
def kernel(registry: str) -> str:
    """A low-rank kernel that fits layer "0"."""
    return esper.compile("lowrank", d_in=10, d_out=20, registry=registry, rank=4)


def finish(model: MorphableModel, future: object, steps: int = 2000) -> bool:
    """Step until a request is done; the number of steps is bounded, their time is not measured."""
    import time

    for _ in range(steps):
        model.step()
        if future.done():  # type: ignore[attr-defined]
            return future.result()  # type: ignore[attr-defined, no-any-return]
        time.sleep(0.005)
    raise AssertionError("the request did not finish")


def test_a_layer_that_is_not_there_is_named_as_it_was_given(model: MorphableModel) -> None:
    with pytest.raises(ValueError, match="Layer 0 not found; this model has: '0', '2'"):
        model.request_kernel(0, 0, "k")  # type: ignore[arg-type]


@pytest.mark.parametrize(("given", "shown"), [("Linear", "'Linear'"), (nn.Linear, "Linear")])
def test_target_layers_is_a_list(network: nn.Sequential, given: Any, shown: str) -> None:
    with pytest.raises(TypeError, match=rf"target_layers is {shown}; it takes a list .*: \[{shown}\]"):
        wrap(network, given)


class TestWrapFunction:
    def test_wrap_defaults_to_linear_and_conv(self) -> None:
        net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2), nn.LayerNorm(2))
        assert wrap(net).get_layer_names() == ["0", "3"]

    def test_wrap_custom_target_layers(self, network: nn.Sequential) -> None:
        model = wrap(network, target_layers=[nn.ReLU])
        assert model.get_layer_names() == ["1"]
        assert isinstance(model.kasmina_layers["1"], KasminaLayer)
        assert isinstance(model.kasmina_layers["1"].default_transform, nn.ReLU)
        x = torch.randn(4, 10)
        assert torch.equal(model(x), network(x))

    def test_wrap_names_and_types_together(self, network: nn.Sequential) -> None:
        assert wrap(network, [nn.ReLU, "2"]).get_layer_names() == ["1", "2"]

    def test_unknown_name(self, network: nn.Sequential) -> None:
        with pytest.raises(ValueError, match=r"Layer 'head' not found; the model has: 0, 1, 2"):
            wrap(network, ["head"])

    def test_unsupported_type_is_named(self, network: nn.Sequential) -> None:
        with pytest.raises(NotImplementedError, match="Dropout"):
            wrap(network, [nn.Dropout])

    def test_not_a_type(self, network: nn.Sequential) -> None:
        with pytest.raises(TypeError, match="module types or layer names"):
            wrap(network, [3])  # type: ignore[list-item]

    def test_layer_that_is_never_called_is_skipped_or_refused(self) -> None:
        net = nn.TransformerEncoderLayer(8, 2, 16)
        assert "self_attn.out_proj" not in find_targets(net)
        with pytest.raises(ValueError, match=r"never called.*'self_attn'"):
            wrap(net, ["self_attn.out_proj"])

    def test_root_layer(self) -> None:
        model = wrap(nn.Linear(3, 2))
        assert model.get_layer_names() == ["root"]
        assert [name for name, _ in model.named_parameters()] == ["weight", "bias"]

    def test_nothing_to_wrap_warns(self) -> None:
        with pytest.warns(UserWarning, match="no layer to give seeds to"):
            assert wrap(nn.Sequential(nn.Flatten())).get_layer_names() == []

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"seeds_per_layer": 0}, "seeds_per_layer must be at least 1, got 0"),
            ({"monitor_budget": 2.0}, "monitor_budget is a share"),
            ({"reserve_rank": -8}, "reserve_rank"),
        ],
    )
    def test_bad_arguments(self, network: nn.Sequential, options: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            wrap(network, **options)  # type: ignore[arg-type]

    def test_a_bus_is_a_client_or_a_url(self, network: nn.Sequential) -> None:
        with pytest.raises(TypeError, match="bus takes a client or a URL, got object"):
            wrap(network, bus=object())  # type: ignore[arg-type]

    def test_a_module_named_esper_is_refused(self, network: nn.Sequential) -> None:
        """The wrapped model could not have loaded its own state."""
        network.add_module("esper", nn.Linear(2, 2))
        with pytest.raises(ValueError, match=r"Sequential has a module named 'esper'.*another name"):
            wrap(network)
        with pytest.raises(ValueError, match="a module named 'esper'"):
            MorphableModel(network, {})
        wrap(nn.ModuleDict({"inner": network}))  # only the names of the outermost module meet those of seeds

    def test_wrapping_twice_is_refused(self, model: MorphableModel) -> None:
        with pytest.raises(TypeError, match="wrapped already"):
            wrap(model)

    def test_shared_module_gets_one_layer_under_both_names(self) -> None:
        net = nn.Sequential(nn.Linear(4, 4))
        net.append(net[0])
        model = wrap(net)
        assert model.get_layer_names() == ["0"]
        assert model.layer("1") is model.layer("0")

    def test_preserve_original_wraps_a_copy(self, network: nn.Sequential) -> None:
        model = wrap(network)
        assert model.wrapped_model is not network
        assert unwrap(model) is network
        with torch.no_grad():
            model.wrapped_model[0].weight.zero_()
        assert network[0].weight.abs().sum() > 0

    def test_in_place_adds_no_copy_of_any_weight(self, network: nn.Sequential) -> None:
        pointers = [parameter.data_ptr() for parameter in network.parameters()]
        model = wrap(network, preserve_original=False)
        assert model.wrapped_model is network is unwrap(model)
        assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
        assert all(a is b for a, b in zip(model.parameters(), network.parameters(), strict=True))


class TestMorphableModel:
    def test_built_from_layers_made_apart(self, network: nn.Sequential) -> None:
        layer = KasminaLayer.from_host(network[0], num_seeds=3, register_host=False)
        layer.state_layout.transition_seed_state(1, State.LOADING)
        model = MorphableModel(network, {"0": layer})
        assert model.lattice.get_active_count() == 0
        assert layer.state_layout.state_of(1) is State.LOADING
        assert unwrap(model) is network

    def test_layers_with_different_seed_counts_are_refused(self, network: nn.Sequential) -> None:
        layers = {
            name: KasminaLayer.from_host(network[int(name)], num_seeds=2 + int(name), register_host=False)
            for name in "02"
        }
        with pytest.raises(ValueError, match=r"same number of seeds, got \[2, 4\]"):
            MorphableModel(network, layers)

    def test_host_attributes_read_through(self, model: MorphableModel) -> None:
        layer = model.kasmina_layers["0"]
        assert layer.weight is model.wrapped_model[0].weight
        assert (layer.in_features, layer.out_features) == (10, 20)
        with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
            _ = model.nonsense

    def test_forward_calls_are_counted(self, model: MorphableModel) -> None:
        for _ in range(3):
            model(torch.randn(2, 10))
        assert model.total_forward_calls == 3
        assert model.kasmina_layers["0"].total_forward_calls == 3

    async def _load(self, model: MorphableModel, kernel: str) -> bool:
        return await model.load_kernel("0", 1, kernel, alpha=0.25)

    def test_load_kernel_success(self, model: MorphableModel, kernel: str) -> None:
        import asyncio

        assert asyncio.run(self._load(model, kernel)) is True
        layer = model.kasmina_layers["0"]
        assert layer.state_layout.state_of(1) is State.ACTIVE
        assert float(layer.state_layout.alpha_blend[1]) == 0.25
        assert layer.state_layout.active_kernel_id[1] > 0
        assert model.morphogenetic_active
        assert model.get_model_stats()["active_seeds"] == 1
        assert layer.get_layer_stats()["artifacts"] == {1: kernel}
        model(torch.randn(2, 10))
        assert layer.total_kernel_executions == 1

    def test_load_kernel_failure(self, model: MorphableModel) -> None:
        import asyncio

        missing = "0123456789abcdef-generic-fast-01234567"
        assert asyncio.run(self._load(model, missing)) is False
        layer = model.kasmina_layers["0"]
        assert layer.state_layout.state_of(1) is State.DORMANT
        assert missing in layer.get_layer_stats()["errors"][1]
        assert not model.morphogenetic_active
        assert "forward" not in layer.default_transform.__dict__

    def test_load_kernel_bad_arguments(self, model: MorphableModel, kernel: str) -> None:
        import asyncio

        with pytest.raises(ValueError, match="Layer 'nope' not found"):
            asyncio.run(model.load_kernel("nope", 0, kernel))
        with pytest.raises(ValueError, match="Invalid seed index 4"):
            asyncio.run(model.load_kernel("0", 4, kernel))
        with pytest.raises(ValueError, match="NaN"):
            asyncio.run(model.load_kernel("0", 0, kernel, alpha=float("nan")))

    def test_wrong_shape_goes_to_error_recovery_naming_both(self, model: MorphableModel, kernel: str) -> None:
        import asyncio

        assert asyncio.run(model.load_kernel("2", 0, kernel)) is False
        layer = model.kasmina_layers["2"]
        assert layer.state_layout.state_of(0) is State.ERROR_RECOVERY
        reason = layer.get_layer_stats()["errors"][0]
        assert all(size in reason for size in ("10", "20", "5")), reason

    def test_request_and_step(self, model: MorphableModel, kernel: str) -> None:
        future = model.request_kernel("0", 0, kernel, alpha=0.5, ramp_steps=4)
        assert model.layer("0").state_layout.state_of(0) is State.LOADING
        assert finish(model, future) is True
        layout = model.layer("0").state_layout
        assert layout.state_of(0) in (State.GRAFTING, State.ACTIVE)
        for _ in range(5):
            model.step()
        assert layout.state_of(0) is State.ACTIVE
        assert float(layout.alpha_blend[0]) == 0.5

    def test_requesting_twice_is_refused(self, model: MorphableModel, kernel: str) -> None:
        future = model.request_kernel("0", 0, kernel)
        with pytest.raises(LifecycleError, match="LOADING"):
            model.request_kernel("0", 0, kernel)
        assert finish(model, future)

    def test_unload_cull_fossilize(self, model: MorphableModel, kernel: str) -> None:
        import asyncio

        for seed in range(3):
            assert asyncio.run(model.load_kernel("0", seed, kernel, alpha=1.0))
        assert asyncio.run(model.unload_kernel("0", 0)) is True
        assert asyncio.run(model.unload_kernel("0", 0)) is False
        model.cull("0", 1, cooldown_steps=2)
        model.fossilize("0", 2)
        layout = model.layer("0").state_layout
        assert [layout.state_of(seed) for seed in range(3)] == [State.DORMANT, State.CULLED, State.FOSSILIZED]
        assert model.layer("0").grafts.bound == (2,)
        for _ in range(3):
            model.step()
        assert layout.state_of(1) is State.DORMANT
        for act in (lambda: model.cull("0", 2), lambda: asyncio.run(model.unload_kernel("0", 2))):
            with pytest.raises(LifecycleError, match="FOSSILIZED"):
                act()
        assert model.layer("0").grafts.bound == (2,)

    def test_waking_and_sleeping_leaves_no_trace(
        self, model: MorphableModel, network: nn.Sequential, kernel: str
    ) -> None:
        import asyncio

        x = torch.randn(4, 10)
        asyncio.run(model.load_kernel("0", 0, kernel, alpha=1.0))
        with torch.no_grad():
            for parameter in model.graft_parameters().values():
                parameter.fill_(0.1)
        assert not torch.equal(model(x), network(x))
        asyncio.run(model.unload_kernel("0", 0))
        assert torch.equal(model(x), network(x))
        assert "forward" not in model.wrapped_model[0].__dict__
        assert not model.graft_parameters()

    def test_replacing_an_awake_kernel(self, model: MorphableModel, kernel: str, registry: str) -> None:
        import asyncio

        other = esper.compile("bottleneck", d_in=10, d_out=20, registry=registry, rank=2)
        assert asyncio.run(model.load_kernel("0", 0, kernel))
        assert asyncio.run(model.load_kernel("0", 0, other))
        assert model.layer("0").get_layer_stats()["artifacts"] == {0: other}

    def test_growth_callbacks(self, model: MorphableModel, kernel: str) -> None:
        import asyncio

        events: list[tuple[str, str, int, int]] = []
        end = model.on_growth(
            lambda event, layer, seed, parameters: events.append((event, layer, seed, len(parameters)))
        )
        asyncio.run(model.load_kernel("0", 2, kernel))
        model.cull("0", 2)
        end()
        asyncio.run(model.load_kernel("0", 3, kernel))
        assert events == [("bound", "0", 2, 2), ("unbound", "0", 2, 2)]

    def test_a_growth_callback_that_raises_leaves_the_seed_dormant_and_the_run_going(
        self, model: MorphableModel, kernel: str
    ) -> None:
        import asyncio

        events: list[str] = []

        def fail(event: str, *_: object) -> None:
            raise RuntimeError(f"no room at {event}")

        end = model.on_growth(fail)
        model.on_growth(lambda event, *_: events.append(event))
        future = model.request_kernel("0", 1, kernel)
        deadline = time.monotonic() + 30
        while not future.done() and time.monotonic() < deadline:
            model.step()
            time.sleep(0.001)
        assert future.result(timeout=0) is False
        # The others were told of both; nothing of the seed is left on the path.
        assert events == ["bound", "unbound"]
        layer = model.layer("0")
        assert layer.state_layout.state_of(1) is SeedLifecycleState.DORMANT
        assert "forward" not in model.wrapped_model[0].__dict__
        assert not model.graft_parameters()
        assert "RuntimeError: no room at bound" in layer.get_layer_stats()["errors"][1]
        # Culling goes through, too, and the reason is on record.
        end()
        assert asyncio.run(model.load_kernel("0", 1, kernel))
        model.on_growth(fail)
        model.cull("0", 1)
        assert layer.state_layout.state_of(1) is SeedLifecycleState.CULLED
        assert "no room at unbound" in layer.get_layer_stats()["errors"][1]

    def test_set_seed_alpha(self, model: MorphableModel) -> None:
        model.set_seed_alpha("0", 0, 7.0)
        assert float(model.layer("0").state_layout.alpha_blend[0]) == 1.0
        with pytest.raises(ValueError, match="NaN"):
            model.set_seed_alpha("0", 0, float("nan"))
        with pytest.raises(ValueError, match="Invalid seed index"):
            model.set_seed_alpha("0", -1, 0.5)

    def test_statistics_keys(self, model: MorphableModel) -> None:
        stats = model.get_model_stats()
        assert {
            "total_forward_calls",
            "morphogenetic_active",
            "total_kasmina_layers",
            "total_seeds",
            "active_seeds",
            "total_kernel_executions",
            "layer_stats",
        } <= stats.keys()
        assert (stats["total_kasmina_layers"], stats["total_seeds"]) == (2, 8)
        layer = stats["layer_stats"]["0"]
        assert {
            "layer_name",
            "total_forward_calls",
            "total_kernel_executions",
            "kernel_execution_ratio",
            "state_stats",
            "cache_stats",
            "telemetry_enabled",
        } <= layer.keys()
        assert layer["state_stats"]["dormant_seeds"] == 4

    def test_compare_with_original(self, model: MorphableModel, network: nn.Sequential) -> None:
        assert model.compare_with_original(torch.randn(3, 10))["max_absolute_difference"] == 0.0
        with pytest.raises(ValueError, match="No original model"):
            wrap(network, preserve_original=False).compare_with_original(torch.randn(3, 10))

    def test_enable_telemetry(self, model: MorphableModel) -> None:
        model.enable_telemetry(False)
        assert not model.kasmina_layers["0"].telemetry_enabled
        x = torch.randn(2, 10)
        samples = model.monitor.stats()["samples"]
        for _ in range(20):
            model(x)
            model.step()
        assert model.monitor.stats()["samples"] == samples
        model.enable_telemetry()
        assert model.kasmina_layers["0"].telemetry_enabled

    def test_close_puts_loading_seeds_back_to_sleep(self, model: MorphableModel, kernel: str) -> None:
        model.request_kernel("0", 0, kernel)
        model.close()
        assert model.layer("0").state_layout.state_of(0) is State.DORMANT
        with pytest.raises(RuntimeError, match="closed"):
            model.request_kernel("0", 1, kernel)


class TestStateDict:
    def test_host_keys_load_both_ways(self, network: nn.Sequential, model: MorphableModel) -> None:
        assert model.load_state_dict(network.state_dict()).missing_keys == []
        state = model.state_dict()
        host = {key: value for key, value in state.items() if not key.startswith("esper.")}
        assert list(host) == list(network.state_dict())
        network.load_state_dict(host)
        assert any(key.startswith("esper.lattice.") for key in state)

    def test_no_tensor_twice(self, model: MorphableModel, kernel: str) -> None:
        import asyncio

        asyncio.run(model.load_kernel("0", 0, kernel))
        names = [name for name, _ in model.named_parameters()]
        assert len(names) == len(set(names)) == len({id(parameter) for parameter in model.parameters()}) == 6
        assert set(names) <= set(model.state_dict())

    def test_unknown_and_missing_keys_have_host_names(self, model: MorphableModel, network: nn.Sequential) -> None:
        state = network.state_dict()
        state["9.weight"] = state.pop("0.weight")
        with pytest.raises(RuntimeError, match=r'"0\.weight"') as raised:
            model.load_state_dict(state)
        assert '"9.weight"' in str(raised.value) and "wrapped_model" not in str(raised.value)

    def test_round_trip_with_awake_seeds(self, model: MorphableModel, kernel: str) -> None:
        import asyncio

        asyncio.run(model.load_kernel("0", 0, kernel, alpha=0.5))
        with torch.no_grad():
            for parameter in model.graft_parameters().values():
                parameter.normal_()
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        twin.set_seed_alpha("0", 0, 0.1)
        twin.load_state_dict(model.state_dict())
        x = torch.randn(4, 10)
        assert torch.equal(twin(x), model(x))
        assert float(twin.layer("0").state_layout.alpha_blend[0]) == 0.5

    def test_other_growth_is_refused(self, model: MorphableModel, network: nn.Sequential, kernel: str) -> None:
        import asyncio

        asyncio.run(model.load_kernel("0", 0, kernel))
        with pytest.raises(RuntimeError, match=r"esper\.load"):
            wrap(network).load_state_dict(model.state_dict())

    @pytest.mark.parametrize("inside", [False, True])
    @pytest.mark.parametrize("assign", [False, True])
    def test_who_refuses_is_as_before(
        self, network: nn.Sequential, kernel: str, registry: str, assign: bool, inside: bool
    ) -> None:
        """The lattice used to be overwritten all the same: an awake seed without a kernel, or a sleeping one with."""
        import asyncio

        model, other = (wrap(copy.deepcopy(network), registry=registry) for _ in range(2))
        assert asyncio.run(model.load_kernel("0", 0, kernel, alpha=0.5))
        x = torch.randn(4, 10)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        for refusing, foreign in ((model, other), (other, model)):
            before, parameters = refusing.state_dict(), list(refusing.parameters())
            before, output = {key: value.clone() for key, value in before.items()}, refusing(x)
            outer, theirs = (nn.ModuleDict({"net": m}) if inside else m for m in (refusing, foreign))
            state = theirs.state_dict()
            keys = list(state)
            with pytest.raises(RuntimeError, match="other awake seeds"):
                outer.load_state_dict(state, assign=assign)
            after = refusing.state_dict()
            assert list(state) == keys and list(before) == list(after)
            assert all(torch.equal(before[key], after[key]) for key in before)
            assert all(mine is then for mine, then in zip(refusing.parameters(), parameters, strict=True))
            assert torch.equal(refusing(x), output)
        assert not other.morphogenetic_active
        assert finish(other, other.request_kernel("0", 0, kernel))

    @pytest.mark.parametrize("strict", [False, True])
    def test_a_damaged_or_foreign_lattice_changes_nothing(
        self, model: MorphableModel, kernel: str, strict: bool
    ) -> None:
        import asyncio

        assert asyncio.run(model.load_kernel("0", 0, kernel, alpha=0.5))
        before = {key: value.clone() for key, value in model.state_dict().items()}
        shifted = {key: value + 1 if value.is_floating_point() else value for key, value in before.items()}
        damaged = {**shifted, "esper.lattice.alpha_blend": before["esper.lattice.alpha_blend"] / 2}
        with pytest.raises(RuntimeError, match="checksum"):
            model.load_state_dict(damaged, strict=strict)
        wide = {**shifted, "esper.0.seed0.down.weight": torch.ones(3, 10)}
        with pytest.raises(RuntimeError, match=r"'0.seed0.down.weight' is .*3, 10.* there, \(\d, 10\) here"):
            model.load_state_dict(wide, strict=strict)
        after = model.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)

    def test_another_kernel_of_the_same_shape_is_refused(self, model: MorphableModel, registry: str) -> None:
        import asyncio

        twin = copy.deepcopy(model)
        for one, activation in ((model, "silu"), (twin, "relu")):
            artifact = esper.compile("bottleneck", d_in=10, d_out=20, rank=2, activation=activation, registry=registry)
            assert asyncio.run(one.load_kernel("0", 0, artifact))
        with pytest.raises(RuntimeError, match="seed 0 of '0' has another kernel"):
            twin.load_state_dict(model.state_dict())

    def test_a_fetch_that_was_under_way_is_not_waited_for(self, model: MorphableModel, kernel: str) -> None:
        """The seed used to be LOADING for good."""
        twin = copy.deepcopy(model)
        model.layer("0").begin_load(1)
        twin.layer("2").begin_load(0)  # under way here
        twin.load_state_dict(model.state_dict())
        assert twin.layer("0").state_layout.state_of(1) is State.DORMANT
        assert finish(twin, twin.request_kernel("0", 1, kernel))
        model.load_state_dict(model.state_dict())
        assert model.layer("0").state_layout.state_of(1) is State.LOADING

    def test_a_bare_hosts_entries_leave_the_seeds_alone(
        self, network: nn.Sequential, model: MorphableModel, kernel: str
    ) -> None:
        import asyncio

        assert asyncio.run(model.load_kernel("0", 0, kernel, alpha=0.5))
        grafts = list(model.esper.parameters())
        model.load_state_dict(network.state_dict(), assign=True)
        assert all(mine is then for mine, then in zip(model.esper.parameters(), grafts, strict=True))

    @pytest.mark.parametrize("inside", [False, True])
    def test_hooks_of_the_state_run_with_all_of_it(self, model: MorphableModel, tmp_path: Path, inside: bool) -> None:
        """They used to be taken and never called."""
        outer, prefix = (nn.ModuleDict({"net": model}), "net.") if inside else (model, "")
        seen: list[object] = []

        def before(module: nn.Module, where: str, keep_vars: bool) -> None:
            seen.append((module, where, keep_vars))

        def after(module: nn.Module, state: dict[str, Any], where: str, metadata: dict[str, Any]) -> None:
            assert module is model and f"{where}0.weight" in state and f"{where}esper.lattice.crc" in state
            state[f"{where}note"] = state.pop(f"{where}0.weight")

        def loading(module: nn.Module, state: dict[str, Any], where: str, *rest: Any) -> None:
            assert module is model and f"{where}esper.lattice.crc" in state
            state[f"{where}0.weight"] = state.pop(f"{where}note")

        model.register_state_dict_pre_hook(before)
        model.register_state_dict_post_hook(after)
        model.register_load_state_dict_pre_hook(loading)
        state = outer.state_dict(keep_vars=True)
        assert seen == [(model, prefix, True)]
        assert f"{prefix}note" in state and f"{prefix}0.weight" not in state
        outer.load_state_dict(state)
        # A file is read by a model that has no hooks.
        esper.save(model, tmp_path / "m")
        esper.load(tmp_path / "m", copy.deepcopy(model.wrapped_model))
        model.register_state_dict_post_hook(lambda *_: {})
        with pytest.raises(RuntimeError, match="must return None"):
            outer.state_dict()

    def test_inside_another_module(self, network: nn.Sequential) -> None:
        outer = nn.ModuleDict({"net": wrap(network)})
        state = outer.state_dict()
        assert "net.0.weight" in state
        outer.load_state_dict(state)


class TestKasminaLayer:
    def test_alone_in_a_network(self, registry: str) -> None:
        import asyncio

        layer = KasminaLayer(10, 20, layer_name="alone")
        layer.kernel_cache = esper.KernelCache(registry=registry)
        kernel = esper.compile("lowrank", d_in=10, d_out=20, registry=registry, rank=2)
        x = torch.randn(3, 10)
        assert torch.equal(layer(x), layer.default_transform(x))
        assert asyncio.run(layer.load_kernel(0, kernel, alpha=1.0))
        assert len(list(layer.parameters())) == 4
        with torch.no_grad():
            for parameter in layer.grafts.parameters():
                parameter.fill_(0.1)
        host = layer.default_transform
        assert not torch.equal(layer(x), nn.functional.linear(x, host.weight, host.bias))

    def test_unsupported_host(self) -> None:
        with pytest.raises(NotImplementedError, match="Embedding"):
            KasminaLayer.from_host(nn.Embedding(3, 4))


def test_a_forward_put_in_front_of_the_models_is_called() -> None:
    # As accelerate does for autocast: it wraps `forward` and sets it on the instance.
    model = esper.wrap(nn.Sequential(nn.Linear(3, 3)))
    x = torch.randn(2, 3)
    expected = model(x)
    hooked: list[str] = []
    model.register_forward_hook(lambda module, args, output: hooked.append(type(module).__name__))
    own = model.forward

    def doubled(*args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = 2 * own(*args, **kwargs)
        return y

    calls = model.total_forward_calls
    model.forward = doubled  # type: ignore[method-assign]
    assert torch.equal(model(x), 2 * expected)
    assert model.total_forward_calls == calls + 1 and hooked == ["Sequential"]
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend="eager")(x), 2 * expected)
    # The copy has it too, and goes on with what the function is bound to: here the first model.
    assert torch.equal(copy.deepcopy(model)(x), 2 * expected)
    del model.forward
    assert torch.equal(model(x), expected)
    model.compile(backend="eager")
    assert torch.equal(model(x), expected)


def test_attributes_of_the_host_are_the_hosts_to_set() -> None:
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.factor = 1.0

        @property
        def halved(self) -> float:
            return self.factor / 2

        @halved.setter
        def halved(self, value: float) -> None:
            self.factor = 2 * value

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.factor * self.linear(x)
            return y

    model: Any = esper.wrap(Host())
    x = torch.randn(3, 2)
    before = model(x)
    model.factor = 3.0
    assert model.wrapped_model.factor == 3.0 and torch.equal(model(x), 3.0 * before)
    model.halved = 4.0
    assert model.factor == 8.0 and "factor" not in model.__dict__
    model.linear = nn.Identity()
    assert torch.equal(model(x), 8.0 * x)
    # What is the model's own, or nobody's yet, stays here; so does what a copy's construction sets.
    model.monitor_budget = 0.1
    model.note = "mine"
    assert not hasattr(model.wrapped_model, "note") and not hasattr(model.wrapped_model, "monitor_budget")
    model.eval()
    assert not model.wrapped_model.training
    twin = copy.deepcopy(model)
    twin.factor = 1.0
    assert model.factor == 8.0 and twin.wrapped_model.factor == 1.0
    del model.factor
    assert not hasattr(model.wrapped_model, "factor")


def test_modules_that_are_set_are_the_hosts() -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(3, 3)), telemetry_enabled=False)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.head = nn.Linear(3, 2)
        twin.add_module("tail", nn.Linear(2, 2))
        twin.register_module("last", nn.Linear(2, 2))
        twin.late = None
        assert "late" not in twin.wrapped_model.__dict__
        twin.late = nn.Linear(2, 2)
        twin.factor = nn.Parameter(torch.ones(()))
        names = {name for name, _ in twin.named_parameters()}
        assert names == set(twin.wrapped_model.state_dict())
        assert {"head.weight", "tail.weight", "last.weight", "late.weight", "factor"} <= names <= set(twin.state_dict())
        assert list(twin._modules) == ["wrapped_model", "esper"]
        twin.double().eval()
        for name in ("head", "tail", "last", "late"):
            module = getattr(twin, name)
            assert module is twin.wrapped_model.get_submodule(name)
            assert module.weight.dtype == torch.float64 and not module.training
        twin.load_state_dict(twin.state_dict())
        twin.head = None
        del twin.tail
        assert not [name for name, _ in twin.named_parameters() if name.startswith(("head", "tail"))]


@pytest.mark.parametrize("name", ["esper", "wrapped_model", "lattice", "monitor", "step", "layer", "_clock"])
@pytest.mark.parametrize("value", [nn.Linear(2, 2), nn.Parameter(torch.ones(2))], ids=["module", "parameter"])
def test_names_of_a_wrapped_model_are_refused(name: str, value: nn.Module | nn.Parameter) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(3, 3)), telemetry_enabled=False)
    before = getattr(model, name)
    with pytest.raises(AttributeError, match=f"'{name}' is a name that a wrapped model uses itself"):
        setattr(model, name, value)
    if isinstance(value, nn.Module):
        with pytest.raises(AttributeError, match="choose another"):
            model.add_module(name, value)
    assert getattr(model, name) == before
