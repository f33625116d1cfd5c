"""``esper urza token``: of a database that is there, and of no other."""

from __future__ import annotations

import urllib.request

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("sqlalchemy")
pytest.importorskip("alembic")

from esper.cli.main import main
from esper.services.urza.database import Database, DatabaseError
from tests.services.urza.server import running_urza


@pytest.mark.parametrize("action", [["list"], ["add", "trainer", "--role", "read"], ["revoke", "trainer"]])
def test_a_place_where_there_is_none(tmp_path, capsys, monkeypatch, action):
    monkeypatch.delenv("ESPER_URZA_DATABASE", raising=False)
    typo = tmp_path / "typo"
    empty = tmp_path / "empty.db"
    empty.touch()
    for where, place in [
        (["--data", str(typo)], typo / "urza.db"),
        (["--database", f"sqlite:///{typo / 'x.db'}"], typo / "x.db"),
        # A file, but no Urza was ever started over it.
        (["--database", f"sqlite:///{empty}"], empty),
    ]:
        assert main(["urza", "token", *action, *where]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        assert f"there is no Urza at {place}: give the --data or --database of the one that is meant" in err
        assert "esper urza serve" in err and "esper urza migrate" in err
    assert not typo.exists()
    assert empty.read_bytes() == b""


def test_whether_a_database_is_made(database, tmp_path):
    opened = Database(database)
    assert not opened.is_made()
    opened.migrate()
    assert opened.is_made()
    opened.close()
    (tmp_path / "file").write_text("this is no database, but long enough to be looked at" * 50)
    for url in (f"sqlite:///{tmp_path / 'file'}", "postgresql://user:secret@127.0.0.1:1/name"):
        with pytest.raises(DatabaseError, match="cannot be used") as refused:
            Database(url).is_made()
        assert "secret" not in str(refused.value)


def test_tokens_may_come_before_the_first_start(tmp_path, capsys):
    """`migrate` makes the database; the first start then finds a token, and makes none of its own."""
    where = ["--data", str(tmp_path / "urza")]
    assert main(["urza", "migrate", *where]) == 0
    assert main(["urza", "token", "add", "me", "--role", "publish", *where]) == 0
    token = capsys.readouterr().out.splitlines()[-1]
    with running_urza(tmp_path) as urza:
        assert "token 'admin'" not in urza.log
        request = urllib.request.Request(f"{urza.url}/api/v1/kernels", headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.status == 200
        # And the other way round: a server that runs has made its database.
        assert main(["urza", "token", "add", "another", "--role", "read", *where]) == 0
    assert capsys.readouterr().out.startswith("urza_")
