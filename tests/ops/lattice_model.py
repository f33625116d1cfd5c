"""The seed state machine in plain Python, written from docs/architecture.md and docs/lattice.md.

It takes nothing from the package. One seed is one object; every number is a Python int or a numpy.float32, so that each
operation rounds once, as it must on every backend.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

F = np.float32
INT32_MAX = 2**31 - 1
DORMANT, LOADING, ACTIVE, ERROR_RECOVERY, FOSSILIZED, GRAFTING, TRAINING, CULLED = range(8)
NAMES = ("DORMANT", "LOADING", "ACTIVE", "ERROR_RECOVERY", "FOSSILIZED", "GRAFTING", "TRAINING", "CULLED")
LEGAL = {
    DORMANT: {LOADING, ACTIVE, GRAFTING, TRAINING, ERROR_RECOVERY},
    LOADING: {DORMANT, ACTIVE, GRAFTING, TRAINING, ERROR_RECOVERY},
    ACTIVE: {DORMANT, GRAFTING, TRAINING, FOSSILIZED, CULLED, ERROR_RECOVERY},
    GRAFTING: {DORMANT, ACTIVE, TRAINING, FOSSILIZED, CULLED, ERROR_RECOVERY},
    TRAINING: {DORMANT, ACTIVE, GRAFTING, FOSSILIZED, CULLED, ERROR_RECOVERY},
    FOSSILIZED: {ERROR_RECOVERY},
    ERROR_RECOVERY: {DORMANT, LOADING, CULLED},
    CULLED: {DORMANT},
}
AWAKE = {ACTIVE, GRAFTING, TRAINING, FOSSILIZED}


@dataclass(eq=False)
class Seed:
    active_kernel_id: int = 0
    alpha_blend: Any = field(default_factory=lambda: F(0))
    alpha_target: Any = field(default_factory=lambda: F(0))
    alpha_step: Any = field(default_factory=lambda: F(0))
    health_accumulator: Any = field(default_factory=lambda: F(1))
    last_update_epoch: int = 0
    exec_latency_us: int = 0
    error_count: int = 0
    state_timer: int = 0
    lifecycle_states: int = DORMANT
    fallback_active: bool = False
    health_sample: Any = field(default_factory=lambda: F("nan"))
    fault_flags: int = 0

    def step(self, epoch: int) -> None:
        """What the device does to one seed in one step."""
        state = self.lifecycle_states
        touched = False
        if state in AWAKE:
            if self.fault_flags:
                self.error_count = min(self.error_count + 1, INT32_MAX)
                self.fallback_active = True
                touched = True
            else:
                self.error_count = 0
                self.fallback_active = False
        died = state in AWAKE and bool(self.fault_flags) and self.error_count >= 3
        self.fault_flags = 0
        if died:
            self._clear_alpha()
            self.state_timer = 0
            self.lifecycle_states = ERROR_RECOVERY
        else:
            timer = self.state_timer
            if state in AWAKE:
                self._ramp()
            if state in (TRAINING, CULLED) and timer > 0:
                self.state_timer = timer - 1
                if timer == 1:
                    self.lifecycle_states = ACTIVE if state == TRAINING else DORMANT
            if state == GRAFTING and self.alpha_blend == self.alpha_target:
                self.lifecycle_states = TRAINING if timer > 0 else ACTIVE
        touched = touched or self.lifecycle_states != state
        if not np.isnan(self.health_sample):
            self._mix(self.health_sample)
            self.health_sample = F("nan")
            touched = True
        if touched:
            self.last_update_epoch = epoch

    def _ramp(self) -> None:
        distance = F(self.alpha_target - self.alpha_blend)
        stride = F(abs(self.alpha_step))
        if F(abs(distance)) > F(F(1.5) * stride):
            self.alpha_blend = F(self.alpha_blend + stride) if distance > 0 else F(self.alpha_blend - stride)
        else:
            self.alpha_blend = self.alpha_target

    def _mix(self, sample: Any) -> None:
        score = F(min(max(float(sample), 0.0), 1.0))
        self.health_accumulator = F(self.health_accumulator + F(F(score - self.health_accumulator) * F(0.1)))

    def _clear_alpha(self) -> None:
        self.alpha_blend = self.alpha_target = self.alpha_step = F(0)

    # What the host's commands do; the epoch is that of the last step.

    def transition(self, new: int, kernel_id: int | None, timer: int, epoch: int) -> bool:
        """Whether it was legal."""
        old = self.lifecycle_states
        if new not in LEGAL[old]:
            return False
        if new in (DORMANT, CULLED):
            self._clear_alpha()
            self.active_kernel_id = self.error_count = 0
            self.fallback_active = False
        elif new == ERROR_RECOVERY:
            self._clear_alpha()
            self.fallback_active = True
        elif old not in AWAKE:
            self.error_count = 0
            self.fallback_active = False
        if kernel_id is not None:
            self.active_kernel_id = kernel_id
        self.lifecycle_states = new
        self.state_timer = timer
        self.last_update_epoch = epoch
        return True

    def set_alpha(self, alpha: float, ramp_steps: int) -> None:
        goal = F(min(max(alpha, 0.0), 1.0))
        self.alpha_target = goal
        if ramp_steps == 0:
            self.alpha_blend = goal
            self.alpha_step = F(0)
        else:
            self.alpha_step = F(F(abs(F(goal - self.alpha_blend))) / F(ramp_steps))

    def add_fault(self, epoch: int) -> bool:
        self.error_count = min(self.error_count + 1, INT32_MAX)
        self.fallback_active = True
        self.last_update_epoch = epoch
        return self.error_count >= 3 and self.transition(ERROR_RECOVERY, None, 0, epoch)

    def record(self, latency_us: float, health: float, epoch: int) -> None:
        self.exec_latency_us = int(min(latency_us, INT32_MAX))
        self.last_update_epoch = epoch
        if not np.isnan(health):
            self._mix(F(min(max(health, 0.0), 1.0)))


def crc32c(data: bytes) -> int:
    """CRC-32C a bit at a time, as RFC 3720 (appendix B.4) has it; no tables, no tricks."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def padded(data: bytes) -> bytes:
    """``data`` with zero bytes up to a multiple of 64."""
    return data + bytes(-len(data) % 64)
