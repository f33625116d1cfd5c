"""Urza's link and the proxies that the environment names."""

from __future__ import annotations

import asyncio
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from esper.contracts.errors import EsperError
from esper.services.tezzeret.urza_link import UrzaLink


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server():
    """Answers everything with an object, and remembers what it was asked for."""
    asked = []

    class Answering(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_):
            pass

    running = HTTPServer(("127.0.0.1", 0), Answering)
    running.asked = asked
    thread = threading.Thread(target=running.serve_forever, args=(0.05,))
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def ask(url: str) -> None:
    async def main() -> None:
        link = UrzaLink(url)
        try:
            assert await link.ask("GET", "/jobs/x") == (200, {})
        finally:
            await link.close()

    asyncio.run(main())


def test_this_machine_itself_is_asked_without_a_proxy(monkeypatch, server):
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    ask(f"http://127.0.0.1:{server.server_port}")
    ask(f"http://localhost:{server.server_port}/api/v1")
    assert server.asked == ["/api/v1/jobs/x"] * 2


@pytest.mark.parametrize("scheme", ["http://", ""])
def test_another_is_asked_through_it(monkeypatch, server, scheme):
    monkeypatch.setenv("http_proxy", f"{scheme}127.0.0.1:{server.server_port}")
    ask("http://urza.invalid:8470")
    assert server.asked == ["http://urza.invalid:8470/api/v1/jobs/x"]
    monkeypatch.setenv("no_proxy", "urza.invalid")
    with pytest.raises(EsperError, match=r"Urza http://urza.invalid:8470 does not answer"):
        ask("http://urza.invalid:8470")
    assert len(server.asked) == 1


@pytest.mark.parametrize("proxy", ["http://u:PROXY/SECRET@127.0.0.1:1", "http://u:SECRET@127.0.0.1:99999"])
def test_of_a_proxy_that_is_none_nothing_is_shown(monkeypatch, proxy):
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises(EsperError, match=r"the proxy that the environment names cannot be used \(http_proxy") as caught:
        ask("http://urza.invalid:8470")
    assert "SECRET" not in str(caught.value)
    assert "PROXY" not in str(caught.value)


def test_a_host_that_is_none():
    with pytest.raises(ValueError, match="is not the address of an Urza"):
        UrzaLink("http://a\N{COMBINING ACUTE ACCENT}\N{ZERO WIDTH SPACE}:1")
