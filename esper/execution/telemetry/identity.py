"""Who a training process is: its run, its rank, and the name it sends under."""

from __future__ import annotations

import os
import re
import secrets
import socket
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Final

from esper.contracts import payload
from esper.contracts.messages import MessageError

__all__ = ["Identity", "in_child", "rank_and_world", "renewed", "this_process"]

_MAX_RUN_ID: Final = 64
_lock = threading.Lock()
#: Models that have gone by one name in this process: the second and later get a number of their own.
_taken: Counter[str] = Counter()


@dataclass(frozen=True, slots=True)
class Identity:
    """The sender of messages.

    Attributes:
        run_id: Name of the run; also the ``trace_id`` of everything it sends.
        rank: Of this process.
        world_size: Processes that train together.
        sender_id: Host, process and rank, in the envelope.
    """

    run_id: str
    rank: int
    world_size: int
    sender_id: str


def this_process(run_id: str | None = None) -> Identity:
    """The identity of one model in this process.

    Args:
        run_id: Name of the run, 1 to 64 letters, digits, dots, underscores and hyphens. By default ``ESPER_RUN_ID``,
            else torchrun's ``TORCHELASTIC_RUN_ID`` with hyphens for what a name cannot have, else one made of time and
            chance. A name that another model of this process has or had gets a number: windows are counted by model.

    Raises:
        MessageError: ``ESPER_RUN_ID`` is no such name. It is refused here, because every message would be later.
    """
    chosen = run_id or _asked_for() or _launchers()
    base = chosen or f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"
    with _lock:
        _taken[base] += 1
        number = _taken[base]
    name = base if number == 1 else f"{base[: _MAX_RUN_ID - 8]}.{number}"
    return _named(name)


def _asked_for() -> str:
    name = os.environ.get("ESPER_RUN_ID", "")
    if name:
        try:
            payload.run_id("ESPER_RUN_ID", name)
        except MessageError:
            raise MessageError(
                f"ESPER_RUN_ID is {name!r:.80}; the name of a run is 1 to {_MAX_RUN_ID} letters, digits, dots, "
                "underscores and hyphens, and begins with a letter or a digit"
            ) from None
    return name


def _launchers() -> str:
    """Torchrun's ``--rdzv-id``, which may be anything, as a name: the same on all ranks."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    # torchrun calls every run "none" unless it is told a name.
    return "" if name == "none" else re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("._-")[:_MAX_RUN_ID]


def renewed(identity: Identity) -> Identity:
    """The same run, with the rank that the process has by now."""
    return _named(identity.run_id)


def in_child(parent: Identity) -> Identity:
    """The identity of a forked child: its own run, unless its rank tells it from the parent."""
    rank, world_size = rank_and_world()
    if (rank, world_size) != (parent.rank, parent.world_size):
        return _named(parent.run_id)
    return _named(f"{parent.run_id[: _MAX_RUN_ID - 12]}.f{os.getpid()}")


def _named(run_id: str) -> Identity:
    rank, world_size = rank_and_world()
    host = "".join(letter for letter in socket.gethostname() if letter.isprintable())[:100] or "unknown"
    return Identity(run_id, rank, world_size, f"esper-train-{host}-{os.getpid()}-rank{rank}of{world_size}")


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks: of ``torch.distributed`` where it is in use, else of ``RANK``."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank()), int(distributed.get_world_size())
    rank, world_size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    return (rank, world_size) if 0 <= rank < world_size else (0, 1)


def _number(variable: str, default: int) -> int:
    value = os.environ.get(variable, "")
    return int(value) if value.isdecimal() and len(value) < 8 else default


def _forget_in_child() -> None:
    global _lock
    _lock = threading.Lock()  # another thread may have held it at the moment of the fork


os.register_at_fork(after_in_child=_forget_in_child)
