"""Who may call a route, and how often: dependencies of the routes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from esper.services.urza.roles import Caller, Role
from esper.services.urza.service import Service

__all__ = ["Publisher", "Reader", "Shared", "Validator", "shared_service"]

# Declares the scheme in the OpenAPI document; the header itself is read by Service.authorize.
_bearer = HTTPBearer(auto_error=False, description="A token made by `esper urza token add`.")


def shared_service(request: Request) -> Service:
    """The service that the application was made with."""
    service: Service = request.app.state.service
    return service


Shared = Annotated[Service, Depends(shared_service)]


def _needs(role: Role, *, writes: bool) -> Callable[..., Awaitable[Caller]]:
    async def caller(
        request: Request,
        service: Shared,
        declared: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    ) -> Caller:
        del declared
        await service.watch.ensure_fresh()
        found = service.authorize(request.headers.get("authorization"), role)
        if writes:
            service.limit.take(found.name)
        return found

    return caller


#: May read.
Reader = Annotated[Caller, Depends(_needs("read", writes=False))]
#: May publish; counts as a write.
Publisher = Annotated[Caller, Depends(_needs("publish", writes=True))]
#: May validate; counts as a write.
Validator = Annotated[Caller, Depends(_needs("validate", writes=True))]
