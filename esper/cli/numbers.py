"""Checks of numbers that were given as options: what is no number, or out of range, ends in one line that names it.

Python reads ``nan`` and ``inf`` as numbers, and most comparisons let NaN through.
"""

from __future__ import annotations

__all__ = ["check_number"]


def check_number(option: str, value: float | None, low: float, high: float, *, above: bool = False) -> None:
    """Accept what lies between two bounds, and what was not given.

    Args:
        option: As it is written, such as ``--port``.
        value: What was given, or None.
        low: The least that is allowed.
        high: The most, which is finite.
        above: Whether ``low`` itself is too little.

    Raises:
        ValueError: it is not allowed; the message names option, value and what is.
    """
    # NaN is on neither side of anything, so the question is whether it is inside.
    if value is None or (low <= value <= high and not (above and value == low)):
        return
    kind = "whole number" if isinstance(value, int) else "number"
    allowed = f"above {low} and at most {high}" if above else f"from {low} to {high}"
    raise ValueError(f"{option} {value}: need a {kind} {allowed}")
