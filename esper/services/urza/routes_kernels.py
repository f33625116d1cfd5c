"""``/api/v1/kernels``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, Final

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from esper.contracts.ids import TAG_PATTERN
from esper.services.urza import kernel_query, kernel_store
from esper.services.urza.access import Publisher, Reader, Shared, Validator
from esper.services.urza.blobs import PIECE
from esper.services.urza.errors import ApiError
from esper.services.urza.intake import take_in
from esper.services.urza.lifecycle import KernelStatus
from esper.services.urza.ranges import blob_headers, parse_range, tag_matches
from esper.services.urza.records import MAX_PAGE, decode_cursor, paged
from esper.services.urza.responses import errors
from esper.services.urza.schemas import (
    ArtifactName,
    KernelDetail,
    KernelList,
    KernelQuery,
    KernelStatusChange,
    Matches,
    Sha256,
    Uploaded,
)
from esper.services.urza.service import Service

__all__ = ["Cursor", "Limit", "router"]

router = APIRouter(prefix="/api/v1/kernels", tags=["kernels"])

Cursor = Annotated[str | None, Query(max_length=200, description="`next_cursor` of the page before")]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="Most items on a page")]

_TAG_HEADER: Final[dict[str, Any]] = {"ETag": {"description": "Names this version", "schema": {"type": "string"}}}


@router.post(
    "",
    status_code=201,
    response_model=Uploaded,
    responses={
        200: {"model": Uploaded, "description": "These bytes are here already"},
        **errors(400, 408, 409, 413, 429),
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
    summary="Upload an artifact",
)
async def upload(
    request: Request,
    service: Shared,
    caller: Publisher,
    x_esper_sha256: Annotated[Sha256, Header(description="SHA-256 of the body")],
    tags: Annotated[str, Query(pattern=f"^({TAG_PATTERN}(,{TAG_PATTERN}){{0,31}})?$")] = "",
) -> JSONResponse:
    """Take in an artifact: it is verified in full before it exists, and the same bytes twice are one kernel."""
    answer, new = await take_in(
        service,
        request.stream().__aiter__(),
        declared=x_esper_sha256,
        tags=tags.split(",") if tags else [],
        caller=caller,
    )
    service.metrics.uploads.labels("new" if new else "known").inc()
    return JSONResponse(answer, 201 if new else 200, headers={"Location": f"/api/v1/kernels/{answer['artifact_id']}"})


@router.get("", response_model=KernelList, responses=errors(), summary="List kernels by id")
def list_kernels(
    service: Shared,
    _: Reader,
    cursor: Cursor = None,
    limit: Limit = 100,
    prefix: Annotated[str, Query(pattern=r"^[a-z0-9_-]{0,80}$", description="How ids begin")] = "",
    status: KernelStatus | None = None,
) -> JSONResponse:
    """A page of kernels, sorted by id."""
    with service.database.read() as connection:
        items = kernel_store.page(
            connection, after=decode_cursor(cursor), limit=limit + 1, prefix=prefix, status=status
        )
    return JSONResponse(paged(items, limit, "artifact_id"))


@router.post("/query", response_model=Matches, responses=errors(400, 408, 413), summary="Find kernels that fit")
def query_kernels(service: Shared, _: Reader, wanted: KernelQuery) -> JSONResponse:
    """Kernels that have what is asked for, best first."""
    with service.database.read() as connection:
        return JSONResponse({"items": kernel_query.find(connection, wanted)})


@router.get(
    "/{artifact_id}",
    response_model=KernelDetail,
    responses={
        200: {"headers": _TAG_HEADER, "description": "What is on record"},
        304: {"description": "The copy named by If-None-Match is current"},
        **errors(404),
    },
    summary="Describe a kernel",
)
async def describe(
    artifact_id: ArtifactName,
    service: Shared,
    _: Reader,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """Status, manifest, history, and where the bytes are."""
    card = service.cards.get(artifact_id)
    if card is None:
        card = await run_in_threadpool(service.card, artifact_id)
    if tag_matches(if_none_match, card.etag):
        return Response(status_code=304, headers=card.headers())
    return Response(card.body, media_type="application/json", headers=card.headers())


@router.get(
    "/{artifact_id}/blob",
    response_class=Response,
    responses={
        200: {
            "headers": {**_TAG_HEADER, "Accept-Ranges": {"schema": {"type": "string"}}},
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
            "description": "The artifact's bytes",
        },
        206: {
            "headers": {**_TAG_HEADER, "Content-Range": {"schema": {"type": "string"}}},
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
            "description": "The part asked for",
        },
        304: {"description": "The copy named by If-None-Match is current"},
        307: {"description": "The bytes are at the presigned address in Location"},
        **errors(404, 416, 500),
    },
    summary="Download a kernel",
)
async def download(
    artifact_id: ArtifactName,
    service: Shared,
    _: Reader,
    # Any text is a Range header; what is not understood is passed over.
    range_: Annotated[str | None, Header(alias="Range")] = None,
    if_range: Annotated[str | None, Header()] = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """The bytes under their SHA-256 as entity tag, whole or in part; or the way to S3."""
    return await run_in_threadpool(_blob, service, artifact_id, range_, if_range, if_none_match)


@router.post(
    "/{artifact_id}/status",
    response_model=KernelDetail,
    responses=errors(400, 404, 408, 409, 413, 429),
    summary="Move a kernel along its life cycle",
)
def change_status(
    artifact_id: ArtifactName, service: Shared, caller: Validator, change: KernelStatusChange
) -> Response:
    """Legal moves only; every one is kept in the history."""
    metrics = change.metrics.model_dump(exclude_none=True) if change.metrics is not None else {}
    with service.database.write("kernels") as connection:
        kernel_store.change_status(
            connection, artifact_id, change.status, by=caller.name, reason=change.reason, metrics=metrics
        )
    service.cards.drop(artifact_id)
    card = service.card(artifact_id)
    return Response(card.body, media_type="application/json", headers=card.headers())


def _blob(
    service: Service, artifact_id: str, range_: str | None, if_range: str | None, if_none_match: str | None
) -> Response:
    sha256, size = service.blob_facts(artifact_id)
    etag = f'"{sha256}"'
    headers = blob_headers(etag)
    if tag_matches(if_none_match, etag):
        return Response(status_code=304, headers=headers)
    address = service.blobs.sign(sha256, service.settings.presign_s)
    if address is not None:
        return RedirectResponse(address, 307, headers={"Cache-Control": "no-store"})
    part = parse_range(range_, if_range, etag, size)
    start, length = part or (0, size)
    if part is not None:
        headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{size}"
    if service.blobs.size(sha256) != size:
        raise ApiError(
            500, "blob_damaged", f"the blob of {artifact_id} is missing or has another size; upload it again"
        )
    status = 206 if part is not None else 200
    if length <= PIECE:
        data = service.blobs.read(sha256, start, length)
        return Response(data, status, headers, "application/octet-stream")
    headers["Content-Length"] = str(length)
    return StreamingResponse(_pieces(service, sha256, start, length), status, headers, "application/octet-stream")


async def _pieces(service: Service, sha256: str, start: int, length: int) -> AsyncIterator[bytes]:
    while length > 0:
        piece = await run_in_threadpool(service.blobs.read, sha256, start, min(PIECE, length))
        if not piece:
            # Too late for a status; an answer that ends early is noticed by its length.
            raise OSError(f"the blob {sha256} ends early")
        yield piece
        start += len(piece)
        length -= len(piece)
