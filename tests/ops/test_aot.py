"""Every Triton kernel compiles for every GPU we promise without spilling, and the check that says so finds faults.

The compiler does not run where ``TRITON_INTERPRET`` is set, so each test starts a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from esper.ops.aot import ARCHITECTURES, differences

pytestmark = pytest.mark.aot

#: Registers and shared memory of every kernel, as they were last looked at.
RECORD = Path(__file__).parents[2] / "bench" / "results" / "kernels.json"


def compiling_environment(**extra: str) -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return environment | extra


@pytest.mark.timeout(2400)  # two hundred compilations, on machines that share their cores
def test_every_kernel_compiles_for_every_architecture() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "esper.ops.aot", "--jobs", "2", "--json", "--against", str(RECORD)],
        env=compiling_environment(),
        capture_output=True,
        text=True,
    )
    assert result.stdout, result.stderr
    report = json.loads(result.stdout)
    assert report["problems"] == []
    assert result.returncode == 0
    table = report["table"]
    assert {row["arch"] for row in table} == set(ARCHITECTURES)
    for row in table:
        # The file formats' own bound: 255 registers a thread. Of shared memory, which launchers ask for, so much that
        # two blocks fit the smallest multiprocessor (164 KiB on sm_80). A layer's own product is tiled for the
        # multiprocessor it runs on (228 KiB on sm_90 and sm_100).
        assert 0 < row["registers"] <= 255
        large = row["kernel"].startswith("fused_linear.") and row["arch"] != 80
        assert 0 <= row["shared"] <= (114 if large else 82) * 1024
        assert row["cubin_bytes"] > 0


def test_what_the_forge_ships_can_be_asked_for() -> None:
    command = [sys.executable, "-m", "esper.ops.aot", "--shipped", "--only", "graft_contain", "bf16", "--arch", "80"]
    result = subprocess.run([*command, "--json"], env=compiling_environment(), capture_output=True, text=True)
    assert result.stdout, result.stderr
    report = json.loads(result.stdout)
    assert report["problems"] == []
    assert [(row["kernel"], row["arch"]) for row in report["table"]] == [("graft_faults.graft_contain_kernel", 80)]


#: Cases that leave it to Triton whether products and sums become one instruction.
UNDECIDED = """
from esper.ops import aot
found = [*(case for module in aot.modules() for case in aot.cases(module)), *aot.shipped_cases()]
assert len(found) > 100
for case in found:
    if "enable_fp_fusion" not in case.options:
        print(case.name, case.variant)
"""


def test_every_kernel_says_whether_it_fuses() -> None:
    command = [sys.executable, "-c", UNDECIDED]
    result = subprocess.run(command, env=compiling_environment(), capture_output=True, text=True, check=True)
    assert result.stdout == ""


def test_a_changed_kernel_is_named() -> None:
    numbers = {"registers": 32, "spill_stores": 0, "spill_loads": 0, "shared": 1024, "warps": 4}
    kept = {"triton": "3.9", "kernels": {"a": {"sm_80": numbers, "sm_90": numbers}, "b": {"sm_80": numbers}}}
    assert differences(kept, kept) == []
    more = {**numbers, "registers": 40}
    now = {"triton": "3.9", "kernels": {"a": {"sm_80": numbers, "sm_90": more}, "c": {"sm_80": numbers}}}
    one, two, three = differences(now, kept)
    assert one.startswith("a on sm_90: {'registers': 40") and "'registers': 32" in one
    assert (two, three) == ("b is not compiled any more", "c is not in the record")
    assert differences({**now, "triton": "3.6"}, kept) == [two, three]  # another compiler: other numbers


def test_interpreter_is_refused() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "esper.ops.aot"],
        env=compiling_environment(TRITON_INTERPRET="1"),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert "TRITON_INTERPRET is set" in result.stderr


KERNELS = """
    import triton
    import triton.language as tl

    @triton.jit
    def good_kernel(x, n, BLOCK: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(x + i, tl.load(x + i, mask=i < n).to(tl.float32) * 2, mask=i < n)

    @triton.jit
    def forgotten_kernel(x):
        pass

    @triton.jit
    def broken_kernel(x):
        tl.store(x, undefined_name)

    @triton.jit
    def hungry_kernel(x, y, N: tl.constexpr):
        # A swap: both tiles, 32 values a thread each, are held before the first store, which might alias the loads.
        i = tl.arange(0, N)
        a = tl.load(x + i)
        b = tl.load(y + i)
        tl.store(x + i, b)
        tl.store(y + i, a)

    def helper(x):
        return x
"""

LISTS = {
    "good": ("good", "AOT = [(good_kernel, {'x': '*bf16', 'n': 'i64'}, {'BLOCK': 256}, {'num_warps': 2})]", None),
    "forgotten": ("forgotten", "AOT = []", "forgotten_kernel is launched, but AOT does not list it"),
    "broken": (
        "broken",
        "AOT = [(broken_kernel, {'x': '*fp32'}, {})]",
        "broken_kernel (fp32) does not compile for sm_80",
    ),
    "hungry": (
        "hungry",
        "AOT = [(hungry_kernel, {'x': '*fp32', 'y': '*fp32'}, {'N': 1024}, {'num_warps': 1, 'maxnreg': 24})]",
        "hungry_kernel (fp32 N=1024) spills",
    ),
    "hungry with a reason": (
        "hungry",
        "AOT = [(hungry_kernel, {'x': '*fp32', 'y': '*fp32'}, {'N': 1024}, {'num_warps': 1, 'maxnreg': 24})]\n"
        "AOT_SPILLS = {'hungry_kernel': 'it is a test'}",
        None,
    ),
    "hungry with a reason for other types": (
        "hungry",
        "AOT = [(hungry_kernel, {'x': '*fp32', 'y': '*fp32'}, {'N': 1024}, {'num_warps': 1, 'maxnreg': 24})]\n"
        "AOT_SPILLS = {'hungry_kernel fp64': 'it is a test'}",
        "hungry_kernel (fp32 N=1024) spills",
    ),
    "argument missing": (
        "good",
        "AOT = [(good_kernel, {'x': '*fp32'}, {'BLOCK': 256})]",
        "good_kernel takes x, n, BLOCK; the entry lacks ['n']",
    ),
    "argument twice": (
        "good",
        "AOT = [(good_kernel, {'x': '*fp32', 'n': 'i64', 'BLOCK': 'i32'}, {'BLOCK': 256})]",
        "names ['BLOCK', 'BLOCK'] wrongly or twice",
    ),
}


@pytest.mark.parametrize("name", LISTS)
def test_checker_finds(name: str, tmp_path: Path) -> None:
    about, listing, expected = LISTS[name]
    (tmp_path / "demo.py").write_text(textwrap.dedent(KERNELS) + listing)
    others = {f"{kind}_kernel" for kind in ("good", "forgotten", "broken", "hungry")} - {f"{about}_kernel"}
    script = f"""
        import json, demo
        from esper.ops import aot
        # Only the kernel that this case is about counts as launched.
        for other in {sorted(others)!r}:
            delattr(demo, other)
        aot.modules = lambda: [demo]
        try:
            table, problems = aot.check([80])
        except ValueError as error:
            table, problems = [], [str(error)]
        print(json.dumps([len(table), problems]))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=compiling_environment(PYTHONPATH=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    rows, problems = json.loads(result.stdout)
    if expected is None:
        assert (rows, problems) == (1, [])
    else:
        assert len(problems) == 1
        assert expected in problems[0]


def test_another_compilers_spills_are_said_and_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "demo.py").write_text(textwrap.dedent(KERNELS) + LISTS["hungry"][1])
    script = """
        import json, demo
        from pathlib import Path
        from esper.ops import aot
        for other in ("good_kernel", "forgotten_kernel", "broken_kernel"):
            delattr(demo, other)
        aot.modules = lambda: [demo]
        kept = aot.record(aot.check([80])[0])
        for version in (kept["triton"], "0.0"):
            Path("kept.json").write_text(json.dumps({**kept, "triton": version}))
            print(aot.main(["--arch", "80", "--against", "kept.json", "--json"]))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=compiling_environment(PYTHONPATH=str(tmp_path)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert [line for line in result.stdout.splitlines() if line in ("0", "1")] == ["1", "0"], result.stderr
    assert "the record is of 0.0: demo.hungry_kernel" in result.stderr
