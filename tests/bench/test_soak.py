"""The soak of telemetry in short: its own checks decide."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_a_short_soak(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    command = [sys.executable, "-m", "bench.soak_telemetry", "--seconds", "12", "--period", "6", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["numbers"]["delivered"] == found["numbers"]["produced"] > 0
    assert found["numbers"]["most_spooled"] > 0, "Redis was dead for a while"
