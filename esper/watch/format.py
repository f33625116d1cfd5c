"""Numbers, times and names in few characters."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Final

from rich.cells import cell_len, set_cell_size

__all__ = ["bars", "clock", "compact", "duration", "fit", "fit_end", "number", "rate", "seconds"]

_BARS: Final = " ▁▂▃▄▅▆▇█"
_UNITS: Final = ("", "k", "M", "G", "T")


def compact(value: int) -> str:
    """A count in at most four characters: ``999``, ``9.9k``, ``120k``, ``3.4M``."""
    size = float(abs(value))
    if size < 1000:
        return str(value)
    unit = 0
    # What rounds to 1000 belongs to the next unit.
    while size >= 999.5 and unit < len(_UNITS) - 1:
        size /= 1000
        unit += 1
    digits = f"{size:.1f}" if size < 9.95 else f"{size:.0f}"
    return f"{'-' if value < 0 else ''}{digits}{_UNITS[unit]}"


def number(value: float, digits: int = 2) -> str:
    """A number near 1 with ``digits`` decimals, others in exponent form; ``-`` where unknown."""
    if not math.isfinite(value):
        return "-"
    if value == 0 or 10.0**-digits <= abs(value) < 1000:
        return f"{value:.{digits}f}"
    return f"{value:.1e}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")


def rate(value: float | None) -> str:
    """Events a second: ``0``, ``0.3``, ``98.2``, ``12k``; ``-`` where unknown."""
    if value is None:
        return "-"
    if value >= 999.5:
        return compact(round(value))
    return f"{value:.0f}" if value == 0 or value >= 100 else f"{value:.1f}"


def seconds(value: float) -> str:
    """A short time: ``40 us``, ``4 ms``, ``1.2 s``, then as :func:`duration`."""
    size = abs(value)
    if size < 0.001:
        return f"{value * 1e6:.0f} us"
    if size < 1:
        return f"{value * 1e3:.0f} ms"
    if size < 100:
        return f"{value:.1f} s"
    return ("-" if value < 0 else "") + duration(size)


def duration(value: float) -> str:
    """``0:07``, ``12:34``, ``1:02:03``, ``3d 4h``."""
    whole = max(0, int(value))
    if whole >= 86_400:
        return f"{whole // 86_400}d {whole % 86_400 // 3600}h"
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def clock(at: float) -> str:
    """Local time of day; dashes for what no calendar has."""
    try:
        return time.strftime("%H:%M:%S", time.localtime(at))
    except (ValueError, OverflowError, OSError):
        return "--:--:--"


def bars(counts: Sequence[int]) -> str:
    """A bar for each count, the highest at full height; what is not zero can be seen."""
    most = max(counts, default=0)
    if most <= 0:
        return " " * len(counts)
    top = len(_BARS) - 1
    return "".join(_BARS[max(1, round(top * count / most)) if count else 0] for count in counts)


def fit(text: str, width: int) -> str:
    """``text`` in exactly ``width`` cells; of a long name the end is kept, where names differ."""
    size = cell_len(text)
    if size <= width:
        return text + " " * (width - size)
    if width <= 0:
        return ""
    kept = text[max(0, len(text) - width + 1) :]
    while cell_len(kept) > width - 1:
        kept = kept[1:]
    return set_cell_size("…" + kept, width)


def fit_end(text: str, width: int) -> str:
    """``text`` in at most ``width`` cells; of a long text the beginning is kept."""
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, max(0, width - 1)).rstrip() + "…" if width > 0 else ""
