from __future__ import annotations

import hashlib

import pytest

from esper.services.urza.blobs import FolderBlobs
from esper.services.urza.errors import ApiError
from esper.services.urza.ranges import parse_range, tag_matches
from tests.artifacts.samples import sample
from tests.services.urza.api import artifact, error


@pytest.fixture
def blob(local):
    artifact_id = local.uploaded()
    return lambda **headers: local(
        "GET",
        f"/api/v1/kernels/{artifact_id}/blob",
        headers={name.replace("_", "-"): value for name, value in headers.items()},
    )


def test_the_whole_blob(blob):
    data = artifact()
    answer = blob()
    assert answer.status_code == 200
    assert answer.content == data
    assert answer.headers["etag"] == f'"{hashlib.sha256(data).hexdigest()}"'
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["content-length"] == str(len(data))
    assert answer.headers["content-type"] == "application/octet-stream"
    assert blob(If_None_Match=answer.headers["etag"]).status_code == 304


def test_parts(blob):
    data = artifact()
    size = len(data)
    for header, start, end in [
        ("bytes=0-0", 0, 1),
        ("bytes=0-", 0, size),
        ("bytes=10-19", 10, 20),
        (f"bytes={size - 1}-", size - 1, size),
        ("bytes=100-999999", 100, size),
        ("bytes=-10", size - 10, size),
        (f"bytes=-{size * 2}", 0, size),
        ("BYTES = 5-6", 5, 7),
    ]:
        answer = blob(Range=header)
        assert answer.status_code == 206, header
        assert answer.content == data[start:end]
        assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
        assert answer.headers["content-length"] == str(end - start)


def test_parts_that_lie_outside(blob):
    size = len(artifact())
    for header in (f"bytes={size}-", f"bytes={size}-{size + 5}", "bytes=-0"):
        answer = blob(Range=header)
        assert (answer.status_code, error(answer)) == (416, "range_not_satisfiable")
        assert answer.headers["content-range"] == f"bytes */{size}"


@pytest.mark.parametrize("header", ["bytes=5-4", "bytes=-", "bytes=1-2,4-5", "items=0-1", "bytes=a-b", "bytes 0-1"])
def test_what_is_no_single_range_gives_everything(blob, header):
    answer = blob(Range=header)
    assert (answer.status_code, answer.content) == (200, artifact())


def test_a_part_only_of_the_same_version(blob):
    etag = blob().headers["etag"]
    assert blob(Range="bytes=0-4", If_Range=etag).status_code == 206
    for other in ('"other"', f"W/{etag}", "Wed, 21 Oct 2015 07:28:00 GMT"):
        assert blob(Range="bytes=0-4", If_Range=other).status_code == 200


def test_ranges_of_nothing():
    assert parse_range(None, None, '"e"', 0) is None
    with pytest.raises(ApiError):
        parse_range("bytes=0-", None, '"e"', 0)
    with pytest.raises(ApiError):
        parse_range("bytes=-5", None, '"e"', 0)


def test_tags_match_weakly():
    assert tag_matches('W/"a", "b"', '"a"')
    assert not tag_matches('"ab"', '"a"')
    assert not tag_matches(None, '"a"')


def test_a_large_blob_is_sent_in_pieces(local):
    # Rank 250 at 600 features in float32 is more than one piece.
    artifact_id = local.upload(large := sample(0, d_in=600, d_out=600, rank=250)).json()["artifact_id"]
    assert local("GET", f"/api/v1/kernels/{artifact_id}/blob").content == large
    part = local("GET", f"/api/v1/kernels/{artifact_id}/blob", headers={"Range": "bytes=5-"})
    assert part.content == large[5:]


def test_a_folder_keeps_what_was_moved_in(tmp_path):
    store = FolderBlobs(tmp_path / "blobs")
    source = tmp_path / "source"
    source.write_bytes(b"abc")
    sha256 = hashlib.sha256(b"abc").hexdigest()
    assert store.size(sha256) is None
    store.put(sha256, source, 3)
    assert not source.exists()
    assert (store.size(sha256), store.read(sha256, 1, 10), store.sign(sha256, 5)) == (3, b"bc", None)
    store.delete(sha256)
    store.delete(sha256)
    assert store.size(sha256) is None


def test_a_folder_that_is_gone(tmp_path):
    store = FolderBlobs(tmp_path / "blobs")
    store.check()
    (tmp_path / "blobs").rmdir()
    with pytest.raises(ApiError, match="missing") as caught:
        store.check()
    assert caught.value.status == 503
    with pytest.raises(ApiError, match="cannot read"):
        store.read("0" * 64, 0, 1)
