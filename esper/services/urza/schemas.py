"""The shapes of requests and answers; the OpenAPI document is made from these."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from esper.contracts.ids import JOB_PATTERN, TAG_PATTERN
from esper.contracts.text import shown
from esper.services.urza.lifecycle import BlueprintStatus, JobStatus, KernelStatus

__all__ = [
    "ArtifactName",
    "BlueprintDetail",
    "BlueprintList",
    "BlueprintSubmission",
    "ClaimedJob",
    "ErrorOut",
    "Health",
    "Job",
    "JobClaim",
    "JobDetail",
    "JobFinish",
    "JobList",
    "JobRenewal",
    "KernelDetail",
    "KernelList",
    "KernelQuery",
    "KernelStatusChange",
    "Matches",
    "Ready",
    "Submitted",
    "Uploaded",
]


def _no_nul(text: str) -> str:
    # PostgreSQL stores no NUL, and nobody needs one.
    if "\0" in text:
        raise ValueError("must not contain NUL characters")
    return text


def _printable(text: str) -> str:
    # It stands in sentences of the history, one line each.
    if not text.isprintable():
        raise ValueError("must not contain characters that cannot be printed")
    return text


def _shown(text: str) -> str:
    # What a compiler or a person wrote is kept, and what it would do to the terminal of whoever reads it is not.
    return shown(text.replace("\r\n", "\n"), "\N{REPLACEMENT CHARACTER}")


Tag = Annotated[str, StringConstraints(pattern=f"^{TAG_PATTERN}$")]
Tags = Annotated[list[Tag], Field(max_length=32)]
Architecture = Annotated[str, StringConstraints(pattern=r"^sm_[0-9]{2,3}[a-z]?$")]
ArtifactName = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}-[a-z0-9_]{1,32}-[a-z]{1,16}-[0-9a-f]{8}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=1, le=1 << 20)]
Dtype = Literal["float64", "float32", "float16", "bfloat16"]
Metric = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]
Lease = Annotated[float, Field(ge=1, le=86_400, allow_inf_nan=False)]


WorkerName = Annotated[str, StringConstraints(min_length=1, max_length=128), AfterValidator(_printable)]
JobName = Annotated[str, StringConstraints(pattern=f"^{JOB_PATTERN}$")]
LeaseKey = Annotated[str, StringConstraints(max_length=64), AfterValidator(_no_nul)]
Reason = Annotated[str, StringConstraints(max_length=2000), AfterValidator(_shown)]
Log = Annotated[str, StringConstraints(max_length=65_536), AfterValidator(_shown)]


class _In(BaseModel):
    """What clients send: exactly these keys, each of its type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Fault(BaseModel):
    """What was wrong."""

    code: str
    message: str


class ErrorOut(BaseModel):
    """The body of every error."""

    error: Fault


class HistoryEntry(BaseModel):
    """One change of status."""

    model_config = ConfigDict(populate_by_name=True)

    before: str | None = Field(alias="from")
    to: str
    at: str
    by: str
    reason: str


class BlueprintSubmission(_In):
    """A blueprint, and if ``d_in`` and ``d_out`` are given, the wish to have it compiled for them."""

    blueprint: dict[str, Any]
    d_in: Size | None = None
    d_out: Size | None = None
    seed: Annotated[int, Field(ge=0, le=(1 << 63) - 1)] = 0
    dtype: Dtype = "float32"
    pipeline: Literal["fast", "standard", "aggressive"] = "fast"
    architectures: Annotated[list[Architecture], Field(max_length=16)] = []
    tags: Tags = []


class Submitted(BaseModel):
    """Where a submission stands."""

    blueprint_id: str
    job_id: str | None = None
    status: BlueprintStatus


class BlueprintStatusChange(_In):
    """Where a blueprint stands, told by a worker whose jobs Urza does not hand out."""

    status: BlueprintStatus
    reason: Reason = ""


class BlueprintSummary(BaseModel):
    """One line of the list of blueprints."""

    blueprint_id: str
    status: BlueprintStatus
    name: str
    created_at: str


class BlueprintList(BaseModel):
    """A page of blueprints."""

    items: list[BlueprintSummary]
    next_cursor: str | None


class BlueprintDetail(BaseModel):
    """A blueprint with what came of it."""

    blueprint_id: str
    status: BlueprintStatus
    blueprint: dict[str, Any]
    created_at: str
    jobs: list[str]
    kernels: list[str]
    history: list[HistoryEntry]


class Job(BaseModel):
    """A compile job."""

    job_id: str
    blueprint_id: str
    status: JobStatus
    d_in: int
    d_out: int
    seed: int
    dtype: Dtype
    pipeline: str
    architectures: list[str]
    tags: list[str]
    attempts: int
    worker: str | None
    lease_until: str | None
    artifact_id: str | None
    log: str
    created_at: str
    updated_at: str


class JobDetail(Job):
    """A compile job with its history."""

    history: list[HistoryEntry]


class ClaimedJob(Job):
    """A job with all a worker needs; ``lease`` proves in later calls that the job is still this worker's."""

    blueprint: dict[str, Any]
    lease: str


class JobList(BaseModel):
    """A page of jobs."""

    items: list[Job]
    next_cursor: str | None


class JobClaim(_In):
    """A worker asks for a job."""

    worker: WorkerName
    lease_s: Lease = 60.0
    #: Jobs that it has left to others, and does not want back yet.
    aside: Annotated[list[JobName], Field(max_length=4096)] = []


class JobRenewal(_In):
    """A worker asks for more time."""

    lease: LeaseKey | None = None
    lease_s: Lease = 60.0


class JobFinish(_In):
    """A worker reports how a job ended."""

    status: Literal["done", "invalid", "retry", "release"]
    lease: LeaseKey | None = None
    artifact_id: ArtifactName | None = None
    log: Log = ""


class Uploaded(BaseModel):
    """A kernel as the registry took it in."""

    artifact_id: str
    sha256: str
    size: int
    status: KernelStatus
    kernel_binary_ref: str


class KernelDetail(Uploaded):
    """Everything on record about a kernel."""

    manifest: dict[str, Any]
    info: dict[str, Any]
    tags: list[str]
    metrics: dict[str, Any]
    created_at: str
    history: list[HistoryEntry]


class KernelSummary(BaseModel):
    """One line of the list of kernels."""

    artifact_id: str
    sha256: str
    size: int
    status: KernelStatus
    info: dict[str, Any]


class KernelList(BaseModel):
    """A page of kernels."""

    items: list[KernelSummary]
    next_cursor: str | None


class KernelQuery(_In):
    """What a kernel must have, and what is merely better."""

    tags_required: Tags = []
    tags_preferred: Tags = []
    tags_excluded: Tags = []
    d_in: Size | None = None
    d_out: Size | None = None
    dtype: Literal["float64", "float32", "float16", "bfloat16", "mixed", "none"] | None = None
    architecture: Architecture | None = None
    family: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,32}$")] | None = None
    blueprint_id: Sha256 | None = None
    max_latency_us: Metric | None = None
    max_memory_bytes: Annotated[int, Field(ge=0, le=(1 << 63) - 1)] | None = None
    statuses: Annotated[list[KernelStatus], Field(max_length=8)] = []
    limit: Annotated[int, Field(ge=1, le=100)] = 20


class Match(KernelSummary):
    """A kernel that fits, and how well."""

    score: float
    tags: list[str]
    latency_us: float | None
    memory_bytes: int | None


class Matches(BaseModel):
    """Kernels that fit, best first."""

    items: list[Match]


class Metrics(_In):
    """What was measured when a kernel was characterised."""

    latency_us: Metric | None = None
    memory_bytes: Annotated[int, Field(ge=0, le=(1 << 63) - 1)] | None = None


class KernelStatusChange(_In):
    """A move along the life cycle, with the reason."""

    status: KernelStatus
    reason: Reason = ""
    metrics: Metrics | None = None


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok"]


class Ready(BaseModel):
    """The process can do its work."""

    status: Literal["ready"]
