"""How long to wait before asking again."""

from __future__ import annotations

import email.utils
import random
import time
from typing import Final

__all__ = ["Backoff", "parse_retry_after"]

_LONGEST_S: Final = 5.0


class Backoff:
    """Random pauses below a bound that doubles, so that many who were refused together do not come back together.

    Args:
        first_s: The bound of the first pause; no pause is longer than five seconds unless the server asks for it.
        patience_s: Longest pause that a server may ask for.
    """

    def __init__(self, first_s: float, patience_s: float) -> None:
        self._first_s = first_s
        self._patience_s = patience_s
        # Not the module's generator: pauses must not move the random numbers that a training run draws.
        self._random = random.Random()

    def pause_s(self, attempt: int, retry_after_s: float | None = None) -> float | None:
        """Seconds to wait after failure number ``attempt`` (from 0); None if the server asks for too long.

        To ask before the time that the server named would only make it worse, so the pause is at least that long.
        """
        pause = self._random.uniform(0, min(_LONGEST_S, self._first_s * 2.0 ** min(attempt, 30)))
        if retry_after_s is None:
            return pause
        return None if retry_after_s > self._patience_s else retry_after_s + pause


def parse_retry_after(text: str | None) -> float | None:
    """Seconds that a ``Retry-After`` header asks for, in either of its forms (RFC 9110, 10.2.3); None if it is none."""
    if text is None:
        return None
    if text.strip().isdecimal():
        return float(text[:12])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
