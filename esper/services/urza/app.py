"""The ASGI application."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from importlib.metadata import version

from fastapi import FastAPI

from esper.services.urza import routes_blueprints, routes_kernels, routes_operation
from esper.services.urza.gate import Gate
from esper.services.urza.responses import add_handlers
from esper.services.urza.service import Service

__all__ = ["create_app"]


def create_app(service: Service) -> FastAPI:
    """The API over one service, which starts and stops with the application's lifespan."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(
        title="Urza",
        summary="The registry of Esper: kernel artifacts, blueprints and compile jobs.",
        version=version("esper"),
        lifespan=lifespan,
        # The description is given out by a route that asks for a token; its pages would load scripts from elsewhere.
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    app.include_router(routes_kernels.router)
    app.include_router(routes_blueprints.router)
    app.include_router(routes_operation.router)
    add_handlers(app)
    app.add_middleware(Gate, service=service)
    return app
