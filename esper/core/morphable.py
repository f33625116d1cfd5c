"""The wrapped model: what users train, and the clock that keeps its seeds going."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from esper.core.clock import Clock, Timed, call_through_clock, make_clock
from esper.core.consensus import several_ranks
from esper.core.naming import GraftTree, HostNames, is_sharded, seeds_prefix
from esper.core.published import Published
from esper.core.requests import KernelRequests
from esper.core.tether import Tether
from esper.core.unchanged import in_mode_of, unchanged, unobserved
from esper.core.variants import TwoForwards, Variants
from esper.execution.grafts import ReservedGraftSet
from esper.execution.grafts.reservation import Tap
from esper.execution.kasmina_layer import GrowthCallback, GrowthEvent, KasminaLayer
from esper.execution.lifecycle import SeedLifecycleState
from esper.execution.monitor import Monitor
from esper.execution.pacing import NEVER
from esper.execution.state_layout import Lattice

__all__ = ["MorphableModel"]

_State = SeedLifecycleState
_tracing = torch.compiler.is_dynamo_compiling

#: Cost of a step() with nothing due, in nanoseconds; the monitor's budget pays for it too. A counted call costs no more
#: than the host's own.
FIXED_NS_PER_STEP = 100.0


class MorphableModel(KernelRequests, TwoForwards, HostNames, Published, Timed):
    """A network whose layers have seeds. Built by ``esper.wrap``.

    It is called, trained, moved, saved and inspected as the network it wraps: parameters and ``state_dict`` entries
    have the host's names, attributes it does not have itself are the host's, to read and to set. Modules and parameters
    that are set on it are added to the host, without seeds; a name that it uses itself is refused. Parameters of awake
    seeds and the lattice stand beside them under names that start with ``esper.``.

    Call :attr:`step` once per training step, after the optimizer's.

    Args:
        wrapped_model: The network.
        kasmina_layers: Its layers with seeds, by dotted name; all with the same number of seeds.
        original_model: What ``esper.unwrap`` gives back; None gives back ``wrapped_model``.
        lattice: The layers' common state; by default one is made and the layers' states are moved into it.
        monitor_budget: Share of the host's time that monitoring may take.
        reserve_rank: Rank that every layer has reserved for each seed; 0 for grafts that grow.
        reserve_tap: What seeds with reserved memory read, as given to ``esper.wrap``.
    """

    _host: nn.Module

    def __init__(
        self,
        wrapped_model: nn.Module,
        kasmina_layers: Mapping[str, KasminaLayer],
        original_model: nn.Module | None = None,
        *,
        lattice: Lattice | None = None,
        monitor_budget: float = 0.005,
        reserve_rank: int = 0,
        reserve_tap: Tap = "input",
    ) -> None:
        super().__init__(wrapped_model)
        self.__dict__["original_model"] = original_model
        self.kasmina_layers: dict[str, KasminaLayer] = dict(kasmina_layers)
        self.lattice = lattice if lattice is not None else _common_lattice(self.kasmina_layers)
        if (parameter := next(wrapped_model.parameters(), None)) is not None:
            self.lattice.to(parameter.device)
        self.esper = GraftTree(self.kasmina_layers)
        self.monitor_budget = monitor_budget
        self.reserve_rank = reserve_rank
        self.reserve_tap = reserve_tap
        self.monitor = Monitor(
            list(self.kasmina_layers.values()), self.lattice, budget=monitor_budget, fixed_ns_per_step=FIXED_NS_PER_STEP
        )
        self._telemetry = any(layer.telemetry_enabled for layer in self.kasmina_layers.values())
        self.set_clock(make_clock())
        self._start()

    def _start(self) -> None:
        """What belongs to one process and one copy: called on construction, copying and unpickling."""
        self._requested = set()
        self._fetched = deque()
        self._growth_callbacks: dict[int, GrowthCallback] = {}
        self._variants = Variants(self)
        self._closed = False
        # A copy is another network, which publishes nothing until it is told to.
        self._publisher = None
        # A copy is not compiled: torch drops the compiled call of a module that is copied or pickled.
        self._compiled = False
        self._consensus = None
        self._warned = False
        self._tether: Tether | None = None
        self._clock.host, self._clock.on_due = self.wrapped_model, self._on_due
        self._route()
        clock = self._clock
        for layer in self.kasmina_layers.values():
            layer._forwards = self._count_forwards
            layer._growth_callbacks.append(self._on_growth)
            layer._on_lifecycle = self._on_lifecycle
            if isinstance(layer.grafts, ReservedGraftSet):
                layer.grafts.before_write = self._reshard
        self.monitor.on_request = self._touch
        self._variants.follow()
        if several_ranks():
            self.tie_reserved()
        clock.due = 0
        self.__dict__.setdefault("_own", frozenset(self.__dict__))
        # From now on, setting an attribute of the host is the host's affair, and modules that are set are the host's.
        self.__dict__["_complete"] = True

    # -- calls -------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the host; arguments and result are its own. Hooks of the host and of this module run."""
        if _tracing():  # a counter that changes would recompile the graph
            return self._entry(*args, **kwargs)
        return self._clock(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The host's forward; arguments and result are its own."""
        if self._entry is not self._host_call:
            # Called by the forward that somebody put in front of this one: the host's call runs the hooks.
            return self._host_call(*args, **kwargs)
        return self.wrapped_model.forward(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "forward":
            self._route()

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        if name == "forward":
            self._route()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the host in place, as ``nn.Module.compile``."""
        self.wrapped_model.compile(*args, **kwargs)
        self._compiled = True
        self._route()

    def _route(self) -> None:
        """Settle where a call goes: to the host, or to a forward that was put in front of this model's.

        That is what accelerate does for autocast: it sets ``forward`` on the instance.
        """
        host, tether, clock = self.wrapped_model, self._tether, self._clock
        patched: Callable[..., Any] | None = self.__dict__.get("forward")
        call: Callable[..., Any] = host.__call__ if self._compiled else host._call_impl
        self._host_call = call if tether is None else _calling(call, tether)
        self._entry = clock.host_call = self._host_call if patched is None else patched
        clock.plain = not self._compiled and tether is None and patched is None
        # torch.compile asks the instance for its __call__ (a plain call asks the class): it gets the host, so that the
        # graph is guarded by what the host's own would be.
        self.__dict__["__call__"] = _calling(host, tether) if patched is None else patched

    def tie_reserved(self, *, zeros: bool = False) -> None:
        """Give the outputs an edge to all reserved parameters: DDP waits for the gradient of every parameter it knows.

        A model that is wrapped after ``torch.distributed.init_process_group`` has it already.

        Args:
            zeros: Whether the gradients are zeros rather than undefined, for a DDP with ``static_graph=True``.
        """
        if not self.reserve_rank:
            return
        if self._tether is None:
            self._tether = Tether(lambda: list(self.esper.parameters()))
            self._route()
        self._tether.zeros = zeros
        self._tether.renew()

    def _reshard(self) -> None:
        """FSDP2: have the sharded parameters in place, which are the ones that last."""
        if is_sharded(self):
            self.reshard()

    def _touch(self) -> None:
        # Something changed by command: the next step has work.
        self._clock.due = 0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self._tether is not None:
            self._tether.renew()
        return self

    def _on_due(self, clock: Clock) -> None:
        clock.due = NEVER
        if self._consensus is None:
            self._commit_ready()
        else:
            clock.due = self._consensus.round(clock.steps)
            self._fetched.clear()  # a fetch is looked at when all ranks look at theirs
        if self.lattice.needs_step:
            self.lattice.step(clock.steps)
            clock.due = 0
            self._follow_lattice()
        if self._telemetry:
            clock.due = min(clock.due, self._monitor_due(clock))
        publisher = self._publisher
        if publisher is not None:
            clock.due = min(clock.due, publisher.on_due(clock.steps, self, windows=self._telemetry))
        # A fetch that ended while this ran, or a command that came, has set `due` before it was overwritten.
        if (self._fetched and self._consensus is None) or (publisher is not None and publisher.wanted_now):
            clock.due = 0

    def _follow_lattice(self) -> None:
        per_layer = self.lattice.seeds_per_layer
        layers = list(self.kasmina_layers.values())
        for row, _, new in self.lattice.poll():
            if new == _State.ERROR_RECOVERY:
                layers[row // per_layer].on_fault_limit(row % per_layer)
        if self.lattice.device.type == "cuda":
            for layer in layers:
                layer.poll_latency()

    def _monitor_due(self, clock: Clock) -> int:
        # Without a counted call since the last time the model runs inside a compiled or captured graph, where arming
        # single layers would compile a graph for each.
        eager = clock.calls != clock.seen_calls and not self._compiled
        clock.seen_calls = clock.calls
        return self.monitor.on_due(clock.steps, eager=eager or clock.steps == 1)

    # -- seeds -------------------------------------------------------------------------------------

    async def unload_kernel(self, layer_name: str, seed_idx: int) -> bool:
        """Put a seed to sleep and drop its kernel, or give up its load; False when it was dormant already.

        Raises:
            ValueError: unknown layer or bad seed index.
            LifecycleError: the seed is fossilized.
        """
        return await self.layer(layer_name).unload_kernel(seed_idx)

    def cull(self, layer_name: str, seed_idx: int, *, cooldown_steps: int = 0) -> None:
        """Remove a seed that does not help. A load under way comes to nothing.

        Args:
            layer_name: The layer's dotted name.
            seed_idx: Which of its seeds.
            cooldown_steps: Training steps after which it is dormant again and may be woken; 0 leaves it culled.

        Raises:
            ValueError: unknown layer or bad seed index.
            LifecycleError: the seed is not awake, or is fossilized.
        """
        layer = self.layer(layer_name)
        layer.release(seed_idx, _State.CULLED)
        if cooldown_steps > 0:
            layer.state_layout.set_timer(seed_idx, cooldown_steps)
        self._clock.due = 0

    def fossilize(self, layer_name: str, seed_idx: int) -> None:
        """Keep a seed for good. A load under way comes to nothing.

        Raises:
            ValueError: unknown layer or bad seed index.
            LifecycleError: the seed is not awake.
        """
        self.layer(layer_name).fossilize(seed_idx)
        self._clock.due = 0

    def set_seed_alpha(self, layer_name: str, seed_idx: int, alpha: float) -> None:
        """Set an awake seed's blend factor at once, clamped to [0, 1].

        On a seed that sleeps or loads it has no effect: whoever wakes the seed says which alpha it gets.

        Raises:
            ValueError: unknown layer, bad seed index, or alpha is NaN.
        """
        if math.isnan(alpha):
            raise ValueError(f"alpha is NaN (layer '{layer_name}', seed {seed_idx})")
        self.layer(layer_name).set_seed_alpha(seed_idx, alpha)
        self._clock.due = 0

    def layer(self, layer_name: str) -> KasminaLayer:
        """The layer of that name; a shared module answers to each of its names.

        Raises:
            ValueError: there is none.
        """
        found = self.kasmina_layers.get(layer_name)
        if found is None:
            modules = dict(self.wrapped_model.named_modules(remove_duplicate=False))
            for layer in self.kasmina_layers.values():
                if modules.get(layer_name) is layer.default_transform:
                    return layer
            known = ", ".join(map(repr, self.kasmina_layers)) or "no layer with seeds"
            raise ValueError(f"Layer {layer_name!r} not found; this model has: {known}")
        return found

    def on_growth(self, callback: GrowthCallback) -> Callable[[], None]:
        """Be told when the parameters of a seed come or go.

        ``callback(event, layer_name, seed_idx, parameters)`` gets the event "bound" or "unbound".

        It runs on the thread that commits, inside :attr:`step` or :meth:`load_kernel`. If it raises, training goes on:
        a seed that was to be bound stays dormant, and the reason is on record. Returns a function that ends it.
        """
        key = id(callback)
        self._growth_callbacks[key] = callback
        return lambda: self._growth_callbacks.pop(key, None) and None

    def _on_growth(
        self, event: GrowthEvent, layer_name: str, seed_idx: int, parameters: dict[str, nn.Parameter]
    ) -> None:
        self._clock.due = 0
        self._variants.follow()
        failure: Exception | None = None
        for callback in tuple(self._growth_callbacks.values()):
            try:
                callback(event, layer_name, seed_idx, parameters)
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def graft_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of all awake seeds, by the names they have in :meth:`named_parameters`."""
        return {
            f"{seeds_prefix(layer_name)}{seed_idx}.{name}": parameter
            for layer_name, layer in self.kasmina_layers.items()
            for seed_idx in layer.grafts.bound
            for name, parameter in layer.grafts.seed_parameters(seed_idx).items()
        }

    def tune(
        self, rows: int, ranks: Sequence[int] | None = None, activation: str | None = None
    ) -> dict[str, dict[int, str]]:
        """Measure on this GPU whether Linear hosts run faster as one operation with their seeds; waits for the device.

        What is found is kept on disk and holds for this process and the next; what was kept before is not measured
        again. Without it layers run their host's product and then their seeds. Compiled graphs and reserved memory do
        so in any case.

        Args:
            rows: Rows of the batches to come (tokens, positions); the choice holds up to the next power of two.
            ranks: Sums of the ranks of a layer's seeds that will be awake together; None means those that are awake.
            activation: Of the seeds that ``ranks`` speaks of, as blueprints name it.

        Returns:
            By layer and sum of ranks the way that is taken: "library" is the host's own product and then the seeds.

        Raises:
            RuntimeError: the model is on no GPU, or a CUDA graph is being captured.
        """
        found = {name: layer.tune(rows, ranks, activation) for name, layer in self.kasmina_layers.items()}
        return {name: ways for name, ways in found.items() if ways}

    def close(self, timeout_s: float = 10.0) -> None:
        """End background work for this model: requests under way are cancelled and their seeds go back to sleep.

        Args:
            timeout_s: How long to wait at most for telemetry that is still to be sent; what is not sent by then is
                kept for the next run.
        """
        if self._consensus is not None:
            self._consensus.close()
        self._closed = True
        self.monitor.close()
        for layer in self.kasmina_layers.values():
            for seed_idx in range(layer.num_seeds):
                if seed_idx in layer.loading or layer.state_layout.state_of(seed_idx) is _State.LOADING:
                    layer.refuse(seed_idx, "the model was closed while it was loading", bad=False)
        # Whoever waits for a request hears of it now, not when a registry that hangs has timed out.
        for item in self._requested:
            item.outcome.cancel()
        self._requested.clear()
        if self._publisher is not None:
            self._publisher.close(timeout_s)

    # -- statistics --------------------------------------------------------------------------------

    @property
    def morphogenetic_active(self) -> bool:
        """Whether any seed is awake."""
        return self.lattice.has_active_seeds()

    @property
    def total_forward_calls(self) -> int:
        """Forwards of the model; inside a compiled graph, where none can be counted, the training steps."""
        return self._count_forwards()

    def _count_forwards(self) -> int:
        return max(self._clock.calls, self._clock.steps)

    def get_layer_names(self) -> list[str]:
        """Names of all layers with seeds, in the order of the network."""
        return list(self.kasmina_layers)

    def get_layer_stats(self, layer_name: str | None = None) -> dict[str, Any]:
        """Statistics of one layer, or of all of them by name; reads device memory, so not for the inner loop."""
        if layer_name is not None:
            return self.layer(layer_name).get_layer_stats()
        return {name: layer.get_layer_stats() for name, layer in self.kasmina_layers.items()}

    def get_model_stats(self) -> dict[str, Any]:
        """Statistics of the model and, under "layer_stats", of every layer."""
        layers = self.get_layer_stats()
        return {
            "total_forward_calls": self.total_forward_calls,
            "morphogenetic_active": self.morphogenetic_active,
            "total_kasmina_layers": len(self.kasmina_layers),
            "total_seeds": sum(layer.num_seeds for layer in self.kasmina_layers.values()),
            "active_seeds": self.lattice.get_active_count(),
            "total_kernel_executions": sum(layer.total_kernel_executions for layer in self.kasmina_layers.values()),
            "monitor": self.monitor.stats(),
            "reserved": self.reserved_stats(),
            "layer_stats": layers,
        }

    def enable_telemetry(self, enabled: bool = True) -> None:
        """Switch monitoring on or off for all layers."""
        for layer in self.kasmina_layers.values():
            layer.telemetry_enabled = enabled
            if not enabled:
                layer.disarm_probe()
        self._telemetry = enabled
        self._clock.due = 0

    def compare_with_original(self, x: Tensor) -> dict[str, Any]:
        """How far the grown model's output for ``x`` is from the preserved original's; leaves both as they were.

        Both run in the mode that this model is in (train or eval, module by module) and draw the same random numbers.
        Their buffers, the generators, counters, samples of the monitor and faults are afterwards what they were.

        Raises:
            ValueError: the original was not preserved.
        """
        original = self.original_model
        if original is None:
            raise ValueError("No original model to compare with: wrap with preserve_original=True keeps one")
        with torch.no_grad():
            with unchanged(self), unobserved(self.kasmina_layers.values(), self.lattice):
                ours = self._entry(x)
            with unchanged(original), in_mode_of(self.wrapped_model, original):
                theirs = original(x)
        difference = (ours - theirs).double()
        return {
            "mse": float(difference.square().mean()),
            "max_absolute_difference": float(difference.abs().max()) if difference.numel() else 0.0,
            "cosine_similarity": float(
                torch.nn.functional.cosine_similarity(ours.double().flatten(), theirs.double().flatten(), dim=0)
            ),
            "output_shape": tuple(ours.shape),
            "morphogenetic_active": self.morphogenetic_active,
        }

    # -- copying and pickling --

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        for layer in self.kasmina_layers.values():
            layer.forget_loads()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what belongs to this process: locks, requests under way, callbacks."""
        state = dict(self.__dict__)
        state["_clock"] = (self._clock.calls, self._clock.steps)
        for name in (
            "__call__",
            "_complete",
            "_entry",
            "_host_call",
            "_requested",
            "_fetched",
            "_growth_callbacks",
            "_variants",
            "_consensus",
            "_tether",
            "_publisher",
            "_compiled_call_impl",
        ):
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.set_clock(make_clock(*state.pop("_clock")))
        super().__setstate__(state)
        self._start()

    def __deepcopy__(self, memo: dict[int, Any]) -> MorphableModel:
        # The original is a reference, in the copy too.
        if self.original_model is not None:
            memo[id(self.original_model)] = self.original_model
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__setstate__({name: copy.deepcopy(value, memo) for name, value in self.__getstate__().items()})
        return twin


call_through_clock(MorphableModel)


def _calling(host: Callable[..., Any], tether: Tether | None) -> Callable[..., Any]:
    if tether is None:

        def call(*args: Any, **kwargs: Any) -> Any:
            return host(*args, **kwargs)

        return call

    def tied(*args: Any, **kwargs: Any) -> Any:
        return tether(host(*args, **kwargs))

    return tied


def _common_lattice(layers: Mapping[str, KasminaLayer]) -> Lattice:
    """One lattice for layers that were built apart, holding the states they had."""
    counts = {layer.num_seeds for layer in layers.values()}
    if len(counts) > 1:
        raise ValueError(f"all layers of a model need the same number of seeds, got {sorted(counts)}")
    lattice = Lattice(len(layers), counts.pop() if counts else 1)
    for index, layer in enumerate(layers.values()):
        rows = lattice.layer(index)
        rows.copy_from(layer.state_layout)
        layer.adopt_state(rows)
    return lattice
