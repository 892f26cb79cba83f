"""`--scorer`: asks a model the prompts of scorers, and records their figures."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence

from abl_mlx.behaviour.scorers.scorer import Scorer
from abl_mlx.inputs.sets import Question
from abl_mlx.models.thoughts import without_thoughts
from abl_mlx.records.measurements import Scored
from abl_mlx.support.console import in_order
from convert.base.errors import UserError

#: From prompts and the longest reply in tokens to (number of the prompt, reply), in any order.
Ask = Callable[[Sequence[Question], int], Iterator[tuple[int, str]]]


def record(ask: Ask, scorers: Sequence[Scorer]) -> dict[str, Scored]:
    """Name of each scorer -> the figure of a model's replies.

    Args:
        ask: asks the model.
        scorers: the scorers.

    Raises:
        UserError: when the model fails, or a scorer gives no finite number.
    """
    found = {}
    for scorer in scorers:
        asked = list(scorer.prompts)
        answered = in_order(ask(asked, scorer.max_tokens), len(asked), scorer.name)
        found[scorer.name] = Scored(
            n=len(asked),
            figure=figure_of(scorer, answered),
            unit=scorer.unit,
            max_tokens=scorer.max_tokens,
            prompts_sha256=hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        )
    return found


def figure_of(scorer: Scorer, replies: Sequence[str]) -> float:
    """A scorer's figure of whole replies. One that is an unfinished thought counts as empty.

    Raises:
        UserError: when the scorer gives no finite number.
    """
    figure = scorer.figure([without_thoughts(reply) or "" for reply in replies])
    if not math.isfinite(figure):
        raise UserError(f"--scorer {scorer.name} gives {figure} for the replies: no number.")
    return float(figure)
