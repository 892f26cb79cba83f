"""`--lm-eval`: runs lm-evaluation-harness on a model in MLX, with mlx-lm's own `evaluate`."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from convert.base.errors import UserError
from convert.base.scratch import scratch


def task_names(text: str) -> list[str]:
    """The tasks in ``arc_easy,hellaswag``.

    Raises:
        UserError: when the text names no task.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or any(name.startswith("-") for name in names):
        raise UserError(f"--lm-eval {text!r}: name tasks with commas between, such as arc_easy.")
    return names


def check(folder: Path | None, text: str) -> None:
    """Check, before anything is loaded, that the evaluation is possible.

    Args:
        folder: the model's folder; None for a target that is not a folder.
        text: the value of ``--lm-eval``.

    Raises:
        UserError: when the target is no MLX folder, or lm-evaluation-harness is not installed.
    """
    task_names(text)
    if folder is None:
        raise UserError(
            "--lm-eval runs only models in MLX or Hugging Face folders: `abl-mlx convert` makes "
            "one of a .gguf."
        )
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--lm-eval needs lm-evaluation-harness: pip install lm_eval.")


def run(folder: Path, text: str, *, limit: int | None = None) -> dict[str, Any]:
    """Run `python -m mlx_lm evaluate` on the folder; return its results by task, unchanged.

    Args:
        folder: the model's folder.
        text: the value of ``--lm-eval``.
        limit: the largest number of examples for each task.

    Raises:
        UserError: when it fails, with the last line that it printed.
    """
    names = task_names(text)
    with scratch() as place:
        command = [sys.executable, "-m", "mlx_lm", "evaluate", "--model", str(folder)]
        command += ["--output-dir", str(place), "--tasks", *names]
        command += [] if limit is None else ["--limit", str(limit)]
        # Its output is shown to the user; its errors become one sentence.
        done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            said = lines[-1][:300] if lines else f"exit code {done.returncode}"
            raise UserError(f"mlx_lm.evaluate --tasks {' '.join(names)} failed: {said}")
        files = [path for path in place.iterdir() if path.is_file()]
        if len(files) != 1:
            raise UserError("mlx_lm.evaluate wrote no results.")
        return dict(json.loads(files[0].read_text(encoding="utf-8")))
