"""What others tell a training process to do with its seeds, and what came of it.

A command is signed with a key that sender and trainer share (``ESPER_CONTROL_KEY``): whoever can write to the bus is
not thereby allowed to change a network. The signature is an HMAC-SHA256 (RFC 2104) over everything else in it, so that
nothing can be altered; its time of issue and its nonce let the trainer refuse what is old or comes again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import os
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Final, Self

from esper.contracts import payload, strict_json
from esper.contracts.errors import EsperError
from esper.contracts.messages import MessageError

__all__ = ["ANY_RUN", "CommandAction", "CommandOutcome", "KasminaCommand", "control_key"]

#: The ``run_id`` of a command for every run that has the key.
ANY_RUN: Final = "*"

_COMMAND_VERSION: Final = 1
_OUTCOME_VERSION: Final = 1
#: Signed before the command, so that a signature for one purpose serves no other.
_DOMAIN: Final = b"esper.kasmina.command.v1\n"
_NONCE: Final = re.compile(r"[0-9a-f]{32}")
_SIGNATURE: Final = re.compile(r"[0-9a-f]{64}")
#: RFC 2104 advises keys as long as the hash; this is the least that cannot be guessed.
_SHORTEST_KEY: Final = 16
_MAX_RAMP: Final = 2**31 - 1


class CommandAction(StrEnum):
    """What to do with a seed."""

    LOAD = "load"
    UNLOAD = "unload"
    #: Set alpha at once.
    SET_ALPHA = "set_alpha"
    #: Let alpha go to a value over so many steps.
    RAMP = "ramp"
    CULL = "cull"
    FOSSILIZE = "fossilize"


#: Action -> the optional fields that it has to have; it must not have the others.
_NEEDS: Final[Mapping[CommandAction, frozenset[str]]] = {
    CommandAction.LOAD: frozenset(("artifact_id", "alpha", "ramp_steps")),
    CommandAction.UNLOAD: frozenset(),
    CommandAction.SET_ALPHA: frozenset(("alpha",)),
    CommandAction.RAMP: frozenset(("alpha", "ramp_steps")),
    CommandAction.CULL: frozenset(),
    CommandAction.FOSSILIZE: frozenset(),
}


def control_key(value: str | bytes | None = None) -> bytes | None:
    """The shared key: ``value``, or else the environment's ``ESPER_CONTROL_KEY``; None where neither is set.

    Raises:
        EsperError: the key is too short to keep anybody out.
    """
    found = os.environ.get("ESPER_CONTROL_KEY") if value is None else value
    if found is None or not found:
        return None
    key = found.encode() if isinstance(found, str) else found
    if len(key) < _SHORTEST_KEY:
        raise EsperError(
            f"the key for commands (ESPER_CONTROL_KEY) has {len(key)} bytes; need {_SHORTEST_KEY} or more, for example "
            "from: openssl rand -hex 32"
        )
    return key


@dataclass(frozen=True, slots=True, kw_only=True)
class KasminaCommand:
    """One command about one seed.

    Attributes:
        action: What to do.
        layer_name: Dotted name of the layer in the host.
        seed_idx: Which of its seeds.
        artifact_id: The kernel to load; for ``load`` only.
        alpha: Blend factor to reach, in [0, 1]; for ``load``, ``set_alpha`` and ``ramp``.
        ramp_steps: Training steps to reach it in; for ``load`` (0: at once) and ``ramp``.
        run_id: The run that it is for, or :data:`ANY_RUN`.
        issued_at: Seconds since 1970, by the sender's clock.
        nonce: 32 hex digits that no other command has; also the command's id.
        signature: 64 hex digits; empty before :meth:`signed`.

    Raises:
        MessageError: a value that is not as described; the message names the field.
    """

    TYPE: ClassVar[str] = "kasmina_command"

    action: CommandAction
    layer_name: str
    seed_idx: int
    artifact_id: str | None = None
    alpha: float | None = None
    ramp_steps: int | None = None
    run_id: str = ANY_RUN
    issued_at: float = field(default_factory=time.time)
    nonce: str = field(default_factory=lambda: secrets.token_hex(16))
    signature: str = ""

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "action", CommandAction(self.action))
        except ValueError:
            raise MessageError(f"action is {self.action!r:.60}; known: {', '.join(CommandAction)}") from None
        payload.text("layer_name", self.layer_name, 512)
        payload.integer("seed_idx", self.seed_idx, 0, 2**31 - 1)
        payload.optional(payload.text, "artifact_id", self.artifact_id, 512)
        payload.optional(payload.number, "alpha", self.alpha, 0.0, 1.0)
        payload.optional(payload.integer, "ramp_steps", self.ramp_steps, 0, _MAX_RAMP)
        given = {name for name in ("artifact_id", "alpha", "ramp_steps") if getattr(self, name) is not None}
        if given != _NEEDS[self.action]:
            need = ", ".join(sorted(_NEEDS[self.action])) or "none of artifact_id, alpha, ramp_steps"
            raise MessageError(f"{self.action} needs {need}; it has {', '.join(sorted(given)) or 'none'}")
        if self.run_id != ANY_RUN:
            payload.run_id("run_id", self.run_id)
        payload.number("issued_at", self.issued_at, 0.0)
        payload.word("nonce", self.nonce, _NONCE)
        if self.signature:
            payload.word("signature", self.signature, _SIGNATURE)

    @property
    def command_id(self) -> str:
        """What an outcome refers to it by: the nonce."""
        return self.nonce

    def signed(self, key: bytes) -> Self:
        """The same command with its signature."""
        return dataclasses.replace(self, signature=self._digest(key))

    def verify(self, key: bytes) -> bool:
        """Whether it was signed with ``key`` and not altered since; takes as long whether or not."""
        return hmac.compare_digest(self._digest(key), self.signature)

    def _digest(self, key: bytes) -> str:
        content = self.to_payload()
        del content["signature"]
        # A number that went through JSON may come back as 1 for 1.0.
        for name in ("alpha", "issued_at"):
            if content[name] is not None:
                content[name] = float(content[name])
        return hmac.new(key, _DOMAIN + strict_json.canonical(content).encode(), hashlib.sha256).hexdigest()

    def to_payload(self) -> dict[str, Any]:
        """JSON values."""
        found = {name: getattr(self, name) for name in _COMMAND_FIELDS}
        return {"type": self.TYPE, "version": _COMMAND_VERSION, **found, "action": self.action.value}

    @classmethod
    def from_payload(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_payload`, whatever ``data`` holds; says nothing about the signature.

        Raises:
            MessageError: it is no command; the message names the field.
        """
        return cls(**payload.fields_of(data, cls.TYPE, _COMMAND_VERSION, _COMMAND_FIELDS))


_COMMAND_FIELDS: Final = tuple(each.name for each in dataclasses.fields(KasminaCommand))


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandOutcome:
    """What came of a command, by the process that had it.

    Attributes:
        command_id: The command's nonce; empty when what came could not be read so far.
        status: "done" or "refused"; refused means that nothing was changed, or that a load came to nothing.
        reason: Why it was refused, at most 1000 characters; None when it was done.
        run_id: Name of the run.
        rank: Of the process that answers.
        step: Training steps done when it was answered.
        answered_at: Seconds since 1970, by the trainer's clock.

    Raises:
        MessageError: a value that is not as described; the message names the field.
    """

    TYPE: ClassVar[str] = "command_outcome"

    command_id: str
    status: str
    reason: str | None
    run_id: str
    rank: int
    step: int
    answered_at: float

    def __post_init__(self) -> None:
        if self.command_id != "":
            payload.word("command_id", self.command_id, _NONCE)
        if self.status not in ("done", "refused"):
            raise MessageError(f"status is {self.status!r:.60}; need 'done' or 'refused'")
        if (self.reason is None) != (self.status == "done"):
            raise MessageError(f"an outcome that is {self.status} has the reason {self.reason!r:.60}")
        payload.optional(payload.text, "reason", self.reason, 1000)
        payload.run_id("run_id", self.run_id)
        payload.integer("rank", self.rank, 0, 2**20)
        payload.integer("step", self.step)
        payload.number("answered_at", self.answered_at, 0.0)

    @property
    def done(self) -> bool:
        """Whether the command was carried out."""
        return self.status == "done"

    def to_payload(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "type": self.TYPE,
            "version": _OUTCOME_VERSION,
            **{name: getattr(self, name) for name in _OUTCOME_FIELDS},
        }

    @classmethod
    def from_payload(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_payload`, whatever ``data`` holds.

        Raises:
            MessageError: it is no outcome; the message names the field.
        """
        return cls(**payload.fields_of(data, cls.TYPE, _OUTCOME_VERSION, _OUTCOME_FIELDS))


_OUTCOME_FIELDS: Final = tuple(each.name for each in dataclasses.fields(CommandOutcome))
