"""The compiler in a process of its own: what it is given, and how its failures come back."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from esper.ops import toolchain
from esper.ops.toolchain import Request, ToolchainError, compile_request, tune_request

LOWRANK = Request("lowrank", None, None, 8, False, True, ("bf16",), (80,))


def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str) -> None:
    """A program in the compiler's place, to see how the parent takes what it does."""
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\n{program}")
    script.chmod(0o755)
    monkeypatch.setattr(toolchain.sys, "executable", str(script))


def test_the_child_sees_little_of_the_environment(monkeypatch, tmp_path):
    for name in ("TRITON_INTERPRET", "TRITON_CACHE_DIR", "PTXAS_OPTIONS", "USE_IR_LOC", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    stand_in(
        monkeypatch,
        tmp_path,
        "import json, os, sys\njson.dump({'env': dict(os.environ), 'in': json.load(sys.stdin), 'built': []}, "
        f"open({str(tmp_path / 'seen')!r}, 'w'))\nprint(json.dumps(dict(built=[])))",
    )
    assert compile_request(LOWRANK) == []
    seen = json.loads((tmp_path / "seen").read_text())
    assert seen["in"]["family"] == "lowrank"
    environment = seen["env"]
    assert environment.keys().isdisjoint({"TRITON_INTERPRET", "PTXAS_OPTIONS", "USE_IR_LOC", "AWS_SECRET_ACCESS_KEY"})
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["TRITON_CACHE_DIR"] not in ("x", "")
    # The cache was empty, and it is gone.
    assert not os.path.exists(environment["TRITON_CACHE_DIR"])


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import os; os.abort()", "the compiler was ended by signal 6: it said nothing"),
        ("import sys; print('a\\nLLVM ERROR: why', file=sys.stderr); sys.exit(3)", "ended with 3: a LLVM ERROR: why"),
        ('print(\'{"error": "demo_kernel does not compile"}\')', "demo_kernel does not compile"),
        ("print('half an ans')", "the compiler ended with 0"),
    ],
)
def test_failures_of_the_child_are_told(monkeypatch, tmp_path, program, message):
    stand_in(monkeypatch, tmp_path, program)
    with pytest.raises(ToolchainError, match=message):
        compile_request(LOWRANK)


def test_what_the_child_notes_is_warned_of(monkeypatch, tmp_path):
    stand_in(monkeypatch, tmp_path, "import json; print(json.dumps(dict(built=[], notes=['demo_kernel spills'])))")
    with pytest.warns(RuntimeWarning, match="^demo_kernel spills$"):
        compile_request(LOWRANK)


def test_spills_without_a_reason_are_noted(monkeypatch):
    from esper.kernels import graft_bank

    def build(variant, dtype, arch):
        return SimpleNamespace(kernel=variant.kernel.__name__, spills=8 if variant.direction == "forward" else 0)

    monkeypatch.setattr(toolchain, "build_variant", build)
    built, notes = toolchain._build(LOWRANK)
    assert (len(built), len(notes)) == (6, 3)
    assert "graft_bank_kernel (bf16, sm_80) spills 8 bytes a thread" in notes[0]
    monkeypatch.setattr(graft_bank, "AOT_SPILLS", {"graft_bank_kernel": "it is a test"}, raising=False)
    assert toolchain._build(LOWRANK)[1] == notes[1:]


def test_a_compiler_that_hangs_is_stopped(monkeypatch, tmp_path):
    stand_in(monkeypatch, tmp_path, "import time; time.sleep(60)")
    with pytest.raises(ToolchainError, match=r"took longer than 0\.2 seconds"):
        compile_request(LOWRANK, timeout_s=0.2)


def test_tuning_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(toolchain.native, "driver", lambda: None)
    monkeypatch.setattr(toolchain.native, "driver_reason", lambda: "no such thing")
    with pytest.raises(ToolchainError, match=r"needs a GPU .* \(no such thing\); pipeline 'standard' compiles"):
        tune_request(LOWRANK, present=(), d_in=8, d_out=8)


def test_tuning_is_for_the_present_gpu_only(monkeypatch):
    class Driver:
        def capability(self, device: int) -> tuple[int, int]:
            return (9, 0)

    monkeypatch.setattr(toolchain.native, "driver", Driver)
    with pytest.raises(ToolchainError, match="which is sm_90, and not for sm_80, sm_90"):
        tune_request(LOWRANK, present=(80, 90), d_in=8, d_out=8)


@pytest.mark.aot
def test_an_architecture_that_crashes_the_compiler_ends_in_an_error_here():
    with pytest.raises(ToolchainError, match=r"the compiler was ended by signal|does not compile"):
        compile_request(replace(LOWRANK, architectures=(93,)))


def test_widths_that_are_no_multiples_of_16_have_kernels_of_their_own():
    for aligned in (True, False):
        found = toolchain.kernels_for(replace(LOWRANK, aligned=aligned), "bf16")
        assert {each.constants["ALIGNED"] for each in found if "ALIGNED" in each.constants} == {aligned}


def test_neighbours_change_one_value_each():
    from esper.ops.graft.variants import KernelVariant
    from esper.ops.tuning import CANDIDATES, neighbours

    constants = {"ACT": 1, "BLOCK_M": 64, "BLOCK_R": 64}
    variant = KernelVariant(None, "forward", {}, constants, {"num_warps": 4})
    found = dict(neighbours(variant))
    assert set(found) == {"BLOCK_M", "num_warps", "num_stages"}
    assert [each.constants["BLOCK_M"] for each in found["BLOCK_M"]] == [16, 32, 128]
    assert [each.options["num_warps"] for each in found["num_warps"]] == [2, 8]
    assert len(found["num_stages"]) == len(CANDIDATES["num_stages"])
    assert all(each.constants["BLOCK_R"] == 64 and each.constants["ACT"] == 1 for each in found["BLOCK_M"])


def test_a_candidate_runs_for_a_while_before_it_is_timed(monkeypatch):
    """Its compiler kept the GPU waiting, whose clocks go down meanwhile."""
    from esper.ops import tuning

    now, began = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]
            began.append(self.at)

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    def run():
        now[0] += 0.002

    monkeypatch.setattr(tuning.torch.cuda, "Event", Event)
    monkeypatch.setattr(tuning.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: now[0])
    assert tuning.time_of(tuning.Workload(run, "bf16")) == pytest.approx(2.0)
    assert 0.05 <= began[0] <= 0.06


def test_the_best_of_each_value_is_kept_if_its_results_agree(monkeypatch):
    """The search alone, on a made-up table of costs; that a GPU is measured is the next test's."""
    from esper.ops import tuning
    from esper.ops.graft.variants import KernelVariant

    right, wrong = [torch.ones(4)], [torch.ones(4) * 3]

    def build(variant, dtype, arch):
        if variant.options.get("num_stages") == 4:
            raise ToolchainError("too much shared memory")
        return SimpleNamespace(constants=variant.constants, options=variant.options, kernel="demo", dtype=dtype)

    def measure(load, built):
        cost = abs(built.constants["BLOCK_M"] - 32) / 32 + abs(built.options["num_warps"] - 8) + 1.0
        if built.constants["BLOCK_M"] == 16:
            return wrong, 0.0  # fastest of all, and not what was asked for
        if built.options.get("num_stages") == 3:
            return right, cost * 0.99  # noise
        return right, cost

    monkeypatch.setattr(tuning, "build_variant", build)
    monkeypatch.setattr(tuning, "_measure", measure)
    monkeypatch.setattr(tuning, "_results", lambda load: right)
    variant = KernelVariant(None, "forward", {}, {"BLOCK_M": 64, "BLOCK_R": 64}, {"num_warps": 4})
    best = tuning._best(variant, tuning.Workload(lambda: right, "bf16"), 90)
    assert best.constants == {"BLOCK_M": 32, "BLOCK_R": 64}
    assert best.options == {"num_warps": 8}
    monkeypatch.setattr(tuning, "_measure", lambda load, built: (wrong, 1.0))
    with pytest.raises(ToolchainError, match="it computes something else"):
        tuning._best(variant, tuning.Workload(lambda: right, "bf16"), 90)


@pytest.mark.parametrize(
    ("family", "norm", "biased"),
    [
        ("lowrank", None, False),
        ("bottleneck", None, True),
        ("gated", None, True),
        ("gated", "rmsnorm", False),
        ("dense", None, False),
        ("graph", None, False),
    ],
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_what_is_measured_runs(monkeypatch, family, norm, biased, direction):
    """On the CPU, by another backend: the operations take these arguments, and find no fault."""
    from esper.ops import tuning

    monkeypatch.setattr(tuning, "ROWS", 32)
    request = replace(LOWRANK, family=family, norm=norm, activation="gelu", biased=biased)
    load = tuning._workload(request, "fp32", 16, 48, direction, "cpu")
    first, *rest = load.run()
    assert len(first) == 32
    assert all(bool(each.isfinite().all()) for each in (first, *rest))
    assert tuning.agree(load.run(), load.run(), "fp32")
    assert not tuning.agree([first + 1.0], [first], "fp32")
    assert not tuning.agree([first * float("nan")], [first], "fp32")
    if direction == "forward":
        assert not rest[0].any()


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["lowrank", "dense"])
def test_tuning_on_the_gpu_of_this_machine(family):
    major, minor = torch.cuda.get_device_capability(0)
    request = replace(LOWRANK, family=family, architectures=())
    built = tune_request(request, present=(10 * major + minor,), d_in=256, d_out=256)
    assert {each.direction for each in built} == {"forward", "backward"}
    assert {each.arch for each in built} == {10 * major + minor}
    assert all(each.cubin for each in built)
