"""From a loaded model and prompts to its refusal direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from abl_mlx import directions, selection
from abl_mlx.arrays import number, numbers
from abl_mlx.directions import Candidates, DirectionFile
from abl_mlx.edits import Edit, orthonormal
from abl_mlx.evaluate import generate
from abl_mlx.hooks import around
from abl_mlx.models import ChatModel, common_prefix
from abl_mlx.options import Options
from abl_mlx.prompts import PromptSets
from abl_mlx.steering import first_input
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
            "pins": candidate_pins(candidates, summary["layer"], summary["position"], selected),
            "embedding_scale": embedding_scale(chat, writers),
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
    scale = embedding_scale(chat, writers) if options.pin is not None else None

    def edit_for(score: selection.Score) -> Edit:
        selected = selection.direction_of(candidates, score.layer, score.position)
        pins = candidate_pins(candidates, score.layer, score.position, selected)
        return make_edit(selected, options, pin=_pin(options.pin, pins, scale))

    choice = selection.choose(
        chat,
        writers,
        candidates,
        harmful,
        harmless,
        edit_for=edit_for,
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


def make_edit(
    selected: mx.array,
    options: Options,
    *,
    recipe: Mapping[str, Any] | None = None,
    pin: mx.array | None = None,
) -> Edit:
    """The edit that removes ``selected``, (k, d) or (L, k, d), with the chosen options.

    Args:
        recipe: what a search has found beside the directions: ``profile``, ``embedding``.
        pin: what the embedding holds of the directions instead, in its own units.

    Raises:
        UserError: options that do not go together.
    """
    recipe = recipe or {}
    if pin is not None and options.norm != "none":
        raise UserError("--pin and --norm do not go together: leave one of them out.")
    embedding = options.embedding and bool(recipe.get("embedding", True))
    if pin is not None and not embedding:
        raise UserError("--pin is written into the embedding: leave --no-embedding out.")
    return Edit(
        selected, options.strength, options.layers, embedding, recipe.get("profile"), options.norm,
        pin,
    )  # fmt: skip


def edit_of(direction: DirectionFile, options: Options) -> Edit:
    """The edit that a direction file describes, with the chosen options.

    Raises:
        UserError: options that do not go together, or a file that lacks what ``--pin`` needs.
    """
    metadata = direction.metadata
    pin = _pin(options.pin, metadata.get("pins"), metadata.get("embedding_scale"))
    return make_edit(direction.selected, options, recipe=metadata.get("recipe"), pin=pin)


# --- what is pinned ----------------------------------------------------------------------------


def candidate_pins(
    candidates: Candidates, layer: int, position: int, selected: mx.array
) -> dict[str, list[float]]:
    """The mean component of either prompt set along a candidate's directions, where it was read."""
    at = candidates.positions.index(position)
    basis = orthonormal(selected)
    return {
        "harmful": numbers(basis @ candidates.harmful_mean[layer, at]),
        "harmless": numbers(basis @ candidates.harmless_mean[layer, at]),
    }


def _pin(
    wanted: str | None, pins: Mapping[str, Sequence[float]] | None, scale: float | None
) -> mx.array | None:
    """What the embedding's rows hold, in its own units; None without ``--pin``."""
    if wanted is None:
        return None
    if not scale:
        raise UserError(
            "--pin needs a direction measured by abl-mlx on a model whose embedding, times a "
            "constant, is what its first layer gets."
        )
    if wanted in ("harmful", "harmless"):
        if pins is None:
            raise UserError(f"--pin {wanted} needs a direction file that `abl-mlx measure` wrote.")
        held = mx.array(list(pins[wanted]))
    else:
        held = mx.array([float(wanted)])
    return held / scale


def embedding_scale(chat: ChatModel, writers: Sequence[Writer]) -> float | None:
    """The constant between the embedding's output and what the first layer gets.

    None where there is more between the two: a norm, or embeddings of positions.
    """
    embedding = next(writer for writer in writers if writer.kind == "embedding")
    seen: dict[str, mx.array] = {}

    def keep(name: str, states: mx.array) -> mx.array:
        seen[name] = states.astype(mx.float32)
        return states

    def out(call: Any, *args: Any, **kwargs: Any) -> Any:
        return keep("out", call(*args, **kwargs))

    with around([(embedding.module, out)]), first_input(chat, lambda states: keep("in", states)):
        mx.eval(chat.model(mx.array([chat.encode("Hello there.")])))
    before, after = seen["out"].reshape(-1), seen["in"].reshape(-1)
    scale = number((before * after).sum()) / number((before * before).sum())
    off = number(mx.abs(after - scale * before).max()) / number(mx.abs(after).max())
    return scale if off < 1e-2 else None
