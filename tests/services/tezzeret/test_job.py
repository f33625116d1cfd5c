"""Jobs and results as data."""

from __future__ import annotations

import json

import pytest

from esper.services.tezzeret.job import MAX_LOG_CHARS, CompileJob, CompileResult, JobError, JobStatus

BLUEPRINT = {"schema": 1, "nodes": []}


def job(**changes) -> CompileJob:
    return CompileJob(**{"blueprint": BLUEPRINT, "d_in": 6, "d_out": 4, **changes})


def result(**changes) -> CompileResult:
    return CompileResult(**{"job_id": "j", "status": "COMPILED", "artifact_id": "a", "blueprint_hash": "b", **changes})


def test_round_trips():
    sent = job(seed=3, architectures=["sm_80", "sm_90"], tags=["small"], dtype="bfloat16", pipeline="standard")
    assert CompileJob.from_payload(json.loads(json.dumps(sent.to_payload()))) == sent
    done = result(log="fine", attempts=2)
    assert done.status is JobStatus.COMPILED
    assert CompileResult.from_payload(json.loads(json.dumps(done.to_payload()))) == done


def test_defaults_and_names():
    read = CompileJob.from_payload({"job_id": "x", "blueprint": {}, "d_in": 1, "d_out": 2})
    assert (read.seed, read.dtype, read.pipeline, read.architectures, read.tags) == (0, "float32", "fast", (), ())
    assert job().job_id != job().job_id


@pytest.mark.parametrize(
    "tag", ["x", "0", "a" * 64, "a" * 65, "a_.:/+=-Z9", "", "-a", ".a", "a b", "a,b", "a\n", "\u00e9"]
)
def test_a_tag_is_what_urza_takes_for_one(tag):
    from pydantic import TypeAdapter, ValidationError

    from esper.services.urza.schemas import Tag

    try:
        TypeAdapter(Tag).validate_python(tag)
    except ValidationError:
        with pytest.raises(JobError, match=r"job\.tags"):
            job(tags=[tag])
    else:
        assert job(tags=[tag]).tags == (tag,)


def test_of_a_log_the_end_is_kept():
    assert result(log="a" * MAX_LOG_CHARS + "end").log.endswith("aend")
    assert len(result(log="a" * 3 * MAX_LOG_CHARS).log) == MAX_LOG_CHARS


def test_a_log_holds_nothing_that_a_terminal_obeys():
    # Whoever sent it: it need not have been a worker of ours.
    log = "one\n\ttwo \x1b]0;pwned\x07\x1b[2J\N{RIGHT-TO-LEFT OVERRIDE}evil\x9b"
    read = CompileResult.from_payload({**result().to_payload(), "log": log})
    assert read.log == "one\n\ttwo ?]0;pwned??[2J?evil?"
    with pytest.raises(JobError) as caught:
        CompileJob.from_payload({**job().to_payload(), "\x1b[2J": 1})
    assert str(caught.value) == "the job has unknown fields: ?[2J"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"blueprint": "lowrank"}, "job.blueprint is a str; need an object"),
        ({"d_in": "6"}, "job.d_in is '6'"),
        ({"d_in": True}, "job.d_in is True"),
        ({"d_out": -1}, "job.d_out is -1"),
        ({"seed": 1 << 63}, "job.seed"),
        ({"dtype": ""}, "job.dtype is ''"),
        ({"pipeline": 1}, "job.pipeline is 1"),
        ({"job_id": "a\x1b[2J"}, "job.job_id"),
        ({"architectures": "sm_90"}, "job.architectures is 'sm_90'; need a list"),
        ({"architectures": [90]}, "job.architectures is 90"),
        ({"tags": ["x"] * 33}, "at most 32"),
        ({"tags": ["good", "bad tag"]}, "job.tags has 'bad tag'; a tag is 1 to 64 letters, digits and"),
        ({"tags": ["x" * 65]}, "a tag is 1 to 64 letters"),
        ({"tags": ["-x"]}, "begins with a letter or a digit"),
    ],
)
def test_refused_jobs(changes, said):
    with pytest.raises(JobError, match=said):
        job(**changes)
    with pytest.raises(JobError, match=said):
        CompileJob.from_payload({**job().to_payload(), **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"status": "fine"}, "result.status is 'fine'; known: COMPILED, INVALID"),
        ({"status": "INVALID"}, "contradicts itself"),
        ({"artifact_id": None}, "contradicts itself"),
        ({"attempts": "1"}, "result.attempts is '1'"),
        ({"log": None}, "result.log is a NoneType"),
        ({"job_id": None}, "result.job_id is None"),
    ],
)
def test_refused_results(changes, said):
    with pytest.raises(JobError, match=said):
        CompileResult.from_payload({**result().to_payload(), **changes})


def test_fields():
    with pytest.raises(JobError, match="the job lacks d_in, job_id"):
        CompileJob.from_payload({"blueprint": {}, "d_out": 1})
    with pytest.raises(JobError, match="the job has unknown fields: command"):
        CompileJob.from_payload({**job().to_payload(), "command": "rm"})
    with pytest.raises(JobError, match="an object, not list"):
        CompileJob.from_payload([])
    with pytest.raises(JobError, match="the result lacks log"):
        CompileResult.from_payload({key: value for key, value in result().to_payload().items() if key != "log"})
