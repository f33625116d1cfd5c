"""``esper grow`` from the command line: the whole job in small, bad input, interruption."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("safetensors")

import esper
from esper.grow import cli, experiment
from esper.grow.model import build, host_width


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    args = parser.parse_args(["grow", *arguments])
    return int(args.run(args))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Two rings that a narrow network cannot tell apart, a few hundred points."""
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 2 * np.pi, 300)
    y = np.arange(300) % 3
    radius = 1.0 + y + rng.normal(0, 0.1, 300)
    path = tmp_path / "rings.npz"
    np.savez(path, X=np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1), y=y)
    return path


def events_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


def test_the_whole_job_in_small(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "REPEATS", 2)
    out, registry = tmp_path / "out", tmp_path / "kernels"
    threads = torch.get_num_threads()
    status = run("--data", str(small), "--epochs", "60", "--seed", "3", "--out", str(out), "--registry", str(registry))
    assert status == 0
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    assert "grown: the host, grown by seeds" in printed
    assert str(out) in printed

    log = events_of(out)
    assert [line["seq"] for line in log] == list(range(len(log)))
    assert (log[0]["event"], log[-1]["event"]) == ("run_started", "run_finished")
    kinds = {line["event"] for line in log}
    # 60 epochs are enough for a network to level off and be given a seed, whatever becomes of it.
    assert {"levelled_off", "seed_requested", "seed_bound", "seed_judged", "checkpoint_saved"} <= kinds
    for judged in (line for line in log if line["event"] == "seed_judged"):
        assert (judged["verdict"] == "culled") or judged["loss_after"] < judged["loss_before"]

    report = json.loads((out / "report.json").read_text())
    assert [report["networks"][name]["count"] for name in ("host", "grown", "static")] == [2, 2, 2]
    assert report["interrupted"] is False
    runs = {(run["network"], run["seed"]): run for run in report["runs"]}
    assert set(runs) == {(name, seed) for name in ("host", "grown", "static") for seed in (3, 4)}
    # Before the first seed was asked for, the grown network is the host, bit for bit.
    asked = next(line["epoch"] for line in log if line["event"] == "seed_requested" and line["seed"] == 3)
    assert runs["grown", 3]["history"][:asked] == runs["host", 3]["history"][:asked]
    assert (out / "growth.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert any(registry.rglob("*.json"))

    grown = runs["grown", 3]
    model = esper.load(out / grown["checkpoint"], build(2, 3, width=host_width(3), seed=0))
    assert sum(p.numel() for p in model.parameters()) == grown["parameters"]

    assert run("--data", str(small), "--epochs", "1", "--out", str(out)) == cli.EXIT_BAD_INPUT
    assert "never overwritten" in capsys.readouterr().err
    assert events_of(out) == log


def test_without_matplotlib_there_is_no_picture_and_a_line_that_says_so(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "REPEATS", 1)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib" or name == "esper.grow.plot"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "out"
    assert run("--data", str(small), "--epochs", "2", "--out", str(out)) == 0
    assert "no picture, which needs matplotlib" in capsys.readouterr().out
    assert (out / "report.json").exists()
    assert not (out / "growth.png").exists()


def test_default_folder_is_new_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = {cli._make_folder(None) for _ in range(3)}
    assert len(folders) == 3
    assert all(folder.parent == Path("runs") for folder in folders)


BAD = [
    (["--epochs", "0"], "--epochs 0"),
    (["--epochs", "-3"], "--epochs -3"),
    (["--seed", "-1"], "--seed -1"),
    (["--device", "abacus"], "--device abacus"),
    (["--device", "cuda:77"], "--device cuda:77"),
    (["--data", "missing.npz"], "missing.npz: no such file"),
    (["--registry", "https://example.org/kernels"], "folder or file:// URL"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD)
def test_bad_arguments_end_in_one_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments, "--out", "out") == cli.EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_folders_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    for out in (file, file / "below"):
        assert run("--out", str(out)) == cli.EXIT_BAD_INPUT
        error = capsys.readouterr().err
        assert str(out) in error
        assert error.count("\n") == 1
    # /proc refuses new entries even to root, for whom the rights of an ordinary folder do not count.
    assert run("--out", "/proc/esper-run") == cli.EXIT_BAD_INPUT
    assert "cannot be written to" in capsys.readouterr().err
    assert run("--out", str(tmp_path / "new"), "--registry", str(file)) == cli.EXIT_BAD_INPUT
    assert "--registry" in capsys.readouterr().err


def test_ctrl_c_saves_what_there_is(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = "import sys; from esper.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "grow", "--data", str(small), "--epochs", "100000", "--out", str(out)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        log = out / "events.jsonl"
        deadline = time.monotonic() + 60
        while not (log.exists() and log.read_text().count("epoch_ended") > 3):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "training did not begin"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == cli.EXIT_INTERRUPTED, errors
    assert "Interrupted; saved what there is" in printed
    report = json.loads((out / "report.json").read_text())
    assert report["interrupted"] is True
    assert [run["complete"] for run in report["runs"]] == [False]
    assert events_of(out)[-1]["event"] == "run_finished"
    assert (out / "growth.png").exists()


def test_ctrl_c_while_growing_saves_the_checkpoint(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def growing(self: cli.InterruptFlag) -> bool:
        path = out / "events.jsonl"
        return '"seed_bound"' in path.read_text() if path.exists() else False

    monkeypatch.setattr(cli.InterruptFlag, "is_set", growing)
    assert run("--data", str(small), "--epochs", "60", "--out", str(out)) == cli.EXIT_INTERRUPTED
    report = json.loads((out / "report.json").read_text())
    assert [(run["network"], run["complete"]) for run in report["runs"]] == [("host", True), ("grown", False)]
    # The seed on trial had not shown that it helps, so it was culled before saving.
    model = esper.load(out / report["runs"][1]["checkpoint"], build(2, 3, width=host_width(3), seed=0))
    assert not model.morphogenetic_active


def test_a_registry_that_vanishes_costs_the_seeds_and_not_the_run(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "REPEATS", 1)
    # What an earlier test fetched would be found on the disk.
    monkeypatch.setenv("ESPER_CACHE_DIR", str(tmp_path / "cache"))
    out, registry = tmp_path / "out", tmp_path / "kernels"
    build_catalogue = experiment.build_catalogue

    def build_and_lose(*args: Any, **kwargs: Any) -> Any:
        catalogue = build_catalogue(*args, **kwargs)
        shutil.rmtree(registry)
        return catalogue

    monkeypatch.setattr(experiment, "build_catalogue", build_and_lose)
    assert run("--data", str(small), "--epochs", "50", "--out", str(out), "--registry", str(registry)) == 0
    refused = [line for line in events_of(out) if line["event"] == "seed_refused"]
    # So short a run may well end before the background has tried often enough to give up.
    assert len(refused) == len([line for line in events_of(out) if line["event"] == "seed_requested"]) > 0
    assert all(line["reason"] != "no reason on record" for line in refused)
    # Nothing was ever woken, so the wrapped network ends as the host does, bit for bit.
    runs = {run["network"]: run for run in json.loads((out / "report.json").read_text())["runs"]}
    assert runs["grown"]["history"] == runs["host"]["history"]
    assert runs["grown"]["parameters"] == runs["host"]["parameters"]


def test_kernels_in_the_registry_are_used_again(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "REPEATS", 1)
    registry = tmp_path / "kernels"
    held = []
    for out in ("first", "second"):
        assert (
            run("--data", str(small), "--epochs", "2", "--out", str(tmp_path / out), "--registry", str(registry)) == 0
        )
        held.append(sorted(path.relative_to(registry) for path in registry.rglob("*") if path.is_file()))
    assert held[0] == held[1]
    assert len(held[0]) > 0


def test_interrupt_flag_gives_ctrl_c_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with cli.InterruptFlag() as flag:
        assert not flag.is_set()
        signal.raise_signal(signal.SIGINT)
        assert flag.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
