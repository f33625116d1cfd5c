"""What a server's refusal, or its silence, means: redis-py's exceptions as the errors of the contract.

The texts come from the server and from the operating system. They are cut, made printable and stripped of passwords
before they are shown.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from typing import Final

from esper.contracts.errors import (
    BusDeniedError,
    BusError,
    BusFullError,
    BusUnavailableError,
    BusWrongTypeError,
)
from esper.oona.urls import BusAddress

__all__ = ["GroupExistsError", "NoGroupError", "failed_at_start", "refused", "translate"]

_LONGEST: Final = 300


class NoGroupError(BusError):
    """The consumer group is gone, or was never there. Does not leave :mod:`esper.oona`."""


class GroupExistsError(BusError):
    """The consumer group that was to be made is there. Does not leave :mod:`esper.oona`."""


def translate(error: Exception, address: BusAddress, about: str) -> BusError:
    """The error of the contract that ``error``, raised by redis-py or by a socket, stands for.

    Args:
        error: What was raised.
        address: Where it came from.
        about: The streams that the command was about.
    """
    import redis.exceptions as known

    reason = _reason(error, address)
    if isinstance(error, known.AuthenticationError | known.AuthorizationError | known.NoPermissionError):
        return refused("DENIED", reason, address, about)
    if isinstance(error, known.OutOfMemoryError):
        return refused("OOM", reason, address, about)
    if isinstance(
        error,
        # The last four: a cluster or a primary in the middle of a change.
        known.ConnectionError
        | known.TimeoutError
        | OSError
        | known.RedisClusterException
        | known.ClusterError
        | known.TryAgainError
        | known.ReadOnlyError,
    ):
        return _unavailable(error, reason, address)
    return refused(reason.partition(" ")[0], reason, address, about)


def refused(code: str, reason: str, address: BusAddress, about: str) -> BusError:
    """The error for an answer that begins with the word ``code``."""
    where = f"Redis at {address.shown}" if address.kind != "memory" else f"the bus {address.shown}"
    if code in ("DENIED", "NOAUTH", "WRONGPASS", "NOPERM"):
        return BusDeniedError(
            f"{where} refused us: {reason}. Check the user and the password in the URL (REDIS_URL), and what that user "
            f"may do (ACL)",
            reason=reason,
        )
    if code == "OOM":
        return BusFullError(
            f"{where} has no memory left for {about or 'this'}: {reason}. Raise maxmemory, or trim streams that nobody "
            f"reads",
            reason=reason,
        )
    if code == "WRONGTYPE":
        return BusWrongTypeError(
            f"{where} keeps something other than a stream under one of these names: {about}. Delete or rename that "
            f"key, or use another database",
            reason=reason,
        )
    if code == "NOGROUP" or code == "UNBLOCKED":
        return NoGroupError(f"{where}: {reason}")
    if code == "BUSYGROUP":
        return GroupExistsError(f"{where}: {reason}")
    return BusError(
        f"{where} refused a command about {about or 'itself'}: {reason}",
        # Redis cannot write to its disk and says so; somebody may make room there.
        retryable=code == "MISCONF",
        reason=reason,
    )


def failed_at_start(error: BusError, address: BusAddress, attempts: int, seconds: float) -> BusError:
    """``error`` as it is told when nothing ever answered: what was tried, and what to check."""
    what = {
        "unix": f"that redis-server runs on this machine and listens on {address.path}, and that you may open it",
        "sentinel": f"that the sentinels run there, and that they know a service {address.service!r} that is up",
        "cluster": "that the nodes of the cluster run there and that all its slots are covered",
    }.get(address.kind, "that redis-server runs there, that host and port in REDIS_URL are right, and the firewall")
    if address.tls:
        what += "; and that the port speaks TLS"
    times = "1 attempt" if attempts == 1 else f"{attempts} attempts in {seconds:.1f} s"
    return BusUnavailableError(
        f"no Redis at {address.shown} after {times}: {error.reason or error}. Check {what}",
        retryable=error.retryable,
        reason=error.reason,
    )


def _unavailable(error: Exception, reason: str, address: BusAddress) -> BusUnavailableError:
    import redis.exceptions as known

    # A replica, or a cluster without its slots, has answered; a certificate does not get better by asking again.
    answered = isinstance(error, known.ResponseError)
    message = f"Redis at {address.shown} {'cannot serve us now' if answered else 'does not answer'}: {reason}"
    return BusUnavailableError(message, retryable=not _certificate(error), reason=reason)


def _certificate(error: Exception) -> bool:
    return any(isinstance(each, ssl.SSLCertVerificationError) for each in _chain(error))


def _reason(error: Exception, address: BusAddress) -> str:
    if type(error).__name__ == "MasterNotFoundError":
        # redis-py prints its client objects here, with all that they hold.
        denied = "; one did not take our user and password" if "Authentication" in str(error) else ""
        return f"none of {len(address.hosts)} sentinels answers and names a primary for {address.service!r}{denied}"
    # What a pipeline adds in front is the command with all its arguments.
    text = address.scrub(str(error).rpartition("of pipeline caused error: ")[2]).strip().rstrip(".")
    for each in _chain(error):
        # redis-py tells what the system said, but not always, and sometimes only its number.
        said = ""
        if isinstance(each, ssl.SSLCertVerificationError):
            said = f"certificate verify failed: {each.verify_message}"
        elif isinstance(each, OSError) and not isinstance(each, ssl.SSLError) and each.errno and each.errno > 0:
            said = os.strerror(each.errno)
        if said and said not in text:
            text = f"{text} ({said})"
            break
    shown = "".join(each if each.isprintable() else " " for each in text[:_LONGEST])
    return shown or type(error).__name__


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """``error``, and what it came from."""
    for _ in range(8):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__
