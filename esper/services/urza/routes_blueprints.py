"""``/api/v1/blueprints`` and ``/api/v1/jobs``."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path
from fastapi.responses import JSONResponse, Response

from esper.blueprints import blueprint_hash, from_json, validate
from esper.contracts.errors import BlueprintError
from esper.contracts.ids import JOB_PATTERN
from esper.services.urza import blueprint_store, job_store
from esper.services.urza.access import Publisher, Reader, Shared
from esper.services.urza.errors import invalid
from esper.services.urza.lifecycle import BlueprintStatus, JobStatus
from esper.services.urza.records import decode_cursor, paged
from esper.services.urza.responses import errors
from esper.services.urza.routes_kernels import Cursor, Limit
from esper.services.urza.schemas import (
    BlueprintDetail,
    BlueprintList,
    BlueprintStatusChange,
    BlueprintSubmission,
    ClaimedJob,
    Job,
    JobClaim,
    JobDetail,
    JobFinish,
    JobList,
    JobRenewal,
    Submitted,
)

__all__ = ["router"]

router = APIRouter(prefix="/api/v1")

BlueprintId = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$")]
JobId = Annotated[str, Path(pattern=f"^{JOB_PATTERN}$")]


@router.post(
    "/blueprints",
    tags=["blueprints"],
    status_code=201,
    response_model=Submitted,
    responses={
        200: {"model": Submitted, "description": "Blueprint and job are here already"},
        **errors(400, 408, 413, 429),
    },
    summary="Submit a blueprint, and perhaps have it compiled",
)
def submit(service: Shared, caller: Publisher, submission: BlueprintSubmission) -> JSONResponse:
    """With ``d_in`` and ``d_out`` it is also a compile job."""
    if (submission.d_in is None) != (submission.d_out is None):
        raise invalid("d_in and d_out are given together (compile it) or not at all (keep it)")
    try:
        blueprint = from_json(submission.blueprint)
        if submission.d_in is not None and submission.d_out is not None:
            validate(blueprint, submission.d_in, submission.d_out)
        blueprint_id = blueprint_hash(blueprint)
    except BlueprintError as error:
        raise invalid(str(error), "invalid_blueprint") from error
    job_id = None
    with service.database.write() as connection:
        # One at a time, so that what is looked up stays true until it is inserted.
        service.database.lock(connection)
        new = blueprint_store.insert_if_new(connection, blueprint_id, blueprint.to_dict(), caller.name)
        if submission.d_in is not None:
            request = submission.model_dump(exclude={"blueprint"})
            request["architectures"] = sorted(set(submission.architectures))
            request["tags"] = sorted(set(submission.tags))
            job_id, new_job = job_store.enqueue(connection, blueprint_id, request, caller.name)
            new = new or new_job
        status = blueprint_store.status_of(connection, blueprint_id)
    answer: dict[str, Any] = {"blueprint_id": blueprint_id, "status": status}
    if job_id is not None:
        answer["job_id"] = job_id
    return JSONResponse(answer, 201 if new else 200, headers={"Location": f"/api/v1/blueprints/{blueprint_id}"})


@router.get(
    "/blueprints", tags=["blueprints"], response_model=BlueprintList, responses=errors(), summary="List blueprints"
)
def list_blueprints(
    service: Shared, _: Reader, cursor: Cursor = None, limit: Limit = 100, status: BlueprintStatus | None = None
) -> JSONResponse:
    """A page of blueprints, sorted by id."""
    with service.database.read() as connection:
        items = blueprint_store.page(connection, after=decode_cursor(cursor), limit=limit + 1, status=status)
    return JSONResponse(paged(items, limit, "blueprint_id"))


@router.get(
    "/blueprints/{blueprint_id}",
    tags=["blueprints"],
    response_model=BlueprintDetail,
    responses=errors(404),
    summary="Describe a blueprint",
)
def describe_blueprint(blueprint_id: BlueprintId, service: Shared, _: Reader) -> JSONResponse:
    """The blueprint, its jobs, its kernels, its history."""
    with service.database.read() as connection:
        return JSONResponse(blueprint_store.describe(connection, blueprint_id))


@router.post(
    "/blueprints/{blueprint_id}/status",
    tags=["blueprints"],
    response_model=Submitted,
    responses=errors(400, 404, 408, 409, 413, 429),
    summary="Say where a blueprint stands",
)
def change_status(
    blueprint_id: BlueprintId, service: Shared, caller: Publisher, change: BlueprintStatusChange
) -> JSONResponse:
    """For workers whose jobs come from elsewhere. Legal moves only; every one is kept in the history."""
    with service.database.write() as connection:
        service.database.lock(connection)
        blueprint_store.change_status(connection, blueprint_id, change.status, by=caller.name, reason=change.reason)
    return JSONResponse({"blueprint_id": blueprint_id, "status": change.status})


@router.get("/jobs", tags=["jobs"], response_model=JobList, responses=errors(), summary="List compile jobs")
def list_jobs(
    service: Shared, _: Reader, cursor: Cursor = None, limit: Limit = 100, status: JobStatus | None = None
) -> JSONResponse:
    """A page of jobs, in the order they came."""
    with service.database.read() as connection:
        items = job_store.page(connection, after=decode_cursor(cursor), limit=limit + 1, status=status)
    return JSONResponse(paged(items, limit, "job_id"))


@router.post(
    "/jobs/claim",
    tags=["jobs"],
    response_model=ClaimedJob,
    responses={204: {"description": "No job waits"}, **errors(400, 408, 413, 429)},
    summary="Claim the oldest job that waits",
)
def claim(service: Shared, caller: Publisher, wish: JobClaim) -> Response:
    """A job for as long as the lease lasts; its time may be extended. None of those in ``aside``."""
    with service.database.write() as connection:
        job = job_store.claim(connection, wish.worker, wish.lease_s, wish.aside, by=caller.name)
    return Response(status_code=204) if job is None else JSONResponse(job)


@router.get("/jobs/{job_id}", tags=["jobs"], response_model=JobDetail, responses=errors(404), summary="Describe a job")
def describe_job(job_id: JobId, service: Shared, _: Reader) -> JSONResponse:
    """Where the job stands, its log, its history."""
    with service.database.read() as connection:
        return JSONResponse(job_store.describe(connection, job_id))


@router.post(
    "/jobs/{job_id}/renew",
    tags=["jobs"],
    response_model=Job,
    responses=errors(400, 404, 408, 409, 413, 429),
    summary="Extend a lease",
)
def renew(job_id: JobId, service: Shared, _: Publisher, wish: JobRenewal) -> JSONResponse:
    """The lease then lasts ``lease_s`` from now."""
    with service.database.write() as connection:
        return JSONResponse(job_store.renew(connection, job_id, wish.lease, wish.lease_s))


@router.post(
    "/jobs/{job_id}/finish",
    tags=["jobs"],
    response_model=Job,
    responses=errors(400, 404, 408, 409, 413, 429),
    summary="Report how a job ended",
)
def finish(job_id: JobId, service: Shared, caller: Publisher, report: JobFinish) -> JSONResponse:
    """``done`` needs the artifact in the registry; ``invalid`` is final; ``retry`` and ``release`` give the job back.

    ``release`` says that it was not tried: this claim does not count as an attempt.
    """
    with service.database.write() as connection:
        job = job_store.finish(
            connection,
            job_id,
            report.status,
            lease=report.lease,
            artifact_id=report.artifact_id,
            log=report.log,
            by=caller.name,
        )
    return JSONResponse(job)
