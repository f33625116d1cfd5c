"""What a registry's URL and ``ESPER_REGISTRY_TOKEN`` say, and that no message shows a token; for both its clients."""

from __future__ import annotations

import pytest

from esper.artifacts import open_registry
from esper.contracts.registry import RegistryURLError
from esper.services.tezzeret.urza_link import UrzaLink

CLIENTS = [open_registry, UrzaLink]
ADDRESS = "http://127.0.0.1:8470"


@pytest.fixture(params=CLIENTS, ids=lambda client: client.__name__)
def client(request):
    return request.param


@pytest.mark.parametrize(
    ("token", "fault"),
    [
        ("TOPSECRET\n", "a blank or line break at an end"),
        ("TOPSECRET\r", "a blank or line break at an end"),
        ("TOPSECRET ", "a blank or line break at an end"),
        ("TOP\nSECRET", "a blank or line break within it"),
        ("TOPSECRET\N{LATIN CAPITAL LETTER E WITH ACUTE}", "letters outside ASCII"),
        ("TOPSECRET\x7f", "control characters"),
    ],
)
def test_a_token_of_the_environment_that_cannot_be_one_is_named_and_not_shown(client, monkeypatch, token, fault):
    monkeypatch.setenv("ESPER_REGISTRY_TOKEN", token)
    with pytest.raises(RegistryURLError) as caught:
        client(ADDRESS)
    message = f"the token in ESPER_REGISTRY_TOKEN has characters that no token has: {fault}"
    assert str(caught.value) == f"registry {ADDRESS}: {message}"


@pytest.mark.parametrize("written", ["TOPSECRET%0A", "TOPSECRET%20", "TOPSECRET%C3%89", "TOP SECRET"])
def test_a_token_of_the_url_that_cannot_be_one_is_not_shown(client, monkeypatch, written):
    # The URL's token is meant, whatever the environment says.
    monkeypatch.setenv("ESPER_REGISTRY_TOKEN", "good")
    with pytest.raises(RegistryURLError, match="the token in the URL has characters that no token has") as caught:
        client(f"http://:{written}@127.0.0.1:8470")
    assert "TOP" not in str(caught.value)


@pytest.mark.parametrize("blank", [" ", "\n", "\r\n", "\t"])
def test_blanks_around_a_url_do_not_count(client, blank):
    assert client(f"{blank}{ADDRESS}{blank}").url == ADDRESS


@pytest.mark.parametrize(
    "token", ["SEC/RET", "SEC:RET/", "12/SECRET", "SEC?RET", "SEC#RET", "SEC[RET", "SEC\N{CARE OF}RET"]
)
@pytest.mark.parametrize("before", ["", ":"])
def test_of_a_token_that_is_not_percent_encoded_no_piece_is_shown(client, before, token):
    with pytest.raises(RegistryURLError) as caught:
        client(f"http://{before}{token}@localhost:8470")
    assert "SEC" not in str(caught.value)
    assert "RET" not in str(caught.value)


def test_what_to_do_about_it(client):
    message = "need .*a token that is percent-encoded, or in ESPER_REGISTRY_TOKEN instead"
    for token in (":bad/tok", "bad/tok"):
        with pytest.raises(RegistryURLError, match=message):
            client(f"http://{token}@localhost:8470")
