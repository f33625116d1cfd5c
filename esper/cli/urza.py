"""``esper urza``: run the registry service, and administer its tokens."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from esper.cli.numbers import check_number

if TYPE_CHECKING:
    from esper.services.urza.database import Database
    from esper.services.urza.settings import Settings

    Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

__all__ = ["add_parser", "run"]

_DATABASE_VARIABLE = "ESPER_URZA_DATABASE"


def add_parser(subparsers: Subparsers) -> None:
    """Declare the command's arguments."""
    parser = subparsers.add_parser("urza", help="run and administer the registry service")
    commands = parser.add_subparsers(dest="urza_command", required=True, metavar="COMMAND")
    _add_serve(commands)
    token = commands.add_parser("token", help="make, list and revoke tokens of a database that is there")
    actions = token.add_subparsers(dest="token_command", required=True, metavar="COMMAND")
    add = actions.add_parser("add", help="make a token and print it, this once")
    add.add_argument("name", metavar="NAME", help="who it is for; stands in histories")
    add.add_argument(
        "--role",
        action="append",
        required=True,
        choices=("read", "publish", "validate"),
        help="what it may do (give it several times); publish and validate may read too",
    )
    listing = actions.add_parser("list", help="list tokens, without the tokens themselves")
    revoke = actions.add_parser("revoke", help="end a token")
    revoke.add_argument("name", metavar="NAME")
    migrate = commands.add_parser("migrate", help="make the database, or bring it up to date (serve does so by itself)")
    for command in (add, listing, revoke, migrate):
        _add_where(command)


def run(args: argparse.Namespace) -> int:
    """Run the chosen command."""
    try:
        import fastapi  # noqa: F401
        import sqlalchemy  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"{error.name} is not installed, which the registry needs; in Esper's folder: pip install '.[urza]'"
        ) from error
    if args.urza_command == "serve":
        return _serve(args)
    return _administer(args)


def _add_serve(commands: Subparsers) -> None:
    from esper.services.urza.settings import DEFAULT_MAX_MB, DEFAULT_PORT

    serve = commands.add_parser("serve", help="run the registry; needs nothing but itself")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    serve.add_argument("--port", type=int, default=DEFAULT_PORT, help="port (default %(default)s); 0 takes a free one")
    _add_where(serve)
    serve.add_argument("--blobs", metavar="DIR|S3URL", help="folder, or s3://bucket/prefix (default DATA/blobs)")
    serve.add_argument("--s3-endpoint", metavar="URL", help="an S3 service other than Amazon's")
    serve.add_argument(
        "--presign",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="send clients to presigned S3 addresses, or pass the bytes on (default: presign)",
    )
    serve.add_argument(
        "--presign-s", type=int, default=3600, help="seconds such an address lasts (default %(default)s)"
    )
    serve.add_argument(
        "--max-mb", type=float, default=DEFAULT_MAX_MB, help="largest artifact in MiB (default %(default)s)"
    )
    serve.add_argument(
        "--write-rate", type=float, default=20.0, help="writes a second for each token, 0: any (default %(default)s)"
    )
    serve.add_argument("--write-burst", type=int, default=200, help="writes at once (default %(default)s)")
    serve.add_argument("--open-read", action="store_true", help="reading needs no token")
    serve.add_argument("--open-metrics", action="store_true", help="/metrics needs no token")
    serve.add_argument("--access-log", action="store_true", help="log every request to standard error")


def _add_where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="DIR", help="folder for everything not placed otherwise")
    parser.add_argument(
        "--database",
        metavar="URL",
        help=f"sqlite:///PATH or postgresql://... (default ${_DATABASE_VARIABLE}, else DATA/urza.db)",
    )


def _settings(args: argparse.Namespace, **options: object) -> Settings:
    from esper.services.urza.settings import settings_for

    database = args.database
    if database is None:
        # What a file or `$(...)` put into it may end in a line's end; empty, it is as if it were not set.
        database = os.environ.get(_DATABASE_VARIABLE, "").strip() or None
    # Before a path is made of it: an empty one is the working directory.
    if args.data is not None and not args.data.strip():
        raise ValueError("--data is empty; leave it out to have the default")
    return settings_for(None if args.data is None else Path(args.data), database=database, **options)  # type: ignore[arg-type]


def _serve(args: argparse.Namespace) -> int:
    from esper.services.urza.serve import serve
    from esper.services.urza.settings import MAX_PRESIGN_S, MAX_WRITES

    if not args.host.strip():
        raise ValueError("--host is empty; give an address to listen on, 0.0.0.0 for all of IPv4")
    check_number("--port", args.port, 0, 65_535)
    check_number("--presign-s", args.presign_s, 1, MAX_PRESIGN_S)
    check_number("--max-mb", args.max_mb, 0.001, 1 << 20)
    check_number("--write-rate", args.write_rate, 0, MAX_WRITES)
    check_number("--write-burst", args.write_burst, 1, MAX_WRITES)
    settings = _settings(
        args,
        blobs=args.blobs,
        s3_endpoint=args.s3_endpoint,
        presign=args.presign,
        presign_s=args.presign_s,
        max_bytes=int(args.max_mb * (1 << 20)),
        write_rate=args.write_rate,
        write_burst=args.write_burst,
        open_read=args.open_read,
        open_metrics=args.open_metrics,
    )
    return serve(settings, args.host, args.port, access_log=args.access_log)


def _administer(args: argparse.Namespace) -> int:
    from esper.services.urza.database import Database

    database = Database(_settings(args).database)
    try:
        # Of a token that could not be stored not even the hash is shown.
        with database.failing():
            _act(args, database)
    finally:
        database.close()
    return 0


def _act(args: argparse.Namespace, database: Database) -> None:
    from esper.services.urza.database import DatabaseError
    from esper.services.urza.roles import Tokens

    if args.urza_command == "token" and not database.is_made():
        raise DatabaseError(
            f"there is no Urza at {database.place}: give the --data or --database of the one that is meant; a new "
            "one is made by the first `esper urza serve`, or by `esper urza migrate` where tokens must come first"
        )
    database.migrate()
    tokens = Tokens(database)
    if args.urza_command == "migrate":
        print(f"{database.shown} is up to date")
    elif args.token_command == "add":
        print(tokens.add(args.name, args.role))
    elif args.token_command == "revoke":
        tokens.revoke(args.name)
        print(f"{args.name} is revoked")
    else:
        for row in tokens.rows():
            made = time.strftime("%Y-%m-%d", time.gmtime(row.created_at))
            print(f"{row.name:<24} {','.join(row.roles):<24} {made}{'  revoked' if row.revoked_at else ''}")
