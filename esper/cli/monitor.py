"""``esper monitor``: what a running job tells, on a terminal, for Prometheus, for TensorBoard."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final, TypeAlias

from esper.cli.numbers import check_number
from esper.contracts.errors import EsperError

if TYPE_CHECKING:
    from esper.watch.ui import Ui
    from esper.watch.watcher import Source, Watcher

    Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

__all__ = ["add_parser", "run"]

_EPILOG = """\
examples:
  esper monitor --redis redis://localhost:6379/0
  esper monitor --events runs/20260101-120000/events.jsonl --speed 10
  esper monitor --once --state awake
  esper monitor --prometheus 9464 --no-view
"""
_PATIENCE_S: Final = 3.0


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command's arguments."""
    parser = subparsers.add_parser(
        "monitor",
        help="watch a running job, or a recording of one",
        description="Show what training processes tell over the message bus, or what a file recorded: layers, seeds by "
        "state, health, alpha, loads, faults, throughput, lag and losses. In the view ? explains the keys.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--redis", metavar="URL", help="the bus (default REDIS_URL)")
    where.add_argument("--events", type=Path, metavar="FILE", help="recorded events: of esper grow, or of --record")
    parser.add_argument(
        "--since", type=_positive, default=300.0, metavar="S", help="begin with what the bus kept of S seconds (300)"
    )
    parser.add_argument(
        "--speed", type=_positive, metavar="X", help="replay the file X times as fast as it happened (default at once)"
    )
    parser.add_argument("--follow", action="store_true", help="wait for more at the end of the file")
    parser.add_argument("--once", action="store_true", help="print the picture once, and exit")
    parser.add_argument("--layer", default="", metavar="TEXT", help="only layers whose name contains TEXT")
    parser.add_argument("--state", default="", metavar="STATE", help="only seeds in this state; or: awake")
    parser.add_argument("--run", metavar="NAME", help="show this run (default the latest)")
    parser.add_argument("--rank", type=int, metavar="N", help="and this rank of it (default 0)")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write every message of the bus to a new file")
    parser.add_argument(
        "--prometheus",
        metavar="[HOST:]PORT",
        help="serve metrics over HTTP there (only to this machine unless HOST is given; 0 is any free port)",
    )
    parser.add_argument("--tensorboard", type=Path, metavar="FOLDER", help="write event files there")
    parser.add_argument("--no-view", action="store_true", help="no screen: only record and export, until SIGTERM")


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: need a finite number above 0")
    return value


def run(args: argparse.Namespace) -> int:
    """Watch until the viewer or the source has had enough; returns the exit status."""
    try:
        from esper.watch.app import watch_quietly
        from esper.watch.export import Exporters
        from esper.watch.watcher import Watcher
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "rich":
            raise
        raise EsperError("the package rich is not installed; in Esper's folder: pip install '.[monitor]'") from None
    ui = _ui(args)
    if not args.once and not args.no_view and not sys.stdout.isatty():
        raise EsperError("standard output is no terminal: use --once to print the picture, or --no-view to export only")
    with contextlib.ExitStack() as stack:
        # Before anything is served: whoever sees the metrics may ask for the end.
        ended = stack.enter_context(_until_sigterm()) if args.no_view else None
        source = _source(args, stack)
        watcher = Watcher(source)
        exporters = stack.enter_context(Exporters(watcher, prometheus=args.prometheus, tensorboard=args.tensorboard))
        if exporters.url is not None and args.no_view:
            print(f"metrics at {exporters.url}", flush=True)
        watcher.start()
        stack.callback(watcher.stop)
        if args.once:
            return _once(args, watcher, ui)
        if ended is not None:
            watch_quietly(watcher, lambda: ended.is_set() or watcher.done.is_set())
            return 0
        return _view(watcher, ui)


def _ui(args: argparse.Namespace) -> Ui:
    from esper.watch.ui import FILTERS, Ui

    if args.state not in FILTERS:
        raise EsperError(f"--state {args.state}: known are {', '.join(FILTERS[1:])}")
    if args.rank is not None and args.run is None:
        raise EsperError("--rank needs --run: it is a rank of that run")
    if args.no_view and args.prometheus is args.tensorboard is args.record is None:
        raise EsperError("--no-view leaves nothing to do: add --prometheus, --tensorboard or --record")
    check_number("--rank", args.rank, 0, 1_000_000)
    chosen = (args.run, args.rank or 0) if args.run is not None else None
    return Ui(name_filter=args.layer, state_filter=args.state, chosen=chosen)


def _source(args: argparse.Namespace, stack: contextlib.ExitStack) -> Source:
    from esper.watch.recording import FileSource, Recorder

    if args.events is not None:
        if args.record is not None:
            raise EsperError("--record writes what a bus tells; --events is a recording already")
        if args.once and (args.follow or args.speed is not None):
            raise EsperError("--once reads the whole file at once: leave --follow and --speed away")
        return FileSource(args.events, speed=args.speed, follow=args.follow)
    if args.follow or args.speed is not None:
        raise EsperError("--follow and --speed are for --events FILE")
    url = args.redis or os.environ.get("REDIS_URL", "")
    if not url:
        raise EsperError("no bus to listen to: set REDIS_URL, or give --redis URL; --events FILE shows a recording")
    from esper.oona import BusSettings, OonaClient
    from esper.watch.bus_source import BusSource

    # A person waits: say soon what is wrong.
    bus = OonaClient(url, settings=BusSettings(start_patience_s=_PATIENCE_S))
    stack.callback(bus.close)
    recorder = stack.enter_context(Recorder(args.record)) if args.record is not None else None
    return BusSource(bus, since_s=args.since, follow=not args.once, recorder=recorder)


def _once(args: argparse.Namespace, watcher: Watcher, ui: Ui) -> int:
    from rich.console import Console

    from esper.watch.app import heading_of, watch_quietly
    from esper.watch.view import once

    watch_quietly(watcher, watcher.done.is_set)
    width = shutil.get_terminal_size((80, 24)).columns
    with watcher.looking() as state:
        if not state.runs:
            ago = "in the file" if args.events is not None else f"in the last {args.since:g} s (--since reads more)"
            raise EsperError(f"{watcher.source.name}: no run was heard of {ago}")
        if ui.chosen is not None and ui.chosen not in state.runs:
            known = ", ".join(f"{run} rank {rank}" for run, rank in state.runs)
            raise EsperError(f"--run {args.run} --rank {args.rank or 0}: not heard of; known: {known}")
        lines = once(state, ui, heading_of(watcher), width)
    console = Console(width=width, highlight=False)
    for line in lines:
        console.print(line, no_wrap=True, overflow="crop")
    return 0


@contextlib.contextmanager
def _until_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets."""
    ended = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        ended.set()

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield ended
    finally:
        signal.signal(signal.SIGTERM, before)


def _view(watcher: Watcher, ui: Ui) -> int:
    from esper.watch.app import view
    from esper.watch.screen import Screen

    # Before the screen is taken, so that what is wrong at once is said without a flash of it.
    watcher.done.wait(0.2)
    if watcher.error is not None:
        raise watcher.error
    with Screen(sys.stdout, sys.stdin) as screen:
        view(watcher, screen, ui)
    return 0
