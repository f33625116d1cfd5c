"""``esper bench``: runs the benchmarks of a checkout and judges their ratios."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from esper.cli.main import Subparsers

__all__ = ["add_parser", "find_checkout", "run"]


def add_parser(subparsers: Subparsers) -> None:
    """Declare ``esper bench``."""
    parser = subparsers.add_parser(
        "bench",
        help="run the benchmarks of a checkout",
        description="Run the scripts bench/test_NAME.py of a checkout with pytest-benchmark. Their ratios gather in "
        "bench/results/latest.json.",
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="which scripts, such as dormant_overhead (default: all)"
    )
    parser.add_argument("-k", dest="keyword", metavar="EXPRESSION", help="only the benchmarks that pytest's -k selects")
    parser.add_argument("--list", action="store_true", help="list the scripts and exit")
    after = parser.add_mutually_exclusive_group()
    after.add_argument(
        "--check",
        action="store_true",
        help="then compare with the stored ratios; fail beyond noise (of another machine: judge the limits alone)",
    )
    after.add_argument("--keep", action="store_true", help="then make these ratios the stored ones")
    parser.add_argument(
        "--replace", action="store_true", help="with --keep: drop the stored ratios if another machine measured them"
    )


def run(args: argparse.Namespace) -> int:
    """Run the benchmarks; the exit status is pytest's, or that of the comparison after it.

    Raises:
        ValueError: if there is no checkout here, a script of that name is not in it, or ``--replace`` stands alone.
    """
    if args.replace and not args.keep:
        raise ValueError("--replace says what --keep may drop: give both")
    checkout = find_checkout(Path.cwd())
    scripts = {path.stem.removeprefix("test_"): path for path in sorted((checkout / "bench").glob("test_*.py"))}
    if args.list:
        print("\n".join(scripts))
        return 0
    if unknown := [name for name in args.names if name not in scripts]:
        raise ValueError(f"no benchmark {unknown[0]!r}; there are {', '.join(scripts)}")
    chosen = [scripts[name] for name in args.names or scripts]
    command = [sys.executable, "-m", "pytest", "-q", "-s", "--benchmark-only", "--timeout=0"]
    command += ["-k", args.keyword] if args.keyword else []
    command += [str(path.relative_to(checkout)) for path in chosen]
    status = subprocess.run(command, cwd=checkout, check=False).returncode
    action = "check" if args.check else "keep" if args.keep else ""
    if status == 0 and action:
        results = [sys.executable, "-m", "bench.results", action, *(["--replace"] if args.replace else [])]
        status = subprocess.run(results, cwd=checkout, check=False).returncode
    return status


def find_checkout(start: Path) -> Path:
    """The checkout that ``start`` is in, else the one that this package runs from.

    Raises:
        ValueError: if there is none; benchmarks are not part of an installed package.
    """
    for folder in (start, *start.parents, Path(__file__).resolve().parents[2]):
        if (folder / "bench" / "results.py").is_file() and (folder / "esper" / "cli").is_dir():
            return folder
    raise ValueError(
        f"benchmarks are run from a checkout of Esper; neither {start} nor this package is in one: change to it first"
    )
