"""Keys from a terminal: bytes in, names out.

Names: a printable character is itself; else ``up down left right home end pageup pagedown enter escape tab backspace``.
What is none of these is swallowed whole, so that no part of it acts as a key.
"""

from __future__ import annotations

import codecs
import os
import select
import time
from typing import Final

__all__ = ["KeyDecoder", "KeyReader"]

#: What follows ESC [ or ESC O.
_SEQUENCES: Final = {
    "A": "up",
    "B": "down",
    "C": "right",
    "D": "left",
    "H": "home",
    "F": "end",
    "1~": "home",
    "7~": "home",
    "4~": "end",
    "8~": "end",
    "5~": "pageup",
    "6~": "pagedown",
    "M": "enter",
}
_CONTROLS: Final = {"\r": "enter", "\n": "enter", "\t": "tab", "\x7f": "backspace", "\x08": "backspace"}
_LONGEST_SEQUENCE: Final = 32
#: A terminal sends a sequence at once; an escape that stays alone this long was the key.
ESCAPE_S: Final = 0.05


class KeyDecoder:
    """Turns bytes into names of keys; what is incomplete waits for the rest."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    @property
    def waiting(self) -> bool:
        """Whether an escape came that may be the key or the beginning of a sequence."""
        return bool(self._held)

    def feed(self, data: bytes) -> list[str]:
        """Names of the keys that are complete now."""
        text = self._held + self._decode.decode(data)
        self._held = ""
        keys = []
        while text:
            size, key = _first(text)
            if not size:
                self._held = text
                break
            if key:
                keys.append(key)
            text = text[size:]
        return keys

    def flush(self) -> list[str]:
        """Nothing more is coming: a held escape was the key, a cut sequence nothing."""
        alone = self._held == "\x1b"
        self._held = ""
        return ["escape"] if alone else []


def _first(text: str) -> tuple[int, str]:
    """Length and name of the first key in ``text``; 0 if it is incomplete, no name if it is none."""
    first = text[0]
    if first != "\x1b":
        return 1, _CONTROLS.get(first) or (first if first.isprintable() else "")
    if len(text) == 1:
        return 0, ""
    if text[1] not in "[O":
        # Two keys, or Alt with a key: the escape counts.
        return 1, "escape"
    for place in range(2, min(len(text), _LONGEST_SEQUENCE)):
        # Parameters and intermediates come before the final character (ECMA-48, 5.4).
        if "@" <= text[place] <= "~":
            return place + 1, _SEQUENCES.get(text[2 : place + 1], "")
        if not " " <= text[place] <= "?":
            return place, ""
    return (0, "") if len(text) < _LONGEST_SEQUENCE else (_LONGEST_SEQUENCE, "")


class KeyReader:
    """Keys from a file descriptor that is in cbreak mode."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._decoder = KeyDecoder()
        self.ended = False

    def read(self, timeout_s: float) -> list[str]:
        """Keys pressed within ``timeout_s`` seconds; returns with the first. A closed terminal sets ``ended``."""
        deadline = time.monotonic() + timeout_s
        while not self.ended:
            left = deadline - time.monotonic()
            wait = ESCAPE_S if self._decoder.waiting else max(0.0, left)
            if not select.select([self._fd], [], [], wait)[0]:
                if self._decoder.waiting:
                    if keys := self._decoder.flush():
                        return keys
                    continue
                return []
            try:
                data = os.read(self._fd, 1024)
            except InterruptedError:
                continue
            except OSError:
                data = b""
            if not data:
                self.ended = True
                break
            if keys := self._decoder.feed(data):
                return keys
        return []
