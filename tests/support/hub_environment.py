"""The environment in which huggingface_hub takes a server on this machine for Hugging Face."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.places import ROOT


def taken_for_the_hub(url: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub in this process take a server for Hugging Face.

    Args:
        url: the server.
        home: the folder that holds its cache, and abl-mlx's own.
        monkeypatch: undoes it.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    for name, value in {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hf"),
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)


def hub_environment(url: str, home: Path, **more: str) -> dict[str, str]:
    """The environment of a new Python.

    Args:
        url: the server.
        home: the folder that holds its cache.
        more: further variables.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k}
    return {
        **kept,
        "HF_ENDPOINT": url,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(ROOT),
        **more,
    }
