"""Binaries of an artifact reach the operations with the kernel, on a GPU only, and what is left out is on record."""

from __future__ import annotations

import hashlib
import pickle
from typing import Any

import pytest
import torch

from esper.artifacts import Artifact, pack
from esper.artifacts.signing import SigningKey
from esper.blueprints import get, initialise
from esper.contracts.manifest import BinaryEntry
from esper.execution import kernel_executor
from esper.execution.kernel_executor import LoadedKernel

CODE = b"not code"
ENTRY = BinaryEntry(
    arch="sm_90",
    dtype="fp32",
    direction="forward",
    kernel="demo_kernel",
    symbol="demo_kernel",
    signature=(("x", "*fp32"),),
    constants={},
    num_warps=4,
    shared=0,
    registers=20,
    spills=0,
    tools={},
    sha256=hashlib.sha256(CODE).hexdigest(),
    size=len(CODE),
)


def artifact(*, trusted: bool) -> Artifact:
    key = SigningKey.generate()
    blueprint = get("lowrank", rank=2)
    data = pack(
        blueprint,
        initialise(blueprint, 6, 4, 0),
        d_in=6,
        d_out=4,
        seed=0,
        pipeline="standard",
        binaries={"gpu/sm_90/fp32/forward": (ENTRY, CODE)},
        sign_with=key,
    )
    return Artifact.open(data, trusted_keys=[key.public] if trusted else [])


class Table:
    def __init__(self) -> None:
        self.asked: list[tuple[Any, int]] = []

    def add(self, binaries: Any, device: int) -> tuple[str, ...]:
        self.asked.append((binaries, device))
        return ("too new",)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Table:
    table = Table()
    monkeypatch.setattr(kernel_executor, "TABLE", table)
    # Tensors need no GPU to be there: only where the binaries go is looked at.
    monkeypatch.setattr(kernel_executor, "to_device", lambda tensors, device: (dict(tensors), None))
    return table


def test_trusted_binaries_are_loaded_for_the_device(table: Table) -> None:
    given = artifact(trusted=True)
    kernel = LoadedKernel.from_artifact(given, torch.device("cuda", 1))
    ((binaries, device),) = table.asked
    assert (bytes(binaries[0].data), device) == (CODE, 1)
    assert kernel.notes == ("too new",)
    assert pickle.loads(pickle.dumps(kernel)).notes == kernel.notes


def test_a_cpu_loads_none(table: Table) -> None:
    kernel = LoadedKernel.from_artifact(artifact(trusted=True))
    assert (table.asked, kernel.notes) == ([], ())


def test_untrusted_binaries_are_never_loaded(table: Table) -> None:
    kernel = LoadedKernel.from_artifact(artifact(trusted=False), torch.device("cuda", 0))
    assert table.asked == []
    assert len(kernel.notes) == 1
