"""Kasmina: one host layer and the seeds beside it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self

from torch import nn

from esper.artifacts.workers import run_blocking
from esper.contracts.errors import ArtifactError, ShapeMismatchError
from esper.contracts.telemetry import EventKind
from esper.execution.grafts import GraftSet, Reservation, ReservedGraftSet
from esper.execution.grafts.warm import warm_up
from esper.execution.host_forwards import HostForwards
from esper.execution.hosts import describe_host, device_of
from esper.execution.kernel_cache import KernelCache
from esper.execution.kernel_executor import LoadedKernel
from esper.execution.lifecycle import LifecycleError, SeedLifecycleState
from esper.execution.state_layout import KasminaStateLayout

__all__ = ["GrowthEvent", "KasminaLayer", "Load"]

GrowthEvent = Literal["bound", "unbound"]
GrowthCallback = Callable[[GrowthEvent, str, int, dict[str, nn.Parameter]], None]
#: Told what happened to a seed: kind, layer, seed, artifact id, reason. Must not raise.
LifecycleCallback = Callable[[EventKind, str, int, str | None, str | None], None]

_State = SeedLifecycleState


@dataclass(eq=False, slots=True)
class Load:
    """A load under way, from :meth:`KasminaLayer.begin_load` until it is committed or refused.

    Attributes:
        artifact_id: What is loaded.
        ended: Whether a command to the seed has overtaken it: its kernel must not wake the seed any more.
    """

    artifact_id: str
    ended: bool = False


class KasminaLayer(HostForwards):
    """A host layer with ``num_seeds`` seeds.

    While every seed is dormant the host runs alone and nothing of this class is on its path. An awake seed, or an
    armed probe, shadows the host's ``forward`` until it is gone.

    Built directly, the layer makes its own ``nn.Linear`` host and can stand in a network like any module; with
    :meth:`from_host` it takes any supported layer. ``esper.wrap`` leaves hosts where they are and keeps the layers
    beside the model. Attributes this class does not have (``weight``, ``in_features``, ...) are the host's.

    Args:
        input_size: Features of the host's input.
        output_size: Features of the host's output.
        num_seeds: Seeds of this layer, each watching its share of the output features.
        cache_size_mb: Memory for fetched kernels, in MiB.
        telemetry_enabled: Whether the monitor samples this layer.
        layer_name: Name in statistics, messages and errors.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        num_seeds: int = 4,
        cache_size_mb: int = 128,
        telemetry_enabled: bool = True,
        layer_name: str = "kasmina_layer",
    ) -> None:
        super().__init__()
        self.default_transform = nn.Linear(input_size, output_size)
        self._setup(num_seeds, layer_name, telemetry_enabled, KernelCache(cache_size_mb), None, ())

    @classmethod
    def from_host(
        cls,
        host: nn.Module,
        *,
        num_seeds: int = 4,
        cache_size_mb: int = 128,
        telemetry_enabled: bool = True,
        layer_name: str = "kasmina_layer",
        kernel_cache: KernelCache | None = None,
        state_layout: KasminaStateLayout | None = None,
        register_host: bool = True,
        fast_path: tuple[nn.Module, ...] = (),
        reservation: Reservation | None = None,
    ) -> Self:
        """Build a layer around an existing module.

        Args:
            host: Linear, Conv2d, ReLU, GELU, Tanh, Sigmoid, LayerNorm, BatchNorm1d/2d or MultiheadAttention.
            num_seeds: Seeds of this layer.
            cache_size_mb: Memory for fetched kernels, in MiB; not used when ``kernel_cache`` is given.
            telemetry_enabled: Whether the monitor samples this layer.
            layer_name: Name in statistics, messages and errors.
            kernel_cache: A cache to share with other layers.
            state_layout: Rows of a model's lattice; by default the layer has its own.
            register_host: Whether the host is a submodule of the layer (its parameters are then the layer's too).
                ``wrap`` says no: there the host keeps its place in the network.
            fast_path: Modules whose fused inference path would pass the host by.
            reservation: Memory to set aside for the seeds; None lets it grow as they wake.

        Raises:
            NotImplementedError: the host's type is not supported; the message names it.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        if register_host:
            layer.default_transform = host
        else:
            layer.__dict__["default_transform"] = host
        cache = kernel_cache if kernel_cache is not None else KernelCache(cache_size_mb)
        layer._setup(num_seeds, layer_name, telemetry_enabled, cache, state_layout, fast_path, reservation)
        return layer

    def _setup(
        self,
        num_seeds: int,
        layer_name: str,
        telemetry_enabled: bool,
        kernel_cache: KernelCache,
        state_layout: KasminaStateLayout | None,
        fast_path: tuple[nn.Module, ...],
        reservation: Reservation | None = None,
    ) -> None:
        if num_seeds < 1:
            raise ValueError(f"num_seeds must be at least 1, got {num_seeds}")
        host = self.default_transform
        self.num_seeds = num_seeds
        self.layer_name = layer_name
        self.telemetry_enabled = telemetry_enabled
        self.kernel_cache = kernel_cache
        if state_layout is None:
            state_layout = KasminaStateLayout(num_seeds, device=device_of(host))
        self.state_layout = state_layout
        spec = describe_host(host)
        if reservation is None:
            self.grafts = GraftSet(spec, state_layout)
        else:
            self.grafts = ReservedGraftSet(spec, state_layout, reservation, device_of(host))
        self._stand_by(host, fast_path)
        self._artifacts: dict[int, str] = {}
        self._failures: dict[int, str] = {}
        self._loads: dict[int, Load] = {}
        self._growth_callbacks: list[GrowthCallback] = []
        self._on_lifecycle: LifecycleCallback | None = None
        self._forwards: Callable[[], int] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the host, with its grafts if any are awake; arguments and result are the host's."""
        return self.default_transform(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):  # how the host is copied, pickled, ... is not how its layer is
                raise
            host = self.__dict__.get("default_transform") or self.__dict__.get("_modules", {}).get("default_transform")
            if host is None:
                raise
            return getattr(host, name)

    # -- seeds -------------------------------------------------------------------------------------

    async def load_kernel(self, seed_idx: int, artifact_id: str, *, alpha: float = 0.3, ramp_steps: int = 0) -> bool:
        """Fetch a kernel and wake the seed with it.

        Call it between two forwards of the training thread. An awake seed keeps its old kernel until the new one is
        there.

        Args:
            seed_idx: Which seed.
            artifact_id: What to load, from the layer's registry.
            alpha: Blend factor to reach, clamped to [0, 1].
            ramp_steps: Training steps over which alpha rises from 0; 0 sets it at once.

        Returns:
            True when the seed is awake with the new kernel. False when the artifact is not to be had (the seed is as
            before, dormant if it was) or is bad (the seed is in ERROR_RECOVERY), or when the seed was unloaded, culled
            or fossilized meanwhile (it stays so); :meth:`get_layer_stats` then holds the reason.

        Raises:
            ValueError: bad seed index, alpha is NaN, or ``ramp_steps`` is no whole number of at least 0.
            TypeError: ``artifact_id`` is no text, or ``alpha`` no number.
            LifecycleError: the seed is fossilized, culled, or already loading.
        """
        load = self.begin_load(seed_idx, alpha, artifact_id, ramp_steps=ramp_steps)
        try:
            kernel = await self.fetch(seed_idx, artifact_id)
        except ArtifactError as error:
            return self.refuse(seed_idx, f"{artifact_id}: {error}", bad=True, load=load)
        except BaseException as error:
            self.refuse(seed_idx, f"{artifact_id}: {type(error).__name__}: {error}", bad=False, load=load)
            raise
        if kernel is None:
            reason = self.kernel_cache.last_error(artifact_id) or "not to be had"
            return self.refuse(seed_idx, f"{artifact_id}: {reason}", bad=False, load=load)
        return self.commit(seed_idx, kernel, alpha=alpha, ramp_steps=ramp_steps, load=load)

    async def fetch(self, seed_idx: int, artifact_id: str) -> LoadedKernel | None:
        """A kernel for a seed of this layer, on the layer's device, with all compiled that it will launch there.

        Otherwise as :meth:`KernelCache.load_kernel`.
        """
        device = self.state_layout.alpha_blend.device
        kernel = await self.kernel_cache.load_kernel(artifact_id, device=device)
        if kernel is not None and device.type != "cpu":
            await run_blocking(warm_up, self.grafts, seed_idx, kernel)
        return kernel

    async def unload_kernel(self, seed_idx: int) -> bool:
        """Put a seed to sleep and drop its kernel, or give up its load; False when it was dormant already.

        Raises:
            ValueError: bad seed index.
            LifecycleError: the seed is fossilized.
        """
        self.check_seed(seed_idx)
        if self.state_layout.state_of(seed_idx) is _State.DORMANT:
            return False
        self.release(seed_idx, _State.DORMANT)
        return True

    def set_seed_alpha(self, seed_idx: int, alpha: float) -> None:
        """Set a seed's blend factor at once.

        Args:
            seed_idx: Which seed.
            alpha: New factor, clamped to [0, 1].

        Raises:
            ValueError: bad seed index, or alpha is NaN.
        """
        self.check_seed(seed_idx)
        self.state_layout.set_alpha(seed_idx, alpha)

    def check_seed(self, seed_idx: int) -> None:
        """Raise ``ValueError`` unless ``seed_idx`` names a seed of this layer."""
        if not isinstance(seed_idx, int) or isinstance(seed_idx, bool) or not 0 <= seed_idx < self.num_seeds:
            last = self.num_seeds - 1
            raise ValueError(f"Invalid seed index {seed_idx!r}: layer '{self.layer_name}' has seeds 0 to {last}")

    def begin_load(
        self, seed_idx: int, alpha: float = 0.0, artifact_id: str = "kernel", *, ramp_steps: int = 0
    ) -> Load:
        """Check that a kernel may be loaded into the seed, and mark a sleeping one LOADING.

        The load that is returned goes to :meth:`commit` or :meth:`refuse`, one of which must follow.

        Raises:
            ValueError: bad seed index, alpha is NaN, or ``ramp_steps`` is no whole number of at least 0.
            TypeError: ``artifact_id`` is no text, or ``alpha`` no number.
            LifecycleError: the seed is fossilized, culled, or already loading. In every case nothing was changed.
        """
        self.check_seed(seed_idx)
        if not isinstance(artifact_id, str):
            raise TypeError(
                f"artifact_id is {artifact_id!r}; it is the text that esper.compile gave (layer '{self.layer_name}', "
                f"seed {seed_idx})"
            )
        try:
            missing = math.isnan(alpha)
        except TypeError:
            raise TypeError(f"alpha is {alpha!r}, not a number (layer '{self.layer_name}', seed {seed_idx})") from None
        if missing:
            raise ValueError(f"alpha is NaN (layer '{self.layer_name}', seed {seed_idx})")
        if not _is_count(ramp_steps):
            raise ValueError(
                f"ramp_steps is a whole number of at least 0, got {ramp_steps!r} "
                f"(layer '{self.layer_name}', seed {seed_idx})"
            )
        self.check_host()
        state = self.state_layout.state_of(seed_idx)
        if state is _State.FOSSILIZED:
            raise LifecycleError(
                f"layer '{self.layer_name}', seed {seed_idx} is FOSSILIZED: a fossilized seed keeps its kernel"
            )
        if state is _State.LOADING or seed_idx in self._loads:
            raise LifecycleError(
                f"layer '{self.layer_name}', seed {seed_idx} is {state.name}: wait for the load under way"
            )
        if seed_idx not in self.grafts.bound:
            self.state_layout.transition_seed_state(seed_idx, _State.LOADING)
            self._tell(EventKind.SEED_LOADING, seed_idx)
        load = self._loads[seed_idx] = Load(artifact_id)
        return load

    @property
    def loading(self) -> tuple[int, ...]:
        """Indices of the seeds that a load is under way for, ascending; an awake one keeps its kernel until then."""
        return tuple(sorted(self._loads))

    def commit(
        self, seed_idx: int, kernel: LoadedKernel, *, alpha: float, ramp_steps: int = 0, load: Load | None = None
    ) -> bool:
        """Wake a seed with a kernel that is here.

        Args:
            seed_idx: Which seed.
            kernel: What to run.
            alpha: As for :meth:`load_kernel`.
            ramp_steps: As for :meth:`load_kernel`.
            load: The load that this ends. None is a command of its own, which overtakes a load under way.

        Returns:
            False when the kernel does not fit (the seed is in ERROR_RECOVERY), something failed on the way, such as
            memory that ran out (it is dormant), or a command has overtaken the load (it is left as it is).
        """
        if load is None:
            self.overtake(seed_idx, "given another kernel")
        elif not self._finish(seed_idx, load):
            return False
        self._drop_graft(seed_idx)
        try:
            # On a GPU the kernel may still be on its way; the stream that trains waits for it here, the thread does
            # not.
            kernel.wait_on_current_stream()
            self.grafts.bind(seed_idx, kernel)
            self._wake(seed_idx, kernel, alpha, ramp_steps)
            parameters = self.grafts.seed_parameters(seed_idx)
        except (ShapeMismatchError, ArtifactError) as error:
            return self.refuse(seed_idx, f"{kernel.artifact_id}: {error}", bad=True)
        except Exception as error:
            # Nobody has been told of the new parameters, so nobody is told that they go.
            self.grafts.unbind(seed_idx)
            self._artifacts.pop(seed_idx, None)
            self.state_layout.reset_seed(seed_idx)
            return self.refuse(seed_idx, f"{kernel.artifact_id}: {type(error).__name__}: {error}", bad=False)
        failure = self._announce("bound", seed_idx, parameters)
        if failure is not None:
            # Whoever was to train the new parameters may not have them: better no seed than one that never learns.
            self.release(seed_idx, _State.DORMANT)
            self._failures[seed_idx] = f"{kernel.artifact_id}: {failure}"
            self._tell(EventKind.SEED_REFUSED, seed_idx, kernel.artifact_id, failure)
            return False
        self._tell(EventKind.SEED_WOKEN, seed_idx, kernel.artifact_id)
        return True

    def _wake(self, seed_idx: int, kernel: LoadedKernel, alpha: float, ramp_steps: int) -> None:
        layout = self.state_layout
        if layout.state_of(seed_idx) not in (_State.LOADING, _State.DORMANT):
            layout.reset_seed(seed_idx)
        layout.transition_seed_state(
            seed_idx, _State.GRAFTING if ramp_steps > 0 else _State.ACTIVE, kernel_id=kernel.kernel_id
        )
        if ramp_steps > 0:
            layout.set_alpha(seed_idx, 0.0)
        layout.set_alpha(seed_idx, alpha, ramp_steps=ramp_steps)
        self._artifacts[seed_idx] = kernel.artifact_id
        self._failures.pop(seed_idx, None)
        self._refresh()

    def refuse(self, seed_idx: int, reason: str, *, bad: bool, load: Load | None = None) -> bool:
        """Put on record why a load came to nothing; always False.

        Args:
            seed_idx: Which seed.
            reason: In words.
            bad: Whether the kernel is bad (the seed goes to ERROR_RECOVERY) rather than not to be had.
            load: The load that this ends; nothing changes if a command has overtaken it. None ends the one under way.
        """
        if load is None:
            if (load := self._loads.pop(seed_idx, None)) is not None:
                load.ended = True
        elif not self._finish(seed_idx, load):
            return False
        self._failures[seed_idx] = reason
        layout = self.state_layout
        if bad:
            self._drop_graft(seed_idx)
            if layout.state_of(seed_idx) is not _State.ERROR_RECOVERY:
                layout.transition_seed_state(seed_idx, _State.ERROR_RECOVERY)
        elif layout.state_of(seed_idx) is _State.LOADING:
            layout.transition_seed_state(seed_idx, _State.DORMANT)
        self._refresh()
        self._tell(EventKind.SEED_REFUSED, seed_idx, None, reason)
        return False

    def release(self, seed_idx: int, state: SeedLifecycleState) -> None:
        """Move a seed to a sleeping state and drop its kernel; an illegal move raises and changes nothing.

        A load under way comes to nothing.
        """
        self.check_seed(seed_idx)
        self.state_layout.transition_seed_state(seed_idx, state)
        self.overtake(seed_idx, "culled" if state is _State.CULLED else "unloaded")
        artifact = self._artifacts.get(seed_idx)
        self._drop_graft(seed_idx)
        self._refresh()
        kind = EventKind.SEED_CULLED if state is _State.CULLED else EventKind.SEED_UNLOADED
        self._tell(kind, seed_idx, artifact)

    def fossilize(self, seed_idx: int) -> None:
        """Keep a seed for good: it stays awake at its alpha, is never unloaded, and gets no other kernel."""
        self.check_seed(seed_idx)
        self.state_layout.transition_seed_state(seed_idx, _State.FOSSILIZED)
        self.overtake(seed_idx, "fossilized")
        self._tell(EventKind.SEED_FOSSILIZED, seed_idx, self._artifacts.get(seed_idx))

    def on_fault_limit(self, seed_idx: int) -> None:
        """The lattice moved a seed to ERROR_RECOVERY: take its kernel off the path, if it is there still."""
        if self.state_layout.state_of(seed_idx) is not _State.ERROR_RECOVERY:
            return  # what `poll` tells is history: a command has made something else of the seed since
        artifact = self._artifacts.get(seed_idx, "kernel")
        why = self.grafts.reason_of(seed_idx) or "non-finite output in three steps in a row"
        self._failures[seed_idx] = f"{artifact}: {why}"
        self._drop_graft(seed_idx)
        self._refresh()
        self._tell(EventKind.SEED_FAULT, seed_idx, artifact, why)

    def failure_of(self, seed_idx: int) -> str | None:
        """Why the seed's last load or kernel failed; None when none did. Reads no device memory."""
        return self._failures.get(seed_idx)

    def reset(self, seed_idx: int, what: str = "reset") -> None:
        """Put a seed to sleep from any state, fossilized or at fault, and drop its kernel; ``what`` goes on record."""
        self.check_seed(seed_idx)
        self.overtake(seed_idx, what)
        artifact = self._artifacts.get(seed_idx)
        self.state_layout.reset_seed(seed_idx)
        self._drop_graft(seed_idx)
        self._failures.pop(seed_idx, None)
        self._refresh()
        if artifact is not None:
            self._tell(EventKind.SEED_UNLOADED, seed_idx, artifact, what)

    def overtake(self, seed_idx: int, what: str) -> None:
        """A command was given to the seed: the load under way, if there is one, comes to nothing."""
        load = self._loads.pop(seed_idx, None)
        if load is not None:
            load.ended = True
            reason = self._failures[seed_idx] = f"{load.artifact_id}: the seed was {what} while it was loading"
            self._tell(EventKind.SEED_REFUSED, seed_idx, None, reason)

    def _finish(self, seed_idx: int, load: Load) -> bool:
        """Take a load off those under way; whether it may still change the seed."""
        state = self.state_layout.state_of(seed_idx)
        # Not by a command of this layer: by a state_dict, or by hand.
        if not load.ended and state in (_State.CULLED, _State.FOSSILIZED):
            self.overtake(seed_idx, state.name.lower())
        if self._loads.get(seed_idx) is load:
            del self._loads[seed_idx]
        return not load.ended

    def _tell(self, kind: EventKind, seed_idx: int, artifact_id: str | None = None, reason: str | None = None) -> None:
        if self._on_lifecycle is not None:
            self._on_lifecycle(kind, self.layer_name, seed_idx, artifact_id, reason)

    def forget_loads(self) -> None:
        """Put to sleep what is LOADING by its state although no load is under way: in a copy, or a loaded state."""
        for seed_idx in range(self.num_seeds):
            if seed_idx not in self._loads and self.state_layout.state_of(seed_idx) is _State.LOADING:
                self.state_layout.transition_seed_state(seed_idx, _State.DORMANT)

    def adopt_state(self, state_layout: KasminaStateLayout) -> None:
        """Keep the seeds' state in other rows from now on; they must hold what the present ones hold."""
        self.state_layout = state_layout
        self.grafts.state_layout = state_layout

    def _drop_graft(self, seed_idx: int) -> None:
        if seed_idx in self.grafts.bound:
            parameters = self.grafts.seed_parameters(seed_idx)
            self.grafts.unbind(seed_idx)
            artifact = self._artifacts.pop(seed_idx, "kernel")
            failure = self._announce("unbound", seed_idx, parameters)
            if failure is not None:
                self._failures[seed_idx] = f"{artifact}: {failure}"

    def _announce(self, event: GrowthEvent, seed_idx: int, parameters: dict[str, nn.Parameter]) -> str | None:
        """Tell all callbacks, whatever one of them does; the first error in words, for the record."""
        failure = None
        for callback in tuple(self._growth_callbacks):
            try:
                callback(event, self.layer_name, seed_idx, parameters)
            except Exception as error:
                failure = failure or f"a growth callback failed at {event!r}: {type(error).__name__}: {error}"
        return failure

    # -- statistics --------------------------------------------------------------------------------

    @property
    def total_kernel_executions(self) -> int:
        """Forwards that ran this layer's grafts; compiled ones are not counted, a counter would recompile the graph."""
        return self._counters.executions

    @property
    def total_forward_calls(self) -> int:
        """Forwards of the layer: the model's count inside a wrapped model, else those that ran grafts."""
        return self._forwards() if self._forwards is not None else self._counters.executions

    def get_layer_stats(self) -> dict[str, Any]:
        """Counters, states and the reason of every failure; reads device memory, so not for the inner loop."""
        forwards = self.total_forward_calls
        return {
            "layer_name": self.layer_name,
            "host_type": type(self.default_transform).__name__,
            "total_forward_calls": forwards,
            "total_kernel_executions": self.total_kernel_executions,
            "kernel_execution_ratio": self.total_kernel_executions / max(forwards, 1),
            "state_stats": self.state_layout.get_stats(),
            "cache_stats": self.kernel_cache.get_cache_stats(),
            "telemetry_enabled": self.telemetry_enabled,
            "artifacts": dict(self._artifacts),
            "errors": dict(self._failures),
        }

    def extra_repr(self) -> str:
        """What ``print`` shows beside the submodules."""
        return f"{self.layer_name!r}, num_seeds={self.num_seeds}, awake={list(self.grafts.bound)}"

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what belongs to this process: observers, callbacks, loads under way, events of a GPU."""
        state = dict(self.__dict__)
        state["_loads"] = {}
        state["_observer"] = None
        state["_cuda_timing"] = None
        state["_growth_callbacks"] = []
        state["_on_lifecycle"] = None
        state["_forwards"] = None
        state["latency_sink"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.forget_loads()


def _is_count(value: object) -> bool:
    """Whether it is a whole number of at least 0, numpy's among them."""
    try:
        return not isinstance(value, bool) and operator.index(value) >= 0  # type: ignore[arg-type]
    except TypeError:
        return False
