"""`--scorer`: asks a model the prompts of scorers, and records their figures."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence

from abl_mlx.behaviour.scorers.scorer import Scorer
from abl_mlx.behaviour.target import Target
from abl_mlx.models.thoughts import without_thoughts
from abl_mlx.records.measurements import Scored
from abl_mlx.support.console import in_order
from convert.base.errors import UserError


def record(target: Target, scorers: Sequence[Scorer]) -> dict[str, Scored]:
    """Name of each scorer -> the figure of the target's replies.

    A reply that is an unfinished thought counts as empty.

    Raises:
        UserError: when the target fails, or a scorer gives no finite number.
    """
    found = {}
    for scorer in scorers:
        asked = list(scorer.prompts)
        answered = in_order(target.ask(asked, scorer.max_tokens), len(asked), scorer.name)
        figure = scorer.figure([without_thoughts(reply) or "" for reply in answered])
        if not math.isfinite(figure):
            raise UserError(f"--scorer {scorer.name} gives {figure} for the replies: no number.")
        found[scorer.name] = Scored(
            n=len(asked),
            figure=float(figure),
            unit=scorer.unit,
            max_tokens=scorer.max_tokens,
            prompts_sha256=hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        )
    return found
