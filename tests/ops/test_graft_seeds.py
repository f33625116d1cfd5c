"""``graft_seeds`` in C++ against the reference in PyTorch, and its derivative against numbers.

Tolerances. Nothing is rounded between the sums, which run in the dtype of h in another order: an output differs by at
most n eps times the sum of its terms' sizes, n terms. With terms of size 1 and up to 64 of them in a sum of a sum, 256
eps of the largest value covers both, and chance keeps well inside. Where gradients are summed over rows, n is the
number of rows.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from esper.ops import native
from esper.ops.graft import seeds
from esper.ops.graft.seeds import ACTIVATIONS, Plan, blend_seeds, graft_seeds, graft_seeds_backward

D_IN, D_OUT = 13, 11


@pytest.fixture(autouse=True)
def _fresh_memory_is_full_of_nan() -> Iterator[None]:
    """Deterministic mode fills what torch allocates with NaN: an output left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Seed:
    rank: int
    begin: int = 0
    end: int = D_OUT
    replace: bool = False
    activation: str | None = None
    biased: bool = False
    reserved: int | None = None  # rows of its memory, where there are more than it uses
    own_width: bool = False  # its way up is as wide as its own features
    asleep: bool = False
    packed: bool = False  # as a bank lays it out: the way up by columns


class Case:
    def __init__(
        self, lines: Sequence[Seed], shape: tuple[int, ...] = (7,), dtype: torch.dtype = torch.float64, **alphas: Any
    ) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(*shape, D_IN, dtype=dtype)
        self.h, self.gy = torch.randn(2, *shape, D_OUT, dtype=dtype)
        own = alphas.get("alphas", [0.25 + 0.125 * i for i in range(len(lines))])
        #: Of a layer with a seed more that is not among these: theirs are in the other order, behind it.
        self.alpha = torch.tensor([*own, torch.nan]).flip(0)
        self.flags = torch.zeros(len(lines) + 1, dtype=torch.uint8)
        self.plan = torch.zeros(len(lines), len(Plan), dtype=torch.int32)
        self.downs, self.ups, self.biases = [], [], []
        for i, (line, seed) in enumerate(zip(self.plan, lines, strict=True)):
            memory = seed.reserved or seed.rank
            if not seed.asleep:
                code = 1 + ACTIVATIONS.index(seed.activation)
                place = [seed.begin, seed.end, int(seed.replace), int(seed.biased), len(lines) - 1 - i]
                line[:] = torch.tensor([code, seed.rank, *place])
            width = seed.end - seed.begin if seed.own_width else D_OUT
            self.downs.append(torch.randn(memory, D_IN, dtype=dtype))
            up = torch.randn(width, memory, dtype=dtype)
            self.ups.append(up.t().contiguous().t() if seed.packed else up)
            self.biases.append(torch.randn(memory, dtype=dtype))
        if not any(seed.biased for seed in lines):
            self.biases = []

    @property
    def weights(self) -> list[Tensor]:
        return [*self.downs, *self.ups, *self.biases]

    def forward(self, backend: str, plan: Tensor | None = None) -> tuple[Tensor, Tensor]:
        plan = self.plan if plan is None else plan
        y, effect = seeds.results_for(self.h, self.plan)
        graft_seeds.backend(backend)(self.x, self.h, self.alpha, self.flags, plan, self.weights, 1, y, effect)
        return y, effect

    def backward(
        self, backend: str, effect: Tensor, wants: tuple[bool, bool, bool] = (True, True, True)
    ) -> list[Tensor]:
        found = seeds.gradients_for(self.gy, self.x, self.weights, *wants)
        graft_seeds_backward.backend(backend)(self.gy, self.x, effect, self.weights, *wants, found)
        return found

    def check(self) -> list[int]:
        """Native and reference agree; the faults."""
        y, effect = self.forward("cpu")
        faults = self.faults
        self.flags.zero_()
        expected, kept = self.forward("reference")
        assert faults == self.faults
        assert torch.equal(effect, kept)
        close(y, expected)
        for one, other in zip(self.backward("cpu", effect), self.backward("reference", effect), strict=True):
            assert one.stride() == other.stride()
            close(one, other)
        return faults

    @property
    def faults(self) -> list[int]:
        """The seeds' flags in their order; of others none is raised."""
        assert self.flags[0] == 0
        found: list[int] = self.flags[1:].flip(0).tolist()
        return found


def close(got: Tensor, want: Tensor) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    if want.numel() == 0:
        return
    sound = want[torch.isfinite(want)]
    scale = max(1.0, sound.abs().max().item()) if sound.numel() else 1.0
    torch.testing.assert_close(got, want, rtol=0, atol=256 * torch.finfo(want.dtype).eps * scale, equal_nan=True)


PLAIN = [Seed(4), Seed(3, packed=True)]
MIXED = [
    Seed(3, replace=True, activation="gelu", biased=True),
    Seed(5, reserved=8),
    Seed(2, replace=True, activation="tanh"),
]
CHUNKS = [
    Seed(3, 0, 5, replace=True, own_width=True),
    Seed(2, 5, 11, activation="relu", biased=True, own_width=True, packed=True),
    Seed(4, 2, 9, reserved=6),
]
SLEEPERS = [
    Seed(3, asleep=True),
    Seed(2, biased=True, activation="silu", reserved=5),
    Seed(4, asleep=True, biased=True),
]
KINDS = {"plain": PLAIN, "mixed": MIXED, "chunks": CHUNKS, "sleepers": SLEEPERS, "one": [Seed(1)]}
kinds = pytest.mark.parametrize("lines", KINDS.values(), ids=KINDS.keys())


def test_it_is_native_here() -> None:
    """Without the C++ kernels the rest of this file would compare the reference with itself."""
    assert graft_seeds.reason("cpu") == ""
    assert seeds.compiled_here()


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(7,), (), (2, 3, 5), (1,), (0,), (3, 0)], ids=str)
def test_as_the_reference(shape: tuple[int, ...], dtype: torch.dtype, lines: list[Seed]) -> None:
    Case(lines, shape, dtype).check()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str | None) -> None:
    Case([Seed(3, activation=activation, biased=True), Seed(2)]).check()


@kinds
def test_strided_tensors(lines: list[Seed]) -> None:
    case = Case(lines, (4, 6))
    case.x = torch.randn(D_IN, 6, 4, dtype=torch.float64).permute(2, 1, 0)
    case.h = torch.randn(4, 6, 2 * D_OUT, dtype=torch.float64)[..., ::2]
    case.gy = torch.randn(1, 1, D_OUT, dtype=torch.float64).expand(4, 6, D_OUT)
    case.downs = [torch.cat([t, t], 1)[:, ::2] for t in case.downs]
    case.check()


@pytest.mark.parametrize("wants", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_only_what_is_wanted(wants: tuple[bool, bool, bool]) -> None:
    case = Case(MIXED)
    _, effect = case.forward("cpu")
    found = case.backward("cpu", effect, wants)
    assert len(found) == (len(case.weights) if wants[2] else 1)
    for got, want in zip(found, case.backward("reference", effect, wants), strict=True):
        close(got, want)


def test_side_by_side_parameters_are_read_where_they_are() -> None:
    """The same numbers, whether gathered or not; a bank's buffer is laid out so."""
    apart = Case([Seed(3), Seed(2), Seed(4)])
    buffer = torch.zeros(9 * (D_IN + D_OUT), dtype=torch.float64)
    together = Case([Seed(3), Seed(2), Seed(4)])
    row = 0
    for i, down in enumerate(apart.downs):
        rank = down.shape[0]
        together.downs[i] = buffer[row * D_IN :][: rank * D_IN].view(rank, D_IN).copy_(down)
        up = buffer[9 * D_IN + row * D_OUT :][: rank * D_OUT].view(rank, D_OUT).t()
        together.ups[i] = up.copy_(apart.ups[i])
        row += rank
    assert torch.equal(apart.forward("cpu")[0], together.forward("cpu")[0])
    together.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_many_rows_are_shared_by_threads(dtype: torch.dtype) -> None:
    """Above 2^21 multiply-adds; the sums over rows are made in the threads' order, so twice is the same twice."""
    case = Case([Seed(8), Seed(8, activation="tanh")], (9000,), dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        y, effect = case.forward("cpu")
        grads = case.backward("cpu", effect)
        again = case.backward("cpu", effect)
        torch.set_num_threads(1)
        alone, _ = case.forward("cpu")
        single = case.backward("cpu", effect)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(y, alone)
    assert case.faults == [0, 0]
    assert torch.equal(grads[0], single[0])
    for one, other, repeated in zip(grads[2:], single[2:], again[2:], strict=True):
        assert torch.equal(one, repeated)
        # A sum of 9000 products of numbers of size 1 has size 95; its error is at most 9000 eps of the sum of sizes,
        # and by chance their root.
        torch.testing.assert_close(one, other, rtol=0, atol=9000 * torch.finfo(dtype).eps * 10)


# -- faults -----------------------------------------------------------------------------------------------------------


def test_a_seed_at_fault_is_found_and_contained() -> None:
    case = Case(MIXED)
    case.ups[1][4, 2] = torch.nan
    assert case.check() == [0, 1, 0]
    y, effect = case.forward("cpu")
    assert torch.equal(y, case.h)
    gx, gh, *rest = case.backward("cpu", effect)
    assert torch.equal(gh, case.gy)
    assert all(torch.count_nonzero(t) == 0 for t in (gx, *rest))


def test_overflow_is_the_largest_contributions_fault() -> None:
    case = Case(PLAIN, dtype=torch.float32)
    case.ups[0][:] = 1e38
    case.downs[0][:] = 10.0
    assert case.check() == [1, 0]
    case = Case(PLAIN, dtype=torch.float32, alphas=[1.0, 1.0])
    for i, size in enumerate((3e38, 2e38)):  # only their sum breaks
        case.x[:] = 1.0
        case.downs[i][:] = 0.0
        case.downs[i][0, 0] = 1.0
        case.ups[i][:] = 0.0
        case.ups[i][:, 0] = size
    assert case.check() == [1, 0]


def test_a_fault_stays_on_record() -> None:
    case = Case(PLAIN)
    case.ups[0][0, 0] = torch.nan
    case.forward("cpu")
    case.ups[0][0, 0] = 0.0
    case.forward("cpu")
    assert case.faults == [1, 0]


def test_a_broken_tap_or_host_is_nobodys_fault() -> None:
    case = Case(PLAIN)
    case.x[3, 2] = torch.inf
    assert case.check() == [0, 0]
    case = Case(PLAIN)
    case.h[3, 2] = torch.nan
    assert case.check() == [0, 0]


@pytest.mark.parametrize("how", ["asleep", "alpha 0", "beyond its rank", "beyond its features"])
def test_what_is_off_is_not_read(how: str) -> None:
    case = Case([Seed(3, 2, 7, reserved=5), Seed(2)])
    if how == "asleep":
        case.plan[0] = 0
    if how == "alpha 0":
        case.alpha[1 + case.plan[0, Plan.ROW]] = 0.0
    if how in ("asleep", "alpha 0"):
        case.downs[0][:], case.ups[0][:] = torch.nan, torch.nan
    if how == "beyond its rank":
        case.downs[0][3:], case.ups[0][:, 3:] = torch.nan, torch.nan
    if how == "beyond its features":
        case.ups[0][:2], case.ups[0][7:] = torch.nan, torch.nan
    y, effect = case.forward("cpu")
    assert case.faults == [0, 0]
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(t).all() for t in case.backward("cpu", effect))


def test_with_all_asleep_h_comes_back_bit_for_bit() -> None:
    case = Case([Seed(3, asleep=True), Seed(2)], alphas=[0.5, 0.0])
    case.h[0, 0] = -0.0
    y, effect = case.forward("cpu")
    assert torch.equal(y.view(torch.int64), case.h.view(torch.int64))
    gx, gh, *_ = case.backward("cpu", effect)
    assert torch.equal(gh, case.gy)
    assert torch.count_nonzero(gx) == 0


# -- in PyTorch -------------------------------------------------------------------------------------------------------


@kinds
def test_gradcheck(lines: list[Seed]) -> None:
    case = Case(lines, (3,))
    tensors = [case.x, case.h, *case.downs, *case.ups, *case.biases]
    for t in tensors:
        t.requires_grad_()

    def run(x: Tensor, h: Tensor, *weights: Tensor) -> Tensor:
        return blend_seeds(x, h, case.alpha, case.flags, case.plan, weights, 1, any(s.replace for s in lines))

    torch.autograd.gradcheck(run, tensors)


@kinds
def test_opcheck(lines: list[Seed]) -> None:
    case = Case(lines)
    results = seeds.results_for(case.h, case.plan)
    torch.library.opcheck(
        graft_seeds.overload, (case.x, case.h, case.alpha, case.flags, case.plan, case.weights, 1, *results)
    )
    _, effect = case.forward("cpu")
    wants = True, True, True
    grads = seeds.gradients_for(case.gy, case.x, case.weights, *wants)
    torch.library.opcheck(graft_seeds_backward.overload, (case.gy, case.x, effect, case.weights, *wants, grads))


def test_memory_is_given_back() -> None:
    """What crosses into C++ is owned there: nothing may stay behind, also where a call fails."""
    case = Case([Seed(64), Seed(64, activation="relu", biased=True)], (4000,))
    bad = case.plan.clone()
    bad[0, Plan.RANK] = 65

    def work() -> None:
        for _ in range(30):
            _, effect = case.forward("cpu")
            case.backward("cpu", effect)
            with pytest.raises(RuntimeError):
                case.forward("cpu", plan=bad)

    work()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()
    work()
    # One leaked tensor of h's size a call would be 60 times 350 KB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 * 1024


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: setattr(c, "plan", c.plan.long()), "plan must be int32"),
        (lambda c: setattr(c, "plan", c.plan[:, :6]), "plan must be int32"),
        (lambda c: setattr(c, "plan", c.plan[:1]), "one up"),
        (lambda c: c.plan[1].__setitem__(Plan.ROW, 2), "has no alpha"),
        (lambda c: c.plan[1].__setitem__(Plan.ROW, -2), "has no alpha"),
        (lambda c: c.plan[0].__setitem__(Plan.CODE, 8), "unknown activation"),
        (lambda c: c.plan[0].__setitem__(Plan.RANK, 9), "does not fit its weights"),
        (lambda c: c.plan[0].__setitem__(Plan.RANK, -1), "does not fit its weights"),
        (lambda c: c.plan[0].__setitem__(Plan.END, D_OUT + 1), "does not fit its weights"),
        (lambda c: c.plan[0].__setitem__(Plan.BIASED, 1), "there are none"),
        (lambda c: setattr(c, "alpha", c.alpha.double()), "alpha must be a row of float32"),
        (lambda c: setattr(c, "alpha", c.alpha[:1]), "one for each alpha"),
        (lambda c: setattr(c, "flags", c.flags.int()), "flags must be uint8"),
        (lambda c: setattr(c, "x", c.x.float()), "one dtype"),
        (lambda c: setattr(c, "x", c.x[:3]), "one dtype"),
        (lambda c: setattr(c, "ups", c.ups[:1]), "one up"),
        (lambda c: c.ups.__setitem__(0, c.ups[0][:4]), "as many features"),
        (lambda c: c.downs.__setitem__(0, c.downs[0].float()), "dtype of h"),
        (lambda c: c.downs.__setitem__(0, c.downs[0][:, :4]), "do not fit x and h"),
    ],
)
def test_what_does_not_fit_is_refused(change: Any, match: str) -> None:
    case = Case(PLAIN)
    change(case)
    with pytest.raises(RuntimeError, match=match):
        case.forward("cpu")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda y, effect: (y.float(), effect), "y must be"),
        (lambda y, effect: (y[:, :4], effect), "y must be"),
        (lambda y, effect: (y.t().contiguous().t(), effect), "y must be"),
        (lambda y, effect: (y, effect.long()), "effect must be"),
        (lambda y, effect: (y, effect[:1]), "effect must be"),
        (lambda y, effect: (y, effect[:, :7]), "effect must be"),
    ],
)
def test_results_that_do_not_fit_are_refused(change: Any, match: str) -> None:
    case = Case(PLAIN)
    results = change(*seeds.results_for(case.h, case.plan))
    with pytest.raises(RuntimeError, match=match):
        graft_seeds.overload(case.x, case.h, case.alpha, case.flags, case.plan, case.weights, 1, *results)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda grads: grads[:-1], "as many gradients"),
        (lambda grads: [grads[0][:, :4], *grads[1:]], "a gradient must be"),
        (lambda grads: [grads[0].t().contiguous().t(), *grads[1:]], "a gradient must be"),
        (lambda grads: [*grads[:-1], grads[-1].float()], "a gradient must be"),
        (lambda grads: [*grads[:-1], grads[-1][:4]], "a gradient must be"),
    ],
)
def test_gradients_that_do_not_fit_are_refused(change: Any, match: str) -> None:
    case, wants = Case(PLAIN), (True, True, True)
    _, effect = case.forward("cpu")
    grads = change(seeds.gradients_for(case.gy, case.x, case.weights, *wants))
    with pytest.raises(RuntimeError, match=match):
        graft_seeds_backward.overload(case.gy, case.x, effect, case.weights, *wants, grads)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: setattr(c, "alpha", c.alpha.double()), "alpha is"),
        (lambda c: setattr(c, "flags", c.flags[:1]), "flags are"),
        (lambda c: c.plan[1].__setitem__(Plan.ROW, 2), "in rows"),
        (lambda c: c.plan[1].__setitem__(Plan.ROW, -2), "in rows"),
        (lambda c: c.ups.pop(), "3 weights for 2 seeds"),
    ],
)
def test_the_reference_refuses_it_too(change: Any, match: str) -> None:
    """A row of -1 would be the last seed's to PyTorch."""
    case = Case(PLAIN)
    change(case)
    with pytest.raises(ValueError, match=match):
        case.forward("reference")


def test_halves_are_refused() -> None:
    case = Case(PLAIN, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="float32 or float64"):
        case.forward("cpu")


def test_kernels_for_other_schemas_are_not_installed() -> None:
    """An extension older than the package would take the arguments for others."""
    module: Any = native.load()
    path = str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")
    schemas = {op.name: op.schema for op in (graft_seeds, graft_seeds_backward)}
    changed = schemas | {"graft_seeds": schemas["graft_seeds"].replace("Tensor[] weights", "Tensor weights")}
    assert "another graft_seeds" in module.install_torch_kernels(path, changed)
    assert "another graft_seeds" in module.install_torch_kernels(path, {})
    assert "not at /nowhere" in module.install_torch_kernels("/nowhere", schemas)


# -- past the dispatcher ----------------------------------------------------------------------------------------------


@pytest.fixture
def direct() -> tuple[Any, Any]:
    """The functions that compiled code calls; not the operations, which they are where there is no extension."""
    found = torch.ops.esper.graft_seeds.direct, torch.ops.esper.graft_seeds_backward.direct
    assert all(type(function).__name__ == "builtin_function_or_method" for function in found)
    return found


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(7,), (), (2, 3, 5), (3, 0)], ids=str)
def test_called_directly_it_is_the_same(
    shape: tuple[int, ...], dtype: torch.dtype, lines: list[Seed], direct: tuple[Any, Any]
) -> None:
    case = Case(lines, shape, dtype)
    case.downs = [torch.cat([t, t], 1)[:, ::2] for t in case.downs]
    y, effect = case.forward("cpu")
    results = seeds.results_for(case.h, case.plan)
    weights = [torch.nn.Parameter(t) for t in case.weights]  # as a graph has them
    direct[0](case.x, case.h, case.alpha, case.flags, case.plan, weights, 1, *results)
    assert torch.equal(results[0], y)
    assert torch.equal(results[1], effect)
    for wants in ((True, True, True), (False, True, False), (True, False, True)):
        grads = seeds.gradients_for(case.gy, case.x, weights, *wants)
        direct[1](case.gy, case.x, effect, weights, *wants, grads)
        for got, want in zip(grads, case.backward("cpu", effect, wants), strict=True):
            assert torch.equal(got, want)


_PLAIN_CALL = """
import torch
from esper.ops import native
from esper.ops.graft import seeds

called = []
record = lambda *args: called.append(args)
forward, backward = native.load().direct_seeds(torch.Tensor, torch.nn.Parameter, record, record)
x, h, gy = torch.randn(3, 5, 4)
plan = torch.tensor([[1, 2, 0, 4, 0, 0, 0]], dtype=torch.int32)
weights = [torch.nn.Parameter(torch.randn(2, 4)), torch.nn.Parameter(torch.randn(4, 2))]
y, effect = seeds.results_for(h, plan)
forward(x, h, torch.ones(1), torch.zeros(1, dtype=torch.uint8), plan, weights, 0, y, effect)
torch.testing.assert_close(y, h + x @ weights[0].t() @ weights[1].t())
backward(gy, x, effect, weights, True, False, True, seeds.gradients_for(gy, x, weights, True, False, True))
assert not called
"""


def test_in_a_fresh_process_it_reads_plain_tensors_itself() -> None:
    """Nothing has run before, and nothing goes to the operation: that would be right too, and as slow as before."""
    subprocess.run([sys.executable, "-c", _PLAIN_CALL], check=True, timeout=120)


def test_called_directly_faults_are_raised(direct: tuple[Any, Any]) -> None:
    case = Case(MIXED)
    case.ups[1][4, 2] = torch.nan
    y, effect = seeds.results_for(case.h, case.plan)
    direct[0](case.x, case.h, case.alpha, case.flags, case.plan, case.weights, 1, y, effect)
    assert case.faults == [0, 1, 0]
    assert torch.equal(y, case.h)


def test_what_it_cannot_read_goes_to_the_operation(direct: tuple[Any, Any]) -> None:
    """Fake tensors have no memory; a tuple in place of the list is for the operation to read or to refuse."""
    case = Case(PLAIN)
    y, effect = seeds.results_for(case.h, case.plan)
    given: list[Any] = [case.x, case.h, case.alpha, case.flags, case.plan, tuple(case.weights), 1, y, effect]
    direct[0](*given)
    assert torch.equal(y, case.forward("cpu")[0])
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) if isinstance(t, Tensor) else t for t in given]
        fake[5] = [mode.from_tensor(t) for t in case.weights]
        direct[0](*fake)
    with pytest.raises(RuntimeError, match=r"missing value|is missing"):
        direct[0](case.x)
    with pytest.raises(RuntimeError, match=r"weights|Expected a value of type"):
        direct[0](*given[:5], "weights", *given[6:])
    with pytest.raises(RuntimeError, match="one dtype"):
        direct[0](case.x.float(), *given[1:5], case.weights, *given[6:])


def test_memory_is_given_back_by_direct_calls(direct: tuple[Any, Any]) -> None:
    case = Case([Seed(64), Seed(64, activation="relu", biased=True)], (4000,))

    def work() -> None:
        for _ in range(30):
            y, effect = seeds.results_for(case.h, case.plan)
            direct[0](case.x, case.h, case.alpha, case.flags, case.plan, case.weights, 1, y, effect)
            grads = seeds.gradients_for(case.gy, case.x, case.weights, True, True, True)
            direct[1](case.gy, case.x, effect, case.weights, True, True, True, grads)

    work()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()
    work()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 * 1024
