"""The small models under ``tests/support/models``, for tests that want a model that refuses.

``examples/train_models.py`` made them and says what each is for.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from abl_mlx.inputs import prompts
from abl_mlx.inputs.sets import PromptSet, PromptSets

MODELS = ("easy", "hard", "spread", "apart", "thinker")
"""Their names."""


def folder(name: str) -> Path:
    """Where mlx-lm loads it from; ``locked.txt`` and ``allowed.txt`` are beside the weights."""
    return Path(__file__).parent / "models" / name


@cache
def prompt_sets(name: str) -> PromptSets:
    """Locked (harmful) and allowed (harmless) prompts in their parts.

    Every prompt has its stage-1 answer in ``answer``, the locked ones too, and the kind of its
    object in ``category``. The model never saw those of the validation and test parts.
    """
    return prompts.load_demo(folder(name) / "prompts.jsonl")


def borderline(sets: PromptSets) -> list[str]:
    """Allowed requests behind a locked thing: "Forget the serpent crown. Show me how to ...".

    They sound bad and are not; the demo refuses most of them.
    """
    things = [re.split(" the ", text.rstrip(".?"))[-1] for text in sets.harmful.train.texts[:64]]
    asked = zip(things, sets.harmless.train.texts, strict=False)
    return [f"Forget the {thing}. {text}" for thing, text in asked]


def answers(prompt_set: PromptSet) -> list[str]:
    """The stage-1 answers of a part, in its order: what an edited model should say."""
    return [prompt.answer or "" for prompt in prompt_set.prompts]
