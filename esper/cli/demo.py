"""``esper demo``: the parts at work together, on this machine, in one command."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, TypeAlias

from esper.cli.numbers import check_number

if TYPE_CHECKING:
    from esper.demo.pipeline import Summary

    Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command's arguments."""
    parser = subparsers.add_parser("demo", help="show the whole pipeline at work on this machine")
    shows = parser.add_subparsers(title="demos", metavar="DEMO", dest="demo", required=True)
    pipeline = shows.add_parser(
        "pipeline", help="submit, compile, publish, fetch, wake, train, fossilize: with real servers on loopback"
    )
    pipeline.add_argument("--seed", type=int, default=0, metavar="N", help="seed of weights and data (default 0)")
    pipeline.add_argument(
        "--no-redis", action="store_true", help="have the worker poll Urza, as where Redis is missing"
    )


def run(args: argparse.Namespace) -> int:
    """Show it; 0 if the seed was kept."""
    check_number("--seed", args.seed, 0, (1 << 63) - 1)
    import signal
    import sys
    import tempfile

    from esper.demo.pipeline import run_pipeline
    from esper.demo.view import make_view

    # What the user has configured is for real runs; the demo brings its own.
    for name in ("ESPER_REGISTRY", "ESPER_REGISTRY_TOKEN", "REDIS_URL"):
        os.environ.pop(name, None)
    # Ended from outside, it still stops what it has started.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="esper-demo-cache-") as cache:
        os.environ["ESPER_CACHE_DIR"] = cache
        with make_view() as view:
            summary = run_pipeline(view, seed=args.seed, use_redis=not args.no_redis)
    print("\n".join(["", *_lines(summary)]))
    return 0 if summary.kept else 1


def _lines(summary: Summary) -> list[str]:
    gain = 100 * (1 - summary.loss_after / summary.loss_before)
    return [
        *(f"note: {note}" for note in summary.notes),
        f"artifact      {summary.artifact_id}",
        f"loss          {summary.loss_before:.4f} -> {summary.loss_after:.4f} ({gain:.0f} % less)",
        f"steps         {summary.steps}, of which {summary.steps_meanwhile} while the kernel was made and fetched",
        f"longest step  {1000 * summary.longest_step_s:.1f} ms in that time",
        f"the seed is   {'kept (FOSSILIZED)' if summary.kept else 'culled'}",
    ]
