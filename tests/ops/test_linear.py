"""``fused_linear``: the kernel (in Triton's interpreter where there is no GPU) against the library's way, and that
against autograd.

Tolerances. The library rounds h to the layer's dtype before the seeds are blended in, the kernel does not; with z
given, z is rounded once more. Everything else is summed in float32, in another order. For halves that is three
roundings of values of the largest size: 4 eps of the dtype times the scale. In float32 sums of up to 200 terms: 64 eps.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from esper.ops import choices, registry, tuning
from esper.ops.graft import graft_bank, graft_bank_backward
from esper.ops.linear import WAYS, Graft, fused_linear, kept_way, linear, reference, tune_linear
from esper.ops.linear import triton as launcher
from esper.ops.linear.reference import linear_blend
from esper.ops.linear.triton import choice_key, runs_fused
from esper.ops.stats import channel_stats

DEVICE = "cpu" if registry.triton_interprets() else "cuda"
HALVES = [torch.bfloat16, torch.float16]
KERNEL_WAYS = WAYS[1:]


@pytest.fixture(autouse=True)
def _fresh_memory_is_full_of_nan():
    """Deterministic mode fills what torch.empty hands out with NaN: an output left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_triton_serves_this_machine():
    """Without it the rest of this file would compare nothing."""
    assert fused_linear.reason(registry.Backend.TRITON) == ""


class Case:
    """A layer and its seeds: rank, first feature, one past the last (None: all), replace."""

    def __init__(self, rows, d_in, d_out, seeds=(), dtype=torch.float32, *, activation=None, graft_activation=None,
                 bias=True, graft_bias=False, alphas=None):  # fmt: skip
        def draw(*shape, scale=1.0):
            return (torch.randn(*shape, dtype=torch.float64) * scale).to(device=DEVICE, dtype=dtype)

        self.x, self.weight = draw(rows, d_in), draw(d_out, d_in, scale=d_in**-0.5)
        self.bias = draw(d_out) if bias else None
        self.gy = draw(rows, d_out)
        self.activation, self.graft_activation = activation, graft_activation if seeds else None
        ranks = sum(seed[0] for seed in seeds)
        self.alpha = self.down = self.up = self.graft_bias = None
        if seeds:
            self.down, self.up = draw(ranks, d_in, scale=d_in**-0.5), draw(ranks, d_out, scale=ranks**-0.5)
            self.graft_bias = draw(ranks, scale=0.3) if graft_bias else None
            numbers = alphas or [0.25 + 0.125 * i for i in range(len(seeds))]
            self.alpha = torch.tensor([*numbers, 9.0], device=DEVICE)  # a row of alpha that is nobody's
        self.seats, row = [], 0
        for i, (rank, begin, end, replace) in enumerate(seeds):
            self.seats += [i, begin or 0, d_out if end is None else end, int(replace), row, row + rank]
            row += rank

    @property
    def arguments(self):
        graft = self.alpha, self.down, self.up, self.graft_bias, self.seats, self.graft_activation
        return self.x, self.weight, self.bias, self.activation, *graft

    def run(self, way, keep=True, stats=True):
        return runs_fused(way, *self.arguments, keep, stats)

    def graft(self):
        if self.alpha is None:
            return None
        return Graft(self.alpha, self.down, self.up, self.graft_bias, self.seats, self.graft_activation)

    def check(self, ways=KERNEL_WAYS):
        want, before, _, faults = self.run("library")
        for way in ways:
            y, p, stats, found = self.run(way)
            assert found.tolist() == faults.tolist()
            assert_close(y, want)
            assert_close(p, before)
            # Of what was stored, so that they can be compared with PyTorch's on the same numbers.
            exact, _ = channel_stats.backend("reference")(y, 1, -1)
            assert torch.equal(stats[[0, 4]], exact[[0, 4]])
            scale = max(1.0, float(y.float().abs().max()))
            torch.testing.assert_close(stats[1], exact[1], rtol=0, atol=4e-6 * scale)
            torch.testing.assert_close(stats[2], exact[2], rtol=1e-5, atol=1e-5 * scale**2)
            assert torch.equal(stats[3], exact[3])
        return want


def assert_close(got, want):
    assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device)
    if want.numel() == 0:
        return
    finite = want[torch.isfinite(want)]
    scale = max(1.0, finite.abs().max().item()) if finite.numel() else 1.0
    allowed = (64 if want.dtype is torch.float32 else 4) * torch.finfo(want.dtype).eps * scale
    torch.testing.assert_close(got, want, rtol=0, atol=allowed, equal_nan=True)


@pytest.fixture
def chosen(tmp_path, monkeypatch):
    """The process's choices in a folder of their own."""
    own = choices.Choices(tmp_path)
    monkeypatch.setattr(launcher, "CHOICES", own)
    return own


PLAIN = [(4, None, None, False)]
MIXED = [(3, None, None, True), (5, None, None, False), (2, None, None, True)]
CHUNKS = [(3, 0, 5, True), (2, 5, 41, False), (4, None, None, True)]
#: Chunks alone, with features that nobody changes behind them.
APART = [(3, 0, 5, True), (5, 5, 30, False), (2, 0, 5, False)]


@pytest.mark.parametrize(
    ("dtype", "seeds"),
    [
        *((torch.float32, seeds) for seeds in ([], PLAIN, MIXED, CHUNKS)),
        *((dtype, CHUNKS) for dtype in HALVES),
    ],
    ids=str,
)
def test_odd_sizes(dtype, seeds):
    Case(35, 37, 41, seeds, dtype).check()


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "tanh", "sigmoid", "silu"])
def test_activations(activation):
    Case(9, 13, 11, MIXED, activation=activation, graft_activation=activation, graft_bias=True).check(("inline",))


@pytest.mark.parametrize(
    ("rows", "rank", "dtype"), [(20, 8, torch.bfloat16), (70, 30, torch.bfloat16), (130, 60, torch.float16)]
)
def test_aligned_with_several_tiles(rows, rank, dtype):
    """The variant that is told of multiples of 16, with few rows and with many, ranks of every class."""
    case = Case(rows, 48, 80, [(rank, 0, 48, True), (4, 48, 80, False)], dtype, activation="silu")
    case.check(("inline",) if rank == 60 else ("given",))


def test_programs_take_several_tiles_in_turns():
    """Blocks of rows in groups of eight, the last of them not full."""
    Case(290, 5, 40, PLAIN, bias=False).check(("inline",))


def test_strided_and_leading_dimensions():
    case = Case(12, 10, 8, MIXED)
    wide = torch.randn(12, 23, device=DEVICE)
    case.x = wide[:, 5:15].unflatten(0, (3, 4))
    case.weight = torch.randn(10, 8, device=DEVICE).t()
    case.check()


@pytest.mark.parametrize("rows", [0, 1])
def test_empty_and_single(rows):
    case = Case(rows, 7, 9, PLAIN)
    for way in WAYS:
        y, before, features, faults = case.run(way)
        assert y.shape == before.shape == (rows, 9) and features.shape == (5, 9) and faults.tolist() == [0]
        assert features[0].tolist() == [rows] * 9


@pytest.mark.parametrize("way", KERNEL_WAYS)
def test_all_asleep_is_the_host_bit_for_bit(way):
    awake = Case(35, 37, 41, MIXED, activation="gelu", alphas=[0.0, 0.0, 0.0])
    awake.down[0], awake.up[1] = float("nan"), float("inf")
    bare = Case(35, 37, 41, activation="gelu")
    bare.x, bare.weight, bare.bias = awake.x, awake.weight, awake.bias
    assert torch.equal(awake.run(way)[0], bare.run("inline")[0])


@pytest.mark.parametrize("way", KERNEL_WAYS)
def test_a_sleeping_seed_is_not_read(way):
    case = Case(9, 13, 41, MIXED, graft_bias=True, graft_activation="tanh", alphas=[0.5, 0.0, 0.25])
    case.down[3:8], case.up[3:8], case.graft_bias[3:8] = float("nan"), float("inf"), float("nan")
    y, _, _, faults = case.run(way)
    assert torch.isfinite(y).all() and not faults.any()
    assert_close(y, case.run("library")[0])


@pytest.mark.parametrize("way", KERNEL_WAYS)
def test_a_replaced_host_is_not_added(way):
    case = Case(9, 13, 41, [(3, None, None, True)], alphas=[1.0])
    case.bias[:] = float("nan")
    y, _, _, faults = case.run(way)
    assert not faults.any()
    assert_close(y, case.x @ case.down.t() @ case.up)


FAULTS = {
    "weight": lambda c: c.up[4].__setitem__(7, float("nan")),
    "overflow of a seed": lambda c: (c.down[3:8].mul_(1e38), c.x.mul_(100)),
    "host": lambda c: c.bias.__setitem__(1, float("inf")),
    "input": lambda c: c.x[2].__setitem__(1, float("nan")),
    "host and weight": lambda c: (c.bias.__setitem__(1, float("nan")), c.down[9].__setitem__(0, float("inf"))),
    # h stays finite: features that no seed changes must not be touched by what the seeds make of it.
    "inf input with sigmoid": lambda c: (c.x[2].__setitem__(1, float("inf")), setattr(c, "activation", "sigmoid")),
}


@pytest.mark.parametrize("way", KERNEL_WAYS)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("seeds", [MIXED, APART], ids=["layer", "chunks"])
def test_faults(fault, way, seeds):
    case = Case(20, 13, 41, seeds, activation="relu")
    FAULTS[fault](case)
    y, _, _, faults = case.run(way)
    want, _, _, expected = case.run("library")
    assert faults.tolist() == expected.tolist()
    assert_close(y, want)
    assert faults.any() == (fault not in ("host", "input", "inf input with sigmoid"))
    if faults.any():
        # h of this kernel: the host without seeds.
        bare = Case(20, 13, 41, activation="relu")
        bare.x, bare.weight, bare.bias = case.x, case.weight, case.bias
        torch.testing.assert_close(y, bare.run("inline")[0], rtol=0, atol=0, equal_nan=True)


def test_what_the_kernel_cannot_take_goes_to_the_library():
    for case in (Case(4, 3, 5, PLAIN, torch.float64), Case(4, 3, 5, [(80, None, None, False)])):
        for way in KERNEL_WAYS:
            assert torch.equal(case.run(way)[0], case.run("library")[0])


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid"])
@pytest.mark.parametrize("seeds", [[], MIXED], ids=["none", "mixed"])
def test_true_gradients(activation, seeds):
    case = Case(3, 4, 6, seeds, torch.float64, activation=activation, graft_activation="tanh", graft_bias=bool(seeds))
    leaves = [t for t in (case.x, case.weight, case.bias, case.down, case.up, case.graft_bias) if t is not None]
    for leaf in leaves:
        leaf.requires_grad_()

    def y(*_):
        return linear(case.x, case.weight, case.bias, activation, case.graft())[0]

    assert torch.autograd.gradcheck(y, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(y, leaves, fast_mode=True)
    truth = torch.autograd.grad(linear_blend(*case.arguments), leaves, case.gy)
    for got, want in zip(torch.autograd.grad(y(), leaves, case.gy), truth, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_gradients_after_a_fault_are_the_hosts():
    case = Case(6, 4, 5, MIXED, torch.float64, activation="gelu")
    leaves = [t.requires_grad_() for t in (case.x, case.weight, case.bias, case.down, case.up)]
    with torch.no_grad():
        case.up[0, 0] = float("nan")
    for create_graph in (False, True):
        y, _, faults = linear(case.x, case.weight, case.bias, "gelu", case.graft())
        assert faults.tolist() == [1, 0, 0]
        found = torch.autograd.grad(y, leaves, case.gy, create_graph=create_graph)
        h = F.gelu(F.linear(case.x, case.weight, case.bias))
        torch.testing.assert_close(found[:3], torch.autograd.grad(h, leaves[:3], case.gy), rtol=1e-12, atol=1e-12)
        assert not found[3].any() and not found[4].any()


@pytest.mark.parametrize("stats", [False, True])
def test_without_gradients_nothing_is_kept(stats):
    case = Case(6, 4, 5, activation="relu")
    y, features, faults = linear(case.x, case.weight, case.bias, "relu", stats=stats)
    torch.testing.assert_close(y, F.relu(F.linear(case.x, case.weight, case.bias)))
    assert features.shape == ((5, 5) if stats else (0,)) and faults.numel() == 0


@pytest.mark.parametrize("way", KERNEL_WAYS)
def test_autocast_changes_nothing(chosen, way):
    case = Case(6, 4, 5, PLAIN, activation="gelu")
    chosen.put(choice_key(case.x, case.weight, case.bias, "gelu", 4, None, True, False), way, case.x.device)
    run = fused_linear.backend("triton")
    want = run(*case.arguments, True, False)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = run(*case.arguments, True, False)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_alpha_with_a_stride():
    case = Case(9, 13, 41, MIXED)
    want = [case.run(way)[0] for way in KERNEL_WAYS]
    h = case.bias.expand(9, 41)
    bank = None, case.up, None, None, case.seats, None
    faults = torch.zeros(3, dtype=torch.uint8, device=DEVICE)
    forward, backward = graft_bank.backend("triton"), graft_bank_backward.backend("triton")

    def results():
        there = backward(case.gy, case.x, case.alpha, faults, case.down, *bank, True, True, True)
        return forward(case.x, h, case.alpha, case.down, *bank)[0], *there

    together = results()
    apart = torch.full((8,), float("nan"), device=DEVICE)
    apart[::2] = case.alpha
    case.alpha = apart[::2]
    assert all(torch.equal(case.run(way)[0], y) for way, y in zip(KERNEL_WAYS, want, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(results(), together, strict=True))


def test_opcheck_and_compile():
    case = Case(6, 4, 5, MIXED, activation="gelu", graft_activation="relu")
    for keep, stats in ((True, True), (False, False)):
        torch.library.opcheck(fused_linear.overload, (*case.arguments, keep, stats))
    leaves = [t.requires_grad_() for t in (case.x, case.weight, case.bias, case.down, case.up)]

    def y(x):
        return linear(x, case.weight, case.bias, "gelu", case.graft())[0]

    torch._dynamo.reset()
    compiled = torch.compile(y, fullgraph=True, backend="aot_eager")
    for alpha in (0.25, 0.5):
        with torch.no_grad():
            case.alpha.fill_(alpha)
        with torch._dynamo.config.patch(error_on_recompile=alpha == 0.5):
            got = compiled(case.x)
        torch.testing.assert_close(got, y(case.x))
        pairs = [torch.autograd.grad(out, leaves, case.gy) for out in (got, y(case.x))]
        torch.testing.assert_close(*pairs)


def test_what_does_not_fit_is_refused():
    def refused(match, **changes):
        case = Case(4, 3, 5, PLAIN)
        for name, value in changes.items():
            setattr(case, name, value)
        for way in WAYS:
            with pytest.raises(ValueError, match=match):
                case.run(way)
        with pytest.raises(ValueError, match=match):
            fused_linear.backend("triton")(*case.arguments, True, True)

    like = {"device": DEVICE}
    refused("weight is", x=torch.zeros(4, 4, **like))
    refused(r"x is \(\)", x=torch.zeros((), **like))
    refused(r"weight \(3,\)", weight=torch.zeros(3, **like))
    refused(r"down is \(\)", down=torch.zeros((), **like))
    refused(r"bias is \(4,\)", bias=torch.zeros(4, **like))
    refused("float64", weight=torch.zeros(5, 3, dtype=torch.float64, **like))
    refused(r"up is \(4, 6\)", up=torch.zeros(4, 6, **like))
    refused("a graft needs alpha", down=None)
    refused("a graft needs alpha", seats=[])
    refused("swish", activation="swish")
    with pytest.raises(ValueError, match="'fastest'"):
        Case(4, 3, 5).run("fastest")


# -- choosing ---------------------------------------------------------------------------------------------------------


def test_the_way_is_the_librarys_unless_another_was_measured_faster(chosen, monkeypatch):
    ways = []
    real = launcher.runs_fused
    monkeypatch.setattr(launcher, "runs_fused", lambda way, *rest: (ways.append(way), real(way, *rest))[1])
    case = Case(6, 4, 5, PLAIN)
    run = fused_linear.backend("triton")
    key = choice_key(case.x, case.weight, case.bias, None, 4, None, False, False)
    run(*case.arguments, False, False)
    chosen.put(key, "inline", case.x.device)
    run(*case.arguments, False, False)
    chosen.put(key, "something of a later version", case.x.device)
    run(*case.arguments, False, False)
    assert ways == ["library", "inline", "library"]


def test_choices_are_kept_on_disk_and_shared(tmp_path):
    here, there = choices.Choices(tmp_path), choices.Choices(tmp_path)
    device = torch.device("cpu")
    assert here.get("a", device) is None
    here.put("a", "inline", device)
    there.put("b", "given", device)
    assert json.loads(here.path(device).read_text()) == {"a": "inline", "b": "given"}
    assert here.get("b", device) is None  # read once
    here.forget()
    assert here.get("b", device) == "given"
    assert str(torch.__version__) in here.path(device).name


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"a": 1, "b": "given"}', "{"])
def test_a_file_that_is_not_ours_is_no_choice(tmp_path, content):
    own = choices.Choices(tmp_path)
    device = torch.device("cpu")
    own.path(device).write_text(content)
    assert own.get("a", device) is None
    own.put("a", "inline", device)
    own.forget()
    assert own.get("a", device) == "inline"


def test_a_folder_that_cannot_be_written_to_loses_only_the_file(tmp_path):
    (tmp_path / "file").write_text("")
    own = choices.Choices(tmp_path / "file")
    own.put("a", "inline", torch.device("cpu"))
    assert own.get("a", torch.device("cpu")) == "inline"


def test_a_call_asks_neither_for_the_folder_nor_twice_for_the_checks(chosen, monkeypatch):
    case = Case(6, 4, 5)
    run = fused_linear.backend("triton")
    run(*case.arguments, False, False)
    checks = []
    monkeypatch.setattr(choices.Choices, "path", lambda *_: pytest.fail("the path was built again"))
    for module in (launcher, reference):
        real = module.check_linear
        monkeypatch.setattr(module, "check_linear", lambda *rest, real=real: (checks.append(1), real(*rest))[1])
    run(*case.arguments, False, False)
    assert checks == [1]


def test_a_device_has_one_file_by_whatever_name(tmp_path, monkeypatch):
    monkeypatch.setattr(choices, "_file_name", lambda device: f"{device.type}.json")
    own = choices.Choices(tmp_path)
    assert own.get("a", torch.device("cuda:0")) is None
    own.put("a", "inline", torch.device("cuda"))
    assert own.get("a", torch.device("cuda:0")) == "inline"


def test_operations_are_imported_without_the_compiler():
    code = "import sys, esper.ops; print([m for m in ('tuning', 'toolchain') if f'esper.ops.{m}' in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_rows_are_bucketed():
    assert [choices.bucket(n) for n in (0, 1, 2, 3, 4, 5, 1000)] == [1, 1, 2, 4, 4, 8, 1024]
    case = Case(5, 4, 5)
    keys = set()
    for rows in (5, 8, 9):
        x = torch.zeros(rows, 4, device=DEVICE)
        keys.add(choice_key(x, case.weight, case.bias, None, 0, None, False, False))
    assert len(keys) == 2


def test_measuring_needs_a_gpu():
    with pytest.raises(RuntimeError, match="on a GPU, and cpu is none"):
        tune_linear(8, 4, 4, device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="on a GPU"):
            tune_linear(8, 4, 4)


def test_of_the_ways_the_fastest_that_agrees_is_kept(monkeypatch, tmp_path):
    """The decision alone, on made-up times; that a GPU is measured is the next test's."""
    from esper.ops.linear import measure

    own = choices.Choices(tmp_path)
    monkeypatch.setattr(measure, "CHOICES", own)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    costs, broken, current, used = {}, set(), ["cuda:0"], []

    @contextlib.contextmanager
    def switched(device):
        before, current[0] = current[0], str(device)
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", switched)

    def run(way, x, weight, *rest):
        used.append(current[0])
        if way in broken:
            raise MemoryError(way)
        last[0] = way
        y = torch.ones(3, dtype=torch.bfloat16)
        return (y if way != "given" else y * wrong[0]), torch.empty(0), None, None

    def time_of(load):
        load.run()
        return costs[last[0]]

    last, wrong = [""], [1.0]
    monkeypatch.setattr(measure, "runs_fused", run)
    monkeypatch.setattr(tuning, "time_of", time_of)
    monkeypatch.setattr(measure.torch, "Generator", lambda device: torch._C.Generator())
    monkeypatch.setattr(measure.torch, "randn", lambda *s, generator, device: torch.zeros(s))
    monkeypatch.setattr(measure.torch, "full", lambda s, v, device: torch.zeros(s))

    def best():
        measure.tune_linear(8, 4, 4, ranks=4)
        (kept,) = set(json.loads(own.path(torch.device("cuda")).read_text()).values())
        assert kept_way(8, 4, 4, ranks=4) == kept
        return kept

    monkeypatch.setattr(choices, "_file_name", lambda device: "test.json")
    costs.update(library=1.0, inline=0.8, given=0.7)
    assert best() == "given"
    wrong[0] = 2.0  # the fastest, and something else
    assert best() == "inline"
    costs["inline"] = 0.99  # noise
    assert best() == "library"
    assert kept_way(9, 4, 4, ranks=4) is None
    used.clear()
    measure.tune_linear(8, 4, 4, device="cuda:1")
    assert set(used) == {"cuda:1"} and current == ["cuda:0"], "events are recorded on the current device"
    broken.update(("inline", "given"))
    costs["inline"] = 0.1
    assert best() == "library"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="being captured"):
        measure.tune_linear(8, 4, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [0, 16, 64])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_ways_are_measured_and_taken(chosen, monkeypatch, ranks, activation):
    from esper.ops.linear import measure

    monkeypatch.setattr(measure, "CHOICES", chosen)
    times = tune_linear(2048, 1024, 1024, ranks=ranks, activation=activation)
    assert "library" in times and all(t > 0 for t in times.values())
    ((key, kept),) = json.loads(chosen.path(torch.device("cuda")).read_text()).items()
    assert kept in times
    ways = []
    real = launcher.runs_fused
    monkeypatch.setattr(launcher, "runs_fused", lambda way, *rest: (ways.append(way), real(way, *rest))[1])
    seeds = [(ranks, None, None, False)] if ranks else []
    case = Case(2048, 1024, 1024, seeds, torch.bfloat16, activation=activation)
    for way in (kept, *times):
        chosen.put(key, way, case.x.device)
        linear(case.x, case.weight.requires_grad_(), case.bias, activation, case.graft())
    assert ways == [kept, *times]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("rows", [1, 1000, 4096])
def test_layers_of_real_size(dtype, rows):
    """What the interpreter is too slow for. float32 products of the library must not be TF32's."""
    for seeds in ([(16, None, None, False)] * 4, [(16, 0, 512, True), (32, 512, 1024, False)], []):
        Case(rows, 768, 1024, seeds, dtype, activation="gelu").check()
