"""What operators and their tools ask: is it alive, can it work, how much does it do, and what is the API."""

from __future__ import annotations

import asyncio
from typing import Final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.concurrency import run_in_threadpool

from esper.services.urza.access import Reader, Shared
from esper.services.urza.errors import unavailable
from esper.services.urza.responses import errors
from esper.services.urza.schemas import ErrorOut, Health, Ready
from esper.services.urza.service import Service

__all__ = ["router"]

router = APIRouter(tags=["operation"])

#: A check that takes longer than this has failed.
_CHECK_S: Final = 5.0


@router.get("/health", response_model=Health, summary="The process answers")
async def health() -> JSONResponse:
    """Open to everybody, and asks nothing of database or blobs."""
    return JSONResponse({"status": "ok"})


@router.get(
    "/ready",
    response_model=Ready,
    responses={503: {"model": ErrorOut, "description": "Database or blob store do not answer"}},
    summary="The process can work",
)
async def ready(service: Shared) -> JSONResponse:
    """Open to everybody; asks the database and the blob store."""
    try:
        await asyncio.wait_for(asyncio.to_thread(_check, service), _CHECK_S)
    except TimeoutError:
        raise unavailable(f"database and blob store did not answer in {_CHECK_S:g} s") from None
    return JSONResponse({"status": "ready"})


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {"description": "Prometheus' text format", "content": {"text/plain": {"schema": {"type": "string"}}}},
        **errors(),
    },
    openapi_extra={"security": [{"HTTPBearer": []}]},
    summary="Metrics for Prometheus",
)
async def metrics(request: Request, service: Shared) -> Response:
    """Needs a token that may read, unless the operator says otherwise."""
    if not service.settings.open_metrics:
        await service.watch.ensure_fresh()
        service.authorize(request.headers.get("authorization"), "read")
    text = await run_in_threadpool(service.metrics.text)
    return PlainTextResponse(text, media_type="text/plain; version=1.0.0; charset=utf-8")


@router.get("/api/v1/openapi.json", include_in_schema=False)
async def openapi(request: Request, _: Reader) -> JSONResponse:
    """The API's description, for those who may use it."""
    return JSONResponse(request.app.openapi())


def _check(service: Service) -> None:
    service.database.check()
    service.blobs.check()
