"""A training process: a linear host learns a function that is not, until a kernel arrives and it can.

``python -m tests.integration.training_process --registry URL --kernel ID``: the report goes to standard output as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

D_IN, D_OUT = 16, 8
ALPHA_STEPS = 40


class Training:
    """The run, one step at a time; used by tests in their own process too."""

    def __init__(self, registry: Any, cache: Path | None = None, **options: Any) -> None:
        import torch
        from torch import nn

        import esper
        from esper.execution.kernel_cache import KernelCache

        torch.manual_seed(0)
        torch.set_num_threads(1)
        self._torch = torch
        self._inner, self._outer = torch.randn(D_IN, 12), torch.randn(12, D_OUT) / 3
        self.model = esper.wrap(nn.Sequential(nn.Linear(D_IN, D_OUT)), registry=registry)
        self.layer = self.model.layer("0")
        self.cache = KernelCache(registry=registry, disk_dir=cache, **{"backoff_s": 0.05, **options})
        self.layer.kernel_cache = self.cache
        self._optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        esper.optim.attach(self._optimizer, self.model)
        self.steps = 0
        self.longest_step_s = 0.0

    def loss(self) -> Any:
        x = self._torch.randn(64, D_IN)
        return (self.model(x) - self._torch.tanh(x @ self._inner) @ self._outer).square().mean()

    def step(self, times: int = 1) -> float:
        """Train; the mean loss."""
        total = 0.0
        for _ in range(times):
            begun = time.perf_counter()
            self._optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            self._optimizer.step()
            self.model.step()
            total += float(loss.detach())
            self.steps += 1
            self.longest_step_s = max(self.longest_step_s, time.perf_counter() - begun)
        return total / times

    def until_done(self, future: Any, timeout_s: float = 60.0) -> bool:
        """Train while a kernel is on its way; RuntimeError after ``timeout_s``."""
        deadline = time.perf_counter() + timeout_s
        while not future.done():
            self.step()
            time.sleep(0.002)
            if time.perf_counter() > deadline:
                raise RuntimeError(f"no kernel and no reason within {timeout_s} s")
        return bool(future.result())

    def load(self, kernel: str, timeout_s: float = 60.0) -> bool:
        """Request a kernel and train until it is there, or is not to be had."""
        future = self.model.request_kernel("0", 0, kernel, alpha=1.0, ramp_steps=ALPHA_STEPS)
        return self.until_done(future, timeout_s)

    @property
    def state(self) -> str:
        return str(self.layer.state_layout.state_of(0).name)

    @property
    def reason(self) -> str:
        """Why the seed has no kernel, as the layer has it on record."""
        return str(self.layer.get_layer_stats()["errors"].get(0, ""))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--registry", required=True)
    parser.add_argument("--kernel", required=True)
    parser.add_argument("--cache", type=Path)
    args = parser.parse_args()
    run = Training(args.registry, args.cache)
    run.step(250)
    before = run.step(50)
    run.longest_step_s = 0.0
    begun = run.steps
    loaded = run.load(args.kernel)
    report: dict[str, Any] = {"loaded": loaded, "steps_while_loading": run.steps - begun, "loss_before": before}
    if loaded:
        run.step(1200)
        report["alpha"] = run.layer.state_layout.alpha_of(0)
        run.model.fossilize("0", 0)
        report["loss_after"] = run.step(50)
    report |= {
        "state": run.state,
        "reason": run.reason,
        "longest_step_s": run.longest_step_s,
        "cache": {key: value for key, value in run.cache.get_cache_stats().items() if isinstance(value, int)},
    }
    run.model.close()
    print(json.dumps(report), flush=True)


def start(registry: str, kernel: str, cache: Path) -> subprocess.Popen[str]:
    """The process; its output is the report."""
    command = [sys.executable, "-m", "tests.integration.training_process", "--registry", registry, "--kernel", kernel]
    return subprocess.Popen(
        [*command, "--cache", str(cache)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def report_of(process: subprocess.Popen[str], timeout_s: float = 90.0) -> dict[str, Any]:
    """Wait for a training process and read its report."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    assert process.returncode == 0, err
    return dict(json.loads(out))


if __name__ == "__main__":
    main()
