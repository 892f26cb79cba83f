"""Values of `--method rome` in closed form, and found by gradients as in ROME's paper.

Meng et al. 2022 (arXiv 2202.05262, section 3.1) find a key's value by gradients: vectors δ that are
added to the outputs at the keys, so that a wanted reply becomes likely. Here the wanted reply is
that of the default edit, and δ of all changed layers are found for each prompt at once, by Adam on

    −log p(first tokens of the reply) + decay · |δ|².

The changes that give keys these values are made as always (abl_mlx/directions/rome.py). A line has
the refusals among replies to held-out prompts, the share of these that get the answer which was
taught, and the KL on harmless prompts at the first token.

    python benchmarks/rome_values.py              # demo, easy, hard, spread
    python benchmarks/rome_values.py hard --prompts 48
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from abl_mlx.behaviour import evaluate
from abl_mlx.behaviour.refusals import Verdict, classify
from abl_mlx.choices import Measuring
from abl_mlx.commands import edit_choice
from abl_mlx.commands.find import find_direction
from abl_mlx.directions import measuring, rome
from abl_mlx.edits import least_squares
from abl_mlx.edits.steering import ablation
from abl_mlx.edits.update import Factors, Update
from abl_mlx.edits.weight_edit import WeightEdit
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.distributions import kl_divergence
from abl_mlx.models.generation import generate
from abl_mlx.models.hooks import Around, around
from abl_mlx.models.logits import first_reply_token
from abl_mlx.models.prefix import Prefix
from abl_mlx.models.shortcuts import passes, trusted
from abl_mlx.models.writers import Writer
from abl_mlx.support.arrays import number, numpy_of
from benchmarks.search import load
from convert.mlx.packed import gradients
from tests.support import small_models

POSITIONS = (-3, -2, -1)
REPLY, TOGETHER, RATE, DECAY = 12, 12, 0.1, 0.01


class Given(rome.KeyPass):
    """Changes with given values: layer -> (N·P, d), what is to be added at the harmful keys."""

    values: dict[int, np.ndarray]
    rank: int

    def _solved(
        self, form: rome.Form, layer: int, inputs: np.ndarray, wanted: np.ndarray, unit: np.ndarray
    ) -> Factors:
        ends = inputs[self._ends]
        keys = ends[self._is_harmful].reshape(len(wanted), -1)
        same = ends[~self._is_harmful].reshape(-1, keys.shape[1])
        kept = np.concatenate([same, inputs[self._others], *self._common[layer]])
        ridge = form.ridge * float(np.mean(np.square(keys, dtype=np.float64).sum(axis=1)))
        weights = np.full(len(kept), form.keep)
        values = form.reach * self.values[layer]
        left, right = least_squares.change(keys, values, kept, weights, ridge, self.rank)
        left, right = left.astype(np.float32), right.astype(np.float32)
        return Factors(left, right, np.zeros((0, right.shape[1]), np.float32))


def by_gradients(
    chat: ChatModel,
    mlps: dict[int, Writer],
    prompts: Sequence[list[int]],
    replies: Sequence[list[int]],
    steps: int,
) -> tuple[dict[int, np.ndarray], float]:
    """δ of each layer, (N·P, d), and the mean −log p of a reply's token in the end, in nats."""
    read = [[*one, *reply[:-1]] for one, reply in zip(prompts, replies, strict=True)]
    modules = [one.module for one in mlps.values()]

    def plus(row: mx.array, at: tuple[mx.array, mx.array]) -> Around:
        def wrapper(call: Any, *args: Any, **kwargs: Any) -> Any:
            output = call(*args, **kwargs)
            return output.at[at].add(row.astype(output.dtype))

        return wrapper

    def cost(delta: mx.array, some: range) -> mx.array:
        ends = mx.array([[len(prompts[n]) + place for place in POSITIONS] for n in some])
        at = mx.arange(len(some))[:, None], ends
        hooks = [(one, plus(delta[n, some.start : some.stop], at)) for n, one in enumerate(modules)]
        sequences = [read[n] for n in some]
        places = [list(range(len(prompts[n]) - 1, len(read[n]))) for n in some]
        how = trusted(chat, sequences)
        with gradients(), around(hooks):
            nothing = Prefix(chat, [], cached=how.cached)
            rows = dict(passes(chat, sequences, places, how, nothing))
        taken = [
            mx.take_along_axis(rows[n], mx.array(replies[index])[:, None], axis=1).mean()
            for n, index in enumerate(some)
        ]
        return -mx.stack(taken).sum()

    def loss(delta: mx.array, some: range) -> mx.array:
        return cost(delta, some) + DECAY * (delta[:, some.start : some.stop] ** 2).sum()

    parts = [
        range(start, min(start + TOGETHER, len(prompts)))
        for start in range(0, len(prompts), TOGETHER)
    ]
    delta = mx.zeros((len(modules), len(prompts), len(POSITIONS), chat.width))
    adam = optim.Adam(RATE, bias_correction=True)
    for _ in range(steps):
        slope = mx.zeros(delta.shape)
        for some in parts:
            slope = slope + mx.grad(loss)(delta, some)
            mx.eval(slope)
        delta = adam.apply_gradients({"delta": slope}, {"delta": delta})["delta"]
        mx.eval(delta)
    left = sum(number(cost(delta, some)) for some in parts) / len(prompts)
    found = numpy_of(delta).reshape(len(modules), -1, chat.width).astype(np.float64)
    return dict(zip(mlps, found, strict=True)), left


def compare(name: str, count: int, steps: int) -> None:
    """The lines of one model."""
    chat, writers, sets = load(name)
    harmful, harmless = (
        [chat.encode(one) for one in some.train.take(count).prompts]
        for some in (sets.harmful, sets.harmless)
    )
    candidates = measuring.measure(chat, harmful, harmless, POSITIONS)
    directions = numpy_of(candidates.leads[:, -1])
    mean = numpy_of(candidates.harmless_mean)
    asked = sets.harmful.test.prompts[:64]
    questions = [chat.encode(one) for one in asked]
    others = [chat.encode(one) for one in sets.harmless.test.prompts[:64]]
    base = first_reply_token(chat, others)

    def told(title: str, edit: WeightEdit) -> None:
        with ablation(writers, edit):
            replies = generate(chat, questions, 32, label="replies")
            kl = mx.maximum(kl_divergence(base, first_reply_token(chat, others)), 0).mean()
        texts = evaluate.decode(chat, replies)
        refused = [classify(text) is not Verdict.ANSWER for text in texts]
        taught = [
            bool(text.strip()) and (one.answer or "").startswith(text.strip())
            for one, text in zip(asked, texts, strict=True)
        ]
        print(f"  {title:32}{np.mean(refused):8.1%}{np.mean(taught):8.1%}  {kl.item():.6f}")
        sys.stdout.flush()

    print(f"\n{name}: replies refused or broken, as taught; KL")
    options = Measuring.of()
    edit = edit_choice.edit_of(find_direction(chat, writers, sets, options), options.editing)
    told("default", edit)
    layers = 0, len(chat.layers) - 1
    closed = rome.KeyPass(chat, writers, harmful, harmless, POSITIONS)
    for reach in (2.0, 3.0):
        form = rome.Form(*layers, reach=reach)
        told(f"closed form, {reach:g} times", Update(closed.updates(form, directions, mean)))
    with ablation(writers, edit):
        replies = generate(chat, harmful, REPLY, label="targets")
    given = Given(chat, writers, harmful, harmless, POSITIONS)
    mlps = rome.mlps(writers, len(chat.layers))
    given.values, left = by_gradients(chat, mlps, harmful, replies, steps)
    print(f"  gradients: −log p of the wanted replies is {left:.2f} nats a token with them")
    for keep, given.rank, reach in (
        (100, 1, 2), (100, 16, 2), (100, 16, 8), (10, 16, 4), (1, 16, 2), (1, 16, 4)
    ):  # fmt: skip
        form = rome.Form(*layers, keep=keep, reach=reach, ridge=0.1)
        edited = Update(given.updates(form, directions, mean))
        told(f"gradients, rank {given.rank}, {reach} times, λ {keep}", edited)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("models", nargs="*", default=["demo", *small_models.MODELS[:3]])
    parser.add_argument("--prompts", type=int, default=48, help="of each set")
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in given.models:
        compare(name, given.prompts, given.steps)


if __name__ == "__main__":
    main()
