"""``esper tezzeret``: what its options mean, before a queue is asked."""

from __future__ import annotations

import pytest

from esper.cli import tezzeret
from esper.cli.compile import PIPELINES
from esper.cli.main import main
from esper.services.tezzeret import pipelines

SUBMIT = ["tezzeret", "submit", "lowrank", "--d-in", "6", "--d-out", "4", "--redis", "redis://127.0.0.1:1"]


@pytest.fixture
def submitted(monkeypatch):
    """The jobs that were handed over."""
    jobs = []

    async def hand_over(queue, job, wait_s):
        jobs.append(job)
        return 0

    monkeypatch.setattr(tezzeret, "_hand_over", hand_over)
    return jobs


@pytest.mark.parametrize(
    ("options", "pipeline"),
    [
        ([], "fast"),
        (["--arch", "sm_90"], "standard"),
        (["--arch", "sm_90", "--arch", "sm_80", "--pipeline", "standard"], "standard"),
        (["--pipeline", "aggressive"], "aggressive"),
        (["--arch", "sm_90", "--pipeline", "aggressive"], "aggressive"),
    ],
)
def test_architectures_alone_mean_standard(submitted, options, pipeline):
    assert main([*SUBMIT, *options]) == 0
    (job,) = submitted
    assert job.pipeline == pipeline
    assert list(job.architectures) == [value for value in options if value.startswith("sm_")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arch", "sm_90", "--pipeline", "fast"], "pipeline 'fast' builds no GPU binaries"),
        (["--arch", "sm_93"], "unknown architecture 'sm_93'; known: sm_80, "),
        (["--tag", "bad tag"], "job.tags has 'bad tag'; a tag is 1 to 64 letters"),
        (["--dtype", "int8"], "dtype 'int8' cannot be stored; possible: float64, "),
    ],
)
def test_what_no_worker_would_compile_is_not_submitted(submitted, capsys, options, message):
    assert main([*SUBMIT, *options]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert submitted == []


def test_a_job_has_torchs_name_of_a_dtype(submitted):
    assert main([*SUBMIT, "--dtype", "bf16"]) == 0
    assert [job.dtype for job in submitted] == ["bfloat16"]


@pytest.mark.parametrize("command", [["tezzeret", "worker"], SUBMIT])
def test_pipelines_are_known_by_name(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--pipeline", "standrd"])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert "--pipeline: invalid choice: 'standrd'" in err
    assert all(name in err for name in PIPELINES)


def test_the_names_are_those_of_the_pipelines():
    assert PIPELINES == pipelines.PIPELINES


@pytest.mark.parametrize("token", ["urza_TOPSECRET\r", "urza_TOPSECRET\n", "urza_TOPSECRET ", "urza_TOPSECRET\u00c9"])
def test_a_token_that_cannot_be_one_is_not_printed(monkeypatch, capsys, token):
    monkeypatch.setenv("ESPER_REGISTRY_TOKEN", token)
    assert main([*SUBMIT[:-2], "--urza", "http://127.0.0.1:1"]) == 1
    err = capsys.readouterr().err
    assert "the token in ESPER_REGISTRY_TOKEN has characters that no token has" in err
    assert "TOPSECRET" not in err


def test_help_puts_no_token_where_ps_shows_it(capsys):
    with pytest.raises(SystemExit):
        main(["tezzeret", "--help"])
    out = capsys.readouterr().out
    assert "ESPER_REGISTRY_TOKEN" in out
    assert "TOKEN@" not in out
