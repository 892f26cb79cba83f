"""How refusal score and KL change with the strength of an edit in each layer, by a gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx.directions.selection import opening_nats
from abl_mlx.edits.steering import ablation
from abl_mlx.edits.weight_edit import LayeredEdit
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.distributions import kl_divergence
from abl_mlx.models.prefix import Prefix
from abl_mlx.models.shortcuts import passes, trusted
from abl_mlx.models.writers import Writer
from abl_mlx.support.arrays import let_go, number, numpy_of
from convert.mlx.packed import gradients

#: The groups of writers that have a strength for each layer, named as in `edit.Edit.profile`.
COMPONENTS = ("attention", "mlp")

# Prompts of one pass. What a backward pass needs of each layer is in memory until it has run.
_TOGETHER = 1


@dataclass(frozen=True)
class Slopes:
    """Values at some strengths, and their derivatives with respect to these, (2, L).

    Attributes:
        refusal: the mean refusal score (log-odds, nats) of harmful prompts.
        kl: the mean KL(model ‖ edited) of harmless prompts, in nats.
        of_refusal, of_kl: the derivatives, by component (`COMPONENTS`) and layer.
    """

    refusal: float
    kl: float
    of_refusal: np.ndarray
    of_kl: np.ndarray


def slopes(
    chat: ChatModel,
    writers: Sequence[Writer],
    edit: LayeredEdit,
    strengths: np.ndarray,
    harmful: Sequence[Sequence[int]],
    harmless: Sequence[Sequence[int]],
    base: mx.array,
    tokens: Sequence[int],
    ceilings: Sequence[float] | None = None,
) -> Slopes:
    """The slopes of an edit, by one forward and one backward pass of each prompt.

    Args:
        chat: the model.
        writers: its residual writers.
        edit: the edit at strength 1.
        strengths: (2, L), by which it is multiplied in each component and layer.
        harmful, harmless: encoded prompts.
        base: log-probabilities of the unedited model after the harmless prompts, (M, V).
        tokens: the refusal openings.
        ceilings: if they are given, only what the refusal score of each harmful prompt is above its
            own counts, in nats.

    Raises:
        Exception: whatever MLX raises where a module of the model has no gradient.
    """
    openings = mx.array(list(tokens))

    def score(rows: mx.array, start: int) -> mx.array:
        inside, outside = opening_nats(rows, openings)
        scores = inside - outside
        if ceilings is None:
            return scores
        return mx.maximum(scores - mx.array(list(ceilings[start : start + len(rows)])), 0)

    def kl(rows: mx.array, start: int) -> mx.array:
        return kl_divergence(base[start : start + len(rows)], rows)

    found = []
    for prompts, measure in ((harmful, score), (harmless, kl)):
        found.append(_mean(chat, writers, edit, strengths, prompts, measure))
    return Slopes(found[0][0], found[1][0], found[0][1], found[1][1])


def _mean(
    chat: ChatModel,
    writers: Sequence[Writer],
    edit: LayeredEdit,
    strengths: np.ndarray,
    prompts: Sequence[Sequence[int]],
    measure: Callable[[mx.array, int], mx.array],
) -> tuple[float, np.ndarray]:
    """The mean of a measure of the first reply token's log-probabilities, and its derivatives.

    Args:
        measure: of the rows (B, V) of the prompts from an index on, (B,).
    """
    how = trusted(chat, prompts)
    let_go()
    value, slope = 0.0, np.zeros(strengths.shape)
    for start in range(0, len(prompts), _TOGETHER):
        some = prompts[start : start + _TOGETHER]

        def total(given: mx.array, some: Sequence[Sequence[int]] = some, start: int = start) -> Any:
            by_component = dict(zip(COMPONENTS, given, strict=True))
            with gradients(), ablation(writers, edit, by_component):
                nothing = Prefix(chat, [], cached=how.cached)
                places = [[len(one) - 1] for one in some]
                rows = dict(passes(chat, some, places, how, nothing))
            return measure(mx.concatenate([rows[n] for n in range(len(some))]), start).sum()

        of, by = mx.value_and_grad(total)(mx.array(strengths.astype(np.float32)))
        mx.eval(of, by)
        value += number(of) / len(prompts)
        slope += numpy_of(by) / len(prompts)
        del of, by
        let_go()
    return value, slope
