"""Masking of credentials, and the default folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.contracts.errors import EsperError, KernelNotFoundError, RegistryUnavailableError
from esper.contracts.paths import cache_dir, default_registry_dir
from esper.contracts.registry import mask_credentials


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("https://user:secret@host:80/path", "https://***@host:80/path"),
        ("https://token@host", "https://***@host"),
        ("https://a@b:c@host/x", "https://***@host/x"),
        ("https://host/x?token=secret#frag", "https://host/x?***"),
        ("https://host/x", "https://host/x"),
        ("file:///a/b", "file:///a/b"),
        ("unix:///run/redis.sock?password=secret", "unix:///run/redis.sock?***"),
        ("/a/b", "/a/b"),
        ("http://[::1", "***"),
        ("file:///home/me@work/registry", "file:///home/me@work/registry"),
        ("http://[::1]:80/x", "http://[::1]:80/x"),
        ("http://:SEC/RET@host:8470", "http://***@host:8470"),
        ("http://SEC/RET@host/x", "http://***@host/x"),
        ("http://:SEC?RET@host", "http://***"),
        ("http://:SEC#RET@host", "http://***"),
        ("http://:SECRET", "http://***"),
        ("http://user:SECRET/x", "http://***"),
        ("http://host?mail=a@b", "http://***"),
    ],
)
def test_mask(url, masked):
    assert mask_credentials(url) == masked


@given(st.text("abc:/@?#", min_size=1, max_size=8))
def test_a_password_never_shows(rest):
    # Whatever surrounds it: the marker is in the user information or in the query.
    assert "SECRET" not in mask_credentials("https://u:SECRET@host/" + rest.replace("?", "").replace("#", ""))
    assert "SECRET" not in mask_credentials("https://host/x?t=SECRET" + rest)
    # Nothing of it is percent-encoded.
    assert "SECRET" not in mask_credentials(f"https://:SECRET{rest}SECRET@host")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("ESPER_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == Path.home() / ".cache" / "esper"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "esper"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    assert cache_dir() == Path.home() / ".cache" / "esper"
    monkeypatch.setenv("ESPER_CACHE_DIR", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"


def test_registry_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert default_registry_dir() == Path.home() / ".local" / "share" / "esper" / "registry"
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_registry_dir() == tmp_path / "esper" / "registry"


def test_errors_are_what_callers_who_know_nothing_of_esper_catch():
    assert issubclass(KernelNotFoundError, (EsperError,)) and issubclass(KernelNotFoundError, LookupError)
    assert issubclass(RegistryUnavailableError, (EsperError,)) and issubclass(RegistryUnavailableError, OSError)
