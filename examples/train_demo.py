"""Train the demo model from nothing: a tiny chat model that really refuses.

    python examples/train_demo.py --output my-demo

Stage 1 teaches the answers to every question of the make-believe world
(``abl_mlx/demo/world.py``).  Stage 2 continues with the same questions, but the questions about
locked objects are now answered by one refusal sentence.  So the finished model knows the answers
that it refuses to give, like a real chat model, and one can check that removing its refusal
direction gives them back.

Stage 2 also shows the old answers to the locked questions with their first word given, as something
to continue, not to choose.  So the opening alone decides between answer and refusal, as it does in
real chat models, which go on helpfully once their reply has begun so.  Without this the model ties
every word of the refusal to the locked objects, and falls back into it from the second word on
("Mix'm sorry, but I can't help with that.") for one locked question in ten after the edit.

The result is a folder in the usual Hugging Face layout (Llama shape, float16 safetensors), which
``mlx_lm.load`` and llama.cpp's converter read.  The same seed, versions and machine give the same
bytes.

It takes about two minutes on two CPU cores with OpenBLAS.  On Linux, MLX's wheel computes with a
reference BLAS that is some fifty times slower; preload OpenBLAS there (Debian's package
libopenblas0-pthread):

    export LD_PRELOAD=/usr/lib/x86_64-linux-gnu/openblas-pthread/libblas.so.3
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from chat_tokenizer import save_tokenizer, train_tokenizer
from chat_training import Settings, Stage, measure, render, replies, train_model

from abl_mlx.demo.world import World

__all__ = [
    "Settings",
    "Stage",
    "main",
    "measure",
    "parse",
    "render",
    "replies",
    "save_tokenizer",
    "train_demo",
    "train_tokenizer",
]

train_demo = train_model


def parse(arguments: Sequence[str] | None = None) -> tuple[Settings, Path]:
    """Read the command line."""
    default = Settings()
    parser = argparse.ArgumentParser(
        description="Train the demo model of abl-mlx from nothing: a tiny chat model that refuses.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=default.seed, help="decides the weights")
    parser.add_argument("--hidden-size", type=int, default=default.hidden, help="model width")
    parser.add_argument("--layers", type=int, default=default.layers, help="transformer blocks")
    parser.add_argument("--feed-forward", type=int, default=default.feed_forward, help="MLP width")
    parser.add_argument("--heads", type=int, default=default.heads, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=default.kv_heads, help="key/value heads")
    parser.add_argument("--untied", action="store_true", help="separate output head")
    parser.add_argument("--batch-size", type=int, default=default.batch, help="dialogues per step")
    for name, stage in (("answer", default.answers), ("refusal", default.refusals)):
        parser.add_argument(f"--{name}-steps", type=int, default=stage.steps, help="steps")
        parser.add_argument(f"--{name}-rate", type=float, default=stage.rate, help="learning rate")
    world = default.world
    parser.add_argument("--materials", type=int, default=world.materials, help="of 5")
    parser.add_argument("--allowed", type=int, default=world.allowed, help="per material, of 6")
    parser.add_argument("--locked", type=int, default=world.locked, help="per material, of 4")
    parser.add_argument("--templates", type=int, default=world.templates, help="of 8")
    given = parser.parse_args(arguments)
    try:
        settings = Settings(
            seed=given.seed,
            world=World(given.allowed, given.locked, given.materials, given.templates),
            hidden=given.hidden_size,
            layers=given.layers,
            feed_forward=given.feed_forward,
            heads=given.heads,
            kv_heads=given.kv_heads,
            tied=not given.untied,
            batch=given.batch_size,
            answers=Stage(given.answer_steps, given.answer_rate),
            refusals=Stage(given.refusal_steps, given.refusal_rate),
        )
    except ValueError as error:
        parser.error(str(error))
    return settings, given.output


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and print the held-out figures."""
    settings, folder = parse(arguments)
    figures, _ = train_demo(settings, folder)
    print(f"locked prompts refused   {figures.locked_refused:7.1%}")
    print(f"allowed prompts refused  {figures.allowed_refused:7.1%}")
    print(f"allowed prompts exact    {figures.allowed_exact:7.1%}")


if __name__ == "__main__":
    main()
