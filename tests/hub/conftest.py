"""Ways for a test to be someone at the Hub, and to lose patience with it."""

from __future__ import annotations

import pytest

from tests.hub.server import Hub


@pytest.fixture
def signed_in(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> str:
    """The token of the Hub, which the client finds in its environment."""
    monkeypatch.setenv("HF_TOKEN", hub.token)
    return hub.token


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client, here and in child processes, waits one second for an answer."""
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", 1)
        monkeypatch.setenv(name, "1")
