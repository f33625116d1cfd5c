"""A training process that publishes: ``python -m tests.integration.telemetry_process --bus URL --spool FOLDER``.

It trains until its standard input ends, prints ``stepping`` after its first step, and at the end its statistics, as
JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bus", required=True)
    parser.add_argument("--spool", required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--pause", type=float, default=0.005)
    args = parser.parse_args()

    import torch
    from torch import nn

    import esper
    from esper.execution.telemetry.options import TelemetryOptions

    torch.set_num_threads(1)
    ended = threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    model = esper.wrap(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)),
        bus=args.bus,
        telemetry=TelemetryOptions(run_id=args.run, every_steps=1, spool_dir=args.spool),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    steps = 0
    while not ended.is_set():
        optimizer.zero_grad()
        model(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
        model.step()
        steps += 1
        if steps == 1:
            print("stepping", flush=True)
        time.sleep(args.pause)
    model.close()
    print(json.dumps({"steps": steps, **model.telemetry_stats()}), flush=True)


def start(bus: str, spool: Path, run: str) -> subprocess.Popen[str]:
    """The process, once it has made its first step."""
    command = [sys.executable, "-m", "tests.integration.telemetry_process", "--bus", bus, "--spool", str(spool)]
    process = subprocess.Popen(
        [*command, "--run", run],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if line.strip() != "stepping":
        raise AssertionError(f"it did not step: {line!r} {process.communicate()[1][-2000:]}")
    return process


def finish(process: subprocess.Popen[str]) -> dict[str, object]:
    """Let it end; its statistics."""
    out, err = process.communicate("", timeout=90)
    assert process.returncode == 0, err
    return dict(json.loads(out.strip().splitlines()[-1]))


if __name__ == "__main__":
    main()
