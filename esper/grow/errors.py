"""The one error of the main job."""

from __future__ import annotations

__all__ = ["GrowError"]


class GrowError(Exception):
    """Something the user gave cannot be used; the message is one line that says what and what to do about it."""
