"""The API in this process, without a network: what most tests of its behaviour use."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("sqlalchemy")
pytest.importorskip("alembic")
pytest.importorskip("prometheus_client")

from fastapi.testclient import TestClient

from esper.services.urza.app import create_app
from esper.services.urza.service import Service
from esper.services.urza.settings import settings_for
from tests.artifacts.samples import sample


@functools.cache
def artifact(seed: int = 0, d_in: int = 6, d_out: int = 4) -> bytes:
    """A small artifact; packing one takes a while, so each is made once."""
    return sample(seed, d_in=d_in, d_out=d_out)


class Api:
    """The service, and clients with each role.

    Attributes:
        service: The service.
        admin: A client whose token has all roles.
    """

    def __init__(self, service: Service, client: TestClient) -> None:
        self.service = service
        self.client = client
        token = service.tokens.ensure_admin()
        assert token is not None
        self.admin_token = token

    def as_(self, token: str | None) -> Any:
        """Call with another token, or none: ``api.as_(token)("GET", path, ...)``."""
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}

        def call(method: str, path: str, **options: Any) -> httpx.Response:
            return self.client.request(
                method, path, **{**options, "headers": {**headers, **options.get("headers", {})}}
            )

        return call

    def __call__(self, method: str, path: str, **options: Any) -> Any:
        return self.as_(self.admin_token)(method, path, **options)

    def upload(self, data: bytes, *, tags: str = "", sha256: str | None = None, token: str | None = None) -> Any:
        return self.as_(token or self.admin_token)(
            "POST",
            "/api/v1/kernels",
            params={"tags": tags} if tags else {},
            content=data,
            headers={"X-Esper-SHA256": sha256 or hashlib.sha256(data).hexdigest()},
        )

    def uploaded(self, *args: Any, **options: Any) -> str:
        """Upload an artifact that is to be accepted, and give its id."""
        answer = self.upload(artifact(*args), **options)
        assert answer.status_code in (200, 201), answer.text
        artifact_id: str = answer.json()["artifact_id"]
        return artifact_id

    def set_status(self, artifact_id: str, status: str, **more: Any) -> Any:
        return self("POST", f"/api/v1/kernels/{artifact_id}/status", json={"status": status, **more})


@contextlib.contextmanager
def running_api(folder: Path, *, database: str | None = None, **options: Any) -> Iterator[Api]:
    """An API with its data under ``folder`` (and its database at ``database``); ``options`` are settings."""
    options = {"write_rate": 0.0, **options}
    service = Service(settings_for(folder / "urza", database=database, **options))
    # Faults become answers, as in a real server, not exceptions in the test.
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        yield Api(service, client)


def error(answer: Any) -> str:
    """The code of an error answer, whose form is checked."""
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"code", "message"}, body
    code: str = body["error"]["code"]
    return code
