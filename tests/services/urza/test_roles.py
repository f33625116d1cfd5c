from __future__ import annotations

import hashlib
import time

import pytest

pytest.importorskip("sqlalchemy")

import sqlalchemy as sa

from esper.services.urza.errors import ApiError
from esper.services.urza.limits import WriteLimit
from esper.services.urza.roles import TokenError
from esper.services.urza.tables import tokens
from tests.services.urza.api import artifact, error, running_api
from tests.services.urza.server import wait_until

KERNEL = "/api/v1/kernels/0123456789abcdef-any-fast-01234567"
JOB = f"/api/v1/jobs/{'0' * 32}"

#: Every operation, with what it needs.
OPERATIONS = [
    ("read", "GET", "/api/v1/kernels", {}),
    ("read", "GET", KERNEL, {}),
    ("read", "GET", f"{KERNEL}/blob", {}),
    ("read", "POST", "/api/v1/kernels/query", {"json": {}}),
    ("read", "GET", "/api/v1/blueprints", {}),
    ("read", "GET", f"/api/v1/blueprints/{'0' * 64}", {}),
    ("read", "GET", "/api/v1/jobs", {}),
    ("read", "GET", JOB, {}),
    ("read", "GET", "/metrics", {}),
    ("read", "GET", "/api/v1/openapi.json", {}),
    ("publish", "POST", "/api/v1/kernels", {"content": b"x", "headers": {"X-Esper-SHA256": "0" * 64}}),
    ("publish", "POST", "/api/v1/blueprints", {"json": {"blueprint": {}}}),
    ("publish", "POST", f"/api/v1/blueprints/{'0' * 64}/status", {"json": {"status": "COMPILING"}}),
    ("publish", "POST", "/api/v1/jobs/claim", {"json": {"worker": "w"}}),
    ("publish", "POST", f"{JOB}/renew", {"json": {}}),
    ("publish", "POST", f"{JOB}/finish", {"json": {"status": "retry"}}),
    ("validate", "POST", f"{KERNEL}/status", {"json": {"status": "VALIDATED"}}),
]


@pytest.fixture
def by_role(local):
    held = {role: local.service.tokens.add(f"only-{role}", [role]) for role in ("read", "publish", "validate")}
    # The process that made them is this one, but not through the API: it takes note within a second.
    wait_until(lambda: len(local.service.watch.callers) == 4)
    return held


def test_every_operation_with_every_token(local, by_role):
    known = {(method, path) for _, method, path, _ in OPERATIONS}
    declared = {
        (method.upper(), path.replace("{artifact_id}", KERNEL[16:]).replace("{blueprint_id}", "0" * 64))
        for path, methods in local("GET", "/api/v1/openapi.json").json()["paths"].items()
        for method in methods
    }
    declared = {(method, path.replace("{job_id}", "0" * 32)) for method, path in declared}
    assert declared - known == {("GET", "/health"), ("GET", "/ready")}, "an operation is missing in this test"
    for needed, method, path, options in OPERATIONS:
        for token, expected in [
            (None, 401),
            ("wrong", 401),
            (by_role["read"], None if needed == "read" else 403),
            (by_role["publish"], None if needed in ("read", "publish") else 403),
            (by_role["validate"], None if needed in ("read", "validate") else 403),
            (local.admin_token, None),
        ]:
            answer = local.as_(token)(method, path, **options)
            if expected is None:
                assert answer.status_code not in (401, 403), (method, path, answer.text)
            else:
                assert answer.status_code == expected, (method, path, answer.text)
                assert error(answer) == {401: "unauthorized", 403: "forbidden"}[expected]
                assert ("www-authenticate" in answer.headers) == (expected == 401)


def test_only_health_and_readiness_are_open(local):
    anybody = local.as_(None)
    assert anybody("GET", "/health").json() == {"status": "ok"}
    assert anybody("GET", "/ready").json() == {"status": "ready"}
    for path in ("/docs", "/redoc", "/openapi.json", "/"):
        assert anybody("GET", path).status_code == 404


def test_other_schemes_are_no_token(local):
    for header in (f"Basic {local.admin_token}", local.admin_token, "Bearer", "Bearer \xff"):
        answer = local.client.get("/api/v1/kernels", headers={"Authorization": header.encode("latin-1")})
        assert answer.status_code == 401
    lower = local.client.get("/api/v1/kernels", headers={"Authorization": f"bearer {local.admin_token}"})
    assert lower.status_code == 200


def test_what_the_operator_opens_is_open(tmp_path):
    with running_api(tmp_path, open_read=True, open_metrics=True) as api:
        anybody = api.as_(None)
        for needed, method, path, options in OPERATIONS:
            answer = anybody(method, path, **options)
            assert (answer.status_code == 401) == (needed != "read"), (method, path)
        # A token that is wrong is an error, not a stranger.
        assert api.as_("wrong")("GET", "/api/v1/kernels").status_code == 401


def test_a_revoked_token_ends_within_a_moment(local, by_role):
    assert local.as_(by_role["read"])("GET", "/api/v1/kernels").status_code == 200
    local.service.tokens.revoke("only-read")
    wait_until(lambda: local.as_(by_role["read"])("GET", "/api/v1/kernels").status_code == 401)
    with pytest.raises(TokenError, match="no valid token"):
        local.service.tokens.revoke("only-read")
    with pytest.raises(TokenError, match="is, or was"):
        local.service.tokens.add("only-read", ["read"])


def test_tokens_are_stored_as_hashes_and_shown_once(local):
    with local.service.database.read() as connection:
        rows = connection.execute(sa.select(tokens)).all()
    assert [row.sha256 for row in rows] == [hashlib.sha256(local.admin_token.encode()).hexdigest()]
    assert local.admin_token not in str(rows)
    assert local.service.tokens.ensure_admin() is None
    (row,) = local.service.tokens.rows()
    assert (row.name, row.roles, row.revoked_at) == ("admin", ("read", "publish", "validate"), None)


def test_bad_tokens_are_not_made(local):
    for name, roles in [("a b", ["read"]), ("", ["read"]), ("x", []), ("x", ["root"]), ("x" * 65, ["read"])]:
        with pytest.raises(TokenError):
            local.service.tokens.add(name, roles)


def test_writes_are_limited_for_each_token(tmp_path):
    with running_api(tmp_path, write_rate=0.001, write_burst=2) as api:
        other = api.service.tokens.add("other", ["publish"])
        wait_until(lambda: len(api.service.watch.callers) == 2)
        assert [api.upload(artifact()).status_code for _ in range(3)] == [201, 200, 429]
        refused = api("POST", "/api/v1/jobs/claim", json={"worker": "w"})
        assert error(refused) == "too_many_writes"
        assert 1 <= int(refused.headers["retry-after"]) <= 1000
        # Reading, and others, go on.
        assert api("GET", "/api/v1/kernels").status_code == 200
        assert api.upload(artifact(), token=other).status_code == 200


def test_the_bucket_fills_again():
    now = [0.0]
    limit = WriteLimit(2.0, 3, lambda: now[0])
    for _ in range(3):
        limit.take("a")
    with pytest.raises(ApiError):
        limit.take("a")
    now[0] = 0.5
    limit.take("a")
    with pytest.raises(ApiError):
        limit.take("a")
    now[0] = 1000.0
    for _ in range(3):
        limit.take("a")
    with pytest.raises(ApiError) as caught:
        limit.take("a")
    assert caught.value.headers == {"Retry-After": "1"}


def test_metrics_count(local):
    artifact_id = local.uploaded()
    for _ in range(3):
        local("GET", f"/api/v1/kernels/{artifact_id}")
    local("GET", "/nowhere")
    local.upload(artifact())
    local.set_status(artifact_id, "VALIDATED")
    text = local("GET", "/metrics").text
    for line in (
        'urza_requests_total{method="GET",route="/api/v1/kernels/{artifact_id}",status="200"} 3.0',
        'urza_requests_total{method="GET",route="unknown",status="404"} 1.0',
        'urza_request_seconds_count{route="/api/v1/kernels/{artifact_id}"} 3.0',
        'urza_uploads_total{result="new"} 1.0',
        'urza_uploads_total{result="known"} 1.0',
        'urza_kernels{status="VALIDATED"} 1.0',
        'urza_kernels{status="REJECTED"} 0.0',
        'urza_jobs{status="QUEUED"} 0.0',
    ):
        assert line in text
    received = float(text.split("\nurza_received_bytes_total ")[1].split()[0])
    assert received >= 2 * len(artifact())
    assert artifact_id not in text


def test_readiness_says_what_is_wrong(local, tmp_path):
    (tmp_path / "urza" / "blobs").rename(tmp_path / "gone")
    answer = local.as_(None)("GET", "/ready")
    assert (answer.status_code, error(answer)) == (503, "unavailable")
    assert local.as_(None)("GET", "/health").status_code == 200
    assert int(answer.headers["retry-after"]) >= 1
    (tmp_path / "gone").rename(tmp_path / "urza" / "blobs")
    assert local.as_(None)("GET", "/ready").status_code == 200


def test_without_the_database_nothing_is_answered_from_memory(local):
    artifact_id = local.uploaded()
    assert local("GET", f"/api/v1/kernels/{artifact_id}").status_code == 200

    def fail():
        raise sa.exc.OperationalError("SELECT secret", {}, Exception("gone"))

    read = local.service.watch._read
    local.service.watch._read = fail
    deadline = time.monotonic() + 20
    while (answer := local("GET", f"/api/v1/kernels/{artifact_id}")).status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert (answer.status_code, error(answer)) == (503, "database_unavailable")
    assert "secret" not in answer.text
    local.service.watch._read = read
    assert local("GET", f"/api/v1/kernels/{artifact_id}").status_code == 200
