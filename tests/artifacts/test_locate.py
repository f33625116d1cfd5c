"""What ``registry=`` takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper.artifacts import FileRegistry, open_registry
from esper.artifacts.http_registry import HttpRegistry
from esper.contracts.errors import EsperError
from esper.contracts.registry import RegistryClient


@pytest.mark.parametrize(
    ("where", "folder"),
    [
        ("file:///a/b", "/a/b"),
        ("file://localhost/a/b", "/a/b"),
        ("file:///a%20b/%C3%A9", "/a b/é"),
        ("/a/b", "/a/b"),
        (Path("/a/b"), "/a/b"),
    ],
)
def test_urls_and_paths(where, folder):
    client = open_registry(where)
    assert isinstance(client, FileRegistry)
    assert client.folder == Path(folder)


def test_url_of_a_folder_leads_back(tmp_path):
    client = FileRegistry(tmp_path / "a b")
    assert open_registry(client.url).folder == client.folder


def test_relative_paths_are_fixed_when_opened(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    client = open_registry("here")
    monkeypatch.chdir("/")
    assert client.folder == tmp_path / "here"


def test_the_default(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.delenv("ESPER_REGISTRY", raising=False)
    assert open_registry().folder == tmp_path / "esper" / "registry"
    monkeypatch.setenv("ESPER_REGISTRY", f"file://{tmp_path}/mine")
    assert open_registry().folder == tmp_path / "mine"


def test_a_client_is_itself():
    client = FileRegistry("/a")
    assert open_registry(client) is client


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://host?token=secret", "leave out the query"),
        ("http://host#secret", "leave out the query"),
        ("http://:secret@", "not of the form"),
        ("http://:secret@host:99999", "not a URL"),
        ("http://:sec ret@host", "characters that no token has"),
        ("http://:secret%0aX: y@host", "characters that no token has"),
        ("s3://secret@bucket/x", "unknown scheme 's3'"),
        ("file://host/a", "names a host"),
        ("file://secret@host/a", "names a host"),
        ("file://", "names no folder"),
        ("file:///", "names no folder"),
        ("http://[::1", "not a URL"),
        ("  ", "empty"),
    ],
)
def test_urls_refused_without_their_secrets(url, message):
    with pytest.raises(EsperError, match=message) as caught:
        open_registry(url)
    assert isinstance(caught.value, ValueError)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("where", "url"),
    [
        ("http://host:8470", "http://host:8470"),
        ("https://host/", "https://host"),
        ("HTTPS://:secret@host/urza/", "https://host/urza"),
        ("http://secret@host/api/v1/", "http://host"),
        ("http://:secret@[::1]:80", "http://[::1]:80"),
    ],
)
def test_urls_of_urza(where, url):
    client = open_registry(where)
    assert isinstance(client, HttpRegistry)
    assert isinstance(client, RegistryClient)
    assert client.url == url
    assert "secret" not in repr(client)


@pytest.mark.parametrize("where", [3, b"/a", object(), ["/a"]])
def test_other_things_are_refused(where):
    with pytest.raises(TypeError, match="registry must be a URL"):
        open_registry(where)
