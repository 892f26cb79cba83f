"""Harmless prompts matched to the topics of harmful ones, against all of them: docs/methods.md.

    python benchmarks/topics.py                # the small models: a minute on two cores

After Petrov 2026, "On the Failure of Topic-Matched Contrast Baselines in Multi-Directional Refusal
Abliteration" (arXiv 2603.22061): for each category c of harmful prompts a direction is measured
from the mean of harmless prompts of the same category (matched) or from that of all harmless
prompts (unmatched), and the span of a few of them is removed. Both are judged on held-out prompts,
after the layer where the unmatched ones leave fewest refusals on validation prompts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from search import Judge, load  # noqa: E402

from abl_mlx.directions.decomposition import by_category  # noqa: E402
from abl_mlx.directions.estimators import subspace  # noqa: E402
from abl_mlx.edits.edit import Edit  # noqa: E402
from abl_mlx.inputs.sets import PromptSet  # noqa: E402
from abl_mlx.models import capture  # noqa: E402
from abl_mlx.models.chat_model import ChatModel  # noqa: E402
from abl_mlx.support.arrays import numpy_of  # noqa: E402

MODELS = ("demo", "easy", "hard", "spread")

#: The number of directions that are removed together, of those of all categories.
RANK = 3


@dataclass(frozen=True)
class Baselines:
    """The directions of the categories (C, d) after one layer, not normalized."""

    matched: np.ndarray
    unmatched: np.ndarray

    @property
    def shorter(self) -> float:
        """How long matched directions are beside the unmatched ones, on average."""
        lengths = [np.linalg.norm(one, axis=1) for one in (self.matched, self.unmatched)]
        return float((lengths[0] / lengths[1]).mean())


def states(chat: ChatModel, prompts: PromptSet) -> np.ndarray:
    """The states of prompts at the last token, (N, L, d)."""
    return numpy_of(capture.full(chat, [chat.encode(one) for one in prompts.prompts])[:, :, 0])


def baselines(
    harmful: np.ndarray, harmless: np.ndarray, kinds: Sequence[Sequence[str]]
) -> Baselines:
    """The directions of the categories that both sets have, from states (N, d) and (M, d)."""
    bad, good = (
        {name: some.mean(axis=0) for name, some in by_category(rows, of).items()}
        for rows, of in zip((harmful, harmless), kinds, strict=True)
    )
    shared = sorted(set(bad) & set(good))
    return Baselines(
        np.stack([bad[name] - good[name] for name in shared]),
        np.stack([bad[name] - harmless.mean(axis=0) for name in shared]),
    )


def edit(directions: np.ndarray) -> Edit:
    """The removal of the span of a few directions."""
    rows, _ = subspace(directions, RANK)
    return Edit(mx.array(rows.astype(np.float32)))


def main() -> None:
    """Print a row for each model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("models", nargs="*", default=list(MODELS))
    given = parser.parse_args()
    print("| model | layer | matched: length of unmatched | refusals, KL: matched | unmatched |")
    print("|---|--:|--:|--:|--:|")
    for name in given.models:
        chat, writers, sets = load(name)
        train = sets.harmful.train, sets.harmless.train
        bad, good = (states(chat, one) for one in train)
        kinds = [[prompt.category for prompt in one.prompts] for one in train]
        found = [baselines(bad[:, n], good[:, n], kinds) for n in range(len(chat.layers))]
        judges = [
            Judge(chat, writers, asked.texts, harmless.texts, 24)
            for asked, harmless in (
                (sets.harmful.validation, sets.harmless.validation),
                (sets.harmful.test, sets.harmless.test),
            )
        ]
        layer = min(range(len(found)), key=lambda n: judges[0](edit(found[n].unmatched)))
        rows = [judges[1](edit(one)) for one in (found[layer].matched, found[layer].unmatched)]
        figures = " | ".join(f"{refused:.0%}, {kl:.4f}" for refused, kl in rows)
        print(f"| {name} | {layer} | {found[layer].shorter:.2f} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
