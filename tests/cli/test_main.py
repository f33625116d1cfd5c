"""The command's frame: lazy subcommands, exit statuses, and errors in one line."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from esper.cli import bench, main
from esper.contracts.errors import EsperError
from esper.ops.registry import BackendUnavailableError


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A subcommand ``try`` whose ``run`` a test sets."""
    module = ModuleType("esper_test_command")
    module.add_parser = lambda subparsers: subparsers.add_parser("try").add_argument("--n", type=int, default=0)
    module.run = lambda args: args.n
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(main.COMMANDS, "try", (module.__name__, "a test"))
    monkeypatch.delenv("ESPER_DEBUG", raising=False)
    return module


def raising(error: BaseException) -> object:
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


def test_status_is_the_commands(command: ModuleType) -> None:
    assert main.main(["try", "--n", "7"]) == 7
    assert main.main(["try"]) == 0


@pytest.mark.parametrize(
    "error",
    [
        EsperError("no such\nkernel"),
        ValueError("no such kernel"),
        FileNotFoundError("no such kernel"),
        BackendUnavailableError("no such kernel"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_expected_error_is_one_line(command: ModuleType, error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    command.run = raising(error)
    assert main.main(["try"]) == 1
    assert capsys.readouterr().err == "esper try: no such kernel\n"


def test_an_error_sends_nothing_to_the_terminal(command: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    command.run = raising(EsperError("it says \x1b[2J\N{RIGHT-TO-LEFT OVERRIDE}evil"))
    assert main.main(["try"]) == 1
    assert capsys.readouterr().err == "esper try: it says ?[2J?evil\n"


def test_debug_keeps_the_traceback(command: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    command.run = raising(EsperError("on purpose"))
    monkeypatch.setenv("ESPER_DEBUG", "1")
    with pytest.raises(EsperError, match="on purpose"):
        main.main(["try"])


def test_a_bug_keeps_its_traceback(command: ModuleType) -> None:
    command.run = raising(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        main.main(["try"])


def test_interrupt(command: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    command.run = raising(KeyboardInterrupt())
    assert main.main(["try"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_reader_that_leaves_early() -> None:
    """``esper env | true`` ends without a traceback."""
    script = f"{sys.executable} -m esper.cli.main env | true"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert result.stderr == ""


@pytest.mark.parametrize("arguments", ["env", "--help", "--version", "keygen --out key"])
def test_a_closed_output(arguments: str, tmp_path: Path) -> None:
    """``esper env >&-`` does what it does, and says so to nobody."""
    for closed in (">&-", "2>&-", ">&- 2>&-", "<&- >&-"):
        for left in tmp_path.iterdir():
            left.unlink()
        script = f"{sys.executable} -m esper.cli.main {arguments} {closed}"
        result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout or closed != "2>&-" or "keygen" in arguments


def test_errors_do_not_go_among_the_results(tmp_path: Path) -> None:
    script = f"{sys.executable} -m esper.cli.main inspect nothing 2>&-"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_lists_every_command_and_imports_none(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom esper.cli import main\n"
        f"try:\n    main.main({arguments})\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules\n"
        "assert not {module for module, _ in main.COMMANDS.values()} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name in main.COMMANDS:
        assert f"\n    {name} " in result.stdout


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_command_keeps_the_contract(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main.main([name, "--help"])
    assert end.value.code == 0
    assert f"usage: esper {name}" in capsys.readouterr().out


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main.main(["shrink"])
    assert end.value.code == 2
    assert "invalid choice: 'shrink'" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import esper

    with pytest.raises(SystemExit) as end:
        main.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"esper {esper.__version__}\n"


class TestBench:
    def test_outside_a_checkout(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(bench, "__file__", str(tmp_path / "esper" / "cli" / "bench.py"))
        with pytest.raises(ValueError, match="run from a checkout of Esper"):
            bench.find_checkout(tmp_path)

    def test_inside_a_checkout(self) -> None:
        root = Path(__file__).resolve().parents[2]
        assert bench.find_checkout(root / "bench") == root
        assert bench.find_checkout(Path("/")) == root

    def test_unknown_script_lists_the_known(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main.main(["bench", "shrinking"]) == 1
        error = capsys.readouterr().err
        assert "no benchmark 'shrinking'" in error
        assert "dormant_overhead" in error

    @pytest.mark.parametrize(
        ("flag", "last"),
        [("--check", ["check"]), ("--keep", ["keep"]), ("--keep --replace", ["keep", "--replace"]), ("", [])],
    )
    def test_runs_pytest_and_then_judges(self, monkeypatch: pytest.MonkeyPatch, flag: str, last: list[str]) -> None:
        calls: list[list[str]] = []

        def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
            calls.append(command)
            return subprocess.CompletedProcess(command, returncode=0)

        monkeypatch.setattr(bench.subprocess, "run", run)
        assert main.main(["bench", "dormant_overhead", *flag.split()]) == 0
        assert calls[0][1:3] == ["-m", "pytest"]
        assert calls[0][-1] == "bench/test_dormant_overhead.py"
        assert [call[2:] for call in calls[1:]] == ([["bench.results", *last]] if last else [])

    def test_replace_says_what_keep_may_drop(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main.main(["bench", "--check", "--replace"]) == 1
        assert "give both" in capsys.readouterr().err

    def test_failed_benchmarks_are_not_judged(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[list[str]] = []

        def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
            calls.append(command)
            return subprocess.CompletedProcess(command, returncode=3)

        monkeypatch.setattr(bench.subprocess, "run", run)
        assert main.main(["bench", "--keep"]) == 3
        assert len(calls) == 1
