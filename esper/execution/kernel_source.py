"""Below the memory: a kernel from the disk or, failing that, from the registry, verified and on the device.

What blocks (files, hashing, parsing) runs in a worker thread, what waits (the network, other processes) on the
background loop, and a load changes between them as seldom as it can: a hit on the disk never leaves its worker thread.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from esper.artifacts.artifact import Artifact
from esper.artifacts.keyring import KeyRing
from esper.artifacts.text import summarise
from esper.artifacts.workers import run_blocking, submit_blocking
from esper.contracts.errors import ArtifactError, EsperError, KernelNotFoundError, RegistryUnavailableError
from esper.contracts.ids import artifact_id_wanted, parse_artifact_id
from esper.contracts.registry import ArtifactSummary
from esper.execution import background
from esper.execution.disk_cache import Claim, DiskCache
from esper.execution.fetching import Fetcher
from esper.execution.kernel_executor import LoadedKernel

__all__ = ["KernelSource", "Load"]

#: How often to look whether another process has stored what it said it would fetch: at first, and at most.
_LOOK_S: Final = 0.02
_LOOK_SELDOM_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Load:
    """What is wanted, and by whom.

    Attributes:
        artifact_id: What to load.
        device: Where its tensors shall be.
        land: Takes what came of it, once: the kernel, or why there is none.
    """

    artifact_id: str
    device: torch.device
    land: Callable[[LoadedKernel | BaseException], None]


class KernelSource:
    """The tiers below memory.

    Args:
        disk: The disk tier; None leaves it out.
        fetcher: The registry tier.
        max_bytes: Largest artifact accepted.
        patience_s: Longest wait for another process that is fetching the same artifact into the same folder.
        keys: Whose signatures are trusted.
        policy: What is refused, see :meth:`Artifact.open`.
        count: Called with the name of a counter.
    """

    def __init__(
        self,
        disk: DiskCache | None,
        fetcher: Fetcher,
        *,
        max_bytes: int,
        patience_s: float,
        keys: KeyRing,
        policy: str,
        count: Callable[[str], None],
    ) -> None:
        self._disk = disk
        self._fetcher = fetcher
        self._max_bytes = max_bytes
        self._patience_s = patience_s
        self._keys = keys
        self._policy = policy
        self._count = count

    def start(self, load: Load) -> None:
        """Begin a load, which lands in another thread.

        Raises:
            RuntimeError: the interpreter is exiting; it does not land.
        """
        if self._disk is None:
            background.submit(self._ask(load, None))
        else:
            submit_blocking(self._begin, load)

    def _begin(self, load: Load) -> None:
        """In a worker thread: look on the disk, and pass on to the registry what is not there."""
        claim: Claim | None = None
        outcome: LoadedKernel | BaseException | None
        try:
            artifact_id_wanted(load.artifact_id)
            outcome, claim = self._from_disk(load)
            if outcome is None:
                background.submit(self._ask(load, claim))
                return
        except BaseException as error:
            _release(claim)
            outcome = error
        load.land(outcome)

    async def _ask(self, load: Load, claim: Claim | None) -> None:
        """On the background loop: wait for another process that fetches it, or fetch it."""
        outcome: LoadedKernel | BaseException | None = None
        try:
            if self._disk is None:
                artifact_id_wanted(load.artifact_id)
            elif claim is None:
                outcome, claim = await self._await_other(load)
            if outcome is None:
                data = await self._fetcher.fetch(load.artifact_id)
                self._count("fetches")
                submit_blocking(self._accept, load, data, claim)
                return
        except BaseException as error:
            _release(claim)
            outcome = error
        load.land(outcome)
        if isinstance(outcome, asyncio.CancelledError):
            raise outcome

    async def _await_other(self, load: Load) -> tuple[LoadedKernel | None, Claim | None]:
        """What another process stores, or the claim it gives up, or neither when it takes too long."""
        loop = asyncio.get_running_loop()
        until, pause = loop.time() + self._patience_s, _LOOK_S
        while loop.time() < until:
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, _LOOK_SELDOM_S)
            kernel, claim = await run_blocking(self._from_disk, load)
            if kernel is not None:
                self._count("shared_fetches")
            if kernel is not None or claim is not None:
                return kernel, claim
        return None, None

    def _accept(self, load: Load, data: bytes | bytearray, claim: Claim | None) -> None:
        """In a worker thread: verify what the registry gave, keep it on the disk, load it."""
        outcome: LoadedKernel | BaseException
        try:
            if len(data) > self._max_bytes:
                raise ArtifactError(f"{len(data)} bytes are more than the limit of {self._max_bytes}")
            artifact = self._open(load.artifact_id, data)
            self._store(artifact, data)
            outcome = LoadedKernel.from_artifact(artifact, load.device)
        except BaseException as error:
            outcome = error
        _release(claim)
        load.land(outcome)

    def _store(self, artifact: Artifact, data: bytes | bytearray) -> None:
        if self._disk is None:
            return
        facts = summarise(artifact.manifest)
        try:
            self._disk.store(data, ArtifactSummary(artifact.artifact_id, artifact.sha256, artifact.nbytes, facts))
        except EsperError:
            # A full or read-only disk costs a fetch next time, not the kernel now.
            self._count("disk_errors")

    def _from_disk(self, load: Load) -> tuple[LoadedKernel | None, Claim | None]:
        """The kernel, or the claim to fetch it; neither while another process has that."""
        disk = self._disk
        if disk is None:
            return None, None
        kernel = self._read_disk(disk, load)
        if kernel is not None:
            return kernel, None
        claim = disk.claim(load.artifact_id)
        try:
            # Another process may have stored it after this one looked and before it let go of its claim.
            if claim is not None and disk.holds(load.artifact_id):
                kernel = self._read_disk(disk, load)
        except BaseException:
            _release(claim)
            raise
        if kernel is not None:
            _release(claim)
            return kernel, None
        return None, claim

    def _read_disk(self, disk: DiskCache, load: Load) -> LoadedKernel | None:
        try:
            data, sha256 = disk.read(load.artifact_id, self._max_bytes)
            artifact = self._open(load.artifact_id, data, sha256, from_disk=True)
        except _RefusedError as error:
            raise ArtifactError(str(error)) from None
        except ArtifactError:
            self._set_aside(disk, load.artifact_id)
            return None
        except KernelNotFoundError:
            return None
        except RegistryUnavailableError:
            # Not Path.exists, which raises where a name is too long or a folder may not be entered.
            if os.path.exists(disk.root):
                self._count("disk_errors")
            return None
        self._count("disk_hits")
        return LoadedKernel.from_artifact(artifact, load.device)

    def _set_aside(self, disk: DiskCache, artifact_id: str) -> None:
        try:
            if disk.set_aside(artifact_id, self._max_bytes):
                self._count("quarantined")
        except RegistryUnavailableError:
            self._count("disk_errors")

    def _open(
        self, artifact_id: str, data: bytes | bytearray, sha256: str | None = None, *, from_disk: bool = False
    ) -> Artifact:
        """Verify bytes that are said to be ``artifact_id``: their hash before anything in them is parsed."""
        sha256 = sha256 or hashlib.sha256(data).hexdigest()
        if sha256[:8] != parse_artifact_id(artifact_id).version:
            raise ArtifactError(f"the bytes' SHA-256 is {sha256}: they are truncated, altered, or another artifact's")
        try:
            artifact = self._adopt(data, sha256, self._policy, seen=from_disk)
        except ArtifactError as error:
            if from_disk and self._policy != "standard":
                # Sound, and merely not trusted enough for this cache: it is left to those who trust more.
                self._adopt(data, sha256, "standard", seen=True)
                raise _RefusedError(str(error)) from None
            raise
        if artifact.artifact_id != artifact_id:
            raise ArtifactError(f"asked for {artifact_id}, was given {artifact.artifact_id}")
        return artifact

    def _adopt(self, data: bytes | bytearray, sha256: str, policy: str, *, seen: bool) -> Artifact:
        # What is on the disk was opened before it was stored, and its hash was just found to be what it was then.
        return Artifact.adopt(
            data, sha256=sha256, max_bytes=self._max_bytes, trusted_keys=self._keys, policy=policy, seen=seen
        )


class _RefusedError(Exception):
    """An artifact on the disk is sound, and the policy refuses it."""


def _release(claim: Claim | None) -> None:
    if claim is not None:
        claim.release()
