"""A small registry over HTTP that can misbehave: cut bodies, wait, refuse, drip, lie, redirect, hang.

It speaks as much of Urza's API as a client reads. ``plan`` holds, by kind of request ("metadata", "blob", "list",
"publish"), what to do to the next answers of that kind, in order; when the plan is through, answers are right.

With ``elsewhere`` its blobs are in a store, as Urza's are in S3: the API's own address of a blob leads there (kind
"way"), and so does the metadata.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from urllib.parse import parse_qs, unquote, urlsplit

from esper.artifacts import Artifact
from esper.artifacts.text import summarise


@dataclass(frozen=True)
class Request:
    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    connection: int
    elsewhere: bool = False

    @property
    def kind(self) -> str:
        path = urlsplit(self.target).path
        if self.method == "POST":
            return "publish"
        if self.elsewhere and path.endswith("/blob") and not path.startswith("/store/"):
            return "way"
        return "blob" if path.endswith("/blob") else "list" if path == "/api/v1/kernels" else "metadata"


@dataclass(frozen=True)
class Reply:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    #: Bytes of the body after which the connection is dropped.
    cut: int | None = None
    #: Seconds before anything is sent.
    delay: float = 0.0
    #: Bytes sent at once, and seconds between.
    drip: tuple[int, float] | None = None
    #: Leave out Content-Length; the end of the connection ends the body.
    unsized: bool = False


Change = Callable[[Reply], Reply]


def with_(**changes: object) -> Change:
    """Answer as always, but so."""
    return lambda reply: replace(reply, **changes)


def error(status: int, message: str = "because", **headers: str) -> Change:
    """Answer with a refusal."""
    body = json.dumps({"error": {"code": "no", "message": message}}).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda _: Reply(status, body, names)


class FaultServer:
    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}
        self.metadata_changes: dict[str, object] = {}
        self.plan: defaultdict[str, list[Change]] = defaultdict(list)
        self.requests: list[Request] = []
        self.connections = 0
        self.elsewhere = False
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._ready = threading.Event()
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, data: bytes) -> str:
        artifact_id = Artifact.open(data, policy="standard").artifact_id
        self.contents[artifact_id] = data
        return artifact_id

    def kinds(self) -> list[str]:
        return [request.kind for request in self.requests]

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(30)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", self.port))
        self.port = self._server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()

    async def _close(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        connection = self.connections
        self._writers.add(writer)
        try:
            while request := await self._read(reader, connection):
                self.requests.append(request)
                plan = self.plan[request.kind]
                reply = self._answer(request)
                if plan:
                    reply = plan.pop(0)(reply)
                if not await self._send(writer, reply):
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _read(self, reader: asyncio.StreamReader, connection: int) -> Request | None:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")[:-2]
        method, target, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        return Request(method, target, headers, body, connection, self.elsewhere)

    def _answer(self, request: Request) -> Reply:
        parts = urlsplit(request.target)
        name = unquote(parts.path.removeprefix("/store").removeprefix("/api/v1/kernels").strip("/"))
        if request.kind == "publish":
            assert hashlib.sha256(request.body).hexdigest() == request.headers["x-esper-sha256"]
            artifact_id = self.add(request.body)
            return _json({"artifact_id": artifact_id, "status": "PENDING_BENCHMARKING"}, 201)
        if request.kind == "list":
            return self._page({key: values[0] for key, values in parse_qs(parts.query).items()})
        if request.kind == "way":
            return Reply(307, b"", {"Location": f"{self.url}/store/{name}"})
        if request.kind == "blob":
            name = name.removesuffix("/blob")
            if name not in self.contents:
                return error(404, "no such kernel")(Reply())
            return self._blob(self.contents[name], request)
        if name not in self.contents:
            return error(404, "no such kernel")(Reply())
        return _json(self._document(name) | self.metadata_changes)

    def _document(self, artifact_id: str) -> dict[str, object]:
        data = self.contents[artifact_id]
        artifact = Artifact.open(data, policy="standard")
        return {
            "artifact_id": artifact_id,
            "status": "VALIDATED",
            "sha256": artifact.sha256,
            "size": len(data),
            "manifest": json.loads(artifact.manifest.to_json()),
            "kernel_binary_ref": f"{self.url}/store/{artifact_id}/blob"
            if self.elsewhere
            else f"/api/v1/kernels/{artifact_id}/blob",
            "tags": [],
            "history": [],
        }

    def _page(self, query: dict[str, str]) -> Reply:
        names = sorted(name for name in self.contents if name.startswith(query.get("prefix", "")))
        names = [name for name in names if name > query.get("cursor", "")]
        shown = names[:2]  # small pages, whatever was asked for
        items = []
        for name in shown:
            document = self._document(name)
            info = summarise(Artifact.open(self.contents[name]).manifest)
            items.append({key: document[key] for key in ("artifact_id", "sha256", "size", "status")} | {"info": info})
        return _json({"items": items, "next_cursor": shown[-1] if len(names) > len(shown) else None})

    def _blob(self, data: bytes, request: Request) -> Reply:
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        headers = {"ETag": etag, "Accept-Ranges": "bytes"}
        wanted = request.headers.get("range")
        if wanted and request.headers.get("if-range", etag) == etag:
            first = int(wanted.removeprefix("bytes=").removesuffix("-"))
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            return Reply(206, data[first:], headers)
        return Reply(200, data, headers)

    async def _send(self, writer: asyncio.StreamWriter, reply: Reply) -> bool:
        """Whether the connection may be used again."""
        await asyncio.sleep(reply.delay)
        headers = dict(reply.headers)
        if not reply.unsized:
            headers.setdefault("Content-Length", str(len(reply.body)))
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"HTTP/1.1 {reply.status} X\r\n{head}\r\n".encode())
        body = reply.body if reply.cut is None else reply.body[: reply.cut]
        size, pause = reply.drip or (len(body) or 1, 0.0)
        for begin in range(0, len(body), size):
            writer.write(body[begin : begin + size])
            await writer.drain()
            await asyncio.sleep(pause)
        await writer.drain()
        return reply.cut is None and not reply.unsized


def _json(value: object, status: int = 200) -> Reply:
    return Reply(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


@contextmanager
def running_server() -> Iterator[FaultServer]:
    server = FaultServer()
    server.start()
    try:
        yield server
    finally:
        server.stop()
