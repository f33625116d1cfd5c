"""``esper grow``: the command line of the main job.

Heavy imports wait until the command runs, so that ``esper --help`` stays quick.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, cast

from esper.grow.errors import GrowError

if TYPE_CHECKING:
    from esper.oona import OonaClient

__all__ = ["EXIT_BAD_INPUT", "EXIT_INTERRUPTED", "add_parser", "run"]

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
DEFAULT_EPOCHS = 160
#: Seeds of the random generator over which mean and spread are taken.
REPEATS = 5
#: numpy and torch both take seeds up to here.
MAX_SEED = 2**32 - 1 - REPEATS


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add ``grow`` to the command line."""
    parser = subparsers.add_parser(
        "grow",
        help="grow a network that is too small, and compare",
        description="Train a network that is too small, let it grow by seeds as it levels off, and compare it with "
        f"the same host without growth and a static network of the grown size, over {REPEATS} seeds of the generator.",
    )
    parser.add_argument("--data", metavar="FILE.npz", help="arrays X [samples, ...] and y [samples]; default: digits")
    parser.add_argument("--seed", type=int, default=0, help=f"first of {REPEATS} consecutive seeds (default 0)")
    parser.add_argument(
        "--epochs",
        type=int,
        default=DEFAULT_EPOCHS,
        help=f"passes over the data, per network (default {DEFAULT_EPOCHS})",
    )
    parser.add_argument("--device", default="cpu", help="where to train: cpu, cuda, cuda:1, ... (default cpu)")
    parser.add_argument(
        "--out", metavar="FOLDER", help="new or empty folder for results (default runs/<date and time>)"
    )
    parser.add_argument(
        "--registry",
        metavar="URL",
        help="folder or file:// URL for compiled kernels (default: registry/ in the output folder)",
    )
    parser.add_argument(
        "--prometheus", metavar="[HOST:]PORT", help="serve metrics of the growing networks over HTTP there"
    )
    parser.add_argument("--tensorboard", metavar="FOLDER", help="write event files of the growing networks there")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Carry out ``esper grow``; returns the exit status, having written one line to stderr if it is not 0."""
    try:
        return _run(args)
    except GrowError as error:
        print(f"esper grow: {error}", file=sys.stderr)
    except OSError as error:
        # What the checks before the run could not foresee: a disk that fills up, a folder that vanishes.
        place = f"{error.filename}: " if error.filename else ""
        print(f"esper grow: {place}{error.strerror or error}", file=sys.stderr)
    return EXIT_BAD_INPUT


def _run(args: argparse.Namespace) -> int:
    # Everything cheap to check comes before anything slow.
    if args.epochs < 1:
        raise GrowError(f"--epochs {args.epochs}: expected at least 1")
    if not 0 <= args.seed <= MAX_SEED:
        raise GrowError(f"--seed {args.seed}: expected 0 to {MAX_SEED}")
    from esper.grow.data import load_digits, load_npz

    device = _device(args.device)
    task = load_npz(Path(args.data)) if args.data is not None else load_digits()
    out = _make_folder(args.out)
    registry = _registry_url(args.registry, out)
    try:
        import matplotlib  # noqa: F401 - said now rather than after the training
    except ImportError as error:
        print(f"no picture, which needs matplotlib ({error}); in Esper's folder: pip install '.[grow]'", flush=True)
    return _train(task, args, device, out, registry)


def _train(task: Any, args: argparse.Namespace, device: Any, out: Path, registry: str) -> int:
    from esper.contracts.errors import EsperError
    from esper.contracts.registry import RegistryUnavailableError
    from esper.core.model_wrapper import find_bus
    from esper.grow import events
    from esper.grow.display import make_progress
    from esper.grow.experiment import NETWORKS, Experiment
    from esper.grow.trainer import Interrupted
    from esper.oona import OonaClient

    seeds = [args.seed + i for i in range(REPEATS)]
    try:
        # Before any training: a bus that was asked for and is not there is found at once.
        exports = args.prometheus is not None or args.tensorboard is not None
        # Exporters hear what others would; without REDIS_URL the bus is in this process.
        bus = find_bus(None)
        if bus is None and exports:
            bus = OonaClient()
    except EsperError as error:
        raise GrowError(f"REDIS_URL: {error}") from error
    start = time.monotonic()
    with (
        contextlib.closing(bus) if bus is not None else contextlib.nullcontext(),
        _exporting(cast("OonaClient", bus), args) if exports else contextlib.nullcontext(),
        _one_thread(),
        events.EventLog(out / "events.jsonl") as log,
        make_progress(len(NETWORKS) * len(seeds), args.epochs) as progress,
        InterruptFlag() as interrupt,
    ):
        experiment = Experiment(
            task, seeds, args.epochs, device, registry, out, log.write, progress, bus=bus, stop=interrupt.is_set
        )
        interrupted = False
        try:
            experiment.run()
        except Interrupted:
            interrupted = True
        except RegistryUnavailableError as error:
            raise GrowError(f"the registry {registry} cannot be used: {error}") from error
        except EsperError as error:
            raise GrowError(f"{type(error).__name__}: {error}") from error
        seconds = time.monotonic() - start
        log.write(events.RunFinished(interrupted, round(seconds, 3)))
    _conclude(experiment, args.epochs, seconds, interrupted)
    return EXIT_INTERRUPTED if interrupted else 0


@contextlib.contextmanager
def _exporting(bus: OonaClient, args: argparse.Namespace) -> Iterator[None]:
    from esper.contracts.errors import EsperError
    from esper.watch.export import exporting

    with contextlib.ExitStack() as stack:
        try:
            exporters = stack.enter_context(exporting(bus, prometheus=args.prometheus, tensorboard=args.tensorboard))
        except EsperError as error:
            raise GrowError(str(error)) from error
        if exporters.url is not None:
            print(f"metrics at {exporters.url}", flush=True)
        yield


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for torch: layers this small only lose by being shared out, on a busy machine tenfold."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _conclude(experiment: Any, epochs: int, seconds: float, interrupted: bool) -> None:
    from esper.grow.display import print_table
    from esper.grow.report import build_report, table_rows, write_report

    report = build_report(
        experiment.task,
        experiment.results,
        epochs=epochs,
        device=str(experiment.device),
        registry=experiment.registry,
        seconds=seconds,
        interrupted=interrupted,
    )
    write_report(report, experiment.out / "report.json")
    with contextlib.suppress(ImportError):  # of matplotlib: said when the run began
        from esper.grow.plot import draw

        draw(experiment.results, experiment.layer_rows, experiment.out / "growth.png")
    rows = table_rows(report)
    if rows:
        print_table(rows)
    print(report["verdict"])
    print(f"{'Interrupted; saved what there is' if interrupted else 'Saved'}: {experiment.out} ({seconds:.1f} s)")


def _device(text: str) -> Any:
    import torch

    try:
        device = torch.device(text)
        # Allocating and reading back is the one test that is the same for every kind of device.
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise GrowError(f"--device {text}: not available here: {reason}") from error
    return device


def _make_folder(text: str | None) -> Path:
    """Create the output folder, which must be new or empty, and make sure that it can be written to."""
    if text is None:
        return _make_dated_folder(Path("runs"))
    folder = Path(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise GrowError(f"--out {folder}: is not empty; an existing run is never overwritten, name a new folder")
        probe = folder / ".writable"
        probe.touch(exist_ok=False)
        probe.unlink()
    except FileExistsError as error:
        raise GrowError(f"--out {folder}: is a file; name a folder") from error
    except OSError as error:
        raise GrowError(f"--out {folder}: cannot be written to: {error.strerror or error}") from error
    return folder


def _make_dated_folder(parent: Path) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    for attempt in range(1, 100):
        folder = parent / (stamp if attempt == 1 else f"{stamp}-{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise GrowError(f"{folder}: cannot be created: {error.strerror or error}; use --out") from error
        return folder
    raise GrowError(f"{parent}: 99 runs began within this second; use --out")


def _registry_url(text: str | None, out: Path) -> str:
    """The registry as a URL; a plain path becomes a ``file://`` URL, and the folder is made."""
    if text is not None and "://" in text and not text.startswith("file://"):
        raise GrowError(
            f"--registry {text}: grow compiles kernels into its registry, which takes a folder or file:// URL"
        )
    if text is not None and text.startswith("file://"):
        return text
    folder = out / "registry" if text is None else Path(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GrowError(f"--registry {folder}: cannot be used: {error.strerror or error}") from error
    return folder.resolve().as_uri()


class InterruptFlag:
    """Turns the first Ctrl-C into a flag that is looked at between training steps; the second one acts as usual.

    A training step that is cut anywhere could leave a half-bound seed to be saved.
    """

    def __init__(self) -> None:
        """Not set."""
        self._set = False
        self._previous: Any = None

    def is_set(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self._set

    def __enter__(self) -> InterruptFlag:
        """Watch for Ctrl-C."""
        self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give Ctrl-C back to whoever had it."""
        signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._set = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
