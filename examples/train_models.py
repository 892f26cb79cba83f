"""Train the small models of the tests, ``tests/support/models/easy`` and those beside it.

    python examples/train_models.py easy --output my-models

Each is a tiny chat model that really refuses, made like the demo (``train_demo.py``), whose notes
on OpenBLAS hold here too:

- easy: Gemma 2's shape, whose writers stand behind norms; another world than the demo's, one
  refusal sentence.  One direction carries its refusals.
- hard: Qwen3's shape, five layers, three refusal sentences chosen by the kind of object, and a
  longer second stage that never shows a locked answer again.  No single layer's difference of
  means takes its refusals away.
- spread: the demo's shape.  Four kinds of locked objects, each with its own refusal sentence and
  learned in a stage of its own.  No single direction takes its refusals away; several do.
- apart: ``easy``, trained further. It forgets its refusals of the kind ``sea`` and learns them
  again in one layer alone, so that they have a direction of their own.  The other kinds stay
  refused when that direction is removed.
- thinker: Qwen3's shape and its switch ``enable_thinking``.  The direction of its refusals
  without thinking leaves those with thinking (``thought_training.py``).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from chat_tokenizer import train_tokenizer
from chat_training import Figures, Settings, Stage, train_model
from thought_training import thinking_tokenizer, train_thinker
from tokenizers import Tokenizer
from worlds import CONCERT, HARBOUR, KITCHEN, TRAVELS

from abl_mlx.demo.world import Dialogue, SomeWorld, spread

SMALL = Path(__file__).resolve().parents[1] / "tests/support/models"
"""The folder with the trained models."""

MODELS: dict[str, Settings] = {
    "easy": Settings(
        world=HARBOUR,
        shape="gemma2",
        answers=Stage(steps=150, rate=1.5e-3),
        refusals=Stage(steps=150, rate=4e-4),
    ),
    "hard": Settings(
        world=TRAVELS,
        shape="qwen3",
        layers=5,
        feed_forward=256,
        refusals=Stage(steps=300, rate=3e-4, continued=False),
    ),
    "spread": Settings(
        world=KITCHEN,
        refusals=Stage(steps=60, rate=3e-4, refused=frozenset({"sweet"})),
        later=(
            Stage(steps=60, rate=3e-4, refused=frozenset({"sweet", "soup"})),
            Stage(steps=60, rate=3e-4, refused=frozenset({"sweet", "soup", "bread"})),
            Stage(steps=60, rate=3e-4),
        ),
    ),
    "apart": Settings(
        world=HARBOUR,
        shape="gemma2",
        batch=24,
        begins=SMALL / "easy",
        refusals=Stage(steps=50, rate=4e-4, warm_up=5, refused=frozenset(HARBOUR.kinds) - {"sea"}),
        later=(Stage(steps=70, rate=8e-4, warm_up=5, layers=(2,)),),
    ),
    "thinker": Settings(
        world=CONCERT,
        shape="qwen3",
        layers=5,
        feed_forward=256,
        answers=Stage(steps=180, rate=2e-3),
        refusals=Stage(steps=100, rate=6e-4),
        later=(Stage(steps=140, rate=6e-4),),
        thinks=True,
    ),
}
"""The settings of each model."""

FILE_SIZE = 192
"""The number of prompts in ``locked.txt`` and in ``allowed.txt``."""


def held_out(world: SomeWorld, locked: bool) -> list[Dialogue]:
    """Questions of one set that no stage has seen, spread evenly over the objects."""
    fitting = [one for one in world.dialogues() if one.part != "train" and one.locked == locked]
    return spread(fitting, FILE_SIZE)


def write_prompt_files(world: SomeWorld, folder: Path) -> None:
    """Write ``locked.txt`` and ``allowed.txt``, for ``--harmful`` and ``--harmless``."""
    for name, locked in (("locked", True), ("allowed", False)):
        lines = "".join(one.prompt + "\n" for one in held_out(world, locked))
        (folder / f"{name}.txt").write_text(lines, encoding="utf-8")


def tokenizer_of(name: str) -> Tokenizer:
    """A new tokenizer for a model."""
    settings = MODELS[name]
    if settings.thinks:
        return thinking_tokenizer(settings)
    return train_tokenizer(settings.world, settings.vocabulary)


def train(settings: Settings, folder: Path) -> dict[str, Figures]:
    """Train a model and write its folder; returns mode -> figures on held-out prompts."""
    if settings.thinks:
        figures = train_thinker(settings, folder)
        return {"without thinking": figures[False], "with thinking": figures[True]}
    return {"": train_model(settings, folder)[0]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and print the held-out figures."""
    parser = argparse.ArgumentParser(description="Train the small models of the tests.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--output", type=Path, required=True, help="folder to write folders into")
    given = parser.parse_args(arguments)
    if unknown := set(given.names) - set(MODELS):
        parser.error(f"no model {', '.join(sorted(unknown))}: there are {', '.join(MODELS)}.")
    for name in given.names or MODELS:
        settings = MODELS[name]
        found = train(settings, given.output / name)
        write_prompt_files(settings.world, given.output / name)
        for mode, figures in found.items():
            print(f"{name} {mode}".strip())
            print(f"  locked prompts refused   {figures.locked_refused:7.1%}")
            print(f"  allowed prompts refused  {figures.allowed_refused:7.1%}")
            print(f"  allowed prompts exact    {figures.allowed_exact:7.1%}")


if __name__ == "__main__":
    main()
