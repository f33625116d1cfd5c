"""The process that compiles one job: ``python -m esper.services.tezzeret.sandbox``.

A request comes on standard input, as JSON. The process binds itself to the limits before it looks at the blueprint,
writes the artifact and a reply into its working directory, which is its own, and ends with a status that says what kind
of end it was. Whatever it prints is the job's log.
"""

from __future__ import annotations

import json
import math
import sys
import traceback
from typing import TYPE_CHECKING, Any, Final

from esper.services.tezzeret.limits import Limits, die_with

if TYPE_CHECKING:
    from esper.blueprints.ir import Blueprint
    from esper.services.tezzeret.job import CompileJob

__all__ = ["ARTIFACT", "EXIT_ELSEWHERE", "EXIT_INVALID", "EXIT_LIMIT", "REPLY", "main"]

#: Files in the working directory.
ARTIFACT: Final = "artifact"
REPLY: Final = "reply.json"

#: The job is at fault, and would be again.
EXIT_INVALID: Final = 3
#: It took more than it may.
EXIT_LIMIT: Final = 4
#: This machine lacks what it takes; another may have it.
EXIT_ELSEWHERE: Final = 5


def main() -> int:
    """Compile what standard input asks for; the exit status."""
    request: dict[str, Any] = json.load(sys.stdin)
    die_with(request["parent"])
    limits = Limits.from_payload(request["limits"])
    limits.bind()
    reply: dict[str, Any] = {}
    try:
        return _compile(request["job"], limits, reply)
    except MemoryError:
        return _out_of_memory(limits)
    except RuntimeError as error:
        # PyTorch's allocators have no exception type of their own.
        if "memory" in str(error):
            return _out_of_memory(limits)
        raise
    finally:
        with open(REPLY, "x", encoding="ascii") as file:
            json.dump(reply, file)


def _compile(payload: dict[str, Any], limits: Limits, reply: dict[str, Any]) -> int:
    # Imported under the limits; and PyTorch, which takes seconds, only for a blueprint that is one.
    from esper.contracts.errors import BlueprintError
    from esper.services.tezzeret.job import CompileJob, JobError
    from esper.services.tezzeret.pipelines import CompileError, MachineError

    try:
        job = CompileJob.from_payload(payload)
        blueprint = _validated(job, limits, reply)
    except (BlueprintError, CompileError, JobError) as error:
        return _invalid(error)
    from esper.services.tezzeret.forge import build

    try:
        data = build(
            blueprint,
            d_in=job.d_in,
            d_out=job.d_out,
            seed=job.seed,
            dtype=job.dtype,
            pipeline=job.pipeline,
            architectures=job.architectures,
        )
    except MachineError as error:
        print(error, flush=True)
        return EXIT_ELSEWHERE
    except (BlueprintError, CompileError) as error:
        return _invalid(error)
    if len(data) > limits.artifact_bytes:
        print(f"the artifact has {len(data)} bytes, more than this worker's limit of {limits.artifact_bytes}")
        return EXIT_LIMIT
    with open(ARTIFACT, "xb") as file:
        file.write(data)
    return 0


def _validated(job: CompileJob, limits: Limits, reply: dict[str, Any]) -> Blueprint:
    """The blueprint, if it is one and is not too large, before any weight is drawn."""
    from esper.blueprints.canonical import blueprint_hash
    from esper.blueprints.ir import from_json
    from esper.blueprints.validation import validate
    from esper.contracts.container import ITEMSIZES
    from esper.contracts.errors import BlueprintError
    from esper.services.tezzeret.pipelines import check_request, torch_name

    check_request(job.pipeline, job.architectures)
    itemsize = ITEMSIZES[torch_name(job.dtype)]
    blueprint = from_json(job.blueprint)
    reply["blueprint_hash"] = blueprint_hash(blueprint)
    sizes = {name: math.prod(shape) for name, shape in validate(blueprint, job.d_in, job.d_out).tensors.items()}
    total = sum(sizes.values()) * itemsize
    if total > limits.artifact_bytes:
        largest = max(sizes, key=lambda name: sizes[name])
        raise BlueprintError(
            f"its weights take {total} bytes, more than this worker's limit of {limits.artifact_bytes}; "
            f"the largest is {largest}, {sizes[largest]} values",
            node=largest.rpartition(".")[0],
        )
    return blueprint


def _invalid(error: Exception) -> int:
    print(f"{type(error).__name__}: {error}", flush=True)
    return EXIT_INVALID


def _out_of_memory(limits: Limits) -> int:
    traceback.print_exc(limit=-3)
    print(f"out of memory: this worker gives a job {limits.memory_bytes >> 20} MiB", flush=True)
    return EXIT_LIMIT


if __name__ == "__main__":
    sys.exit(main())
