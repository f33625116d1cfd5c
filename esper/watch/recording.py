"""Recorded events: files of one JSON object a line, as ``esper grow`` and ``esper monitor --record`` write them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Final

from esper.contracts import strict_json
from esper.contracts.errors import EsperError
from esper.contracts.messages import MAX_MESSAGE_BYTES, OonaMessage
from esper.watch.decode import decode
from esper.watch.facts import Fact, Unreadable
from esper.watch.grow_log import GrowLog
from esper.watch.watcher import ReplayClock, Watcher

__all__ = ["FileSource", "Recorder", "RecordingError"]

_LONGEST_LINE: Final = MAX_MESSAGE_BYTES + 1
#: How often a file that is followed is looked at, and a replay that waits looks at its clock.
_LOOK_S: Final = 0.05
#: Facts that are taken in under one lock.
_BATCH: Final = 200


class RecordingError(EsperError, ValueError):
    """A file of recorded events cannot be read; the message names the file and the line."""


class FileSource:
    """Reads a recording.

    Args:
        path: The file.
        speed: Seconds of the recording in one second; None reads it as fast as it can be.
        follow: Go on waiting for lines at the end of the file.

    Raises:
        RecordingError: there is no such file, or it cannot be opened.
    """

    live = False

    def __init__(self, path: Path, *, speed: float | None = None, follow: bool = False) -> None:
        self.name = str(path)
        self.replay = ReplayClock(speed) if speed is not None else None
        self._path = path
        self._follow = follow
        self._log = GrowLog()
        try:
            # Opened here, so that a wrong name is found before a screen is.
            self._file: IO[bytes] = path.open("rb")
        except OSError as error:
            raise RecordingError(f"{path}: cannot be opened: {error.strerror or error}") from None

    def run(self, watcher: Watcher) -> None:
        """See :class:`~esper.watch.watcher.Source`."""
        with self._file:
            heard, begun = 0, False
            batch: list[Fact | Unreadable] = []
            for number, line in self._lines(watcher, batch):
                fact = self._read(number, line)
                heard += 1
                at = fact.at if isinstance(fact, Fact) else watcher.now()
                if self.replay is None:
                    batch.append(fact)
                    # Times of different processes may go back a little; the picture's own does not.
                    if len(batch) >= _BATCH or at - watcher.now() > 1:
                        self._flush(watcher, batch)
                    continue
                if not begun and isinstance(fact, Fact):
                    self.replay.begin(at)
                    begun = True
                if not self._await(watcher, at):
                    return
                watcher.hear([fact], max(at, watcher.now()))
            self._flush(watcher, batch)
        if not heard and not watcher.stopping:
            raise RecordingError(f"{self._path}: is empty: no events were recorded")
        watcher.report("ended")

    def _flush(self, watcher: Watcher, batch: list[Fact | Unreadable]) -> None:
        if batch:
            times = [fact.at for fact in batch if isinstance(fact, Fact)]
            watcher.hear(batch, max([watcher.now(), *times]))
            batch.clear()

    def _await(self, watcher: Watcher, at: float) -> bool:
        """Wait for the replay to come to ``at``; False when watching ends first."""
        assert self.replay is not None
        while (ahead := at - self.replay.now()) > 0:
            watcher.report(f"replay x{self.replay.speed:g}")
            if watcher.wait(min(_LOOK_S, max(0.001, ahead / self.replay.speed))):
                return False
            watcher.tick(min(at, self.replay.now()))
        return not watcher.stopping

    def _lines(self, watcher: Watcher, batch: list[Fact | Unreadable]) -> Iterator[tuple[int, bytes]]:
        """Numbered lines that are not blank. One without an end is waited for, or else taken as it is."""
        number = 0
        held = b""
        while not watcher.stopping:
            piece = self._file.readline(_LONGEST_LINE - len(held))
            held += piece
            if not held.endswith(b"\n"):
                if len(held) >= _LONGEST_LINE:
                    raise RecordingError(f"{self._path}:{number + 1}: is longer than {MAX_MESSAGE_BYTES} bytes")
                if self._follow:
                    self._flush(watcher, batch)
                    watcher.report("following")
                    watcher.wait(_LOOK_S)
                    continue
                if not piece and not held:
                    return
            number += 1
            if held.strip():
                yield number, held
            held = b""

    def _read(self, number: int, line: bytes) -> Fact | Unreadable:
        try:
            found = strict_json.loads(line, what="the line", max_bytes=_LONGEST_LINE)
            if not isinstance(found, dict):
                raise ValueError(f"the line is {type(found).__name__}, not an object")
            if "event" in found:
                return self._log.read(found)
            return decode(OonaMessage.from_dict(found))
        except (ValueError, TypeError) as error:
            if not line.endswith(b"\n"):
                # Whoever wrote it was ended in the middle of it.
                return Unreadable(f"line {number} is cut off")
            raise RecordingError(f"{self._path}:{number}: {error}") from None


class Recorder:
    """Writes messages to a file that must not exist yet, one a line, as :class:`FileSource` reads them.

    Raises:
        RecordingError: the file exists, or cannot be made.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("x", encoding="ascii")
        except FileExistsError:
            raise RecordingError(f"{path}: exists; a recording is never overwritten") from None
        except OSError as error:
            raise RecordingError(f"{path}: cannot be written: {error.strerror or error}") from None

    def write(self, message: OonaMessage) -> None:
        """Append one message."""
        self._file.write(message.to_json() + "\n")

    def flush(self) -> None:
        """Make what was written so far visible to others."""
        self._file.flush()

    def __enter__(self) -> Recorder:
        """The recorder itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self._file.close()
