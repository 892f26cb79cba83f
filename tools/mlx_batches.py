"""docs/mlx-batches.md: how each architecture of mlx-lm is asked for replies."""

from __future__ import annotations

from importlib import metadata

from tests.support import batches, zoo


def document() -> str:
    """The whole of docs/mlx-batches.md."""
    lines = [
        "# Batches of mlx-lm's architectures",
        "",
        "How `abl-mlx` asks a model of each architecture of mlx-lm "
        f"{metadata.version('mlx-lm')} for replies, and which ways",
        "to shorten forward passes it leaves out. Neither is read from this table: each model is",
        "compared once with the plain forward pass of single prompts "
        "(`abl_mlx/models/generation.py`,",
        "`abl_mlx/models/shortcuts.py`), and this is what was found in tiny models with random "
        "weights.",
        f"*Same replies* are those of {len(batches.PROMPTS)} prompts of unequal lengths, asked "
        "for with `--batch-size 32`",
        "(and with `--batch-size 1`), that are the greedy ones of that pass. *Apart* is the",
        "largest difference of a log-probability from it, in nats.",
        "Lines with a comma are other settings of an architecture. All was tried on a CPU.",
        "",
        "Generated: `python -m tools.regenerate`.",
        "",
        "| Architecture | Replies are generated | Left out | Same replies | Apart |",
        "|---|---|---|---|---|",
    ]
    names = sorted([*zoo.architectures(), *zoo.VARIANTS], key=str.lower)
    return "\n".join([*lines, *map(row, names)]) + "\n"


def row(name: str) -> str:
    """The table's row of an architecture or a variant."""
    one = batches.outcome(name)
    if one.way is None:
        return f"| {name} | refused: {one.reason.replace('|', '')} | | | |"
    same = f"{one.same}/{len(batches.PROMPTS)} ({one.alone}/{len(batches.PROMPTS)})"
    apart = "< 0.001" if one.apart < 1e-3 else f"{one.apart:.3f}"
    return f"| {name} | {one.way.value} | {', '.join(one.left_out)} | {same} | {apart} |"
