"""What ``esper env`` reports."""

from __future__ import annotations

import json

import pytest
import torch

from esper.cli import env, main
from esper.ops import registry
from esper.ops.registry import Backend


def test_every_operation_says_what_it_uses_and_why_not_the_others() -> None:
    description = env.describe()
    operations = {operation["name"]: operation for operation in description["operations"]}
    assert set(operations) == set(registry.names())
    assert operations
    for operation in operations.values():
        assert operation["doc"]
        for device, chosen in operation["devices"].items():
            assert chosen["used"] == registry.get(operation["name"]).select(device).backend
            assert set(chosen["rejected"]) == {str(backend) for backend in Backend} - {chosen["used"]}
            assert all(chosen["rejected"].values())
        assert set(operation["devices"]) == ({"cuda", "cpu"} if torch.cuda.is_available() else {"cpu"})


def test_every_family_is_declared() -> None:
    """One operation of each family, so that a family that is not imported shows."""
    assert {"lattice_step", "channel_stats", "graft_blend"} <= set(registry.names())


def test_versions_and_extension() -> None:
    description = env.describe()
    assert description["versions"]["torch"] == torch.__version__
    assert description["versions"]["esper"]
    assert description["native"]["loaded"], description["native"]
    assert len(description["gpus"]) == torch.cuda.device_count()


def test_credentials_are_masked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ESPER_REGISTRY", "https://ada:secret@registry.example/kernels?token=hidden")
    monkeypatch.setenv("REDIS_URL", "redis://:secret@bus.example:6379/0")
    monkeypatch.setenv("ESPER_CONTROL_KEY", "secret-of-those-who-command")
    for arguments in (["env"], ["env", "--json"]):
        assert main.main(arguments) == 0
        out = capsys.readouterr().out
        assert "registry.example/kernels" in out
        assert "bus.example:6379" in out
        assert "ESPER_CONTROL_KEY" in out
        assert "secret" not in out
        assert "hidden" not in out


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:sec/ret@bus.example", "redis://***@bus.example"),
        ("redis://:sec#ret@bus.example", "redis://***"),
        ("redis://:sec?ret@bus.example", "redis://***"),
        ("unix:///run/redis.sock?password=secret", "unix:///run/redis.sock?***"),
        ("secret", "***"),
        (" ", " "),
    ],
)
def test_of_a_bus_no_piece_of_the_password_is_shown(url: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", url)
    assert env.describe()["environment"]["REDIS_URL"] == shown


def test_folders_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_CACHE_DIR", "/somewhere/cache")
    monkeypatch.setenv("ESPER_REGISTRY", "/somewhere/registry")
    assert env.describe()["paths"] == {"cache": "/somewhere/cache", "registry": "/somewhere/registry"}


def test_json_and_text_tell_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["env", "--json"]) == 0
    description = json.loads(capsys.readouterr().out)
    assert main.main(["env"]) == 0
    text = capsys.readouterr().out
    for operation in description["operations"]:
        assert f"  {operation['name']}: {operation['doc']}" in text
        for chosen in operation["devices"].values():
            assert all(f"{backend}: {reason}" in text for backend, reason in chosen["rejected"].items())


def test_forced_backend_that_cannot_run_is_shown_not_raised(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ESPER_BACKEND", "cuda")
    assert main.main(["env"]) == 0
    assert "cannot run on cpu (cuda: runs on cuda, not on cpu). Unset ESPER_BACKEND" in capsys.readouterr().out


def test_unknown_backend_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ESPER_BACKEND", "tpu")
    assert main.main(["env"]) == 1
    assert "esper env: ESPER_BACKEND='tpu': expected auto, triton" in capsys.readouterr().err
