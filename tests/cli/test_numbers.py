"""Numbers as options of every command: what is none, or out of range, is named in one line."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from esper.cli.main import COMMANDS, _parser, main

SUBMIT = ["tezzeret", "submit", "lowrank", "--d-in", "6", "--d-out", "4"]
SERVE, WORKER = ["urza", "serve"], ["tezzeret", "worker"]
COMPILE = ["compile", "lowrank", "--d-in", "6", "--d-out", "4", "-o", "k"]

#: Command, option, what it does not take, and what it says is allowed.
REFUSED = [
    (SERVE, "--port", ["-1", "65536"], "a whole number from 0 to 65535"),
    (SERVE, "--presign-s", ["-1", "0", "604801"], "a whole number from 1 to 604800"),
    (SERVE, "--max-mb", ["nan", "inf", "-inf", "-1.0", "0.0"], "a number from 0.001 to 1048576"),
    (SERVE, "--write-rate", ["nan", "inf", "-1.0"], "a number from 0 to 1000000"),
    (SERVE, "--write-burst", ["-1", "0"], "a whole number from 1 to 1000000"),
    (WORKER, "--concurrency", ["-1", "0"], "a whole number from 1 to 1024"),
    (WORKER, "--timeout", ["nan", "inf", "-1.0", "0.0"], "a number from 1 to 1000000000"),
    (WORKER, "--memory-mb", ["-1", "0"], "a whole number from 256 to 1048576"),
    (WORKER, "--max-artifact-mb", ["nan", "inf", "-1.0", "0.0"], "a number from 0.001 to 1048576"),
    (WORKER, "--abandon", ["nan", "inf", "-1.0", "0.0"], "a number above 0 and at most 1000000000"),
    (WORKER, "--lease", ["nan", "inf", "-1.0", "0.0"], "a number from 1 to 86400"),
    (WORKER, "--grace", ["nan", "inf", "-1.0"], "a number from 0 to 1000000000"),
    (SUBMIT, "--d-in", ["-1", "0"], "a whole number from 1 to 1048576"),
    (SUBMIT, "--d-out", ["-1", "0"], "a whole number from 1 to 1048576"),
    (SUBMIT, "--rank", ["-1", "0"], "a whole number from 1 to 1048576"),
    (SUBMIT, "--seed", ["-1"], "a whole number from 0 to 9223372036854775807"),
    (SUBMIT, "--wait", ["nan", "inf", "-1.0", "0.0"], "a number above 0 and at most 1000000000"),
    (["monitor", "--once", "--run", "x"], "--rank", ["-1"], "a whole number from 0 to 1000000"),
    (["demo", "pipeline"], "--seed", ["-1"], "a whole number from 0 to 9223372036854775807"),
    # Esper's own words for sizes, which Python's callers read too.
    (COMPILE, "--d-in", ["-1", "0"], "d_in must be an integer in [1, 1048576]"),
    (COMPILE, "--d-out", ["-1", "0"], "d_out must be an integer in [1, 1048576]"),
    (COMPILE, "--rank", ["-1", "0"], "'rank' must be an integer in [1, 1048576]"),
    (COMPILE, "--seed", ["-1"], "seed must be an integer in [0, 2**63)"),
    (["grow"], "--epochs", ["-1", "0"], "expected at least 1"),
    (["grow"], "--seed", ["-1"], "expected 0 to "),
]

#: What a command asks for before it looks at its options.
NEEDS = {"urza": ("fastapi", "sqlalchemy"), "monitor": ("rich",)}


def cases():
    return [(command, option, value, allowed) for command, option, values, allowed in REFUSED for value in values]


@pytest.mark.parametrize(("command", "option", "value", "allowed"), cases(), ids=lambda each: str(each)[:24])
def test_out_of_range(command, option, value, allowed, capsys, monkeypatch, tmp_path):
    for package in NEEDS.get(command[0], ()):
        pytest.importorskip(package)
    if command is SERVE:
        # What is accepted by mistake shall not be served until somebody looks.
        monkeypatch.setattr("esper.services.urza.serve.serve", lambda *_, **__: 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    for name in ("ESPER_DEBUG", "REDIS_URL", "ESPER_REGISTRY"):
        monkeypatch.delenv(name, raising=False)
    assert main([*command, f"{option}={value}"]) in (1, 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert allowed in err
    assert value in err
    assert option.removeprefix("--").replace("-", "_") in err.replace("-", "_")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0"])
@pytest.mark.parametrize("option", ["--since", "--speed"])
def test_times_of_the_monitor(option, value, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["monitor", f"{option}={value}"])
    assert ended.value.code == 2
    assert f"argument {option}: {value}: need a finite number above 0" in capsys.readouterr().err


def numeric(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> set[tuple[tuple[str, ...], str]]:
    """The options of a parser, and of those below it, that are numbers."""
    found = set()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                found |= numeric(below, (*path, name))
        elif action.type not in (None, str, Path):
            found.add((path, action.option_strings[-1]))
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_no_number_is_forgotten_here(name):
    parser, _ = _parser(name)
    tried = {(tuple(word for word in command[:2] if word in ACTIONS), option) for command, option, _, _ in REFUSED}
    tried |= {(("monitor",), "--since"), (("monitor",), "--speed")}
    assert {each for each in numeric(parser) if each[0][0] == name} <= tried


ACTIONS = {*COMMANDS, "serve", "worker", "submit", "pipeline"}
