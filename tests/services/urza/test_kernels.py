from __future__ import annotations

import hashlib
import itertools
import json

import pytest

pytest.importorskip("sqlalchemy")

import sqlalchemy as sa

from esper.artifacts import Artifact
from esper.services.urza import kernel_store
from esper.services.urza.lifecycle import KERNEL_STATUSES, TRANSITIONS
from tests.artifacts.samples import sample_with_binaries, with_manifest
from tests.services.urza.api import artifact, error, running_api


def files(folder):
    return sorted(path.name for path in (folder / "urza" / "blobs").rglob("*") if path.is_file())


def test_an_upload_is_described_and_downloaded(api):
    data = artifact()
    answer = api.upload(data, tags="fast,vision")
    assert answer.status_code == 201
    opened = Artifact.open(data)
    path = f"/api/v1/kernels/{opened.artifact_id}"
    assert answer.headers["location"] == path
    assert answer.json() == {
        "artifact_id": opened.artifact_id,
        "sha256": opened.sha256,
        "size": len(data),
        "status": "PENDING_BENCHMARKING",
        "kernel_binary_ref": f"{path}/blob",
    }
    found = api("GET", path).json()
    assert found["manifest"] == json.loads(opened.manifest.to_json())
    assert found["tags"] == ["fast", "vision"]
    assert found["metrics"] == {}
    assert [(entry["from"], entry["to"], entry["by"]) for entry in found["history"]] == [
        (None, "PENDING_BENCHMARKING", "admin")
    ]
    assert found["created_at"].endswith("Z")
    assert api("GET", found["kernel_binary_ref"]).content == data


def test_the_same_bytes_twice_are_one(api, tmp_path):
    first, second = api.upload(artifact(), tags="a"), api.upload(artifact(), tags="b,a")
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json() == second.json()
    assert len(api("GET", "/api/v1/kernels").json()["items"]) == 1
    assert api("GET", f"/api/v1/kernels/{first.json()['artifact_id']}").json()["tags"] == ["a", "b"]
    assert files(tmp_path) == [first.json()["sha256"]]


def test_what_is_refused_leaves_nothing(api, tmp_path):
    data = artifact()
    altered = data[:-1] + bytes([data[-1] ^ 1])
    lying = with_manifest(data, lambda manifest: manifest.update(seed="x"))
    cases = [
        (data, hashlib.sha256(b"other").hexdigest(), 422, "hash_mismatch"),
        (altered, None, 422, "invalid_artifact"),
        (lying, None, 422, "invalid_artifact"),
        (b"", None, 422, "invalid_artifact"),
        (data[:500], None, 422, "invalid_artifact"),
        (data, "abc", 422, "invalid"),
    ]
    for content, sha256, status, code in cases:
        answer = api.upload(content, sha256=sha256)
        assert (answer.status_code, error(answer)) == (status, code)
        assert str(tmp_path) not in answer.text
    assert api("POST", "/api/v1/kernels", content=data).status_code == 422
    assert api.upload(data, tags="no space").status_code == 422
    assert api("GET", "/api/v1/kernels").json() == {"items": [], "next_cursor": None}
    assert files(tmp_path) == []


def test_too_large_is_refused_declared_or_not(tmp_path):
    with running_api(tmp_path, max_bytes=1000) as api:
        data = artifact()
        assert len(data) > 1000
        declared = api.upload(data)
        assert (declared.status_code, error(declared)) == (413, "too_large")
        headers = {"X-Esper-SHA256": hashlib.sha256(data).hexdigest()}
        chunked = api("POST", "/api/v1/kernels", content=iter([data[:900], data[900:]]), headers=headers)
        assert (chunked.status_code, error(chunked)) == (413, "too_large")
        assert files(tmp_path) == []


def test_json_bodies_are_bounded(tmp_path):
    with running_api(tmp_path, max_json_bytes=500) as api:
        body = json.dumps({"tags_required": ["a" * 30] * 30}).encode()
        kind = {"Content-Type": "application/json"}
        for content in (body, iter([body[:300], body[300:]])):
            answer = api("POST", "/api/v1/kernels/query", content=content, headers=kind)
            assert (answer.status_code, error(answer)) == (413, "too_large")


def test_a_damaged_blob_is_reported_and_mended_by_another_upload(local, tmp_path):
    artifact_id = local.uploaded()
    (blob,) = (path for path in (tmp_path / "urza" / "blobs").rglob("*") if path.is_file())
    for damage in (lambda: blob.write_bytes(b"short"), blob.unlink):
        damage()
        answer = local("GET", f"/api/v1/kernels/{artifact_id}/blob")
        assert (answer.status_code, error(answer)) == (500, "blob_damaged")
        assert local.upload(artifact()).status_code == 200
        assert local("GET", f"/api/v1/kernels/{artifact_id}/blob").content == artifact()


def test_a_kernel_that_cannot_be_recorded_leaves_no_blob(local, tmp_path, monkeypatch):
    tags = ",".join(f"t{number}" for number in range(32))
    monkeypatch.setattr(kernel_store, "MAX_TAGS", 31)
    assert local.upload(artifact(), tags=tags).status_code == 422
    assert files(tmp_path) == []

    def gone(*_, **__):
        raise sa.exc.OperationalError("INSERT", {}, Exception("gone"))

    # The database goes away just then: the mark stays beside the blob.
    monkeypatch.setattr(kernel_store, "insert", gone)
    with monkeypatch.context() as down:
        down.setattr(local.service, "drop_unrecorded", gone)
        answer = local.upload(artifact())
        assert (answer.status_code, error(answer)) == (503, "database_unavailable")
    sha256 = hashlib.sha256(artifact()).hexdigest()
    blob, mark = files(tmp_path)
    assert blob == sha256 and mark.startswith(f"storing-{sha256}-")
    monkeypatch.undo()
    assert local.upload(artifact()).status_code == 201
    local.service._sweep()
    assert files(tmp_path) == [sha256]
    assert local("GET", "/api/v1/kernels").json()["items"][0]["sha256"] == sha256


def test_unknown_and_impossible_ids(api):
    for suffix in ("", "/blob"):
        unknown = api("GET", f"/api/v1/kernels/0123456789abcdef-any-fast-01234567{suffix}")
        assert (unknown.status_code, error(unknown)) == (404, "not_found")
        assert api("GET", f"/api/v1/kernels/..%2fpasswd{suffix}").status_code in (404, 422)
        assert api("GET", f"/api/v1/kernels/NOT-AN-ID{suffix}").status_code == 422


def test_metadata_is_revalidated(local):
    artifact_id = local.uploaded()
    path = f"/api/v1/kernels/{artifact_id}"
    first = local("GET", path)
    etag = first.headers["etag"]
    assert local("GET", path).headers["etag"] == etag
    for header in (etag, f'"other", W/{etag}', "*"):
        unchanged = local("GET", path, headers={"If-None-Match": header})
        assert (unchanged.status_code, unchanged.content, unchanged.headers["etag"]) == (304, b"", etag)
    assert local.set_status(artifact_id, "VALIDATED").status_code == 200
    changed = local("GET", path, headers={"If-None-Match": etag})
    assert changed.status_code == 200 and changed.headers["etag"] != etag
    assert changed.json()["status"] == "VALIDATED"
    # Tags of a second upload change it too.
    assert local.upload(artifact(), tags="new").status_code == 200
    assert local("GET", path).json()["tags"] == ["new"]


@pytest.mark.parametrize("before", KERNEL_STATUSES)
def test_every_move_of_the_life_cycle(local, before):
    way = {
        "PENDING_BENCHMARKING": [],
        "VALIDATED": ["VALIDATED"],
        "REJECTED": ["REJECTED"],
        "DEPRECATED": ["VALIDATED", "DEPRECATED"],
    }
    for seed, after in enumerate(KERNEL_STATUSES):
        artifact_id = local.uploaded(seed)
        for status in way[before]:
            assert local.set_status(artifact_id, status).status_code == 200
        answer = local.set_status(artifact_id, after, reason="because")
        if after in TRANSITIONS["kernel"][before]:
            assert answer.status_code == 200
            last = answer.json()["history"][-1]
            assert (last["from"], last["to"], last["by"], last["reason"]) == (before, after, "admin", "because")
        else:
            assert (answer.status_code, error(answer)) == (409, "illegal_transition")
            assert local("GET", f"/api/v1/kernels/{artifact_id}").json()["status"] == before


def test_metrics_are_kept_and_replaced_by_name(api):
    artifact_id = api.uploaded()
    api.set_status(artifact_id, "VALIDATED", metrics={"latency_us": 12.5, "memory_bytes": 4096})
    found = api.set_status(artifact_id, "DEPRECATED", metrics={"latency_us": 9}).json()
    assert found["metrics"] == {"latency_us": 9.0, "memory_bytes": 4096}
    assert len(found["history"]) == 3


def test_lists_come_in_pages_and_can_be_narrowed(api):
    ids = sorted(api.uploaded(seed) for seed in range(5))
    other = api.uploaded(0, 3, 3)
    api.set_status(ids[2], "REJECTED")
    everything = sorted([*ids, other])
    for limit in (1, 2, 6, 100):
        got, cursor, pages = [], None, 0
        while True:
            page = api("GET", "/api/v1/kernels", params={"limit": limit, **({"cursor": cursor} if cursor else {})})
            got += [item["artifact_id"] for item in page.json()["items"]]
            pages, cursor = pages + 1, page.json()["next_cursor"]
            if cursor is None:
                break
        assert got == everything
        assert pages == -(-len(everything) // limit)
    named = api("GET", "/api/v1/kernels", params={"prefix": ids[0][:-3]}).json()["items"]
    assert [item["artifact_id"] for item in named] == [name for name in everything if name.startswith(ids[0][:-3])]
    # The underscore stands for itself, not for any character.
    assert api("GET", "/api/v1/kernels", params={"prefix": "_" * 5}).json()["items"] == []
    rejected = api("GET", "/api/v1/kernels", params={"status": "REJECTED"}).json()["items"]
    assert [item["artifact_id"] for item in rejected] == [ids[2]]
    assert rejected[0]["info"]["name"] == "bottleneck"
    bad = api("GET", "/api/v1/kernels", params={"cursor": "!!"})
    assert (bad.status_code, error(bad)) == (422, "bad_cursor")
    assert api("GET", "/api/v1/kernels", params={"limit": 0}).status_code == 422


def ask(api, **wanted):
    answer = api("POST", "/api/v1/kernels/query", json=wanted)
    assert answer.status_code == 200, answer.text
    return [item["artifact_id"] for item in answer.json()["items"]]


def test_queries_filter(api):
    small = api.uploaded(0, 6, 4, tags="vision,fast")
    large = api.uploaded(0, 8, 4, tags="vision,slow")
    assert set(ask(api)) == {small, large}
    assert ask(api, d_in=6) == [small]
    assert set(ask(api, d_out=4)) == {small, large}
    assert ask(api, tags_required=["vision", "fast"]) == [small]
    assert ask(api, tags_required=["vision", "vision", "slow"]) == [large]
    assert ask(api, tags_excluded=["slow"]) == [small]
    assert ask(api, dtype="float16") == []
    assert set(ask(api, dtype="float32", family="bottleneck")) == {small, large}
    assert ask(api, family="gated") == []
    # Without binaries a kernel runs anywhere.
    assert set(ask(api, architecture="sm_90")) == {small, large}
    # Nothing was measured yet, so nothing is known to be fast enough.
    assert ask(api, max_latency_us=1e9) == []
    api.set_status(small, "VALIDATED", metrics={"latency_us": 10, "memory_bytes": 100})
    assert ask(api, max_latency_us=10, max_memory_bytes=100) == [small]
    assert ask(api, max_latency_us=9.9) == []
    api.set_status(small, "DEPRECATED")
    assert ask(api) == [large]
    assert ask(api, statuses=["DEPRECATED"]) == [small]


def test_queries_rank(api):
    pending, slow, quick, tagged = (api.uploaded(seed) for seed in range(4))
    api.upload(artifact(3), tags="wanted")
    api.set_status(slow, "VALIDATED", metrics={"latency_us": 5000})
    api.set_status(quick, "VALIDATED", metrics={"latency_us": 5})
    # A preferred tag outweighs everything else; then what is validated; then what is quicker.
    assert ask(api, tags_preferred=["wanted"]) == [tagged, quick, slow, pending]
    assert ask(api, limit=2) == [quick, slow]
    first, second = itertools.islice(
        api("POST", "/api/v1/kernels/query", json={"tags_preferred": ["wanted"]}).json()["items"], 2
    )
    assert first["score"] == 1.0 and first["tags"] == ["wanted"]
    assert second["score"] < 1.0 and second["latency_us"] == 5.0


def test_binaries_count_for_their_architectures(api, monkeypatch):
    # Whom this machine trusts is no matter of the registry's.
    monkeypatch.setenv("ESPER_TRUST_POLICY", "strict")
    plain = api.uploaded()
    answer = api.upload(sample_with_binaries())
    assert answer.status_code == 201
    built = answer.json()["artifact_id"]
    assert "-sm_80_sm_90-" in built
    assert len(api("GET", f"/api/v1/kernels/{built}").json()["manifest"]["binaries"]) == 3
    for architecture, found in [("sm_80", [built, plain]), ("sm_90", [built, plain]), ("sm_100", [plain])]:
        assert ask(api, architecture=architecture) == found
    # Without the question, binaries are no merit: equal scores come in the order of ids.
    assert ask(api) == sorted([built, plain])


def test_queries_refuse_what_they_do_not_know(local):
    for wanted in ({"tag": []}, {"d_in": "6"}, {"tags_required": ["bad tag"]}, {"limit": 1000}, {"max_latency_us": -1}):
        answer = local("POST", "/api/v1/kernels/query", json=wanted)
        assert (answer.status_code, error(answer)) == (422, "invalid")
    for text in (b"{", b'{"max_latency_us": NaN}', b"\xff", b"[" * 100_000):
        kind = {"Content-Type": "application/json"}
        answer = local("POST", "/api/v1/kernels/query", content=text, headers=kind)
        assert answer.status_code in (400, 422)
        assert error(answer)
