"""``esper tezzeret``: the compile worker, and the way to hand it a blueprint."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from esper.cli.compile import PIPELINES, choose_pipeline
from esper.cli.numbers import check_number
from esper.contracts.errors import EsperError
from esper.contracts.text import shown

if TYPE_CHECKING:
    from esper.services.tezzeret.job import CompileJob, CompileResult
    from esper.services.tezzeret.redis_queue import RedisQueue
    from esper.services.tezzeret.urza_queue import UrzaQueue
    from esper.services.tezzeret.worker import WorkerSettings

    Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

__all__ = ["add_parser", "run"]

_EPILOG = """\
examples:
  esper tezzeret worker --redis redis://localhost:6379/0 --registry http://localhost:8470
  ESPER_REGISTRY_TOKEN=$(cat token) esper tezzeret worker --urza http://localhost:8470 --concurrency 4
  esper tezzeret submit bottleneck --d-in 64 --d-out 64 --rank 8 --redis redis://localhost:6379/0 --wait
"""


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command's arguments."""
    parser = subparsers.add_parser(
        "tezzeret",
        help="run the compile worker, or hand it a blueprint",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    _add_worker(actions)
    _add_submit(actions)


def _add_queue(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--redis", metavar="URL", help="jobs travel through this Redis (default REDIS_URL)")
    where.add_argument("--urza", metavar="URL", help="jobs are kept by this Urza (default, if it is one, the registry)")


def _add_worker(actions: Subparsers) -> None:
    parser = actions.add_parser("worker", help="compile jobs until stopped (SIGTERM)")
    _add_queue(parser)
    parser.add_argument("--registry", metavar="URL", help="publish there (default the Urza, else ESPER_REGISTRY)")
    parser.add_argument("--concurrency", type=int, default=2, metavar="N", help="jobs at once (default 2)")
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="S", help="seconds a job may take (default 120)"
    )
    parser.add_argument("--memory-mb", type=int, default=4096, metavar="M", help="memory of a job (default 4096)")
    parser.add_argument(
        "--max-artifact-mb", type=float, default=256, metavar="M", help="largest artifact (default 256)"
    )
    parser.add_argument(
        "--pipeline",
        action="append",
        choices=PIPELINES,
        help="run only this pipeline, and leave other jobs to other workers; may be repeated (default all)",
    )
    parser.add_argument(
        "--abandon",
        type=float,
        default=86_400.0,
        metavar="S",
        help="a job that this worker cannot run, and nobody else takes, is INVALID after this (default 86400: a day)",
    )
    parser.add_argument("--sign-key", type=Path, metavar="FILE", help="sign artifacts with this key (esper keygen)")
    parser.add_argument("--once", action="store_true", help="run the jobs that wait, then exit")
    parser.add_argument("--name", metavar="NAME", help="this worker's name, different for each (default made up)")
    parser.add_argument(
        "--lease", type=float, default=60.0, metavar="S", help="a silent worker loses its job after this (default 60)"
    )
    parser.add_argument(
        "--grace", type=float, default=30.0, metavar="S", help="for jobs under way after SIGTERM (default 30)"
    )


def _add_submit(actions: Subparsers) -> None:
    parser = actions.add_parser("submit", help="hand a blueprint to the workers")
    parser.add_argument("blueprint", metavar="BLUEPRINT", help="name of a ready-made blueprint, or a JSON file")
    parser.add_argument("--d-in", type=int, required=True, metavar="N", help="features the sub-network reads")
    parser.add_argument("--d-out", type=int, required=True, metavar="N", help="features it changes")
    parser.add_argument("--rank", type=int, metavar="R", help="short for --param rank=R")
    parser.add_argument("--param", action="append", default=[], metavar="KEY=VALUE", help="as for esper compile")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the initial weights (default 0)")
    parser.add_argument("--dtype", default="float32", help="float32, float64, float16 or bfloat16 (default float32)")
    parser.add_argument(
        "--pipeline", choices=PIPELINES, help="as for esper compile (default: standard with --arch, else fast)"
    )
    parser.add_argument("--arch", action="append", default=[], metavar="sm_NN", help="GPU to compile for; repeatable")
    parser.add_argument("--tag", action="append", default=[], metavar="TAG", help="for the registry; repeatable")
    _add_queue(parser)
    parser.add_argument(
        "--wait", nargs="?", type=float, const=300.0, metavar="S", help="wait for the result, so long at most (300 s)"
    )


def run(args: argparse.Namespace) -> int:
    """Do what was chosen."""
    return _work(args) if args.action == "worker" else _submit(args)


# -- worker


def _work(args: argparse.Namespace) -> int:
    """Run a worker; 0 when it was stopped or, with ``--once``, ran out of jobs."""
    from esper.artifacts import open_registry
    from esper.services.tezzeret.limits import Limits
    from esper.services.tezzeret.worker import WorkerSettings

    mib = 1 << 20
    check_number("--concurrency", args.concurrency, 1, 1024)
    check_number("--timeout", args.timeout, 1, 1_000_000_000)
    check_number("--memory-mb", args.memory_mb, 256, mib)
    check_number("--max-artifact-mb", args.max_artifact_mb, 0.001, mib)
    check_number("--abandon", args.abandon, 0, 1_000_000_000, above=True)
    check_number("--lease", args.lease, 1, 86_400)
    check_number("--grace", args.grace, 0, 1_000_000_000)
    limits = Limits(
        timeout_s=args.timeout,
        memory_bytes=args.memory_mb * mib,
        artifact_bytes=int(args.max_artifact_mb * mib),
    )
    settings = WorkerSettings(
        concurrency=args.concurrency,
        limits=limits,
        pipelines=None if args.pipeline is None else frozenset(args.pipeline),
        abandon_s=args.abandon,
        lease_s=args.lease,
        grace_s=args.grace,
    )
    kind, url = _queue(args, args.registry)
    registry = open_registry(args.registry or (url if kind == "urza" else None))
    return asyncio.run(_serve(args, kind, url, registry, settings))


async def _serve(args: argparse.Namespace, kind: str, url: str, registry: Any, settings: WorkerSettings) -> int:
    from esper.artifacts.http_registry import HttpRegistry
    from esper.services.tezzeret.urza_record import UrzaRecord
    from esper.services.tezzeret.worker import Worker

    queue = _open(kind, url, lease_s=settings.lease_s, name=args.name)
    # Urza's own jobs are on its record already.
    known = args.registry or os.environ.get("ESPER_REGISTRY", "")
    record = UrzaRecord(known, _say) if kind == "redis" and isinstance(registry, HttpRegistry) else None
    worker = Worker(queue, registry, settings, signer=_signer(args.sign_key), record=record, say=_say)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, worker.stop)
    _say(f"worker {queue.name}: jobs from {queue.url}, artifacts to {registry.url}")
    try:
        await worker.run(once=args.once)
    finally:
        await queue.close()
        if record is not None:
            await record.close()
    _say("stopped")
    return 0


def _signer(path: Path | None) -> Callable[[bytes], bytes] | None:
    if path is None:
        return None
    from esper.artifacts import SigningKey
    from esper.artifacts.signing import sign

    key = SigningKey.load(path)
    return lambda data: sign(data, key)


def _say(line: str) -> None:
    print(f"tezzeret: {shown(line)}", file=sys.stderr, flush=True)


# -- submit


def _submit(args: argparse.Namespace) -> int:
    """Submit a job; prints its name, and with ``--wait`` the artifact's id instead, alone on its line."""
    from esper.cli.compile import _blueprint, _options
    from esper.services.tezzeret.job import CompileJob
    from esper.services.tezzeret.pipelines import check_request, torch_name

    for option, value in (("--d-in", args.d_in), ("--d-out", args.d_out), ("--rank", args.rank)):
        check_number(option, value, 1, 1 << 20)
    check_number("--seed", args.seed, 0, (1 << 63) - 1)
    check_number("--wait", args.wait, 0, 1_000_000_000, above=True)
    pipeline = choose_pipeline(args.pipeline, args.arch)
    # A worker would say so too, and nobody might be looking.
    check_request(pipeline, args.arch)
    dtype = torch_name(args.dtype)  # Urza takes torch's names only
    blueprint = _bound(_blueprint(args.blueprint), _options(args.param, args.rank))
    job = CompileJob(
        blueprint=blueprint,
        d_in=args.d_in,
        d_out=args.d_out,
        seed=args.seed,
        dtype=dtype,
        pipeline=pipeline,
        architectures=args.arch,
        tags=args.tag,
    )
    kind, url = _queue(args, None)
    return asyncio.run(_hand_over(_open(kind, url), job, args.wait))


async def _hand_over(queue: RedisQueue | UrzaQueue, job: CompileJob, wait_s: float | None) -> int:
    from esper.services.tezzeret.redis_queue import RedisQueue

    result: CompileResult | None = None
    try:
        if isinstance(queue, RedisQueue):
            job_id, since = job.job_id, await queue.submit(job)
            if wait_s is not None:
                result = await queue.result(job_id, since=since, timeout_s=wait_s)
        else:
            job_id = await queue.submit(job)
            if wait_s is not None:
                result = await queue.result(job_id, timeout_s=wait_s)
    finally:
        await queue.close()
    if wait_s is None:
        print(job_id)
        return 0
    if result is None:
        raise EsperError(f"job {job_id}: no result within {wait_s:g} s; is a worker running on {queue.url}?")
    if result.artifact_id is None:
        print(f"{result.log}", file=sys.stderr)
        raise EsperError(f"job {job_id} is {result.status} after {result.attempts} attempts; its log is above")
    print(result.artifact_id)
    return 0


def _bound(blueprint: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The blueprint as JSON values, its parameters bound: what travels is complete."""
    import json
    from dataclasses import replace

    from esper.blueprints.library import get
    from esper.blueprints.validation import bind_parameters

    if isinstance(blueprint, str):
        blueprint = get(blueprint, **options)
    else:
        blueprint = replace(blueprint, parameters=bind_parameters(blueprint, options))
    values: dict[str, Any] = json.loads(blueprint.to_json())
    return values


# -- both


def _queue(args: argparse.Namespace, registry: str | None) -> tuple[str, str]:
    """Which kind of queue, and its URL: as given, else as the environment has it."""
    if args.redis:
        return "redis", args.redis
    if args.urza:
        return "urza", args.urza
    if url := os.environ.get("REDIS_URL"):
        return "redis", url
    for url in (registry, os.environ.get("ESPER_REGISTRY")):
        if url and url.strip().partition("://")[0].lower() in ("http", "https"):
            return "urza", url
    raise EsperError("where are the jobs? give --redis URL or --urza URL, or set REDIS_URL or ESPER_REGISTRY")


def _open(kind: str, url: str, **options: Any) -> RedisQueue | UrzaQueue:
    if kind == "redis":
        from esper.services.tezzeret.redis_queue import RedisQueue

        return RedisQueue(url, **options)
    from esper.services.tezzeret.urza_queue import UrzaQueue

    return UrzaQueue(url, **options)
