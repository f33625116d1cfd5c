"""The live view: draws what a watcher has heard, and acts on keys, until the viewer has seen enough."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Final

from esper.watch.screen import Screen
from esper.watch.state import JobState
from esper.watch.ui import Action, Ui
from esper.watch.view import Heading, draw
from esper.watch.watcher import Watcher

__all__ = ["heading_of", "view", "watch_quietly"]

#: Between two pictures; keys are answered at once.
FRAME_S: Final = 0.125
#: A picture that did not change is drawn anew this often, for its clock and its rates.
IDLE_S: Final = 0.5


def heading_of(watcher: Watcher, *, paused: bool = False) -> Heading:
    """What the first line of the picture says at present."""
    mode = "paused" if paused else watcher.mode
    return Heading(watcher.source.name, mode, watcher.now(), watcher.alarm, watcher.source.live)


def view(watcher: Watcher, screen: Screen, ui: Ui | None = None) -> None:
    """Show the picture on ``screen`` until ``q``, or until the terminal is gone.

    Raises:
        Exception: what ended the source.
    """
    ui = Ui() if ui is None else ui
    frozen: tuple[JobState, Heading] | None = None
    drawn_at, heard, size = 0.0, -1, (0, 0)
    while not screen.ended:
        if watcher.error is not None:
            raise watcher.error
        now = time.monotonic()
        due = watcher.heard != heard or now - drawn_at >= IDLE_S or screen.size() != size
        if due and now - drawn_at >= FRAME_S:
            size, heard, drawn_at = screen.size(), watcher.heard, now
            _draw(watcher, screen, ui, frozen)
        keys = screen.keys(FRAME_S)
        for key in keys:
            with watcher.looking() as state:
                action = ui.press(key, state if frozen is None else frozen[0])
                if action is Action.QUIT:
                    return
                if action is Action.PAUSE:
                    frozen = _pause(watcher, ui.paused, state)
            _speed(watcher, action)
        if keys:
            _draw(watcher, screen, ui, frozen)
            drawn_at = time.monotonic()


def watch_quietly(watcher: Watcher, until: Callable[[], bool]) -> None:
    """Wait until ``until`` says so.

    Raises:
        Exception: what ended the source.
    """
    while not until() and watcher.error is None:
        time.sleep(FRAME_S)
    if watcher.error is not None:
        raise watcher.error


def _draw(watcher: Watcher, screen: Screen, ui: Ui, frozen: tuple[JobState, Heading] | None) -> None:
    width, height = screen.size()
    if frozen is not None:
        state, heading = frozen
        lines = draw(state, ui, heading, width, height)
    else:
        with watcher.looking() as current:
            lines = draw(current, ui, heading_of(watcher), width, height)
    # Written to the terminal without the lock: a terminal may be slow.
    screen.show(lines)


def _pause(watcher: Watcher, paused: bool, state: JobState) -> tuple[JobState, Heading] | None:
    """Stop a replay, or keep a copy of what a bus has told so far: it goes on being heard."""
    if watcher.source.replay is not None:
        watcher.source.replay.pause(paused)
    return (copy.deepcopy(state), heading_of(watcher, paused=True)) if paused else None


def _speed(watcher: Watcher, action: Action | None) -> None:
    replay = watcher.source.replay
    if replay is not None and action in (Action.FASTER, Action.SLOWER):
        replay.change(2.0 if action is Action.FASTER else 0.5)
