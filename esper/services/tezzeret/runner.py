"""The worker's side of a sandbox: start it, feed it, watch the clock, read what it left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from esper.artifacts.workers import run_blocking
from esper.contracts import strict_json
from esper.contracts.errors import ArtifactError
from esper.contracts.text import shown
from esper.services.tezzeret.job import MAX_LOG_CHARS, CompileJob
from esper.services.tezzeret.limits import Limits, sandbox_environment
from esper.services.tezzeret.sandbox import ARTIFACT, EXIT_ELSEWHERE, EXIT_INVALID, EXIT_LIMIT, REPLY

__all__ = ["Outcome", "compile_in_sandbox"]

_REPLY_BYTES: Final = 1 << 16
_LAST_WORDS_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one attempt ended.

    Attributes:
        data: The artifact's bytes, unverified; None when there are none.
        blueprint_hash: Where the blueprint got so far as to have one.
        log: The end of what the sandbox said; where it failed, the last line is the reason.
        final: Trying again would end the same way.
        elsewhere: On this machine it would, because of what the machine lacks; on another it may not.
    """

    data: bytes | None
    blueprint_hash: str | None
    log: str
    final: bool
    elsewhere: bool = False


async def compile_in_sandbox(job: CompileJob, limits: Limits, folder: Path) -> Outcome:
    """Compile a job in a process of its own, which is gone when this returns, or is cancelled.

    Args:
        job: What to compile.
        limits: What it may take.
        folder: Where its private directory is made, and removed.
    """
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as home:
        request = {"job": job.to_payload(), "limits": limits.to_payload(), "parent": os.getpid()}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            # -P: nothing is imported from the working directory.
            "-P",
            "-m",
            "esper.services.tezzeret.sandbox",
            cwd=home,
            env=sandbox_environment(home),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            # A group of its own, so that what it starts ends with it.
            start_new_session=True,
        )
        log = _Log()
        reading = asyncio.create_task(log.read(process.stdout))
        timed_out = False
        try:
            async with asyncio.timeout(limits.timeout_s):
                await _feed(process.stdin, json.dumps(request).encode())
                await process.wait()
        except TimeoutError:
            timed_out = True
        finally:
            _kill_group(process.pid)
            await process.wait()
            # The pipe ends with the last process that holds it; they are all dead, but not all of them are ours.
            await asyncio.wait({reading}, timeout=_LAST_WORDS_S)
            reading.cancel()
        reason = _reason(process.returncode or 0, timed_out, limits)
        data, blueprint_hash = None, None
        try:
            data, blueprint_hash = await run_blocking(_collect, Path(home), limits, reason is None)
        except (OSError, ArtifactError) as error:
            reason = reason or f"the sandbox left no artifact that can be read: {error}"
        final = process.returncode == EXIT_INVALID and not timed_out
        elsewhere = process.returncode == EXIT_ELSEWHERE and not timed_out
        # The sandbox has said itself why it refuses.
        said = "" if final or elsewhere or reason is None else f"{reason}\n"
        return Outcome(data, blueprint_hash, log.text(said), final, elsewhere)


async def _feed(stdin: asyncio.StreamWriter | None, request: bytes) -> None:
    assert stdin is not None
    # A sandbox that died at once does not read; its status and log say why.
    with contextlib.suppress(ConnectionError):
        stdin.write(request)
        await stdin.drain()
        stdin.close()
        await stdin.wait_closed()


def _kill_group(pid: int) -> None:
    # The sandbox may have ended while something that it started goes on.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _reason(status: int, timed_out: bool, limits: Limits) -> str | None:
    if timed_out:
        return f"gave up after {limits.timeout_s:g} s"
    if status == 0:
        return None
    if status == -signal.SIGXCPU:
        return f"used up its {limits.timeout_s:g} s of CPU time"
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"the sandbox was ended by {signal.Signals(-status).name}"
    return {EXIT_INVALID: "invalid", EXIT_LIMIT: "over the limit"}.get(status, f"the sandbox crashed (status {status})")


def _collect(home: Path, limits: Limits, succeeded: bool) -> tuple[bytes | None, str | None]:
    with contextlib.suppress(FileNotFoundError):
        reply: Any = strict_json.loads(_read(home / REPLY, _REPLY_BYTES), what="the reply", max_bytes=_REPLY_BYTES)
        found = reply.get("blueprint_hash") if isinstance(reply, dict) else None
        blueprint_hash = found if isinstance(found, str) and len(found) == 64 else None
        return (_read(home / ARTIFACT, limits.artifact_bytes) if succeeded else None), blueprint_hash
    if succeeded:
        raise FileNotFoundError("no reply")
    return None, None


def _read(path: Path, limit: int) -> bytes:
    """A regular file's bytes, no more than ``limit``."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ArtifactError(f"{path.name} has more than {limit} bytes")
    return data


class _Log:
    """The end of what a process prints, however much that is."""

    def __init__(self) -> None:
        self._kept = bytearray()

    async def read(self, stream: asyncio.StreamReader | None) -> None:
        assert stream is not None
        while piece := await stream.read(1 << 16):
            self._kept += piece
            del self._kept[: -4 * MAX_LOG_CHARS]

    def text(self, last: str) -> str:
        """As it may go into messages and to terminals: text, no control characters, bounded."""
        whole = self._kept.decode("utf-8", "replace")
        if whole and not whole.endswith("\n"):
            whole += "\n"
        return shown(whole + last)[-MAX_LOG_CHARS:].strip("\n")
