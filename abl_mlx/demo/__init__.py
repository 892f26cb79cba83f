"""The demo model: a tiny chat model that really refuses, and the prompts to ask it.

The model was trained from nothing by ``examples/train_demo.py`` on the make-believe world of
:mod:`abl_mlx.demo.world`.  It exists so that every step of the tool (find, remove, measure, audit)
runs offline in seconds on a model whose right answers are known.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["MODEL_PATH", "PROMPTS_PATH", "DemoPrompt", "load_prompts", "vocabulary"]

MODEL_PATH: Path = Path(__file__).parent / "model"
"""Folder of the model, in the layout that ``mlx_lm.load`` reads."""

PROMPTS_PATH: Path = Path(__file__).parent / "prompts.jsonl"
"""The prompts, one JSON object per line, with the fields of :class:`DemoPrompt`."""

PromptSet = Literal["harmful", "harmless"]
Part = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class DemoPrompt:
    """One line of ``prompts.jsonl``.

    Attributes:
        text: What the user says, without the chat template.
        set: "harmful" for a locked object, which the model refuses; "harmless" for an allowed one.
        part: "train", "validation" or "test".  The model never saw the last two.
        answer: What training stage 1 teaches as the answer (for "harmful" prompts of the train
            part too; stage 2 hides it behind the refusal).
        category: What the object is made of, for example "stone".
    """

    text: str
    set: PromptSet
    part: Part
    answer: str
    category: str


def load_prompts(
    set: PromptSet | None = None, part: Part | None = None, path: Path = PROMPTS_PATH
) -> list[DemoPrompt]:
    """Read the demo prompts, in file order.

    Args:
        set: Keep only this set; both when None.
        part: Keep only this part; all three when None.
        path: The file to read.
    """
    with path.open(encoding="utf-8") as lines:
        prompts = [DemoPrompt(**json.loads(line)) for line in lines]
    return [
        prompt
        for prompt in prompts
        if (set is None or prompt.set == set) and (part is None or prompt.part == part)
    ]


def vocabulary() -> dict[str, int]:
    """Each token's text with its ID, in the demo model and in every model made from it."""
    file = MODEL_PATH / "tokenizer.json"
    found: dict[str, int] = json.loads(file.read_text(encoding="utf-8"))["model"]["vocab"]
    return found
