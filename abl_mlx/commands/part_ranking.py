"""Ranks attention heads and experts, for ``--heads N``, ``--experts N`` and ``--rank-parts``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from abl_mlx.choices import Editing, MeasureOptions, SteerOptions
from abl_mlx.commands import prompt_choice
from abl_mlx.directions import parts
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.inputs.sets import PromptSets
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.encoded_sets import EncodedSets, opened
from abl_mlx.models.writers import Writer
from abl_mlx.support.clock import Clock


def added(
    chat: ChatModel,
    writers: Sequence[Writer],
    sets: EncodedSets,
    found: DirectionFile,
    editing: Editing,
    clock: Clock,
) -> DirectionFile:
    """The direction with the rankings that ``--heads N`` and ``--experts N`` need.

    Args:
        chat: the model.
        writers: its residual writers.
        sets: the encoded prompts, whose train parts are used.
        found: the direction.
        editing: the chosen options of the edit.
        clock: times the step.
    """
    for flag, text in (("heads", editing.heads), ("experts", editing.experts)):
        if text is not None and parts.is_count(text):
            found = ranked(chat, writers, sets, found, clock, [flag], most=int(text))
    return found


def with_all(
    chat: ChatModel,
    writers: Sequence[Writer],
    sets: PromptSets,
    options: MeasureOptions | SteerOptions,
    found: DirectionFile,
    clock: Clock,
) -> DirectionFile:
    """The direction, with ``--rank-parts`` with the rankings of all heads and experts.

    Args:
        sets: the prompts, which are asked as in the first mode of thinking.
        options: the chosen options.
    """
    if not options.rank_parts:
        return found
    encoded = prompt_choice.encoded(chat, sets, options.measuring)
    first = next(iter(opened(chat, encoded).values()))
    return ranked(chat, writers, first, found, clock)


def ranked(
    chat: ChatModel,
    writers: Sequence[Writer],
    sets: EncodedSets,
    found: DirectionFile,
    clock: Clock,
    flags: Sequence[str] | None = None,
    most: int = parts.LISTED,
) -> DirectionFile:
    """The direction with rankings in its summary.

    Args:
        flags: ``heads``, ``experts`` or both; None for those that the model has.
        most: the number of heads or experts that is asked for; at least `parts.LISTED` are listed.

    Raises:
        UserError: when the model does not have what ``flags`` name.
    """
    summary = found.metadata.get("summary", {})
    bad, good = (sets.train[name].tokens for name in ("harmful", "harmless"))
    have = {
        "heads": any(one.parts and one.kind == "linear" for one in writers),
        "experts": any(one.kind == "experts" for one in writers),
    }
    listed = max(most, parts.LISTED)
    with clock.step("rank heads and experts"):
        for flag in flags or [flag for flag, there in have.items() if there]:
            if flag == "heads":
                position = summary.get("position") or -1
                ranking = parts.heads(chat, writers, found.selected, bad, good, position)
            else:
                ranking = parts.experts(chat, writers, bad, good, most)
            summary = {**summary, flag: [one.record() for one in ranking[:listed]]}
    return replace(found, metadata={**found.metadata, "summary": summary})
