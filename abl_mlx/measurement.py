"""From a loaded model and prompts to its refusal direction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from abl_mlx import directions, selection
from abl_mlx.directions import Candidates, DirectionFile
from abl_mlx.edits import Edit
from abl_mlx.evaluate import generate
from abl_mlx.models import ChatModel, common_prefix
from abl_mlx.options import Options
from abl_mlx.prompts import PromptSets
from abl_mlx.writers import Writer
from convert.errors import UserError

#: Token positions that are measured at most, counted back from the prompt's end.
MOST_POSITIONS = 8

# Prompts of each set, and tokens of each reply, in which a common opening is looked for.
_OPENING_PROMPTS, _OPENING_TOKENS = 8, 12


def find_direction(
    chat: ChatModel, writers: Sequence[Writer], sets: PromptSets, options: Options
) -> DirectionFile:
    """Measure candidates on the train prompts and choose one on the validation prompts.

    Returns:
        A direction file whose metadata holds `summary` (what was chosen and why) and `scores` (of
        every candidate).

    Raises:
        UserError: no refusal to be found, no gentle enough candidate, a candidate out of range.
    """
    harmful, harmless = (
        [chat.encode(text) for text in part.texts]
        for part in (sets.harmful.train, sets.harmless.train)
    )
    candidates = directions.measure(chat, harmful, harmless, _positions(chat, options))
    harmful, harmless = (
        [chat.encode(text) for text in part.texts]
        for part in (sets.harmful.validation, sets.harmless.validation)
    )
    if options.layer is None and options.position is None:
        summary, selected, scores = _by_cause(chat, writers, candidates, harmful, harmless, options)
    else:
        layer = candidates.n_layers // 2 if options.layer is None else options.layer
        position = -1 if options.position is None else options.position
        selected = selection.direction_of(candidates, layer, position)
        scores = selection.separation(chat, candidates, harmful, harmless)
        summary = {"layer": layer, "position": position, "chosen_by": "hand"}
    return DirectionFile(
        selected,
        candidates,
        {
            "method": directions.METHOD,
            "summary": {"method": directions.METHOD, **summary},
            "scores": [score.record() for score in scores],
        },
    )


def find_reply_prefix(chat: ChatModel, sets: PromptSets) -> tuple[int, ...]:
    """What every reply opens with, whatever was asked: an opened thought block, a newline.

    Positions and first reply tokens are measured behind it, or they would measure the block.
    """
    texts = [
        *sets.harmful.train.texts[:_OPENING_PROMPTS],
        *sets.harmless.train.texts[:_OPENING_PROMPTS],
    ]
    replies = generate(
        chat,
        [chat.encode_message(text) for text in texts],
        _OPENING_TOKENS,
        label="reply openings",
    )
    prefix = common_prefix(replies)
    # A reply that is nothing but the prefix leaves nothing to measure behind it.
    return prefix if all(len(reply) > len(prefix) for reply in replies) else ()


def _positions(chat: ChatModel, options: Options) -> list[int]:
    count = min(chat.template_tail, MOST_POSITIONS)
    if options.position is not None:
        if options.position >= 0:
            raise UserError(
                f"--position {options.position}: positions count back from the prompt's end, so "
                "-1 is the last token."
            )
        count = max(count, -options.position)
    return list(range(-count, 0))


def _by_cause(
    chat: ChatModel,
    writers: Sequence[Writer],
    candidates: Candidates,
    harmful: Sequence[Sequence[int]],
    harmless: Sequence[Sequence[int]],
    options: Options,
) -> tuple[dict[str, Any], mx.array, list[selection.Score]]:
    choice = selection.choose(
        chat,
        writers,
        candidates,
        harmful,
        harmless,
        edit=make_edit(candidates.directions[0, 0], options),
        max_kl=options.max_kl,
    )
    summary = {
        "layer": choice.score.layer,
        "position": choice.score.position,
        "chosen_by": "lowest refusal score under ablation within the KL limit, on validation "
        "prompts",
        "refusal_score": {
            "harmful": choice.refusal_before[0],
            "harmless": choice.refusal_before[1],
            "harmful_ablated": choice.score.refusal,
        },
        "validation_kl": choice.score.kl,
        "refusal_tokens": [chat.tokenizer.decode([token]) for token in choice.refusal_tokens],
    }
    return summary, choice.direction, choice.scores


def make_edit(selected: mx.array, options: Options) -> Edit:
    """The edit that removes ``selected``, (d,) or (k, d), with the chosen options."""
    selected = selected[None] if selected.ndim == 1 else selected
    return Edit(selected, options.strength, options.layers, options.embedding)
