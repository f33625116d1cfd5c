from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys

import pytest

pytest.importorskip("psycopg")
pytest.importorskip("sqlalchemy")
pytest.importorskip("alembic")

import psycopg
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from esper.cli.main import main
from esper.services.urza.cards import Card, Cards
from esper.services.urza.database import Database, DatabaseError
from esper.services.urza.settings import settings_for
from esper.services.urza.tables import changes, metadata, tokens

START = """
import sys
from esper.services.urza.database import Database
from esper.services.urza.roles import Tokens
sys.stdin.readline()
database = Database(sys.argv[1])
database.migrate()
print(Tokens(database).ensure_admin() is not None)
"""


def test_the_migrations_make_what_the_models_say(database):
    opened = Database(database)
    opened.migrate()
    with opened.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
        assert context.get_current_revision() == "0001"
        assert set(connection.execute(sa.select(changes.c.topic)).scalars()) == {"kernels", "tokens"}
    opened.close()


def test_migrating_again_changes_nothing(database):
    for _ in range(2):
        opened = Database(database)
        opened.migrate()
        with opened.write("tokens") as connection:
            connection.execute(sa.insert(tokens).values(name=str(_), sha256=str(_) * 64, roles="read", created_at=0.0))
        opened.close()
    with opened.read() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(tokens)).scalar() == 2
    opened.close()


def test_processes_that_start_at_once_do_not_collide(database):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", START, database],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    ends = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], ends
    # One of them, and only one, makes the first token.
    assert sorted(out for out, _ in ends) == ["False\n", "False\n", "True\n"]


def test_a_failed_migration_leaves_the_database_as_it_was(database, monkeypatch):
    opened = Database(database)

    def broken(*_, **__):
        raise RuntimeError("power cut")

    monkeypatch.setattr("alembic.operations.Operations.create_index", broken)
    with pytest.raises(RuntimeError):
        opened.migrate()
    monkeypatch.undo()
    with opened.read() as connection:
        assert sa.inspect(connection).get_table_names() == []
    opened.migrate()
    opened.close()


def test_a_newer_database_is_refused(database):
    opened = Database(database)
    opened.migrate()
    with opened.write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(DatabaseError, match="newer version"):
        opened.migrate()
    opened.close()


def test_bad_addresses(tmp_path):
    for url, message in [
        ("nonsense", "not one"),
        ("mysql://user:secret@host/name", "only sqlite and postgresql"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
    ]:
        with pytest.raises(DatabaseError, match=message) as caught:
            Database(url)
        assert "secret" not in str(caught.value)
    (tmp_path / "file").write_text("this is no database, but long enough to be looked at" * 50)
    with pytest.raises(DatabaseError):
        Database(f"sqlite:///{tmp_path / 'file'}").migrate()
    unreachable = Database("postgresql://user:secret@127.0.0.1:1/name")
    with pytest.raises(DatabaseError, match="cannot be used") as refused:
        unreachable.migrate()
    assert "secret" not in str(refused.value)


def test_no_password_is_shown(tmp_path):
    for url, shown in [
        ("postgresql://u:SECRET@h:1/d", "postgresql://u:***@h:1/d"),
        ("postgresql://u@h/d?password=SECRET&sslpassword=SECRET", "postgresql://u@h/d"),
        ("postgresql://u@/d?host=%2Frun%2Fpg&password=SECRET", "postgresql://u@/d?host=%2Frun%2Fpg"),
    ]:
        opened = Database(url)
        assert (opened.shown, "SECRET" in opened.place) == (shown, False)
    with pytest.raises(DatabaseError, match="'@' in its host; one that belongs to the password is written %40") as bad:
        Database("postgresql://u:SEC@RET@host/d")
    assert "SEC" not in str(bad.value) and "RET" not in str(bad.value)
    refused = Database("postgresql://u@127.0.0.1:1/d?password=SECRET")
    with pytest.raises(DatabaseError, match="cannot be used") as caught:
        refused.migrate()
    assert "SECRET" not in str(caught.value)
    assert "SECRET" not in repr(settings_for(tmp_path, database="postgresql://u:SECRET@h/d"))


def test_what_cannot_be_used_is_one_line(tmp_path, capsys):
    emptied = tmp_path / "emptied.db"
    with sqlite3.connect(emptied) as raw:
        raw.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
        raw.execute("INSERT INTO alembic_version VALUES ('0001')")
    raw.close()
    (tmp_path / "psycopg.py").write_text("raise ModuleNotFoundError('no', name='psycopg')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from esper.cli.main import main; sys.exit(main())"
    for url, message in [
        ("sqlite+foo:////tmp/x.db", "sqlite+foo:////tmp/x.db: Can't load plugin: sqlalchemy.dialects:sqlite.foo"),
        (
            "postgresql://u:SECRET@127.0.0.1:port/db",
            "the database's URL is not one; expected sqlite:///PATH or postgresql",
        ),
        (f"sqlite:///{emptied}", "says that it is up to date, but has no blueprints, changes, history, jobs, kernel_"),
    ]:
        for command in (["serve", "--port", "0"], ["migrate"]):
            assert main(["urza", *command, "--data", str(tmp_path), "--database", url]) == 1
            out, err = capsys.readouterr()
            assert out == "" and err.count("\n") == 1 and message in err and "SECRET" not in err, err
    run = [sys.executable, "-c", code, "urza", "migrate", "--database", "postgresql://u:SECRET@127.0.0.1:1/db"]
    ended = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == (
        "esper urza: postgresql://u:***@127.0.0.1:1/db: psycopg is not installed, which PostgreSQL needs; "
        "in Esper's folder: pip install '.[postgres]'\n"
    )


def test_a_database_that_may_only_be_read_is_one_line(tmp_path):
    """And shows nothing of the token that could not be kept."""
    where = ["--data", str(tmp_path)]
    assert main(["urza", "migrate", *where]) == 0
    (tmp_path / "urza.db").chmod(0o444)
    run = [sys.executable, "-m", "esper.cli.main", "urza"]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may write everywhere, and there is no setpriv to give that up")
        powers = "-dac_override,-dac_read_search"
        run = ["setpriv", f"--bounding-set={powers}", f"--inh-caps={powers}", *run]
    for command in (["token", "add", "x", "--role", "read"], ["serve", "--port", "0"]):
        ended = subprocess.run([*run, *command, *where], capture_output=True, text=True, timeout=60)
        assert (ended.returncode, ended.stdout) == (1, "")
        expected = f"esper urza: sqlite:///{tmp_path}/urza.db: cannot be used: attempt to write a readonly database\n"
        assert ended.stderr == expected


def test_a_block_that_raises_writes_nothing(database):
    opened = Database(database)
    opened.migrate()
    with pytest.raises(ZeroDivisionError), opened.write("kernels") as connection:
        connection.execute(sa.update(changes).values(number=100))
        raise ZeroDivisionError
    with opened.read() as connection:
        assert set(connection.execute(sa.select(changes.c.number)).scalars()) == {0}
    opened.close()


def test_own_changes_are_told_from_those_of_others(database):
    mine, other = Database(database), Database(database)
    mine.migrate()

    def change(who):
        with who.write("kernels"):
            pass

    assert mine.others_changed("kernels", -1, 0)
    assert not mine.others_changed("kernels", 0, 0)
    change(mine)
    change(mine)
    assert not mine.others_changed("kernels", 0, 2)
    change(other)
    change(mine)
    assert mine.others_changed("kernels", 2, 4)
    assert not mine.others_changed("kernels", 4, 4)
    # Restored from a backup.
    assert mine.others_changed("kernels", 4, 1)
    mine.close()
    other.close()


def test_a_reader_sees_one_moment_while_another_writes(tmp_path):
    opened = Database(f"sqlite:///{tmp_path / 'test.db'}")
    opened.migrate()
    query = sa.select(changes.c.number).where(changes.c.topic == "kernels")
    with opened.read() as reading:
        assert reading.execute(query).scalar() == 0
        with opened.write("kernels"):
            pass
        assert reading.execute(query).scalar() == 0
    with opened.read() as reading:
        assert reading.execute(query).scalar() == 1
    opened.close()
    with sqlite3.connect(tmp_path / "test.db") as raw:
        assert raw.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    raw.close()


def test_postgresql_by_its_short_name(postgres_server):
    opened = Database(postgres_server.replace("postgresql://", "postgresql+psycopg://"))
    with opened.read() as connection:
        assert connection.execute(sa.text("SELECT 1")).scalar() == 1
    opened.close()
    with psycopg.connect(postgres_server) as raw:
        assert raw.execute("SELECT 1").fetchone() == (1,)


def test_the_command_line_makes_lists_and_revokes_tokens(tmp_path, capsys):
    where = ["--data", str(tmp_path)]
    assert main(["urza", "migrate", *where]) == 0
    assert main(["urza", "token", "add", "trainer", "--role", "read", "--role", "publish", *where]) == 0
    token = capsys.readouterr().out.splitlines()[-1]
    assert token.startswith("urza_") and len(token) > 40
    assert main(["urza", "token", "list", *where]) == 0
    listed = capsys.readouterr().out
    assert "trainer" in listed and "read,publish" in listed and token not in listed
    assert main(["urza", "token", "add", "trainer", "--role", "read", *where]) == 1
    assert "already" in capsys.readouterr().err
    assert main(["urza", "token", "revoke", "trainer", *where]) == 0
    assert main(["urza", "token", "list", *where]) == 0
    assert capsys.readouterr().out.rstrip().endswith("revoked")
    assert main(["urza", "token", "revoke", "nobody", *where]) == 1


def test_the_command_line_refuses_what_makes_no_sense(tmp_path, capsys):
    for arguments, message in [
        (["--port", "70000"], "--port"),
        (["--max-mb", "0"], "--max-mb"),
        (["--blobs", "gs://bucket"], "s3://"),
        (["--blobs", "s3://user:secret@bucket/x"], "AWS_"),
        (["--database", "mysql://u:secret@h/d"], "only sqlite"),
        (["--host", "203.0.113.1", "--port", "0"], "cannot listen"),
    ]:
        assert main(["urza", "serve", "--data", str(tmp_path), "--port", "0", *arguments]) == 1
        error = capsys.readouterr().err
        assert message in error and "secret" not in error


def test_cards_are_bounded_and_not_older_than_a_change():
    cards = Cards()
    card = Card(b"{}", '"e"', float("inf"))
    before = cards.generation
    cards.put("a", card, before)
    assert cards.get("a") is card
    cards.drop("a")
    # Made from what was read before the change.
    cards.put("a", card, before)
    assert cards.get("a") is None
    cards.put("a", Card(b"{}", '"e"', 0.0), cards.generation)
    assert cards.get("a") is None, "a presigned address in it is too old"
    large = Card(json.dumps("x" * (20 << 20)).encode(), '"e"', float("inf"))
    for name in "bcde":
        cards.put(name, large, cards.generation)
    assert [cards.get(name) is large for name in "bcde"] == [False, True, True, True]
    cards.clear()
    assert cards.get("e") is None
