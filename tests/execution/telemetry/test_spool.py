"""The spool: order, bounds, what a killed process leaves, and whose it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.execution.telemetry import spool as module
from esper.execution.telemetry.spool import SEGMENT_BYTES, Spool, SpoolError
from tests.artifacts.forks import in_forked_child

BIG = 64 << 20


def drain(spool: Spool, batch: int = 7) -> list[tuple[int, bytes, bool]]:
    found = []
    while records := spool.head(1 << 20, batch):
        found += [(record.tag, record.content, record.own) for record in records]
        spool.take(records)
    return found


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.seg"))


def test_records_come_back_in_order_and_leave_nothing(tmp_path: Path) -> None:
    spool = Spool(tmp_path, BIG)
    sent = [(i % 5 - 2, f"message {i}".encode() * (i % 40 + 1)) for i in range(500)]
    for tag, text in sent:
        spool.append(tag, text)
    assert len(spool) == spool.own == 500
    assert spool.size_bytes == sum(16 + len(text) for _, text in sent)
    assert drain(spool) == [(tag, text, True) for tag, text in sent]
    assert len(spool) == spool.size_bytes == 0
    assert files(tmp_path) == []
    spool.close()
    assert list(tmp_path.iterdir()) == []


def test_head_takes_nothing(tmp_path: Path) -> None:
    spool = Spool(tmp_path, BIG)
    for i in range(10):
        spool.append(0, b"%d" % i)
    first = spool.head(1 << 20, 4)
    assert spool.head(1 << 20, 4) == first
    assert [record.content for record in first] == [b"0", b"1", b"2", b"3"]
    spool.take(first)
    spool.append(0, b"10")
    assert [text for _, text, _ in drain(spool)] == [b"%d" % i for i in range(4, 11)]


def test_head_gives_one_record_however_large(tmp_path: Path) -> None:
    spool = Spool(tmp_path, BIG)
    spool.append(0, b"x" * 5000)
    spool.append(0, b"y" * 5000)
    assert [record.content[:1] for record in spool.head(100, 10)] == [b"x"]


def test_the_oldest_goes_first_when_it_is_full(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 3 * SEGMENT_BYTES)
    text = b"x" * (SEGMENT_BYTES // 4)
    for i in range(40):
        spool.append(i, text)
        assert spool.size_bytes <= 3 * SEGMENT_BYTES
    own, others = spool.take_dropped()
    assert not others
    kept = [tag for tag, _, _ in drain(spool)]
    assert kept == list(range(40 - len(kept), 40))
    assert len(kept) >= 8
    assert own == {tag: 1 for tag in range(40 - len(kept))}
    assert spool.take_dropped() == ({}, {})


def test_the_next_process_takes_over_what_is_left(tmp_path: Path) -> None:
    first = Spool(tmp_path, BIG)
    for i in range(5):
        first.append(i, b"first %d" % i)
    taken = first.head(1 << 20, 2)
    first.take(taken)
    first.close()
    second = Spool(tmp_path, BIG)
    assert (len(second), second.own) == (5, 0), "what was sent of a segment is not on record: it comes twice"
    second.append(9, b"second")
    assert second.own == 1
    texts = [(text, own) for _, text, own in drain(second)]
    assert texts == [(b"first %d" % i, False) for i in range(5)] + [(b"second", True)]
    second.close()
    assert list(tmp_path.iterdir()) == []


def test_two_live_processes_do_not_share(tmp_path: Path) -> None:
    one, two = Spool(tmp_path, BIG), Spool(tmp_path, BIG)
    one.append(0, b"one")
    three = Spool(tmp_path, BIG)
    assert (len(two), len(three)) == (0, 0)
    one.close()
    four = Spool(tmp_path, BIG)
    assert [text for _, text, _ in drain(four)] == [b"one"]


def test_a_forked_child_leaves_the_parents_lock_alone(tmp_path: Path) -> None:
    parent = Spool(tmp_path, BIG)
    parent.append(0, b"parent's")

    def finds_nothing() -> bool:
        parent.forget()
        return len(Spool(tmp_path, BIG)) == 0

    assert in_forked_child(finds_nothing)
    assert len(Spool(tmp_path, BIG)) == 0
    assert [text for _, text, _ in drain(parent)] == [b"parent's"]


KILLED = """
import os, signal, sys
from pathlib import Path
from esper.execution.telemetry.spool import Spool
spool = Spool(Path(sys.argv[1]), 64 << 20)
for i in range(2000):
    spool.append(i, b"message %d" % i)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_all_it_wrote(tmp_path: Path) -> None:
    process = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], timeout=120)
    assert process.returncode == -signal.SIGKILL
    spool = Spool(tmp_path, BIG)
    assert spool.damaged == 0
    assert [(tag, text) for tag, text, _ in drain(spool)] == [(i, b"message %d" % i) for i in range(2000)]


@given(cut=st.integers(0, 400), flip=st.none() | st.integers(0, 399))
@settings(max_examples=40)
def test_a_torn_or_altered_end_costs_no_record_before_it(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int | None
) -> None:
    root = tmp_path_factory.mktemp("spool")
    left = Spool(root, BIG)
    texts = [b"record %d " % i * 2 for i in range(10)]
    ends, end = [], 0
    for text in texts:
        left.append(1, text)
        end += 16 + len(text)
        ends.append(end)
    left.close()
    path = next(root.rglob("*.seg"))
    data = bytearray(path.read_bytes())[:cut]
    if flip is not None and flip < len(data):
        data[flip] ^= 0x10
    path.write_bytes(data)
    broken = min(len(data), flip if flip is not None and flip < len(data) else len(data))
    whole = sum(end <= broken for end in ends)
    spool = Spool(root, BIG)
    assert [text for _, text, _ in drain(spool)] == texts[:whole]
    assert spool.damaged == (len(data) != (ends[whole - 1] if whole else 0))
    spool.close()


def test_a_full_disk_costs_the_record_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path, BIG)
    spool.append(0, b"before")
    write = os.write

    def half(file: int, data: bytes) -> int:
        return write(file, data[: len(data) // 2])

    monkeypatch.setattr(module.os, "write", half)
    with pytest.raises(SpoolError, match="no space left"):
        spool.append(0, b"the one that does not fit")
    monkeypatch.setattr(module.os, "write", write)
    spool.append(0, b"after")
    assert [text for _, text, _ in drain(spool)] == [b"before", b"after"]


def test_a_segment_that_vanishes_counts_as_dropped(tmp_path: Path) -> None:
    spool = Spool(tmp_path, BIG)
    for i in range(3):
        spool.append(i, b"gone")
    next(tmp_path.rglob("*.seg")).unlink()
    assert spool.head(1 << 20, 10) == []
    assert spool.take_dropped()[0].total() == 3
    spool.append(5, b"next")
    assert [tag for tag, _, _ in drain(spool)] == [5]


def test_no_folder_no_spool(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpoolError, match="no spool in"):
        Spool(tmp_path / "file" / "spool", BIG)


def test_a_stranger_in_the_root_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    assert len(Spool(tmp_path, BIG)) == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "folder").is_dir()


def test_closed_twice_it_closes_nobody_else_s_file(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", BIG)
    lock = spool._lock
    spool.close()
    other = (tmp_path / "other").open("w")
    try:
        assert other.fileno() == lock, "the number is given out again"
        spool.close()
        spool.forget()
        other.write("still open")
        other.flush()
    finally:
        other.close()
    assert (tmp_path / "other").read_text() == "still open"
