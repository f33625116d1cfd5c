"""Ten minutes of telemetry with a Redis that dies now and then: memory stays flat, the lag too, and nothing is lost.

``python -m bench.soak_telemetry [--seconds 600] [--period 30] [--out FILE.json]``; exit status 1 says what failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import esper
from esper.execution.telemetry.options import TelemetryOptions
from tests.servers import RedisServer, redis_server

LAYERS, SEEDS = 20, 500
WINDOWS_PER_S = 4.0
#: Of every period Redis is dead for this share, at its end.
DEAD_SHARE = 1 / 6
#: What the process may have grown by from the end of the first third to the end, beside noise of the allocator.
GROWTH_MB = 16.0
#: From capture to answer, median of the samples of the last third, outages left out.
LAG_S = 1.0


def resident_mb() -> float:
    """Memory of this process in RAM, MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


class Soak:
    """The run, sampled."""

    def __init__(self, server: RedisServer, folder: Path) -> None:
        torch.set_num_threads(1)
        network = nn.Sequential(*(nn.Linear(64, 64) for _ in range(LAYERS)))
        self.server = server
        self.model = esper.wrap(
            network,
            seeds_per_layer=SEEDS,
            preserve_original=False,
            bus=server.url,
            telemetry=TelemetryOptions(spool_dir=folder, interval_s=1 / WINDOWS_PER_S, sender_share=0.05),
        )
        self.x = torch.randn(32, 64)
        self.samples: list[dict[str, Any]] = []
        self.steps = 0

    def run(self, seconds: float, period: float) -> None:
        began = time.monotonic()
        next_sample, dead = 0.0, False
        while (now := time.monotonic() - began) < seconds:
            with torch.no_grad():
                self.model(self.x)
            self.model.step()
            self.steps += 1
            wanted = now % period > period * (1 - DEAD_SHARE) and now < seconds - period / 2
            if wanted != dead:
                dead = wanted
                self.server.kill() if dead else self.server.start()
            if now >= next_sample:
                next_sample = now + 1.0
                stats = self.model.telemetry_stats()
                self.samples.append({"at_s": now, "resident_mb": resident_mb(), "dead": dead, **stats})
        self.model.close(30.0)

    def verdict(self) -> tuple[dict[str, Any], list[str]]:
        """Numbers, and what is wrong with them."""
        third = len(self.samples) // 3
        memory = [sample["resident_mb"] for sample in self.samples]
        # Means over a tenth: a single sample catches a spool's batch in memory or not.
        tenth = max(1, len(memory) // 10)
        growth = float(np.mean(memory[-tenth:]) - np.mean(memory[third : third + tenth]))
        calm = [s["lag_s"] for s in self.samples[-third:] if not s["away_s"] and not s["spooled"]]
        lag = float(np.median(calm)) if calm else float("nan")
        stats = self.model.telemetry_stats()
        numbers = {
            "seconds": self.samples[-1]["at_s"],
            "steps": self.steps,
            "produced": stats["produced"],
            "delivered": stats["delivered"],
            "dropped": stats["dropped"],
            "spooled": stats["spooled"],
            "most_spooled": max(sample["spooled"] for sample in self.samples),
            "resident_mb": memory[-1],
            "growth_mb": growth,
            "lag_s": lag,
        }
        problems = []
        if growth > GROWTH_MB:
            problems.append(f"memory grew by {growth:.1f} MiB, more than {GROWTH_MB:g}")
        if not lag <= LAG_S:
            problems.append(f"the lag is {lag:.3f} s at the end, more than {LAG_S:g}")
        if stats["produced"] != stats["delivered"] or stats["in_flight"]:
            problems.append(f"of {stats['produced']} messages {stats['delivered']} were delivered")
        return numbers, problems


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--period", type=float, default=30.0, help="seconds from one death of Redis to the next")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, redis_server(Path(folder) / "redis", appendfsync="no") as server:
        soak = Soak(server, Path(folder) / "spool")
        soak.run(args.seconds, args.period)
    numbers, problems = soak.verdict()
    print(json.dumps(numbers, indent=1))
    if args.out is not None:
        args.out.write_text(json.dumps({"numbers": numbers, "samples": soak.samples}, indent=1) + "\n")
    for problem in problems:
        print(f"soak: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
