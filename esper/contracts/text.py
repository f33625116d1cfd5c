"""Text from elsewhere, as it may be shown."""

from __future__ import annotations

__all__ = ["shown"]


def shown(text: str, mark: str = "?") -> str:
    """``text`` as it may go to a terminal, whoever wrote it: lines, and ``mark`` for other control characters."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else mark for letter in text)
