"""The OpenAPI document, tried out operation by operation by schemathesis."""

from __future__ import annotations

import hypothesis
import pytest

pytest.importorskip("schemathesis")

import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from esper.blueprints import get
from tests.services.urza.api import running_api

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
    ignored_auth,
    unsupported_method,
]
OPERATIONS = 18


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with running_api(tmp_path_factory.mktemp("openapi")) as api:
        api.uploaded()
        yield api


@pytest.fixture(scope="module")
def described(running):
    app = running.client.app

    async def requests_only(scope, receive, send):
        # The application runs already, and is not to be started and stopped once more around every call.
        if scope["type"] == "lifespan":
            for step in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{step}.complete"})
        else:
            await app(scope, receive, send)

    headers = {"Authorization": f"Bearer {running.admin_token}"}
    return schemathesis.openapi.from_asgi("/api/v1/openapi.json", requests_only, headers=headers)


def test_every_answer_is_as_described(running, described):
    headers = {"Authorization": f"Bearer {running.admin_token}"}
    tried, without_input = 0, set()
    for found in described.get_all_operations():
        operation = found.ok()
        for mode in schemathesis.GenerationMode:
            try:
                _try(operation.as_strategy(generation_mode=mode), headers)
            except hypothesis.errors.Unsatisfiable:
                # There is nothing about such a request that could be wrong.
                without_input.add((mode.value, operation.path))
        tried += 1
    assert tried == OPERATIONS
    assert without_input == {("negative", path) for path in ("/health", "/ready")}


def _try(cases, headers):
    @hypothesis.settings(
        max_examples=8,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=cases)
    def check(case):
        case.call_and_validate(headers=headers, checks=CHECKS)

    check()


def test_successes_are_as_described(running, described):
    """What random requests hardly come to."""
    headers = {"Authorization": f"Bearer {running.admin_token}"}

    def call(method, path, status, **parts):
        case = described[path][method].Case(**parts)
        answer = case.call_and_validate(headers={**headers, **parts.get("headers", {})}, checks=CHECKS[:5])
        assert answer.status_code == status, answer.text
        return answer.json() if answer.content and "json" in answer.headers["content-type"][0] else None

    def send(path, status, body, **parts):
        return call("POST", path, status, body=body, media_type="application/json", **parts)

    blueprint = get("bottleneck", rank=2).to_dict()
    submitted = send("/api/v1/blueprints", 201, {"blueprint": blueprint, "d_in": 6, "d_out": 4})
    send("/api/v1/blueprints", 200, {"blueprint": blueprint, "d_in": 6, "d_out": 4})
    job = send("/api/v1/jobs/claim", 200, {"worker": "w"})
    assert job["job_id"] == submitted["job_id"]
    of_job = {"path_parameters": {"job_id": job["job_id"]}}
    send("/api/v1/jobs/{job_id}/renew", 200, {"lease": job["lease"]}, **of_job)
    artifact_id = running.uploaded(1)
    send("/api/v1/jobs/{job_id}/finish", 200, {"status": "done", "artifact_id": artifact_id}, **of_job)
    send("/api/v1/jobs/claim", 204, {"worker": "w"})
    call("GET", "/api/v1/jobs/{job_id}", 200, **of_job)
    call("GET", "/api/v1/jobs", 200)
    call("GET", "/api/v1/blueprints", 200)
    of_blueprint = {"path_parameters": {"blueprint_id": submitted["blueprint_id"]}}
    call("GET", "/api/v1/blueprints/{blueprint_id}", 200, **of_blueprint)
    send("/api/v1/blueprints/{blueprint_id}/status", 200, {"status": "COMPILING"}, **of_blueprint)
    of_kernel = {"path_parameters": {"artifact_id": artifact_id}}
    send(
        "/api/v1/kernels/{artifact_id}/status", 200, {"status": "VALIDATED", "metrics": {"latency_us": 1}}, **of_kernel
    )
    call("GET", "/api/v1/kernels/{artifact_id}", 200, **of_kernel)
    call("GET", "/api/v1/kernels/{artifact_id}", 304, headers={"If-None-Match": "*"}, **of_kernel)
    call("GET", "/api/v1/kernels/{artifact_id}/blob", 200, **of_kernel)
    call("GET", "/api/v1/kernels/{artifact_id}/blob", 206, headers={"Range": "bytes=0-9"}, **of_kernel)
    call("GET", "/api/v1/kernels", 200)
    send("/api/v1/kernels/query", 200, {"tags_excluded": ["x"]})


def test_the_document_needs_a_token(running):
    assert running.as_(None)("GET", "/api/v1/openapi.json").status_code == 401
