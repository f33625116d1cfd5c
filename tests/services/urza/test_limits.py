"""Settings and limits that are none."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("sqlalchemy")
pytest.importorskip("alembic")

from esper.cli.main import main
from esper.services.urza.database import Database
from esper.services.urza.limits import WriteLimit
from esper.services.urza.settings import settings_for

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("rate", [NAN, INF, -1.0])
def test_a_rate_that_is_none(rate):
    with pytest.raises(ValueError, match=rf"rate is {rate}; need a finite number"):
        WriteLimit(rate, 200)


@pytest.mark.parametrize("burst", [0, -1, NAN])
def test_a_burst_that_is_none(burst):
    with pytest.raises(ValueError, match=f"burst is {burst}; need at least one"):
        WriteLimit(20.0, burst)


@pytest.mark.parametrize(
    "setting",
    [
        *({"write_rate": value} for value in (NAN, INF, -1.0, True)),
        *({"write_burst": value} for value in (0, -1)),
        *({"max_bytes": value} for value in (0, -1, 1 << 60)),
        *({"presign_s": value} for value in (0, 604_801)),
        *({"upload_idle_s": value} for value in (0, NAN, INF)),
        {"threads": 0},
        {"max_json_bytes": 0},
    ],
    ids=str,
)
def test_settings_that_are_none(tmp_path, setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=rf"{name} is {value!r}; need a number from"):
        settings_for(tmp_path, **setting)


def test_no_limit_is_a_rate_of_none(tmp_path):
    assert settings_for(tmp_path, write_rate=0).write_rate == 0
    limit = WriteLimit(0, 1)
    for _ in range(1000):
        limit.take("a")


@pytest.mark.parametrize("name", ["q7?1", "q7#1", "pc%41", "a b", "ü&=", "with:colon"])
def test_the_database_is_in_the_folder_that_was_named(tmp_path, name):
    folder = tmp_path / name
    database = Database(settings_for(folder).database)
    database.migrate()
    database.close()
    assert database.place == str(folder / "urza.db")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (folder / "urza.db").is_file()


@pytest.mark.parametrize("option", ["--data", "--database", "--blobs", "--host"])
@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_place_is_none(tmp_path, capsys, monkeypatch, option, value):
    monkeypatch.chdir(tmp_path)
    where = [] if option == "--data" else ["--data", str(tmp_path / "data")]
    assert main(["urza", "serve", "--port", "0", *where, option, value]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and f"{option.removeprefix('--')} is empty" in err
    assert list(tmp_path.iterdir()) == []


def test_a_database_from_the_environment_may_end_in_a_line(tmp_path, capsys, monkeypatch):
    named = tmp_path / "ws.db"
    monkeypatch.setenv("ESPER_URZA_DATABASE", f"sqlite:///{named}\n")
    assert main(["urza", "migrate", "--data", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"sqlite:///{named} is up to date\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ws.db"]
    for text in (f"sqlite:///{tmp_path}/a\nb.db", f"sqlite:///{tmp_path}/a\x1b[2Jb.db"):
        monkeypatch.setenv("ESPER_URZA_DATABASE", text)
        assert main(["urza", "migrate", "--data", str(tmp_path)]) == 1
        assert "database has a line's end or another character in it" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ws.db"]
