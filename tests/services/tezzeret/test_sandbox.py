"""One job in a process of its own, within limits."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from esper.artifacts import Artifact
from esper.services.tezzeret.forge import build
from esper.services.tezzeret.job import MAX_LOG_CHARS
from esper.services.tezzeret.limits import Limits, sandbox_environment
from esper.services.tezzeret.runner import Outcome, _Log, compile_in_sandbox
from tests.services.tezzeret.processes import blueprint, job

MIB = 1 << 20


def compiled(tmp_path: Path, wanted, **limits) -> Outcome:
    outcome = asyncio.run(compile_in_sandbox(wanted, Limits(**limits), tmp_path))
    assert list(tmp_path.iterdir()) == []
    return outcome


def all_children() -> list[int]:
    found = []
    for task in Path("/proc/self/task").iterdir():
        found += [int(pid) for pid in (task / "children").read_text().split()]
    return found


#: Processes that earlier tests of the run left to themselves (torch.compile's workers, say) are not the sandbox's.
others: set[int] = set()


@pytest.fixture(autouse=True)
def _others():
    others.clear()
    others.update(all_children())


def children() -> list[int]:
    return [pid for pid in all_children() if pid not in others]


def test_the_same_bytes_as_in_this_process(tmp_path):
    wanted = job(seed=3, dtype="float16")
    outcome = compiled(tmp_path, wanted)
    assert outcome.data == build("lowrank", d_in=6, d_out=4, seed=3, dtype="float16")
    assert outcome.blueprint_hash == Artifact.open(outcome.data).manifest.blueprint_hash
    assert outcome.log == ""
    assert children() == []


@pytest.mark.aot
def test_gpu_binaries_are_compiled_in_the_sandbox(tmp_path):
    wanted = job(blueprint=blueprint("bottleneck", rank=16), d_in=16, d_out=16, pipeline="standard", dtype="bfloat16")
    wanted = dataclasses.replace(wanted, architectures=("sm_90",))
    outcome = compiled(tmp_path, wanted)
    assert outcome.data is not None, outcome.log
    manifest = Artifact.open(outcome.data).manifest
    assert manifest.target == "sm_90"
    assert {entry.arch for entry in manifest.binaries.values()} == {"sm_90"}


def test_a_gpu_that_is_not_here_is_no_fault_of_the_job(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    outcome = compiled(tmp_path, job(pipeline="aggressive"))
    assert (outcome.data, outcome.final, outcome.elsewhere) == (None, False, True)
    assert outcome.log.startswith("pipeline 'aggressive': needs a GPU to tune on, and there is none here")
    assert "\n" not in outcome.log
    # No machine has a GPU of two architectures.
    outcome = compiled(tmp_path, job(pipeline="aggressive", architectures=["sm_80", "sm_90"]))
    assert (outcome.data, outcome.final, outcome.elsewhere) == (None, True, False)


def cyclic() -> dict:
    shape = blueprint()
    shape["nodes"][0]["inputs"] = [shape["nodes"][-1]["name"]]
    return shape


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"blueprint": {}}, "BlueprintError"),
        ({"blueprint": cyclic()}, "node '"),
        ({"d_in": 1 << 40}, "d_in must be an integer in"),
        ({"blueprint": blueprint("dense"), "d_in": 1 << 19, "d_out": 1 << 19}, "node 'linear': weights add up"),
        ({"dtype": "int8"}, "'int8' cannot be stored"),
    ],
)
def test_what_is_wrong_with_the_job_is_final(tmp_path, changes, said):
    outcome = compiled(tmp_path, job(**changes))
    assert (outcome.data, outcome.final) == (None, True)
    assert said in outcome.log
    assert "Traceback" not in outcome.log


def test_too_large_is_found_before_weights_are_drawn(tmp_path):
    wanted = job(blueprint=blueprint("dense"), d_in=8192, d_out=8192)
    outcome = compiled(tmp_path, wanted, artifact_bytes=MIB, memory_bytes=256 * MIB)
    assert (outcome.data, outcome.final) == (None, True)
    assert "node 'linear': its weights take 268468224 bytes, more than this worker's limit of 1048576" in outcome.log


def test_memory(tmp_path):
    wanted = job(blueprint=blueprint("dense"), d_in=8192, d_out=8192)
    outcome = compiled(tmp_path, wanted, artifact_bytes=1024 * MIB, memory_bytes=384 * MIB)
    assert (outcome.data, outcome.final) == (None, False)
    assert "out of memory: this worker gives a job 384 MiB\nover the limit" in outcome.log


def test_time(tmp_path):
    # Drawing so many weights takes longer anywhere.
    wanted = job(blueprint=blueprint("dense"), d_in=12000, d_out=12000)
    outcome = compiled(tmp_path, wanted, timeout_s=1, artifact_bytes=1024 * MIB)
    assert (outcome.data, outcome.final) == (None, False)
    assert outcome.log.endswith("gave up after 1 s")
    assert children() == []


def test_a_sandbox_that_dies(tmp_path):
    async def main() -> Outcome:
        task = asyncio.create_task(compile_in_sandbox(job(), Limits(), tmp_path))
        while not (found := children()):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        os.kill(found[0], signal.SIGSEGV)
        return await task

    outcome = asyncio.run(main())
    assert (outcome.data, outcome.final) == (None, False)
    assert outcome.log.endswith("the sandbox was ended by SIGSEGV")


def test_cancelled_means_gone(tmp_path):
    async def main() -> None:
        task = asyncio.create_task(compile_in_sandbox(job(), Limits(), tmp_path))
        while not children():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert children() == []
    assert list(tmp_path.iterdir()) == []


def test_what_the_limits_are_to_the_kernel():
    program = """
import resource
from esper.services.tezzeret.limits import Limits
Limits(timeout_s=7, memory_bytes=1 << 30, artifact_bytes=1 << 25).bind()
Limits(timeout_s=9, memory_bytes=1 << 31, artifact_bytes=1 << 26).bind()
for name in ("DATA", "CPU", "FSIZE", "CORE"):
    print(*resource.getrlimit(getattr(resource, "RLIMIT_" + name)))
"""
    command = [sys.executable, "-c", program]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    # The second time they can only stay: a sandbox cannot give itself more.
    assert said.split() == [*2 * [str(1 << 30)], "10", "10", *2 * [str(1 << 25)], "0", "0"]


def test_the_environment_holds_no_secrets(monkeypatch):
    for name in ("AWS_SECRET_ACCESS_KEY", "ESPER_REGISTRY_TOKEN", "REDIS_URL", "TRITON_INTERPRET", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("PATH", "/bin")
    environment = sandbox_environment("/folder")
    assert environment["PATH"] == "/bin"
    assert environment["HOME"] == environment["TMPDIR"] == "/folder"
    assert "x" not in environment.values()


def test_logs_are_bounded_text():
    async def main() -> _Log:
        log, stream = _Log(), asyncio.StreamReader()
        for _ in range(20):
            stream.feed_data(b"x" * 8000 + b"\n")
        stream.feed_data(b"bell\x07 \x1b[31mred \xff\n")
        stream.feed_eof()
        await log.read(stream)
        return log

    text = asyncio.run(main()).text("the reason\n")
    assert len(text) <= MAX_LOG_CHARS
    assert text.endswith("bell? ?[31mred \ufffd\nthe reason")


@pytest.mark.parametrize(
    "bad", [{"timeout_s": 0}, {"timeout_s": float("nan")}, {"memory_bytes": 1}, {"artifact_bytes": "1"}]
)
def test_limits_that_are_none(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Limits(**bad)
