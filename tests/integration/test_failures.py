"""A bad kernel never kills a run: every failure of promise 6, seen from a training loop."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.artifacts import FileRegistry
from esper.blueprints import get, initialise
from esper.contracts.registry import ArtifactSummary, KernelNotFoundError
from esper.execution.lifecycle import SeedLifecycleState
from tests.artifacts.samples import forged, sample, with_manifest

State = SeedLifecycleState
#: Shape of the host, and of what tests.artifacts.samples makes.
D_IN, D_OUT = 6, 4


class Answers:
    """A registry that gives the same answer to every question: a server somebody else controls."""

    url = "test://answers"

    def __init__(self, answer: bytes | Exception) -> None:
        self.answer = answer

    async def fetch(self, artifact_id: str, *, max_bytes: int) -> bytes:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def publish(self, data: bytes) -> str:
        raise NotImplementedError("this registry is only read")

    async def list(self, *, prefix: str = "") -> Sequence[ArtifactSummary]:
        return []

    async def describe(self, artifact_id: str) -> ArtifactSummary:
        raise KernelNotFoundError(artifact_id)


class Run:
    """A small training run beside an unwrapped twin that must stay bit-equal as long as no seed is awake."""

    def __init__(self, registry: Any) -> None:
        torch.manual_seed(0)
        self.host = nn.Sequential(nn.Linear(D_IN, D_OUT), nn.Tanh())
        self.model = esper.wrap(self.host, registry=registry)
        self.optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (self.host, self.model)]
        self.layer = self.model.layer("0")

    def step(self) -> Tensor:
        x = torch.randn(5, D_IN)
        for net, optimizer in zip((self.host, self.model), self.optimizers, strict=True):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
        self.model.step()
        return x

    def until_done(self, future: Future[bool]) -> bool:
        for _ in range(2000):
            self.step()
            if future.done():
                return future.result()
            time.sleep(0.005)
        raise AssertionError("the request did not finish")

    def assert_host_runs_on(self) -> None:
        x = self.step()
        assert torch.equal(self.model(x), self.host(x))
        assert not self.layer.grafts.bound

    @property
    def reason(self) -> str:
        return str(self.layer.get_layer_stats()["errors"][0])


@pytest.fixture(autouse=True)
def own_disk_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "registry"


def identifier(data: bytes) -> str:
    return esper.Artifact.open(data).artifact_id


def vouched(data: bytes) -> str:
    """The id that these bytes would have, so that the check of the hash lets them through to the next one."""
    return f"{identifier(sample()).rpartition('-')[0]}-{hashlib.sha256(data).hexdigest()[:8]}"


def test_missing_id(folder: Path) -> None:
    FileRegistry(folder).publish_sync(sample(1))
    run = Run(folder)
    wanted = identifier(sample(2))
    assert run.until_done(run.model.request_kernel("0", 0, wanted)) is False
    assert run.layer.state_layout.state_of(0) is State.DORMANT
    assert wanted in run.reason
    run.assert_host_runs_on()


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip])
def test_damaged_file(folder: Path, damage: Callable[[Path], None]) -> None:
    registry = FileRegistry(folder)
    wanted = registry.publish_sync(sample())
    path = registry.blob_path(wanted)
    path.chmod(0o644)
    damage(path)
    run = Run(folder)
    assert run.until_done(run.model.request_kernel("0", 0, wanted)) is False
    assert run.layer.state_layout.state_of(0) is State.ERROR_RECOVERY
    assert wanted in run.reason
    run.assert_host_runs_on()


def sample_tensors() -> dict[str, Tensor]:
    return initialise(get("bottleneck", rank=2), D_IN, D_OUT, 0)


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "schema": (lambda: with_manifest(sample(), lambda manifest: manifest["blueprint"].update(schema=99)), "99"),
    "format": (lambda: with_manifest(sample(), lambda manifest: manifest.update(format=99)), "99"),
    "truncated on the way": (lambda: sample()[:100], ""),
    "empty": (lambda: b"", ""),
    "pickle": (lambda: b"\x80\x04cposix\nsystem\n", ""),
    "another artifact": (lambda: sample(9), ""),
}


@pytest.mark.parametrize("name", BAD)
def test_registry_that_answers_badly(name: str) -> None:
    make, expected = BAD[name]
    data = make()
    run = Run(Answers(data))
    wanted = vouched(data) if expected else identifier(sample())
    assert run.until_done(run.model.request_kernel("0", 0, wanted)) is False
    assert run.layer.state_layout.state_of(0) is State.ERROR_RECOVERY
    assert expected in run.reason
    run.assert_host_runs_on()


def test_wrong_shape_inside_the_artifact_names_both() -> None:
    name = next(name for name in sample_tensors() if name.endswith("weight"))
    right = tuple(sample_tensors()[name].shape)
    data = forged(sample(), name, torch.zeros(right[0] + 15, right[1]))
    run = Run(Answers(data))
    assert run.until_done(run.model.request_kernel("0", 0, vouched(data))) is False
    assert run.layer.state_layout.state_of(0) is State.ERROR_RECOVERY
    assert str(list(right))[1:-1] in run.reason and f"{right[0] + 15}, {right[1]}" in run.reason, run.reason
    run.assert_host_runs_on()


def test_wrong_shape_for_the_layer_names_both(folder: Path) -> None:
    wanted = FileRegistry(folder).publish_sync(sample(d_in=11, d_out=13))
    run = Run(folder)
    assert run.until_done(run.model.request_kernel("0", 0, wanted)) is False
    assert run.layer.state_layout.state_of(0) is State.ERROR_RECOVERY
    assert all(str(size) in run.reason for size in (11, D_IN)), run.reason
    run.assert_host_runs_on()


def test_wrong_dtype() -> None:
    data = sample().replace(b'"F32"', b'"I32"')
    run = Run(Answers(data))
    assert run.until_done(run.model.request_kernel("0", 0, vouched(data))) is False
    assert run.layer.state_layout.state_of(0) is State.ERROR_RECOVERY
    assert "I32" in run.reason
    run.assert_host_runs_on()


def test_registry_folder_removed_mid_run(folder: Path) -> None:
    registry = FileRegistry(folder)
    first, second = (registry.publish_sync(sample(seed)) for seed in (1, 2))
    run = Run(folder)
    assert run.until_done(run.model.request_kernel("0", 1, first, alpha=0.0)) is True
    shutil.rmtree(folder)
    assert run.until_done(run.model.request_kernel("0", 0, second)) is False
    assert run.layer.state_layout.state_of(0) is State.DORMANT
    assert "folder" in run.reason or str(folder) in run.reason
    # What was loaded goes on working, and can be loaded again from the cache.
    assert run.layer.grafts.bound == (1,)
    assert run.until_done(run.model.request_kernel("0", 2, first, alpha=0.0)) is True


def test_seed_that_puts_out_nan_at_step_three(folder: Path) -> None:
    wanted = FileRegistry(folder).publish_sync(sample())
    run = Run(folder)
    assert asyncio.run(run.model.load_kernel("0", 0, wanted, alpha=1.0))
    healthy = asyncio.run(run.model.load_kernel("0", 1, wanted, alpha=0.0))
    assert healthy
    states, faults = [], []
    for step in range(1, 8):
        if step == 3:
            with torch.no_grad():
                for parameter in run.layer.grafts.seed_parameters(0).values():
                    parameter.fill_(float("nan"))
        x = torch.randn(5, D_IN)
        y = run.model(x)
        assert torch.isfinite(y).all()
        if step >= 3:
            with torch.no_grad():
                assert torch.equal(
                    y, run.model.wrapped_model[1](nn.functional.linear(x, run.layer.weight, run.layer.bias))
                )
        y.square().sum().backward()
        run.model.step()
        states.append(run.layer.state_layout.state_of(0))
        faults.append(int(run.layer.state_layout.error_count[0]))
    assert faults[:5] == [0, 0, 1, 2, 3]
    assert states == [State.ACTIVE] * 4 + [State.ERROR_RECOVERY] * 3
    assert run.layer.state_layout.state_of(1) is State.ACTIVE
    assert run.layer.grafts.bound == (1,)
    assert wanted in run.reason and "non-finite" in run.reason
    assert not any(torch.isnan(p.grad).any() for p in run.model.wrapped_model.parameters() if p.grad is not None)


def test_registry_that_hangs_never_stops_training(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hangs(Answers):
        async def fetch(self, artifact_id: str, *, max_bytes: int) -> bytes:
            await asyncio.sleep(3600)
            raise AssertionError

    run = Run(Hangs(b""))
    future = run.model.request_kernel("0", 0, identifier(sample()))
    for _ in range(20):
        run.step()
    assert not future.done()
    assert run.layer.state_layout.state_of(0) is State.LOADING
    run.model.close()
    # Nobody waits for what will not come.
    assert future.cancelled()
    assert run.layer.state_layout.state_of(0) is State.DORMANT
    run.assert_host_runs_on()
