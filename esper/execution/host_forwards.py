"""What runs in place of a host's own forward while a seed is awake or a probe is armed."""

from __future__ import annotations

import gc
import inspect
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.execution.fused_host import FusedHost, tune
from esper.execution.grafts import GraftSet, ReservedGraftSet
from esper.execution.grafts.fit import odd_result
from esper.execution.host_binding import Forward, HostBinding, held_hosts, is_held
from esper.execution.hosts import SUPPORTED_HOSTS, HostSpec, foreign_linear
from esper.execution.lifecycle import LifecycleError
from esper.execution.state_layout import KasminaStateLayout

__all__ = ["HostForwards", "Observer", "check_free"]

Observer = Callable[[Tensor], None]

#: One graft execution in this many is timed.
LATENCY_PERIOD = 64

_tracing = torch.compiler.is_dynamo_compiling

#: Forwards of one tensor, called ``input``; and an attention's.
_TORCHS_OWN = frozenset(kind.forward for kind in SUPPORTED_HOSTS)


class _Counters:
    """Execution counts. Slots: an attribute of an ``nn.Module`` costs twenty times as much to set."""

    __slots__ = ("executions",)

    def __init__(self) -> None:
        self.executions = 0


class HostForwards(nn.Module):
    """The forwards of a layer, and which of them stands in front of the host's."""

    default_transform: nn.Module
    layer_name: str
    grafts: GraftSet
    _grafts: GraftSet
    state_layout: KasminaStateLayout

    def _stand_by(self, host: nn.Module, fast_path: tuple[nn.Module, ...]) -> None:
        """Begin with the host's own forward; ``grafts`` is set."""
        # nn.Module's attribute look-up for submodules is slow; the call path reads this one.
        self.__dict__["_grafts"] = self.grafts
        self._bind_host(host, fast_path)
        self._in_place = bool(getattr(host, "inplace", False))
        self._linear = host._parameters if type(host) is nn.Linear and self._binding.untouched else None
        self._fused_host: FusedHost | None = None
        self._counters = _Counters()
        self._observer: Observer | None = None
        self._cuda_timing: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._held = False
        #: Takes measured microseconds in place of the layer's state.
        self.latency_sink: Callable[[int], None] | None = None

    def _bind_host(self, host: nn.Module, fast_path: tuple[nn.Module, ...]) -> None:
        check_free(host, self.layer_name)
        before = _shadow(host)
        if before is not None:
            # Of a layer that gave the host up, or was copied with it. Its awake seeds belong to what the host computes.
            before.disarm_probe()
            before.give_up_host()
        self._binding = HostBinding(host, fast_path)
        self._binding.claim()
        own = type(host).forward
        if self._binding.untouched and own in _TORCHS_OWN:
            self._awake = "_awake_attention" if isinstance(host, nn.MultiheadAttention) else "_awake_forward"
        elif self._binding.untouched and own in {kind.forward for kind in foreign_linear()}:
            self._awake = "_awake_conv1d"
        else:
            self._awake = "_awake_call"
            self._first_name = _first_name(self._binding.base)

    def give_up_host(self) -> None:
        """Let other layers have the host: see :meth:`HostBinding.give_up`."""
        self._binding.give_up()

    def check_host(self) -> None:
        """Raise ``LifecycleError`` where another layer has the host by now, so that no seed of this one could run."""
        if not self._binding.claim():
            raise LifecycleError(
                f"the host of layer '{self.layer_name}' was given up, and another wrapped model has it now: "
                "wake seeds there"
            )

    # -- the forwards that may shadow the host's ---------------------------------------------------

    def _awake_forward(self, input: Tensor) -> Tensor:
        if _tracing():
            return self._traced_forward(input)
        grafts, counters, product = self._grafts, self._counters, self._binding.product
        fast, timed = grafts._fast, not (counters.executions + 1) % LATENCY_PERIOD
        if product is not None:
            alpha = self.state_layout.alpha_blend
            y = None if fast is None else fast.run_host(input, product, alpha, timed)
            # The seeds may not be packed yet, or have moved.
            again = y is None and (fast is not None or not grafts._bank_tried)
            if again and isinstance(input, Tensor) and input.is_cpu:
                before, fast = fast, grafts.fast_call(input)
                y = None if fast is None or fast is before else fast.run_host(input, product, alpha, timed)
            if fast is not None and y is not None:
                counters.executions += 1
                if timed:
                    self._record_latency(fast.elapsed())
                return y
        if fast is not None and not self._in_place:
            # What `_blend` and `GraftSet.forward` do in the plain case, without their calls: 0.3 us of five.
            h = self._binding.base(input)
            if not timed:
                y = fast.run(input, h, self.state_layout.alpha_blend)
                if y is not None:
                    counters.executions += 1
                    return y
            return self._blend(input, h)
        if self._fused_host is not None:
            y = self._fused_host(input)
            if y is not None:
                self._counters.executions += 1
                return y
        return self._blend(input, self._host_output(input))

    def _awake_conv1d(self, x: Tensor) -> Tensor:
        """For the ``Conv1D`` of ``transformers``, which calls its one argument so."""
        return self._awake_forward(x)

    def _awake_call(self, *args: Any, **kwargs: Any) -> Any:
        """For a host whose forward is not torch's own, with whatever arguments that takes.

        Its first one is x; h is what it gives, or the first of a tuple.
        """
        name = None if args else self._first_name if self._first_name in kwargs else next(iter(kwargs), None)
        x: Any = args[0] if args else None if name is None else kwargs[name]
        if self._in_place and isinstance(x, Tensor):
            if name is None:
                args = x.clone(), *args[1:]
            else:
                kwargs = {**kwargs, name: x.clone()}
        result = self._binding.base(*args, **kwargs)
        several = type(result) is tuple and len(result) > 0
        h = result[0] if several else result
        odd = odd_result(self._grafts.spec, x, h)
        if odd is not None:
            self._grafts.refuse(odd)
            return result
        y = self._blend(x, h)
        return (y, *result[1:]) if several else y

    def _host_output(self, input: Tensor) -> Any:
        # A host that works in place would overwrite what its seeds are to read.
        return self._binding.base(input.clone() if self._in_place else input)

    def _traced_forward(self, input: Tensor) -> Tensor:
        h = self._traced_host(input)
        if h is None:
            h = self._host_output(input)
        y = self._grafts.as_operation(input, h)
        return self._grafts.forward(input, h) if y is None else y

    def _traced_host(self, input: Tensor) -> Tensor | None:
        """The host's output, if it is a plain Linear.

        A graph that came to the host in two ways, through the network and from here, would ask before every call
        whether they still lead to one object, and all that lies on them.
        """
        linear = self._linear
        if linear is None or "weight" not in linear or "bias" not in linear:  # parametrized, pruned, ...
            return None
        weight = linear["weight"]
        return None if weight is None else F.linear(input, weight, linear["bias"])

    def _awake_attention(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        h, weights = self._binding.base(query, *args, **kwargs)
        return self._blend(query, h), weights

    def _probe_forward(self, *args: Any, **kwargs: Any) -> Any:
        awake = self._awake_method()
        forward = getattr(self, awake) if awake else self._binding.base
        observer = self._observer
        if _tracing():
            # Disarming is a change of Python state that a compiled graph must not repeat; the model's step() disarms
            # instead.
            result = forward(*args, **kwargs)
            y = _observable(result)
            if observer is not None and y is not None:
                observer(y)
            return result
        self.disarm_probe()
        result = forward(*args, **kwargs)
        y = _observable(result)
        if observer is not None and y is not None:
            # An activation learns from its first output where its features are.
            self.grafts.spec = self.grafts.spec.resolve(tuple(y.shape))
            with torch.no_grad():
                single = self.spec.geometry is not None and y.dim() == 3  # one image [C, H, W]
                observer(y.unsqueeze(0) if single else y)
        return result

    def _blend(self, x: Tensor, h: Tensor) -> Tensor:
        # A counter that changes would recompile the graph. A layer that is only held runs nothing.
        if not _tracing() and self._grafts._kernels:
            counters = self._counters
            counters.executions += 1
            if not counters.executions % LATENCY_PERIOD:
                return self._timed_blend(x, h)
        return self._grafts.forward(x, h)

    def _timed_blend(self, x: Tensor, h: Tensor) -> Tensor:
        if h.is_cuda:
            if self._cuda_timing is not None or torch.cuda.is_current_stream_capturing():
                return self._grafts.forward(x, h)
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            stream = torch.cuda.current_stream(h.device)  # by default that of the current device, which may be another
            events[0].record(stream)
            y = self._grafts.forward(x, h)
            events[1].record(stream)
            self._cuda_timing = events
            return y
        start = time.perf_counter_ns()
        y = self._grafts.forward(x, h)
        self._record_latency((time.perf_counter_ns() - start) // 1000)
        return y

    def poll_latency(self) -> None:
        """Store the time of the last timed execution on a GPU, if it is known by now; never waits."""
        if self._cuda_timing is not None and self._cuda_timing[1].query():
            start, end = self._cuda_timing
            self._cuda_timing = None
            self._record_latency(int(start.elapsed_time(end) * 1000))

    def _record_latency(self, microseconds: int) -> None:
        if self.latency_sink is not None:
            self.latency_sink(microseconds)
            return
        # All awake seeds of a layer run together, so they share one measurement.
        for seed_idx in self.grafts.bound:
            self.state_layout.update_telemetry(seed_idx, microseconds, math.nan)

    def tune(self, rows: int, ranks: Sequence[int] | None = None, activation: str | None = None) -> dict[int, str]:
        """As :meth:`MorphableModel.tune`, for this layer: the way for each sum of ranks."""
        host, bank = self.default_transform, self.grafts.bank_of_seeds
        if type(host) is not nn.Linear or not self._binding.untouched or isinstance(self.grafts, ReservedGraftSet):
            return {}
        banks = [(r, activation) for r in ranks] if ranks is not None else [] if bank is None else [bank]
        found = tune(host, rows, banks)
        if any(way != "library" for way in found.values()):
            self._fused_host = FusedHost(host, self.grafts)  # anew: the old one knows what was measured before
        return {bank[0]: way for bank, way in found.items()}

    # -- probes ------------------------------------------------------------------------------------

    @property
    def spec(self) -> HostSpec:
        """Sizes and orientation of the host."""
        return self.grafts.spec

    @property
    def channel_dim(self) -> int:
        """Dimension of the host's output that holds the features: -1, or 1 for NCHW hosts."""
        return self.spec.channel_dim

    @property
    def features(self) -> int | None:
        """Features of the host's output; None for an activation that has not run yet."""
        return self.spec.d_out

    @property
    def probe_armed(self) -> bool:
        """Whether the next forward will be observed."""
        return self._observer is not None

    def arm_probe(self, observer: Observer) -> None:
        """Let ``observer`` see the output of the next forward, once."""
        self._observer = observer
        self._refresh()

    def disarm_probe(self) -> None:
        """Take the observer away."""
        self._observer = None
        self._refresh()

    def hold_path(self, held: bool) -> None:
        """Keep the grafts on the path although no seed of this layer is awake, or no longer.

        In a model with reserved memory all layers go together: so it has two forwards, asleep and awake, and not one
        for each set of layers.
        """
        self._held = held
        self._refresh()

    def _awake_method(self) -> str | None:
        if not self._held and not self.grafts.bound:
            return None
        return self._awake

    def _refresh(self) -> None:
        awake = self._awake_method()
        if self._observer is not None:
            self._binding.install(self, "_probe_forward", closes_fast_path=awake is not None)
        elif awake is not None:
            self._binding.install(self, awake, closes_fast_path=True)
        else:
            self._binding.remove()


def check_free(host: nn.Module, layer_name: str) -> None:
    """Raise ``ValueError`` where another layer that is in use has the host."""
    if not is_held(host):
        return
    # A model that nobody has any more may still be there: it is made of cycles, and a probe that is armed keeps it.
    _disarm_all()
    gc.collect()
    if not is_held(host):
        return
    raise ValueError(
        f"layer '{layer_name}' ({type(host).__name__}) belongs to another wrapped model already, and two would take "
        "each other's seeds off its path: wrap a copy (preserve_original=True), wrap the networks that share it as one "
        "module, or give the other model up with esper.unwrap(it)"
    )


def _disarm_all() -> None:
    """Take away every probe that is armed in this process; it costs its monitor one sample."""
    for host in held_hosts():
        shadow = _shadow(host)
        if shadow is not None and shadow.probe_armed:
            shadow.disarm_probe()


def _shadow(host: nn.Module) -> HostForwards | None:
    """The layer whose forward stands in front of the host's, or None."""
    owner = getattr(host.__dict__.get("forward"), "__self__", None)
    return owner if isinstance(owner, HostForwards) else None


def _first_name(forward: Forward) -> str | None:
    """What the forward calls its first argument, where that can be known."""
    try:
        first = next(iter(inspect.signature(forward).parameters.values()), None)
    except (TypeError, ValueError):
        return None
    return None if first is None or first.kind is first.VAR_POSITIONAL else first.name


def _observable(result: Any) -> Tensor | None:
    """The part of a result that a probe looks at: it, or the first of a tuple; None where that is no plain tensor."""
    y = result[0] if isinstance(result, tuple) and result else result
    return y if isinstance(y, Tensor) and not y.is_nested else None
