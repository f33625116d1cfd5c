"""What a worker is asked to compile, and what it answers, as data."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any, Final, Self

from esper.contracts.errors import EsperError
from esper.contracts.ids import TAG_PATTERN
from esper.contracts.text import shown

__all__ = ["MAX_LOG_CHARS", "CompileJob", "CompileResult", "JobError", "JobStatus"]

#: What is kept of a job's log: its end.
MAX_LOG_CHARS: Final = 8192
_MAX_TEXT: Final = 128
_MAX_ITEMS: Final = 32


class JobError(EsperError, ValueError):
    """A job or a result is not one; the message names the field."""


class JobStatus(StrEnum):
    """How a job ended for good."""

    COMPILED = "COMPILED"
    INVALID = "INVALID"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileJob:
    """One request to compile.

    Only types, lengths and tags are checked here. Whether the blueprint is one is found out in the sandbox.

    Attributes:
        blueprint: The blueprint as JSON values.
        d_in: Features the sub-network reads.
        d_out: Features it changes.
        seed: Of the initial weights.
        dtype: Of the stored weights.
        pipeline: Which pipeline compiles it.
        architectures: GPUs to compile for ahead of time, such as ``sm_90``.
        tags: Given to the kernel in registries that know tags.
        job_id: Its name; a job submitted twice under one name is two jobs to a queue, and one artifact.
    """

    blueprint: Mapping[str, Any]
    d_in: int
    d_out: int
    seed: int = 0
    dtype: str = "float32"
    pipeline: str = "fast"
    architectures: Sequence[str] = ()
    tags: Sequence[str] = ()
    job_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        if not isinstance(self.blueprint, Mapping):
            raise JobError(f"job.blueprint is a {type(self.blueprint).__name__}; need an object")
        for name in ("d_in", "d_out", "seed"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < 1 << 63:
                raise JobError(f"job.{name} is {value!r:.40}; need an integer, 0 or more and below 2^63")
        for name in ("dtype", "pipeline", "job_id"):
            _check_text(f"job.{name}", getattr(self, name))
        for name in ("architectures", "tags"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence) or len(value) > _MAX_ITEMS:
                raise JobError(f"job.{name} is {value!r:.80}; need a list of at most {_MAX_ITEMS} texts")
            for item in value:
                _check_text(f"job.{name}", item)
                # What registries would refuse is refused before it is compiled.
                if name == "tags" and not re.fullmatch(TAG_PATTERN, item):
                    raise JobError(
                        f"job.tags has {item!r:.80}; a tag is 1 to 64 letters, digits and _ . : / + = -, and "
                        f"begins with a letter or a digit"
                    )
            object.__setattr__(self, name, tuple(value))

    def to_payload(self) -> dict[str, Any]:
        """Plain values for a message."""
        # Not asdict: it would copy the blueprint node by node, for nothing.
        payload = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**payload, "architectures": list(self.architectures), "tags": list(self.tags)}

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_payload`; what has a default may be left out, except for the name.

        Raises:
            JobError: a field is missing, unknown or bad.
        """
        return cls(**_known_fields(cls, payload, "job", {"blueprint", "d_in", "d_out", "job_id"}))


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileResult:
    """How a job ended.

    Attributes:
        job_id: Which job.
        status: COMPILED: the artifact is in the registry. INVALID: it never will be, and the log says why.
        artifact_id: Of what was compiled, else None.
        blueprint_hash: Where the blueprint got so far as to have one, else None.
        log: The end of the log, with ``?`` for control characters; for INVALID its last line is the reason.
        attempts: Times the job was handed out.
    """

    job_id: str
    status: JobStatus
    artifact_id: str | None = None
    blueprint_hash: str | None = None
    log: str = ""
    attempts: int = 1

    def __post_init__(self) -> None:
        _check_text("result.job_id", self.job_id)
        try:
            object.__setattr__(self, "status", JobStatus(self.status))
        except ValueError:
            raise JobError(f"result.status is {self.status!r:.40}; known: {', '.join(JobStatus)}") from None
        for name in ("artifact_id", "blueprint_hash"):
            if getattr(self, name) is not None:
                _check_text(f"result.{name}", getattr(self, name))
        if (self.status is JobStatus.COMPILED) != (self.artifact_id is not None):
            raise JobError(f"a result that is {self.status} with artifact_id {self.artifact_id!r} contradicts itself")
        if not isinstance(self.log, str):
            raise JobError(f"result.log is a {type(self.log).__name__}; need text")
        object.__setattr__(self, "log", shown(self.log[-MAX_LOG_CHARS:]))
        if type(self.attempts) is not int or self.attempts < 0:
            raise JobError(f"result.attempts is {self.attempts!r:.40}; need an integer, 0 or more")

    def to_payload(self) -> dict[str, Any]:
        """Plain values for a message."""
        return {**asdict(self), "status": self.status.value}

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_payload`.

        Raises:
            JobError: a field is missing, unknown or bad.
        """
        return cls(**_known_fields(cls, payload, "result", {each.name for each in fields(cls)}))


def _known_fields(cls: type[Any], payload: Mapping[str, Any], what: str, needed: set[str]) -> dict[str, Any]:
    if not isinstance(payload, Mapping):
        raise JobError(f"a {what} is an object, not {type(payload).__name__}")
    if missing := sorted(needed - payload.keys()):
        raise JobError(f"the {what} lacks {', '.join(missing)}")
    if unknown := sorted(shown(f"{key!s:.40}") for key in payload.keys() - {each.name for each in fields(cls)}):
        raise JobError(f"the {what} has unknown fields: {', '.join(unknown[:8])}")
    return dict(payload)


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value or len(value) > _MAX_TEXT or not value.isprintable():
        raise JobError(f"{name} is {value!r:.80}; need printable text of 1 to {_MAX_TEXT} characters")
