"""Which backend an operation runs on, and what is said about the others."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch

from esper.ops import registry
from esper.ops.registry import Backend, BackendUnavailableError, Op

_NUMBER = itertools.count()


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Operations of these tests are forgotten afterwards, and warnings may be given again."""
    monkeypatch.setattr(registry, "_OPS", {})
    monkeypatch.setattr(registry, "_WARNED", set())
    monkeypatch.delenv("ESPER_BACKEND", raising=False)
    yield


def make_op(*backends: str, **reasons: str) -> Op:
    """An op of one tensor; every backend returns its own name."""
    op = registry.define(f"registry_test_{next(_NUMBER)}", "(Tensor x) -> Tensor", doc="a test")
    for backend in backends:
        registry.implements(op.name, backend)(lambda x, backend=backend: backend)
    for backend, reason in reasons.items():
        registry.unavailable(op.name, backend, reason)
    return op


class TestSelection:
    @pytest.mark.parametrize(
        ("device", "available", "expected"),
        [
            ("cuda", ("triton", "cuda", "cpu", "reference"), "triton"),
            ("cuda", ("cuda", "cpu", "reference"), "cuda"),
            ("cuda", ("cpu", "reference"), "reference"),
            ("cpu", ("triton", "cuda", "cpu", "reference"), "cpu"),
            ("cpu", ("triton", "cuda", "reference"), "reference"),
            ("mps", ("triton", "cuda", "cpu", "reference"), "reference"),
        ],
    )
    def test_picks_the_fastest_that_fits_the_device(
        self, device: str, available: tuple[str, ...], expected: str
    ) -> None:
        selection = make_op(*available).select(device)
        assert selection.backend == expected
        assert selection.kernel(None) == expected

    @pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
    @pytest.mark.parametrize("forced", [None, "reference"])
    def test_says_why_of_every_backend_it_did_not_pick(self, device: str, forced: str | None) -> None:
        op = make_op("cpu", "reference", triton="no triton today")
        if forced:
            with registry.use_backend(forced):
                selection = op.select(device)
        else:
            selection = op.select(device)
        assert set(selection.rejected) == set(Backend) - {selection.backend}
        assert all(selection.rejected.values())

    def test_reasons_are_the_ones_given(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        rejected = make_op("reference", triton="triton is too old", cuda="no nvcc").select("cuda").rejected
        assert rejected[Backend.TRITON] == "triton is too old"
        assert rejected[Backend.CUDA] == "no nvcc"
        assert rejected[Backend.CPU] == "runs on cpu, not on cuda"
        rejected = make_op("triton", "reference").select("cpu").rejected
        assert "interpreter" in rejected[Backend.TRITON]
        assert rejected[Backend.CPU] == "not implemented for this operation"

    def test_triton_runs_on_a_cpu_only_when_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        op = make_op("triton", "reference")
        assert op(torch.zeros(1)) == "reference"
        assert op.select("cpu").rejected[Backend.TRITON] == "only when asked for by name"
        with registry.use_backend("triton"):
            assert op(torch.zeros(1)) == "triton"

    def test_nothing_fits(self) -> None:
        op = make_op("cuda", cpu="no compiler")
        with pytest.raises(
            BackendUnavailableError, match=rf"{op.name} cannot run on cpu .*cpu: no compiler; reference: not"
        ):
            op.resolve("cpu")

    def test_choice_is_remembered_until_a_backend_joins(self) -> None:
        op = make_op("reference")
        assert op.resolve("cpu") is op.resolve("cpu")
        registry.implements(op.name, "cpu")(lambda x: "late")
        assert op(torch.zeros(1)) == "late"


class TestForcing:
    @pytest.mark.parametrize("value", ["reference", "REFERENCE", " reference "])
    def test_environment(self, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
        monkeypatch.setenv("ESPER_BACKEND", value)
        assert make_op("cpu", "reference")(torch.zeros(1)) == "reference"

    @pytest.mark.parametrize("value", ["", "auto", "Auto"])
    def test_environment_leaves_the_choice(self, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
        monkeypatch.setenv("ESPER_BACKEND", value)
        assert make_op("cpu", "reference")(torch.zeros(1)) == "cpu"

    def test_unknown_value_names_the_known_ones(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ESPER_BACKEND", "tpu")
        with pytest.raises(ValueError, match="'tpu': expected auto, triton, cuda, cpu, reference"):
            make_op("cpu")(torch.zeros(1))

    def test_backend_that_cannot_run_is_an_error_not_a_fallback(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ESPER_BACKEND", "cuda")
        with pytest.raises(BackendUnavailableError, match=r"runs on cuda, not on cpu.*Unset ESPER_BACKEND"):
            make_op("cuda", "cpu", "reference")(torch.zeros(1))

    def test_context_manager_nests_and_restores(self) -> None:
        op = make_op("cpu", "reference")
        with registry.use_backend("reference"):
            assert op(torch.zeros(1)) == "reference"
            with registry.use_backend(Backend.CPU):
                assert op(torch.zeros(1)) == "cpu"
            assert op(torch.zeros(1)) == "reference"
        assert op(torch.zeros(1)) == "cpu"

    def test_context_manager_outranks_the_environment_and_restores_after_an_error(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ESPER_BACKEND", "cpu")
        op = make_op("cpu", "reference")
        with pytest.raises(RuntimeError, match="on purpose"), registry.use_backend("reference"):
            assert op(torch.zeros(1)) == "reference"
            raise RuntimeError("on purpose")
        assert op(torch.zeros(1)) == "cpu"

    def test_changed_environment_counts_after_forgetting(self, monkeypatch: pytest.MonkeyPatch) -> None:
        op = make_op("cpu", "reference")
        assert op(torch.zeros(1)) == "cpu"
        monkeypatch.setenv("ESPER_BACKEND", "reference")
        registry.forget_choices()
        assert op(torch.zeros(1)) == "reference"


class TestAnnouncements:
    def test_gpu_fallback_warns_once_with_every_reason(self) -> None:
        first, second = (make_op("reference", triton="t is gone", cuda="c is gone") for _ in range(2))
        with pytest.warns(RuntimeWarning, match=r"slower backend reference \(triton: t is gone; cuda: c is gone\)"):
            first.resolve("cuda")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            first.resolve("cuda")
            second.resolve("cuda")

    def test_another_reason_is_another_warning(self) -> None:
        with pytest.warns(RuntimeWarning, match="t is gone"):
            make_op("cuda", triton="t is gone").resolve("cuda")
        with pytest.warns(RuntimeWarning, match="slower backend cuda .*t is broken"):
            make_op("cuda", triton="t is broken").resolve("cuda")

    @pytest.mark.parametrize(("device", "available"), [("cuda", "triton"), ("cpu", "cpu"), ("cpu", "reference")])
    def test_silent_where_nothing_is_lost_or_no_gpu_is_idle(self, device: str, available: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make_op(available).resolve(device)

    def test_silent_when_asked_for(self) -> None:
        with warnings.catch_warnings(), registry.use_backend("reference"):
            warnings.simplefilter("error")
            make_op("reference", triton="t is gone").resolve("cuda")


class TestNames:
    def test_declared_twice(self) -> None:
        op = make_op()
        with pytest.raises(ValueError, match="declared twice"):
            registry.define(op.name, "(Tensor x) -> Tensor", doc="again")

    def test_name_is_an_identifier(self) -> None:
        with pytest.raises(ValueError, match=r"'lattice\.step': expected an identifier"):
            registry.define("lattice.step", "(Tensor x) -> Tensor", doc="")

    def test_unknown_name_lists_the_known(self) -> None:
        op = make_op()
        registrations: list[Callable[[], object]] = [
            lambda: registry.get("nothing"),
            lambda: registry.implements("nothing", "cpu")(print),
            lambda: registry.unavailable("nothing", "cpu", "why"),
        ]
        for call in registrations:
            with pytest.raises(KeyError, match=f"unknown operation 'nothing'; known: {op.name}"):
                call()

    def test_unknown_backend(self) -> None:
        with pytest.raises(ValueError, match="'tpu' is not a valid Backend"):
            registry.implements(make_op().name, "tpu")(print)

    def test_backend_by_name_or_the_reason(self) -> None:
        op = make_op("cpu", triton="too old")
        assert op.backend("cpu")(None) == "cpu"
        with pytest.raises(BackendUnavailableError, match="triton is not available: too old"):
            op.backend("triton")

    def test_call_without_a_tensor(self) -> None:
        with pytest.raises(TypeError, match="at least one tensor"):
            make_op("cpu")(3)

    def test_device_is_found_in_lists_and_keywords(self) -> None:
        op = make_op("cpu", "reference")
        registry.implements(op.name, "cpu")(lambda *args, **kwargs: "cpu")
        assert op(3, [torch.zeros(1)]) == "cpu"
        assert op(scale=2.0, x=torch.zeros(1)) == "cpu"


class TestDispatcher:
    """An op with a ``fake`` is PyTorch's as well."""

    @pytest.fixture
    def double(self) -> Op:
        op = registry.define(
            f"registry_test_{next(_NUMBER)}",
            "(Tensor x, float by=2.0) -> Tensor",
            doc="a test",
            fake=lambda x, by=2.0: torch.empty_like(x),
        )
        registry.implements(op.name, "reference")(lambda x, by=2.0: x * by)
        # A backend that reads memory by address, as the C++ ones do: it cannot be traced into.
        registry.implements(op.name, "cpu")(lambda x, by=2.0: torch.from_numpy(x.detach().numpy() * by))
        return op

    def test_both_ways_reach_the_selected_backend(self, double: Op) -> None:
        x = torch.arange(3.0)
        assert double.overload is not None
        for call in (double, double.overload, getattr(torch.ops.esper, double.name)):
            assert torch.equal(call(x), x * 2)
            assert torch.equal(call(x, 3.0), x * 3)
        registry.implements(double.name, "reference")(lambda x, by=2.0: x - by)
        with registry.use_backend("reference"):
            assert torch.equal(double.overload(x), x - 2)

    def test_opcheck(self, double: Op) -> None:
        # Reports on itself: schema, fake tensors, dispatch under AOT autograd.
        torch.library.opcheck(double.overload, (torch.randn(3, 4),), {"by": 0.5})

    def test_compiles_without_graph_break(self, double: Op) -> None:
        compiled = torch.compile(lambda x: double(x + 1) - 1, fullgraph=True, backend="aot_eager")
        x = torch.randn(5)
        assert torch.equal(compiled(x), (x + 1) * 2 - 1)

    def test_without_a_fake_there_is_no_overload(self) -> None:
        op = make_op("cpu")
        assert op.overload is None
        assert not hasattr(torch.ops.esper, op.name)

    def test_bad_schema_leaves_nothing_behind(self) -> None:
        name = f"registry_test_{next(_NUMBER)}"
        with pytest.raises(RuntimeError):
            registry.define(name, "(Tensor x) -> Tonsor", doc="", fake=lambda x: x)
        assert name not in registry.names()
