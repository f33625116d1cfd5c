"""Roles, and the tokens that have them. Only a token's hash is ever stored."""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal, get_args

import sqlalchemy as sa

from esper.contracts.errors import EsperError
from esper.services.urza.database import Database
from esper.services.urza.tables import tokens

__all__ = ["ANONYMOUS", "ROLES", "Caller", "Role", "TokenError", "TokenRow", "Tokens", "digest"]

Role = Literal["read", "publish", "validate"]
ROLES: Final[tuple[Role, ...]] = get_args(Role)
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class TokenError(EsperError, ValueError):
    """A token cannot be made or revoked as asked."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a request.

    Attributes:
        name: The token's name, which stands in histories.
        roles: What it may do. Whoever may publish or validate may read.
    """

    name: str
    roles: frozenset[str]


#: Who reads without a token, where the operator allows it.
ANONYMOUS: Final = Caller("anonymous", frozenset({"read"}))


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A token as it may be shown: without the token."""

    name: str
    roles: tuple[str, ...]
    created_at: float
    revoked_at: float | None


class Tokens:
    """The tokens in the database; blocking."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, name: str, roles: Iterable[str]) -> str:
        """Make a token and return it; it cannot be had again.

        Raises:
            TokenError: if the name is taken or is none, or a role is unknown.
        """
        with self._database.write("tokens") as connection:
            return self._insert(connection, name, roles)

    def ensure_admin(self) -> str | None:
        """On the very first start, when no token was ever made: one with all roles, called ``admin``."""
        with self._database.write("tokens") as connection:
            self._database.lock(connection)
            if connection.execute(sa.select(tokens.c.id).limit(1)).first() is not None:
                return None
            return self._insert(connection, "admin", ROLES)

    def revoke(self, name: str) -> None:
        """End a token; servers take note within a fraction of a second.

        Raises:
            TokenError: if there is none of this name that is not revoked.
        """
        with self._database.write("tokens") as connection:
            done = connection.execute(
                sa.update(tokens)
                .where(tokens.c.name == name, tokens.c.revoked_at.is_(None))
                .values(revoked_at=time.time())
            )
            if done.rowcount == 0:
                raise TokenError(f"there is no valid token called {name!r:.80}; `esper urza token list` shows all")

    def rows(self) -> list[TokenRow]:
        """All tokens ever made, by name."""
        with self._database.read() as connection:
            found = connection.execute(sa.select(tokens).order_by(tokens.c.name)).all()
        return [TokenRow(row.name, tuple(row.roles.split(",")), row.created_at, row.revoked_at) for row in found]

    def callers(self) -> dict[str, Caller]:
        """SHA-256 of a token -> who has it, without those revoked."""
        query = sa.select(tokens.c.sha256, tokens.c.name, tokens.c.roles).where(tokens.c.revoked_at.is_(None))
        with self._database.read() as connection:
            return {row.sha256: Caller(row.name, _implied(row.roles.split(","))) for row in connection.execute(query)}

    @staticmethod
    def _insert(connection: sa.Connection, name: str, roles: Iterable[str]) -> str:
        if not _NAME.fullmatch(name):
            raise TokenError(f"a token's name must be 1 to 64 letters, digits, '.', '_' or '-', not {name!r:.80}")
        chosen = [role for role in ROLES if role in set(roles)]
        unknown = sorted(set(roles) - set(ROLES))
        if unknown or not chosen:
            raise TokenError(f"roles must be of {', '.join(ROLES)}, not {unknown[0] if unknown else 'none'!r}")
        token = f"urza_{secrets.token_urlsafe(32)}"
        try:
            connection.execute(
                sa.insert(tokens).values(
                    name=name, sha256=digest(token), roles=",".join(chosen), created_at=time.time()
                )
            )
        except sa.exc.IntegrityError:
            raise TokenError(f"there is, or was, a token called {name!r} already; choose another name") from None
        return token


def digest(token: str) -> str:
    """What is stored in a token's place. Tokens are 256 random bits, so a plain hash cannot be guessed back."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def _implied(roles: Iterable[str]) -> frozenset[str]:
    return frozenset(roles) | {"read"}
