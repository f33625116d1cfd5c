from __future__ import annotations

import concurrent.futures
import time

import pytest
import torch

pytest.importorskip("sqlalchemy")

from esper.artifacts import Artifact
from esper.blueprints import Blueprint, Node, blueprint_hash, get
from esper.services.tezzeret.forge import build
from esper.services.urza import job_store
from tests.artifacts.samples import sample
from tests.services.urza.api import artifact, error
from tests.services.urza.server import wait_until

BOTTLENECK = get("bottleneck", rank=2)


def submit(api, blueprint=BOTTLENECK, **request):
    return api("POST", "/api/v1/blueprints", json={"blueprint": blueprint.to_dict(), **request})


def claim(api, worker="w1", lease_s=60.0):
    return api("POST", "/api/v1/jobs/claim", json={"worker": worker, "lease_s": lease_s})


def finish(api, job, status, **more):
    return api("POST", f"/api/v1/jobs/{job['job_id']}/finish", json={"status": status, "lease": job["lease"], **more})


def blueprint_status(api, blueprint=BOTTLENECK):
    return api("GET", f"/api/v1/blueprints/{blueprint_hash(blueprint)}").json()["status"]


@pytest.fixture
def lapse(monkeypatch):
    """Lets leases run out: the clock by which they are judged goes ahead by an hour."""

    def ahead():
        now = time.time
        monkeypatch.setattr(job_store.time, "time", lambda: now() + 3600)

    return ahead


def test_a_blueprint_is_kept_under_its_meaning(api):
    first = submit(api)
    assert first.status_code == 201
    assert first.json() == {"blueprint_id": blueprint_hash(BOTTLENECK), "status": "UNVALIDATED"}
    renamed = BOTTLENECK.to_dict() | {"name": "other"}
    again = api("POST", "/api/v1/blueprints", json={"blueprint": renamed})
    assert (again.status_code, again.json()) == (200, first.json())
    found = api("GET", first.headers["location"]).json()
    assert found["blueprint"] == BOTTLENECK.to_dict()
    assert (found["jobs"], found["kernels"], len(found["history"])) == ([], [], 1)
    (line,) = api("GET", "/api/v1/blueprints").json()["items"]
    assert (line["name"], line["status"]) == ("bottleneck", "UNVALIDATED")
    assert api("GET", "/api/v1/blueprints", params={"status": "INVALID"}).json()["items"] == []


def test_bad_blueprints_are_refused_by_name(local):
    broken = BOTTLENECK.to_dict()
    broken["nodes"][1]["inputs"] = ["nobody"]
    answer = local("POST", "/api/v1/blueprints", json={"blueprint": broken})
    assert (answer.status_code, error(answer)) == (422, "invalid_blueprint")
    assert "'down'" in answer.json()["error"]["message"]
    replacing = get("dense", mode="residual")
    assert submit(local, replacing, d_in=4).status_code == 422
    assert submit(local, d_in=0, d_out=4).status_code == 422
    assert submit(local, d_in=1 << 20, d_out=1 << 20, architectures=["gpu"]).status_code == 422
    # Fits no host: what it gives depends on no size of the layer.
    fixed = BOTTLENECK.to_dict()
    fixed["nodes"][3]["out"] = 7
    answer = local("POST", "/api/v1/blueprints", json={"blueprint": fixed, "d_in": 6, "d_out": 4})
    assert (answer.status_code, error(answer)) == (422, "invalid_blueprint")
    assert local("GET", "/api/v1/blueprints").json()["items"] == []


def test_a_job_from_submission_to_kernel(api):
    answer = submit(api, d_in=6, d_out=4, architectures=["sm_90", "sm_80", "sm_90"], tags=["b", "a"])
    assert answer.status_code == 201
    job_id = answer.json()["job_id"]
    again = submit(api, d_in=6, d_out=4, architectures=["sm_80", "sm_90"], tags=["a", "b"])
    assert (again.status_code, again.json()["job_id"]) == (200, job_id)
    (waiting,) = api("GET", "/api/v1/jobs", params={"status": "QUEUED"}).json()["items"]
    assert (waiting["job_id"], waiting["attempts"], waiting["architectures"]) == (job_id, 0, ["sm_80", "sm_90"])

    job = claim(api).json()
    assert (job["job_id"], job["status"], job["attempts"], job["worker"]) == (job_id, "RUNNING", 1, "w1")
    assert job["blueprint"] == BOTTLENECK.to_dict()
    assert (job["d_in"], job["d_out"], job["seed"], job["dtype"], job["pipeline"]) == (6, 4, 0, "float32", "fast")
    assert blueprint_status(api) == "COMPILING"
    assert claim(api, "w2").status_code == 204

    early = finish(api, job, "done", artifact_id="0123456789abcdef-any-fast-01234567")
    assert early.status_code == 422
    artifact_id = api.uploaded()
    done = finish(api, job, "done", artifact_id=artifact_id, log="fine")
    assert (done.status_code, done.json()["status"], done.json()["artifact_id"]) == (200, "DONE", artifact_id)
    found = api("GET", answer.headers["location"]).json()
    assert (found["status"], found["jobs"], found["kernels"]) == ("COMPILED", [job_id], [artifact_id])
    steps = [entry["to"] for entry in found["history"]]
    assert steps == ["UNVALIDATED", "COMPILING", "COMPILED"]
    history = api("GET", f"/api/v1/jobs/{job_id}").json()["history"]
    assert [entry["to"] for entry in history] == ["QUEUED", "RUNNING", "DONE"]
    for late in ("done", "retry", "invalid"):
        assert error(finish(api, job, late)) == "not_leased"


def test_a_job_that_fails_is_not_tried_again_but_can_be_asked_for_again(api):
    submit(api, d_in=6, d_out=4)
    job = claim(api).json()
    failed = finish(api, job, "invalid", log="node 'down': no")
    assert (failed.json()["status"], failed.json()["log"]) == ("INVALID", "node 'down': no")
    assert blueprint_status(api) == "INVALID"
    assert claim(api).status_code == 204
    again = submit(api, d_in=6, d_out=4)
    assert again.status_code == 201 and again.json()["job_id"] != job["job_id"]
    assert claim(api).json()["job_id"] == again.json()["job_id"]
    assert blueprint_status(api) == "COMPILING"


def test_a_lease_that_runs_out_makes_a_job_free(api, lapse):
    submit(api, d_in=6, d_out=4)
    first = claim(api, "w1").json()
    assert claim(api, "w2").status_code == 204
    lapse()
    second = claim(api, "w2").json()
    assert (second["job_id"], second["attempts"], second["worker"]) == (first["job_id"], 2, "w2")
    # The first worker, back from wherever it was, finds its job taken.
    late = finish(api, first, "invalid")
    assert (late.status_code, error(late)) == (409, "not_leased")
    renewal = api("POST", f"/api/v1/jobs/{first['job_id']}/renew", json={"lease": first["lease"]})
    assert renewal.status_code == 409
    history = api("GET", f"/api/v1/jobs/{first['job_id']}").json()["history"]
    assert history[-1]["reason"] == "claimed by w2: the lease of w1 ran out"


def test_a_renewed_lease_lasts(api, monkeypatch):
    submit(api, d_in=6, d_out=4)
    job = claim(api, lease_s=10).json()
    renewed = api("POST", f"/api/v1/jobs/{job['job_id']}/renew", json={"lease": job["lease"], "lease_s": 7200})
    assert renewed.status_code == 200 and renewed.json()["lease_until"] > job["lease_until"]
    now = time.time
    monkeypatch.setattr(job_store.time, "time", lambda: now() + 3600)
    assert claim(api, "w2").status_code == 204


def test_three_attempts_that_do_not_end_are_enough(api, monkeypatch):
    submit(api, d_in=6, d_out=4)
    now = time.time
    for attempt in range(1, 4):
        assert claim(api).json()["attempts"] == attempt
        monkeypatch.setattr(job_store.time, "time", lambda attempt=attempt: now() + 3600 * attempt)
    assert claim(api).status_code == 204
    (job,) = api("GET", "/api/v1/jobs", params={"status": "INVALID"}).json()["items"]
    assert "given up after 3 attempts" in job["log"]
    assert blueprint_status(api) == "INVALID"


def test_a_job_given_back_three_times_is_invalid(api):
    submit(api, d_in=6, d_out=4)
    statuses = [finish(api, claim(api).json(), "retry", log="no memory").json()["status"] for _ in range(3)]
    assert statuses == ["QUEUED", "QUEUED", "INVALID"]
    assert blueprint_status(api) == "INVALID"


def test_a_job_handed_back_untried_was_no_attempt(api):
    submit(api, d_in=6, d_out=4)
    submit(api, d_in=8, d_out=4)
    for _ in range(4):
        job = claim(api).json()
        assert (job["d_in"], job["attempts"]) == (6, 1)
        released = finish(api, job, "release", log="left to others: no GPU").json()
        assert (released["status"], released["attempts"], released["log"]) == ("QUEUED", 0, "left to others: no GPU")
    assert blueprint_status(api) == "UNVALIDATED"
    history = api("GET", f"/api/v1/jobs/{job['job_id']}").json()["history"]
    assert history[-1]["reason"] == "handed back untried"
    # No longer this worker's.
    assert finish(api, job, "release").status_code == 409


def test_a_worker_is_not_given_what_it_has_left(api):
    submit(api, d_in=6, d_out=4)
    submit(api, d_in=8, d_out=4)
    job = claim(api).json()
    finish(api, job, "release")
    wish = {"worker": "w1", "aside": [job["job_id"], *(f"{number:032x}" for number in range(4000))]}
    assert api("POST", "/api/v1/jobs/claim", json=wish).json()["d_in"] == 8
    assert api("POST", "/api/v1/jobs/claim", json=wish).status_code == 204
    assert claim(api, "w2").json()["job_id"] == job["job_id"]
    for bad in (["x"], [job["job_id"]] * 4097, job["job_id"]):
        assert api("POST", "/api/v1/jobs/claim", json={"worker": "w1", "aside": bad}).status_code == 422


def test_a_job_is_done_with_what_it_asked_for_and_nothing_else(api):
    submit(api, d_in=6, d_out=4)
    job = claim(api).json()
    others = {
        "blueprint_hash": sample(d_in=6, d_out=4, rank=3),
        "d_in": sample(d_in=7, d_out=4),
        "d_out": sample(d_in=6, d_out=5),
        "dtype": sample(d_in=6, d_out=4, dtype=torch.float64),
    }
    for name, data in others.items():
        wrong = api.upload(data).json()["artifact_id"]
        answer = finish(api, job, "done", artifact_id=wrong)
        assert (answer.status_code, error(answer)) == (422, "wrong_artifact")
        facts = {"blueprint_hash": blueprint_hash(BOTTLENECK), "d_in": 6, "d_out": 4, "dtype": "float32"}
        manifest = Artifact.open(data).manifest
        its = {"blueprint_hash": manifest.blueprint_hash, "d_in": 7, "d_out": 5, "dtype": "float64"}
        expected = (
            f"{wrong} is not what job {job['job_id']} asks for: its {name} is {its[name]}, the job's {facts[name]}"
        )
        assert answer.json()["error"]["message"] == expected
    assert api("GET", f"/api/v1/jobs/{job['job_id']}").json()["status"] == "RUNNING"
    assert blueprint_status(api) == "COMPILING"
    assert finish(api, job, "done", artifact_id=api.uploaded()).json()["status"] == "DONE"
    # Without weights there is no dtype to differ in.
    plain = Blueprint(
        "plain",
        [Node("x", "input", ()), Node("a", "activation", ("x",), {"kind": "relu"}), Node("y", "output", ("a",))],
    )
    submit(api, plain, d_in=4, d_out=4, dtype="bfloat16")
    artifact_id = api.upload(build(plain, d_in=4, d_out=4, dtype="bfloat16")).json()["artifact_id"]
    assert finish(api, claim(api).json(), "done", artifact_id=artifact_id).json()["status"] == "DONE"


def test_what_one_job_compiled_anothers_failure_does_not_undo(api):
    submit(api, d_in=6, d_out=4)
    submit(api, d_in=8, d_out=4)
    first, second = claim(api).json(), claim(api).json()
    assert (first["d_in"], second["d_in"]) == (6, 8)
    assert finish(api, first, "done", artifact_id=api.uploaded()).status_code == 200
    finish(api, second, "invalid")
    assert blueprint_status(api) == "COMPILED"


def test_workers_that_claim_at_once_get_different_jobs(api):
    for size in range(8):
        submit(api, d_in=6 + size, d_out=4)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        jobs = [answer.json() for answer in pool.map(lambda n: claim(api, f"w{n}"), range(8))]
    assert len({job["job_id"] for job in jobs}) == 8
    assert claim(api).status_code == 204


def test_the_same_submission_at_once_is_one_job(api):
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: submit(api, d_in=6, d_out=4), range(6)))
    assert sorted(answer.status_code for answer in answers) == [200] * 5 + [201]
    assert len({answer.json()["job_id"] for answer in answers}) == 1


def test_pages_of_jobs_follow_their_arrival(api):
    ids = [submit(api, d_in=size, d_out=4).json()["job_id"] for size in range(1, 6)]
    page = api("GET", "/api/v1/jobs", params={"limit": 3}).json()
    rest = api("GET", "/api/v1/jobs", params={"limit": 3, "cursor": page["next_cursor"]}).json()
    found = [job["job_id"] for job in page["items"] + rest["items"]]
    # Within one millisecond the order is open.
    assert sorted(found) == sorted(ids) and found == sorted(found)
    assert rest["next_cursor"] is None


def test_text_that_no_database_stores_is_refused(api):
    assert claim(api, "w\0").status_code == 422
    assert claim(api, "").status_code == 422
    assert claim(api, lease_s=0).status_code == 422
    assert api("GET", f"/api/v1/jobs/{'0' * 32}").status_code == 404
    assert api("GET", f"/api/v1/blueprints/{'0' * 64}").status_code == 404


def test_a_history_names_the_token_and_not_what_a_worker_calls_itself(api, lapse):
    forge = api.service.tokens.add("forge", ["publish"])
    wait_until(lambda: len(api.service.watch.callers) == 2)
    submit(api, d_in=6, d_out=4)

    def claimed():
        return api.as_(forge)("POST", "/api/v1/jobs/claim", json={"worker": "admin"})

    for _ in range(3):
        job = claimed().json()
        assert job["worker"] == "admin"
        lapse()
    assert claimed().status_code == 204, "given up"
    history = api("GET", f"/api/v1/jobs/{job['job_id']}").json()["history"]
    assert [(line["to"], line["by"], line["reason"]) for line in history] == [
        ("QUEUED", "admin", "submitted"),
        ("RUNNING", "forge", "claimed by admin"),
        ("RUNNING", "forge", "claimed by admin: the lease of admin ran out"),
        ("RUNNING", "forge", "claimed by admin: the lease of admin ran out"),
        ("INVALID", "forge", "given up after 3 attempts that did not end; the last was admin's"),
    ]
    found = api("GET", f"/api/v1/blueprints/{blueprint_hash(BOTTLENECK)}").json()["history"]
    assert [line["by"] for line in found] == ["admin", "forge", "forge"]


def test_a_log_and_a_reason_keep_what_can_be_printed(api):
    submit(api, d_in=6, d_out=4)
    log = "one\r\ntwo\tthree \u00e9\n\x1b[2J\x00\x9b1m\u202e"
    assert finish(api, claim(api).json(), "retry", log=log).json()["log"] == (
        "one\ntwo\tthree \u00e9\n\ufffd[2J\ufffd\ufffd1m\ufffd"
    )
    path = f"/api/v1/blueprints/{blueprint_hash(BOTTLENECK)}"
    assert api("POST", f"{path}/status", json={"status": "INVALID", "reason": "no\x1b[2J"}).status_code == 200
    assert api("GET", path).json()["history"][-1]["reason"] == "no\ufffd[2J"
    for worker in ("w\n", "w\x1b[2J", "w\u202e"):
        assert claim(api, worker).status_code == 422


def test_a_worker_whose_jobs_come_from_elsewhere_says_where_a_blueprint_stands(api):
    def say(status, reason="", blueprint=BOTTLENECK):
        path = f"/api/v1/blueprints/{blueprint_hash(blueprint)}/status"
        return api("POST", path, json={"status": status, "reason": reason})

    assert error(say("COMPILING")) == "not_found"
    submit(api)
    assert error(say("COMPILED")) == "illegal_transition"
    assert say("COMPILING", "job 1").json() == {"blueprint_id": blueprint_hash(BOTTLENECK), "status": "COMPILING"}
    # Said again it is no move; without a kernel nothing is compiled.
    assert say("COMPILING", "job 2").status_code == 200
    assert error(say("COMPILED")) == "no_kernel"
    assert say("INVALID", "out of memory").status_code == 200
    assert say("COMPILING", "job 3").status_code == 200
    found = Artifact.open(artifact(1)).blueprint
    assert blueprint_hash(found) == blueprint_hash(BOTTLENECK)
    api.uploaded(1)
    assert say("COMPILED", "job 3").status_code == 200
    history = api("GET", f"/api/v1/blueprints/{blueprint_hash(BOTTLENECK)}").json()["history"]
    assert [(line["to"], line["reason"]) for line in history] == [
        ("UNVALIDATED", "submitted"),
        ("COMPILING", "job 1"),
        ("INVALID", "out of memory"),
        ("COMPILING", "job 3"),
        ("COMPILED", "job 3"),
    ]


def test_a_body_that_is_no_json(local):
    """As docs/urza.md says."""
    headers = {"Content-Type": "application/json"}
    for body, status, code in [(b"{", 422, "invalid"), (b"", 422, "invalid"), (b"\xff", 400, "bad_request")]:
        answer = local("POST", "/api/v1/jobs/claim", content=body, headers=headers)
        assert (answer.status_code, error(answer)) == (status, code), body
