"""docs/mlx-architectures.md: which weights are edited in each architecture of mlx-lm."""

from __future__ import annotations

from importlib import metadata

from tests.support import zoo


def document() -> str:
    """The whole of docs/mlx-architectures.md."""
    lines = [
        "# Architectures of mlx-lm",
        "",
        "Which weights `abl-mlx` edits in a model of each architecture of mlx-lm "
        f"{metadata.version('mlx-lm')}. They are found by",
        "probing the forward pass (`abl_mlx/models/writers.py`), not from this table: the table "
        "is what",
        "was found in tiny models with random weights. *Edited* means that a random direction was",
        "removed from these weights and its component is below 1e-5 in float32 after every layer",
        "(`tests/models/test_zoo.py`). Behind weights with a star stands a norm, whose gain is "
        "folded",
        "into the edit. Biases are edited with their weights, and stacks of experts all at once.",
        "Lines with a comma are other settings of an architecture. What is refused was tried on a",
        "CPU.",
        "",
        "Generated: `python -m tools.regenerate`.",
        "",
        "| Architecture | Writers | Gain | Status |",
        "|---|---|---|---|",
    ]
    for name in sorted([*zoo.architectures(), *zoo.VARIANTS], key=str.lower):
        one = zoo.outcome(name)
        cells = ", ".join(f"`{p}`{'*' if gain else ''}" for p, gain in one.writers.items())
        gains = sum(one.writers.values())
        gain = "norm" if gains else ("" if one.reason else "none")
        status = f"refused: {one.reason}" if one.reason else "edited"
        lines.append(f"| {name} | {cells} | {gain} | {status.replace('|', '')} |")
    return "\n".join(lines) + "\n"
