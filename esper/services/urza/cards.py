"""Answers to ``GET /api/v1/kernels/{id}``, kept ready as bytes: most requests to a registry are for the same few."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Final

__all__ = ["Card", "Cards", "make_card"]

_MAX_CARDS: Final = 8192
_MAX_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Card:
    """One answer.

    Attributes:
        body: The JSON.
        etag: Of the body, with its quotes.
        expires: Monotonic time after which a presigned address in it is too old to be handed out.
        head: The headers as ASGI wants them.
        head_unchanged: The same where the client has the body already.
    """

    body: bytes
    etag: str
    expires: float
    head: list[tuple[bytes, bytes]] = field(init=False)
    head_unchanged: list[tuple[bytes, bytes]] = field(init=False)

    def __post_init__(self) -> None:
        common = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in self.headers().items()]
        length = (b"content-length", b"%d" % len(self.body))
        object.__setattr__(self, "head", [*common, length, (b"content-type", b"application/json")])
        object.__setattr__(self, "head_unchanged", common)

    def headers(self) -> dict[str, str]:
        """Headers beside type and length."""
        # Private: what a token may read is not for a shared proxy. Kept copies are asked about before they are used.
        return {"etag": self.etag, "cache-control": "private, no-cache"}


def make_card(facts: dict[str, Any], binary_ref: str, lifetime_s: float | None) -> Card:
    """A card from what :func:`kernel_store.card` found; the manifest, JSON already, is put in as it is."""
    manifest = facts.pop("manifest")
    text = json.dumps({**facts, "kernel_binary_ref": binary_ref}, separators=(",", ":"))
    body = f'{text[:-1]},"manifest":{manifest}}}'.encode("ascii")
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    return Card(body, etag, float("inf") if lifetime_s is None else time.monotonic() + lifetime_s)


class Cards:
    """Cards by artifact id, bounded in number and bytes; safe from several threads.

    Whoever makes a card takes :attr:`generation` before reading the database and gives it to :meth:`put`: a card made
    from what was read before a change is not kept.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cards: dict[str, Card] = {}
        self._bytes = 0
        self.generation = 0

    def get(self, artifact_id: str) -> Card | None:
        """The card, if it is here and may still be handed out."""
        card = self._cards.get(artifact_id)
        return card if card is not None and time.monotonic() < card.expires else None

    def put(self, artifact_id: str, card: Card, generation: int) -> None:
        """Keep a card, unless something changed since ``generation``."""
        with self._lock:
            if generation != self.generation:
                return
            self._remove(artifact_id)
            self._cards[artifact_id] = card
            self._bytes += len(card.body)
            while len(self._cards) > _MAX_CARDS or self._bytes > _MAX_BYTES:
                self._remove(next(iter(self._cards)))

    def drop(self, artifact_id: str) -> None:
        """Forget the card of a kernel that changed."""
        with self._lock:
            self.generation += 1
            self._remove(artifact_id)

    def clear(self) -> None:
        """Forget all cards: some kernel changed."""
        with self._lock:
            self.generation += 1
            self._cards.clear()
            self._bytes = 0

    def _remove(self, artifact_id: str) -> None:
        card = self._cards.pop(artifact_id, None)
        if card is not None:
            self._bytes -= len(card.body)
