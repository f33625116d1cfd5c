"""Entry point of the command ``esper``: imports only the subcommand's module, and turns errors into one line."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

__all__ = ["main"]

#: Subcommand -> its module, with ``add_parser(subparsers)`` and ``run(args) -> int``, and its line in ``esper --help``.
COMMANDS = {
    "grow": ("esper.grow.cli", "train a network that grows, and compare it with ones that do not"),
    "compile": ("esper.cli.compile", "compile a blueprint to a kernel artifact"),
    "inspect": ("esper.cli.inspect", "show what is in an artifact"),
    "keygen": ("esper.cli.keygen", "make a key pair for signing artifacts"),
    "sign": ("esper.cli.sign", "sign an artifact"),
    "verify": ("esper.cli.verify", "check an artifact's hashes, blueprint and signatures"),
    "urza": ("esper.cli.urza", "run and administer the registry service"),
    "tezzeret": ("esper.cli.tezzeret", "run the compile worker, or hand it a blueprint"),
    "monitor": ("esper.cli.monitor", "watch a running job, or a recording of one"),
    "demo": ("esper.cli.demo", "show the whole pipeline at work on this machine"),
    "env": ("esper.cli.env", "show versions, devices, and which backend every operation uses"),
    "bench": ("esper.cli.bench", "run the benchmarks of a checkout"),
}

#: What a shell reports for a program ended by Ctrl-C.
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``esper`` with ``argv`` (default: the process's arguments) and return the exit status.

    Expected errors (:class:`esper.EsperError`, ``ValueError``, ``OSError``) end in one line on standard error and
    status 1; with ``ESPER_DEBUG=1`` they keep their traceback. Ctrl-C gives 130.
    """
    _have_outputs()
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = next((argument for argument in arguments if argument in COMMANDS), None)
    try:
        parser, module = _parser(chosen)
        args = parser.parse_args(arguments)
        if module is None:
            parser.print_help()
            return 0
        status: int = module.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("esper: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) left. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("ESPER_DEBUG", "") == "1" or not _is_expected(error):
            raise
        print(f"esper{f' {chosen}' if chosen else ''}: {_one_line(error)}", file=sys.stderr)
        return 1


def _have_outputs() -> None:
    """Where the shell closed an output (``>&-``) Python has None in its place; what goes there is to go nowhere.

    For standard error, too: print() to None would write errors among the results.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # Open as long as the process.
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="replace"))  # noqa: SIM115


def _parser(chosen: str | None) -> tuple[argparse.ArgumentParser, ModuleType | None]:
    """The parser, complete for the chosen subcommand only; the others are names with a line of help."""
    parser = argparse.ArgumentParser(prog="esper", description="Let a PyTorch network grow while it trains.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    subparsers: Subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    module = None
    for name, (path, summary) in COMMANDS.items():
        if name == chosen:
            module = importlib.import_module(path)
            module.add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser, module


class _Version(argparse.Action):
    """Looks the version up only when asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"esper {version('esper')}")
        parser.exit()


def _is_expected(error: Exception) -> bool:
    """Whether the user can mend it: no traceback then."""
    from esper.contracts.errors import EsperError

    if isinstance(error, (EsperError, ValueError, OSError)):
        return True
    # Imported only if the program got that far: it loads torch.
    registry = sys.modules.get("esper.ops.registry")
    return registry is not None and isinstance(error, registry.BackendUnavailableError)


def _one_line(error: Exception) -> str:
    # Some of it is what a server said, or what stands in a file.
    text = "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(error).split()))
    return text or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
