"""A stand-in for the CUDA driver that writes down what it is asked: for argument packing and error paths only.

It runs nothing. That kernels compute what they should is tested on a GPU.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

_SOURCE = Path(__file__).with_name("recorder.c")


class Recorder:
    """The built library: its path for the extension, and what it wrote down."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._library = ctypes.CDLL(self.path)
        self._buffer = ctypes.create_string_buffer(1 << 16)
        self.reset()

    def reset(self) -> None:
        self.fail("", 0)
        self.devices(2)
        self.sizes()
        self.take()

    def fail(self, function: str, error: int) -> None:
        """From now on ``function`` returns ``error``; "" for none."""
        self._library.recorder_fail(function.encode(), error)

    def devices(self, count: int) -> None:
        self._library.recorder_devices(count)

    def sizes(self, *sizes: int, quiet: bool = False) -> None:
        """Bytes to read of each launch argument; quiet: launches are not written down."""
        self._library.recorder_sizes(-1 if quiet else len(sizes), (ctypes.c_int * (len(sizes) or 1))(*sizes))

    def take(self) -> list[str]:
        """What was asked since the last time, one line a call."""
        self._library.recorder_take(self._buffer)
        return self._buffer.value.decode().splitlines()


def build(folder: Path) -> Recorder:
    """Compile the recorder and load it; skips the test where there is no C compiler."""
    return Recorder(build_library(folder, "librecorder.so"))


def build_library(folder: Path, name: str) -> Path:
    """Compile it under that name: a process that loads it under the driver's own takes it for the driver."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler to build the recording driver with")
    library = folder / name
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", f"-Wl,-soname,{name}", "-o", str(library), str(_SOURCE)], check=True
    )
    return library


def tiny_cubin(symbol: str = "k", sizes: tuple[int, ...] = (8, 4), arch: int = 90) -> bytes:
    """The smallest file that describes itself as a GPU binary with one kernel; it holds no code."""
    info = b"".join(
        b"\x04\x17\x0c\x00"
        + bytes(4)
        + index.to_bytes(2, "little")
        + (8 * index).to_bytes(2, "little")
        + (size << 18).to_bytes(4, "little")
        for index, size in enumerate(sizes)
    )
    section = f".nv.info.{symbol}".encode() + b"\0"
    names = b"\0" + section + b".shstrtab\0"
    body = names.ljust(-(-len(names) // 8) * 8, b"\0")

    def header(name: int, kind: int, offset: int, size: int) -> bytes:
        fields = ((name, 4), (kind, 4), (0, 8), (0, 8), (offset, 8), (size, 8), (0, 4), (0, 4), (1, 8), (0, 8))
        return b"".join(value.to_bytes(width, "little") for value, width in fields)

    table = 64 + len(body) + len(info)
    elf = bytearray(64)
    elf[:9] = b"\x7fELF\x02\x01\x01\x41\x08"
    elf[18:20] = (190).to_bytes(2, "little")
    elf[40:48] = table.to_bytes(8, "little")
    elf[48:52] = (arch << 8 | 2).to_bytes(4, "little")
    elf[58:64] = b"\x40\x00\x03\x00\x02\x00"
    sections = header(0, 0, 0, 0) + header(1, 0x70000000, 64 + len(body), len(info))
    return bytes(elf) + body + info + sections + header(1 + len(section), 3, 64, len(names))
