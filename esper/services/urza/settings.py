"""What an operator can choose; every choice has a default that works on a laptop."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from esper.contracts.paths import default_registry_dir

__all__ = [
    "DEFAULT_MAX_MB",
    "DEFAULT_PORT",
    "MAX_PRESIGN_S",
    "MAX_WRITES",
    "Settings",
    "default_data_dir",
    "settings_for",
]

DEFAULT_PORT: Final = 8470
DEFAULT_MAX_MB: Final = 256
#: A week: S3 takes no longer.
MAX_PRESIGN_S: Final = 604_800
#: Writes a second, or at once, beyond which a limit is none; 0 says so.
MAX_WRITES: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Settings:
    """How one Urza process runs.

    Attributes:
        database: SQLAlchemy URL of the database; not in the text of the settings, because a password may be in it.
        blobs: Folder for the artifacts' bytes, or ``s3://bucket/prefix``.
        scratch: Folder for uploads that are not complete; on the blobs' file system where those are in a folder.
        s3_endpoint: Address of an S3 service other than Amazon's.
        presign: Hand out presigned S3 addresses instead of passing the bytes on.
        presign_s: How long such an address is good for.
        max_bytes: Largest artifact accepted.
        max_json_bytes: Largest JSON body accepted.
        write_rate: Writes a second that one token may make in the long run; 0 means any number.
        write_burst: Writes that it may make at once.
        open_read: Reads need no token.
        open_metrics: ``/metrics`` needs no token.
        threads: Worker threads for requests that wait for the database or a disk.
        request_s: How long a request's head, and its JSON body, may each take to arrive.
        upload_idle_s: How long an upload, or the taking of an answer, may pause before it is given up.
    """

    database: str = field(repr=False)
    blobs: str
    scratch: Path
    s3_endpoint: str | None = None
    presign: bool = True
    presign_s: int = 3600
    max_bytes: int = DEFAULT_MAX_MB << 20
    max_json_bytes: int = 1 << 20
    write_rate: float = 20.0
    write_burst: int = 200
    open_read: bool = False
    open_metrics: bool = False
    threads: int = 8
    request_s: float = 30.0
    upload_idle_s: float = 60.0

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            # `not <=` catches NaN as well.
            if isinstance(value, bool) or not low <= value <= high:
                raise ValueError(f"{name} is {value!r}; need a number from {low} to {high}")


#: Setting, the least and the most it may be.
_RANGES: Final[tuple[tuple[str, float, float], ...]] = (
    ("presign_s", 1, MAX_PRESIGN_S),
    ("max_bytes", 1, 1 << 50),
    ("max_json_bytes", 1, 1 << 30),
    ("write_rate", 0, MAX_WRITES),
    ("write_burst", 1, MAX_WRITES),
    ("threads", 1, 1024),
    ("request_s", 0.001, 86_400),
    ("upload_idle_s", 0.001, 86_400),
)


def default_data_dir() -> Path:
    """``$XDG_DATA_HOME/esper/urza``, else ``~/.local/share/esper/urza``."""
    return default_registry_dir().parent / "urza"


def settings_for(
    data: Path | None = None, *, database: str | None = None, blobs: str | None = None, **options: object
) -> Settings:
    """Settings with database, blobs and scratch under ``data`` (default: the user's data folder) unless given.

    Raises:
        ValueError: a place is empty, or has characters in it that none has; or a number is none.
    """
    # Not above: the command line reads this module to describe its options, where SQLAlchemy may not be installed.
    import sqlalchemy as sa

    for name, place in (("data", data), ("database", database), ("blobs", blobs)):
        # An empty path is the working directory, or a default, and neither is what was meant.
        if place is not None and not (text := str(place)).strip():
            raise ValueError(f"{name} is empty; leave it out to have the default")
        # Shown without the text, in which there may be a password.
        if place is not None and not text.isprintable():
            raise ValueError(f"{name} has a line's end or another character in it that cannot be printed")
    data = (default_data_dir() if data is None else data.expanduser()).absolute()
    if database is None:
        # Not put together as text: in a URL '?', '#' and '%' mean something else.
        url = sa.URL.create("sqlite", database=str(data / "urza.db"))
        database = url.render_as_string(hide_password=False)
        if sa.make_url(database) != url:  # SQLAlchemy 2.0 does not quote
            raise ValueError(f"data is {str(data)!r}, which has characters that a URL has not; choose another folder")
    blobs = str(data / "blobs") if blobs is None else blobs
    on_s3 = "://" in blobs
    if on_s3 and not blobs.startswith("s3://"):
        raise ValueError(f"blobs must be a folder or s3://bucket/prefix, not {blobs.partition('://')[0]}://...")
    if not on_s3:
        blobs = str(Path(blobs).expanduser().absolute())
    return Settings(
        database=database,
        blobs=blobs,
        # Beside the blobs, because a rename is atomic within one file system only.
        scratch=data / "tmp" if on_s3 else Path(blobs) / "tmp",
        **options,  # type: ignore[arg-type]
    )
