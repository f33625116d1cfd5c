"""Taking in an artifact: streamed to a scratch file, hashed on the way, verified, stored, recorded; or nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

import sqlalchemy as sa
from starlette.concurrency import run_in_threadpool

from esper.contracts.errors import ArtifactError
from esper.services.urza import kernel_store
from esper.services.urza.errors import ApiError, invalid, too_large, unavailable
from esper.services.urza.roles import Caller
from esper.services.urza.scratch import Incoming, incoming, storing
from esper.services.urza.service import Service, binary_ref
from esper.services.urza.verify import Verified

__all__ = ["take_in"]

#: Written to the disk in pieces of this size, so that hashing and writing happen in a thread few times.
_PIECE: Final = 1 << 20


async def take_in(
    service: Service, stream: AsyncIterator[bytes], *, declared: str, tags: list[str], caller: Caller
) -> tuple[dict[str, Any], bool]:
    """Receive, verify and store one artifact.

    Args:
        service: The registry.
        stream: The body, as it arrives.
        declared: The SHA-256 that the client says the bytes have.
        tags: Tags for the kernel; a kernel that is here already gets those it has not.
        caller: Who uploads.

    Returns:
        What to tell the client, and whether the kernel is new.

    Raises:
        ApiError: with the reason; nothing is kept then.
    """
    with incoming(service.settings.scratch) as upload:
        await _receive(service, stream, upload)
        if upload.sha256 != declared:
            raise invalid(
                f"the {upload.size} bytes that arrived have SHA-256 {upload.sha256}, not {declared}", "hash_mismatch"
            )
        lock = service.upload_lock(declared)
        async with lock:
            known = await run_in_threadpool(_known, service, declared)
            if known is None:
                try:
                    found = await service.verifier.verify(upload.path, declared, service.settings.max_bytes)
                except ArtifactError as error:
                    raise invalid(str(error), "invalid_artifact") from error
                new = await run_in_threadpool(_store, service, upload, found, tags, caller)
            else:
                new = False
                # The bytes are those that were verified once: they mend a copy that was damaged since.
                await run_in_threadpool(_store_again, service, upload, known, tags)
            answer = await run_in_threadpool(_answer, service, declared)
    return answer, new


async def _receive(service: Service, stream: AsyncIterator[bytes], upload: Incoming) -> None:
    limit = service.settings.max_bytes
    piece = bytearray()
    try:
        while True:
            chunk = await asyncio.wait_for(anext(stream), service.settings.upload_idle_s)
            if upload.size + len(piece) + len(chunk) > limit:
                raise too_large(f"the upload has more bytes than the limit of {limit}")
            piece += chunk
            if len(piece) >= _PIECE:
                await run_in_threadpool(upload.write, piece)
                piece = bytearray()
    except StopAsyncIteration:
        await run_in_threadpool(upload.write, piece)
    except TimeoutError:
        raise ApiError(
            408, "upload_timeout", f"no byte arrived in {service.settings.upload_idle_s:g} s; send it again"
        ) from None


def _known(service: Service, sha256: str) -> str | None:
    with service.database.read() as connection:
        row = kernel_store.by_sha256(connection, sha256)
    return None if row is None else row.artifact_id


def _store(service: Service, upload: Incoming, found: Verified, tags: list[str], caller: Caller) -> bool:
    with storing(service.settings.scratch, found.sha256) as settle:
        service.blobs.put(found.sha256, upload.path, found.size)
        try:
            new = _record(service, found, tags, caller)
        except Exception:
            # Where this fails too, the mark stays, and the next start tries again.
            service.drop_unrecorded(found.sha256)
            settle()
            raise
        settle()
    service.cards.drop(found.artifact_id)
    # What was just uploaded is what will be asked for next.
    service.keep_blob_facts(found.artifact_id, found.sha256, found.size)
    return new


def _record(service: Service, found: Verified, tags: list[str], caller: Caller) -> bool:
    try:
        with service.database.write("kernels") as connection:
            # Against those who remove blobs that no kernel has.
            service.database.lock(connection)
            if service.blobs.size(found.sha256) != found.size:
                raise unavailable("the blob vanished before it was recorded; upload it again")
            kernel_store.insert(connection, found, tags, caller.name)
    except sa.exc.IntegrityError:
        # Another process took in the same bytes in the meantime.
        with service.database.write("kernels") as connection:
            service.database.lock(connection)
            kernel_store.add_tags(connection, found.artifact_id, tags)
        return False
    return True


def _store_again(service: Service, upload: Incoming, artifact_id: str, tags: list[str]) -> None:
    service.blobs.put(upload.sha256, upload.path, upload.size)
    if not tags:
        return
    with service.database.write("kernels") as connection:
        service.database.lock(connection)
        kernel_store.add_tags(connection, artifact_id, tags)
    service.cards.drop(artifact_id)


def _answer(service: Service, sha256: str) -> dict[str, Any]:
    with service.database.read() as connection:
        row = kernel_store.by_sha256(connection, sha256)
    if row is None:
        raise unavailable("the kernel was recorded and cannot be found; upload it again")
    return {
        "artifact_id": row.artifact_id,
        "sha256": sha256,
        "size": row.size,
        "status": row.status,
        "kernel_binary_ref": binary_ref(row.artifact_id),
    }
