"""``bench/run_gpu.sh`` runs on a machine without a GPU, and what it writes is whole."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from bench.gpu import PARTS, Layer, Setting, _layer_rows, measure
from bench.gpu_report import Report, Row, elsewhere, gather, main, table

SCRIPT = Path(__file__).parents[2] / "bench" / "run_gpu.sh"
CPU = torch.device("cpu")


def became(out: Path) -> dict[str, tuple[str, str]]:
    """What the summary says: by stage, what became of it, and why."""
    lines = (out / "summary.txt").read_text().splitlines()[1:]
    found = [re.fullmatch(r"(.{28}) (ok|failed|stopped|left out) +\d+  (.*)", line) for line in lines]
    assert all(found), lines
    return {line[1].strip(): (line[2], line[3]) for line in found if line}


def test_the_cpu_part_of_the_script(tmp_path: Path) -> None:
    """In short mode: the same code as with a GPU, on small cases, and without building again what the tests run on."""
    # Whoever runs this test among several processes does not hand that on: pytest-benchmark would not measure.
    environment = {
        key: value
        for key, value in os.environ.items()
        if key != "TRITON_INTERPRET" and not key.startswith("PYTEST_XDIST")
    }
    result = subprocess.run(
        ["bash", str(SCRIPT), "--cpu", "--short", "--no-build", str(tmp_path / "out")],
        env={**environment, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    stages = became(tmp_path / "out")
    assert {name: result for name, (result, _) in stages.items()} == {
        "build": "left out",
        "gpu tests": "left out",
        "promises": "ok",
        "launch: kernel_cache": "ok",
        "tests": "ok",
        "kernels": "left out",
        "bench: stats": "ok",
    }
    assert stages["gpu tests"][1] == "no GPU wanted"
    assert re.match(r"\d+ passed in ", stages["tests"][1])
    assert (tmp_path / "out" / "summary.txt").read_text() in result.stdout
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert found["failed"] == [] and found["machine"]["device"] == "cpu"
    assert {row["part"] for row in found["rows"]} == {"dormant", "lattice", "stats", "grafts", "load"}
    measured = json.loads((tmp_path / "out" / "bench.json").read_text())["benchmarks"]
    assert {entry["fullname"].partition("::")[0] for entry in measured} == {
        "bench/test_kernel_cache.py",
        "bench/test_stats.py",
    }
    assert all(row["value"] > 0 for row in found["rows"])
    for name in ("esper", "peft", "composed", "floor of bytes and operations"):
        assert any(f": {name} / bare" in row["name"] for row in found["rows"]), name
    written = (tmp_path / "out" / "gpu.md").read_text()
    assert len(written.splitlines()) == 4 + len(found["rows"])
    assert "esper" in (tmp_path / "out" / "environment.json").read_text()


class Machine:
    """One with a GPU, as far as the script can see: its Python and its nvidia-smi only say what they are asked.

    Args:
        folder: Its own.
        python: Shell, run with the arguments of each call of Python in ``$*``.
        gpu: Whether it has one.
    """

    def __init__(self, folder: Path, python: str = "", gpu: bool = True) -> None:
        self.out = folder / "out"
        self._calls = folder / "calls"
        self._program("python", folder, f'echo "$*" >>"{self._calls}"\n{python}')
        smi = 'case $1 in *compute_cap*) echo 9.0 ;; *) echo "NVIDIA Test/1" ;; esac' if gpu else "exit 9"
        self._program("nvidia-smi", folder, smi)
        self._environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(folder / "python")}
        self._environment["JOBS"] = "1"

    @staticmethod
    def _program(name: str, folder: Path, text: str) -> None:
        path = folder / name
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(SCRIPT), *arguments, str(self.out)],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    @property
    def calls(self) -> list[str]:
        """Of Python, but for looking what is installed."""
        return [line for line in self._calls.read_text().splitlines() if not line.startswith("-c ")]


def test_what_needs_the_gpu_comes_first(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    result = machine.run()
    assert result.returncode == 0, result.stdout + result.stderr
    short = [call.removeprefix("-m ").replace(str(machine.out), "OUT") for call in machine.calls]
    pytest_call = re.compile(r"pytest .*--benchmark-json=OUT/bench/(\w+)\.json bench/\1\.py")
    benches = [(number, found[1]) for number, call in enumerate(short) if (found := pytest_call.fullmatch(call))]
    tests = [(number, call) for number, call in enumerate(short) if "--ignore=tests/packaging" in call]
    order = ["lattice", "stats", "dormant", "grafts", "linear"]
    assert sorted(order) == sorted(PARTS)
    parts = [f"bench.gpu --out OUT --part {part}" for part in order]
    assert short[:2] == ["setup.py -q build_ext --inplace", "esper.cli.main env --json"]
    assert benches[:2] == [(2, "test_launch"), (3, "test_kernel_cache")]
    # Now, and not in the end: what comes next takes long.
    assert short[4] == "bench.gpu_report --out OUT"
    # What is short, the tests, and what takes minutes.
    assert short[5:8] == parts[:3]
    assert short[8] == tests[0][1] and tests[0][1].endswith(" -m gpu")
    assert short[9:11] == parts[3:]
    assert [number for number, _ in tests] == [8, 11, 12]
    assert all(" -m not gpu " in call for _, call in tests[1:])
    assert short[13].startswith("esper.ops.aot --jobs ") and "--against bench/results/kernels.json" in short[13]
    # Every file by itself, and none forgotten.
    assert sorted(name for _, name in benches) == sorted(path.stem for path in SCRIPT.parent.glob("test_*.py"))
    assert short[-1] == "bench.gpu_report --out OUT"
    assert {result for result, _ in became(machine.out).values()} == {"ok"}


def test_what_fails_stops_nothing_and_is_told(tmp_path: Path) -> None:
    machine = Machine(
        tmp_path,
        """case "$*" in
            *" -m gpu") echo "3 failed, 9 passed in 4.5s"; exit 1 ;;
            *build_ext*) exit "$ESPER_CUDA" ;;
            *"--part stats") kill -SEGV $$ ;;
            *bench/test_nn.py) echo "1 error in 0.10s"; exit 2 ;;
            *bench/test_urza.py) echo "SKIPPED [1] x.py:1: could not import 'redis': No"
                                 echo "1 skipped in 0.10s"; exit 5 ;;
        esac""",
    )
    result = machine.run()
    assert result.returncode == 1
    stages = became(machine.out)
    failed = {name: why for name, (result, why) in stages.items() if result == "failed"}
    assert failed == {
        "build": "exit 1; see build.log",
        "gpu tests": "exit 1; 3 failed, 9 passed in 4.5s",
        "promises: stats": "exit 139; see promises.log",
        "bench: nn": "exit 2; 1 error in 0.10s",
    }
    left_out = {name: why for name, (result, why) in stages.items() if result == "left out"}
    assert left_out == {"bench: urza": "1 skipped in 0.10s; without redis"}
    assert stages["build without CUDA"][0] == stages["promises: grafts"][0] == stages["tests: the rest"][0] == "ok"
    assert "3 failed, 9 passed" in (machine.out / "gpu-tests.log").read_text()


def test_what_a_package_is_missing_for_is_no_failure(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 'case "$*" in *bench/*) echo "1 skipped in 0.1s"; exit 5 ;; esac')
    assert machine.run("--only", "launch").returncode == 0
    machine = Machine(tmp_path, 'case "$*" in *"-m gpu"*) echo "2 skipped, 7 deselected in 0.1s"; exit 5 ;; esac')
    assert machine.run("--only", "gpu").returncode == 1, "with a GPU some test must run on it"
    machine = Machine(tmp_path, 'case "$*" in *find_spec*) exit 1 ;; esac')
    assert machine.run("--only=bench").returncode == 0
    assert became(machine.out)["bench"] == ("left out", "could not import 'pytest_benchmark'")


def test_single_stages(tmp_path: Path) -> None:
    machine = Machine(tmp_path, gpu=False)
    assert machine.run("--only", "gpu,kernels", "--only=promises").returncode == 0
    # In their order, however they are named.
    modules = [call.split()[1] for call in machine.calls]
    assert modules == ["esper.cli.main", *["bench.gpu"] * len(PARTS), "esper.ops.aot"]
    stages = became(machine.out)
    assert stages["gpu tests"] == ("left out", "no GPU")
    assert stages["build"] == stages["tests"] == ("left out", "not among --only")
    assert machine.run("--only", "grafts").returncode == 0
    assert [call.split()[-1] for call in machine.calls if "--part" in call][len(PARTS) :] == ["grafts"]


def test_a_limit_stops_and_leaves_out(tmp_path: Path) -> None:
    """And what was measured until then is there: the log, the table, and the summary, all of it within the limit."""
    machine = Machine(tmp_path, 'case "$*" in *env*|*report*|-c*) ;; *) echo begun; sleep 50 ;; esac')
    began = time.monotonic()
    result = machine.run(
        "--limit", "9", "--no-build", "--only", "promises,launch,gpu", "--tar", f"{tmp_path}/all.tar.gz"
    )
    assert time.monotonic() - began < 12  # on a machine that has other things to do
    assert result.returncode == 1
    stages = became(machine.out)
    # Three seconds are the least that is a share.
    assert stages["launch: launch"] == ("stopped", "after its 3 s of 9; see launch.log")
    assert stages["promises: linear"] == ("left out", "of 9 s none are left")
    assert (machine.out / "launch.log").read_text().startswith("begun\n")
    assert machine.calls[-1].startswith("-m bench.gpu_report")
    with tarfile.open(tmp_path / "all.tar.gz") as archive:
        assert {"out/summary.txt", "out/launch.log"} <= set(archive.getnames())


def test_a_share_grows_by_what_nobody_else_wants(tmp_path: Path) -> None:
    """Alone, a stage has all of the limit; its share is kept for one behind it."""
    machine = Machine(tmp_path, 'case "$*" in *"-m gpu"*) sleep 50 ;; esac')
    assert machine.run("--limit", "7", "--no-build", "--only", "gpu").returncode == 1
    (seconds,) = re.findall(r"after the last (\d) s of 7; ", became(machine.out)["gpu tests"][1])
    assert 3 <= int(seconds) <= 5
    assert machine.run("--limit", "9", "--no-build", "--only", "gpu,linear").returncode == 1
    (seconds,) = re.findall(r"after its (\d) s of 9; ", became(machine.out)["gpu tests"][1])
    assert 3 <= int(seconds) <= 4


def test_what_a_command_leaves_behind_is_not_waited_for(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 'case "$*" in *"-m gpu"*) setsid sleep 30 & echo done ;; esac')
    began = time.monotonic()
    assert machine.run("--limit", "6", "--no-build", "--only", "gpu").returncode == 0
    assert time.monotonic() - began < 12


@pytest.mark.parametrize("name", ["all.tar", "inside"])
def test_everything_in_one_file(tmp_path: Path, name: str) -> None:
    machine = Machine(tmp_path, gpu=False)
    path = machine.out / "all.tar" if name == "inside" else tmp_path / name
    result = machine.run("--only", "kernels", "--tar", str(path))
    assert result.returncode == 0 and f"and in {path}" in result.stdout
    with tarfile.open(path) as archive:
        names = archive.getnames()
    assert {"out/summary.txt", "out/kernels.txt", "out/environment.json"} <= set(names)
    assert not [name for name in names if name.endswith(".tar")]
    assert machine.run("--only", "kernels", f"--tar={tmp_path}/missing/all.tar").returncode == 1


def test_an_old_setuptools_leaves_the_build_to_cmake(tmp_path: Path) -> None:
    """``pyproject.toml`` is not for it, and nothing may be downloaded."""
    python = """case "$*" in
        *"import sys, setuptools"*) exit 1 ;;
        *realpath*) echo /base/python3 ;;
        *cmakedir*) echo /pybind11 ;;
    esac"""
    machine = Machine(tmp_path, python)
    said = tmp_path / "cmake-calls"
    cmake = f'echo "$CUDACXX $*" >>"{said}"; exit 3'
    machine._program("cmake", tmp_path, cmake)
    machine._program("nvcc", tmp_path, "exit 0")
    assert machine.run("--only", "build").returncode == 1
    stages = became(machine.out)
    assert stages["build"][0] == stages["build without CUDA"][0] == "failed"
    assert not any("setup.py" in call for call in machine.calls)
    first, second = said.read_text().splitlines()
    assert first.startswith(f"{tmp_path}/nvcc -S . -B ")
    assert "-DPython_EXECUTABLE=/base/python3 -Dpybind11_DIR=/pybind11 -DESPER_CUDA_ARCHS=90" in first
    assert "-DESPER_CUDA_ARCHS= -DESPER_CUDA_REASON=ESPER_CUDA was not 1 at build time" in second


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fast"], "unknown option --fast"),
        (
            ["--only", "gpu,speed"],
            "speed, there are build launch lattice stats dormant gpu grafts linear tests kernels bench, and promises",
        ),
        (["--limit", "ten"], "--limit takes whole seconds, not ten"),
        (["--only"], "--only needs a value"),
    ],
)
def test_an_unknown_option_is_refused(arguments: list[str], said: str) -> None:
    result = subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True)
    assert result.returncode == 2
    assert said in result.stderr


@pytest.mark.parametrize(
    ("value", "target", "higher", "verdict"),
    [
        (1.0, None, False, ""),
        (1.0, 1.005, False, "kept"),
        (1.005, 1.005, False, "kept"),
        (1.01, 1.005, False, "missed"),
        (0.95, 0.9, True, "kept"),
        (0.9, 0.9, True, "kept"),
        (0.8, 0.9, True, "missed"),
    ],
)
def test_verdicts(value: float, target: float | None, higher: bool, verdict: str) -> None:
    row = Row("part", "name", value, "x", target, higher)
    assert row.verdict == verdict
    assert f"| {verdict} |" in table([row], {})


def test_a_part_that_fails_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(setting: Setting):  # type: ignore[no-untyped-def]
        yield Row("one", "first", 1.0, "us")
        raise RuntimeError("out of memory")

    monkeypatch.setitem(PARTS, "dormant", broken)  # type: ignore[arg-type]
    monkeypatch.setitem(PARTS, "linear", lambda setting: iter([Row("two", "second", 2.0, "us")]))  # type: ignore[arg-type]
    rows, failed = measure(Setting(CPU, True), ["dormant", "linear"])
    assert [row.name for row in rows] == ["first", "second"]
    assert failed == ["dormant: RuntimeError: out of memory"]


def test_a_contestant_that_fails_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> torch.nn.Module:
        return torch.nn.Linear(3, 3)  # of another width than the layer

    monkeypatch.setattr("bench.gpu.adapted", broken)
    rows, failed = measure(Setting(CPU, True), ["grafts"])
    assert [text.partition(": RuntimeError")[0] for text in failed] == [
        f"grafts, [16, 64] float32, 2 seeds of rank 4, {kind}, peft" for kind in ("forward", "forward and backward")
    ]
    assert any("forward: esper / bare" in row.name for row in rows)


def test_what_was_measured_until_the_end_came_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(setting: Setting):  # type: ignore[no-untyped-def]
        yield Row("stats", "first", 1.0, "us")
        raise KeyboardInterrupt

    def found() -> tuple[list[str], list[str]]:
        document = json.loads((tmp_path / "gpu.json").read_text())
        return [row["name"] for row in document["rows"]], document["failed"]

    monkeypatch.setitem(PARTS, "linear", lambda setting: iter([Row("linear", "way", 2.0, "us")]))  # type: ignore[arg-type]
    monkeypatch.setitem(PARTS, "stats", endless)  # type: ignore[arg-type]
    here = {"gpu": "one"}
    setting = Setting(CPU, True)
    report = Report(tmp_path, here, ["linear"])
    report.write(*measure(setting, ["linear"], report))
    assert found() == (["way"], [])
    with pytest.raises(KeyboardInterrupt):
        measure(setting, ["stats"], Report(tmp_path, here, ["stats"]))
    # In the order of the parts, whatever ran when.
    assert found() == (["first", "way"], ["stats: not finished"])
    assert "| stats | first |" in (tmp_path / "gpu.md").read_text()
    # What is measured again replaces what was there, and another machine's rows are none of this one's.
    Report(tmp_path, here, ["stats"]).write([], [])
    assert found() == (["way"], [])
    Report(tmp_path, {"gpu": "two"}, ["stats"]).write([], [])
    assert found() == ([], [])


def test_files_of_benchmarks_are_put_together(tmp_path: Path) -> None:
    gather(tmp_path)
    assert not (tmp_path / "bench.json").exists()
    (tmp_path / "bench").mkdir()
    for name in ("one", "two"):
        document = {"version": "5", "benchmarks": [{"name": name, "extra_info": {"microseconds_per_call": 1.5}}]}
        (tmp_path / "bench" / f"test_{name}.json").write_text(json.dumps(document))
    (tmp_path / "bench" / "test_stopped.json").write_text('{"benchmarks": [')
    gather(tmp_path)
    assert json.loads((tmp_path / "bench.json").read_text())["version"] == "5"
    assert [row.name for row in elsewhere(tmp_path)] == ["one", "two"]


def test_launches_and_loads_are_taken_from_the_other_benchmarks(tmp_path: Path) -> None:
    assert list(elsewhere(tmp_path)) == []
    ratios = {"launch/few": {"native": {"ratio": 0.2, "limit": 0.25}}, "grafts/x": {"grown": {"ratio": 1.5}}}
    (tmp_path / "ratios.json").write_text(json.dumps({"ratios": ratios}))
    entries = [
        {"name": "test_memory_hit", "extra_info": {"microseconds_per_call": 0.7}},
        {"name": "test_against_triton[few]", "extra_info": {"driver_microseconds": 1.5}},
        {"name": "test_other", "extra_info": {}},
    ]
    (tmp_path / "bench.json").write_text(json.dumps({"benchmarks": entries}))
    assert [(row.part, row.value, row.target) for row in elsewhere(tmp_path)] == [
        ("launch", 0.2, 0.25),
        ("load", 0.7, None),
        ("launch", 1.5, None),
    ]


def test_what_is_gathered_is_of_one_machine(tmp_path: Path) -> None:
    one, other = {"processor": "a", "gpu": "one"}, {"processor": "a", "gpu": "other"}
    ratios = {"launch/few": {"chosen": {"ratio": 0.2, "limit": 0.25}}}
    (tmp_path / "ratios.json").write_text(json.dumps({"machine": one, "ratios": ratios}))

    def gathered() -> tuple[dict[str, str], list[str]]:
        assert main(["--out", str(tmp_path)]) == 0
        document = json.loads((tmp_path / "gpu.json").read_text())
        return document["machine"], [row["part"] for row in document["rows"]]

    assert gathered() == (one, ["launch"]), "launches come before anything else has a table"
    Report(tmp_path, {**one, "device": "cuda"}, ["stats"]).write([Row("stats", "copy", 1.0, "GB/s")], [])
    assert gathered() == ({**one, "device": "cuda"}, ["stats", "launch"])
    Report(tmp_path, other, ["stats"]).write([Row("stats", "copy", 1.0, "GB/s")], [])
    assert gathered() == (one, ["launch"])


def test_gathering_does_without_pytorch(tmp_path: Path) -> None:
    code = "import sys, bench.gpu_report as r; r.main(['--out', sys.argv[1]]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=SCRIPT.parents[1], check=True)
    assert (tmp_path / "gpu.md").exists()


def test_everything_runs_for_a_while_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now, ran = [0.0], []
    monkeypatch.setattr("bench.gpu.time.perf_counter", lambda: now[0])

    def call(name: str) -> None:
        ran.append(name)
        now[0] += 0.01

    Setting(CPU, False).warm_up([lambda: call("a"), lambda: call("b")])
    assert now[0] == pytest.approx(0.3, abs=0.1)
    assert ran[:4] == ["a", "b", "a", "b"] and ran.count("a") == ran.count("b")


def test_no_gradient_is_added_to_one_that_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """For any candidate: reading and adding would be timed as well."""
    there = []
    backward = torch.Tensor.backward

    def watched(y: torch.Tensor, gy: torch.Tensor) -> None:
        seen, leaves = [y.grad_fn], set()
        while seen:
            node = seen.pop()
            leaves |= {node.variable} if hasattr(node, "variable") else set()
            seen += [before for before, _ in node.next_functions if before is not None]
        there.append([leaf for leaf in leaves if leaf.grad is not None])
        backward(y, gy)

    monkeypatch.setattr(torch.Tensor, "backward", watched)
    layer = Layer(4, 8, 1, 2, torch.float32)
    networks = {"bare": torch.nn.Linear(8, 8), "composed": torch.nn.Sequential(torch.nn.Linear(8, 8))}
    x = torch.randn(4, 8, requires_grad=True)
    list(_layer_rows(Setting(CPU, True), layer, networks, x, 1e9, judged=False))
    assert len(there) > 10 and not any(there)
