"""Full verification of an uploaded artifact, in threads of its own: it loads PyTorch, which the rest does without."""

from __future__ import annotations

import asyncio
import gc
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper.contracts.errors import ArtifactError

__all__ = ["Verified", "Verifier"]


@dataclass(frozen=True, slots=True)
class Verified:
    """What is known of an artifact that was found sound."""

    artifact_id: str
    sha256: str
    size: int
    info: dict[str, Any]
    manifest: str
    blueprint_hash: str
    target: str


class Verifier:
    """Opens artifacts as a client would: hashes, blueprint, shapes, finite weights.

    One artifact at a time, so that memory stays bounded by the largest one and reads keep a core for themselves.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="urza-verify")

    def warm(self) -> None:
        """Start loading PyTorch now, so that the first upload need not wait for it."""
        self._pool.submit(_load_for_good)

    async def verify(self, path: Path, sha256: str, max_bytes: int) -> Verified:
        """Open the file, whose hash was computed while it arrived.

        Raises:
            ArtifactError: if it is not a sound artifact.
        """
        return await asyncio.get_running_loop().run_in_executor(self._pool, _verify, path, sha256, max_bytes)

    def close(self) -> None:
        """Let a verification that runs end, and start no other."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _load_for_good() -> None:
    _load()
    # What PyTorch brings stays for as long as the process does. Looking through it again and again for garbage would
    # hold up whoever asks at that moment, for some 0.1 s.
    gc.collect()
    gc.freeze()


def _load() -> None:
    # OpenMP's threads would take both cores from the requests for a gain of milliseconds.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import esper.artifacts  # noqa: F401


def _verify(path: Path, sha256: str, max_bytes: int) -> Verified:
    _load()
    from esper.artifacts.artifact import Artifact, read_bytes
    from esper.artifacts.text import summarise

    try:
        data = read_bytes(path, max_bytes)
    except ArtifactError as error:
        # The scratch file's path is nobody's business.
        raise ArtifactError(str(error).removeprefix(f"{path}: ")) from error
    # A registry keeps what is sound; whom to trust is for those to say who load it.
    artifact = Artifact.adopt(data, sha256=sha256, max_bytes=max_bytes, trusted_keys=(), policy="standard")
    return Verified(
        artifact_id=artifact.artifact_id,
        sha256=artifact.sha256,
        size=artifact.nbytes,
        info=summarise(artifact.manifest),
        manifest=artifact.manifest.to_json(),
        blueprint_hash=artifact.manifest.blueprint_hash,
        target=artifact.manifest.target,
    )
