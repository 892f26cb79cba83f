"""The environment in which huggingface_hub takes a server on this machine for Hugging Face."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.places import ROOT


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
