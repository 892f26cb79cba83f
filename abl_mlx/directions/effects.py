"""What a method is given that needs the loaded model beside the states, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from abl_mlx.directions.measuring import Candidates
from abl_mlx.directions.selection import Score
from abl_mlx.directions.trial import Trial
from abl_mlx.edits.edit import Edit
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.writers import Writer


@dataclass(frozen=True)
class Measured:
    """A loaded model, measured candidates, and the prompts on which effects are seen.

    Attributes:
        chat: the model.
        writers: its residual writers.
        candidates: the measured candidates.
        scores: how well each separates the validation prompts.
        train, validation: encoded prompts by name of the set.
        trial: makes what tries edits on validation prompts by the first reply token; only methods
            that use reply tokens call it.
        edit_for: makes the edit that removes directions, (k, d).
        rank: the number of directions to find.
        max_kl: limit of the mean KL on harmless prompts, in nats at the first reply token.
    """

    chat: ChatModel
    writers: Sequence[Writer]
    candidates: Candidates
    scores: Sequence[Score]
    train: Mapping[str, list[list[int]]]
    validation: Mapping[str, list[list[int]]]
    trial: Callable[[], Trial]
    edit_for: Callable[[mx.array], Edit]
    rank: int
    max_kl: float


@dataclass(frozen=True)
class Chosen:
    """The candidate that a method chose.

    Attributes:
        score: its scores.
        by: how it was chosen, for a record.
        facts: name -> (L, P), what the method says of every candidate, NaN for those not tried.
        tokens: the number of tokens in forward passes for the choice.
    """

    score: Score
    by: str
    facts: Mapping[str, mx.array] = field(default_factory=dict)
    tokens: int = 0


@dataclass(frozen=True)
class Refined:
    """The directions that a method made of the chosen candidate.

    Attributes:
        directions: orthonormal rows (k, d).
        by: how they were found, for a record.
        facts: figures of the way there, by name, for a record.
    """

    directions: mx.array
    by: str
    facts: Mapping[str, float] = field(default_factory=dict)
