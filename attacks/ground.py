"""Prepares attacks: makes the sound inputs, and imports the tool into this process."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path


def build(base: Path) -> None:
    """Make the sound inputs in another process: this one must compute nothing before it forks."""
    base.mkdir()
    subprocess.run([sys.executable, "-m", "attacks.base", str(base)], check=True)


def warm() -> None:
    """Import everything that commands import, so that forked processes need not."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_DOWNLOAD_TIMEOUT"] = os.environ["HF_HUB_ETAG_TIMEOUT"] = "3"
    for name in (
        "abl_mlx.commands.measure_apply", "abl_mlx.commands.run", "abl_mlx.commands.find",
        "abl_mlx.commands.evaluate_model", "abl_mlx.commands.undo", "abl_mlx.commands.audit",
        "abl_mlx.commands.conversion", "abl_mlx.commands.show", "abl_mlx.commands.session",
        "abl_mlx.search.loop", "mlx_lm", "transformers", "optuna", "pyarrow.parquet", "gguf",
        "huggingface_hub",
    ):  # fmt: skip
        importlib.import_module(name)
