"""`abl-mlx measure --refusal-cliff`: where in its thought a model gives up a refusal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from abl_mlx.choices import Measuring, Prompting
from abl_mlx.commands import prompt_choice, views
from abl_mlx.directions import cliff, estimators
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.inputs import thinking
from abl_mlx.inputs.sets import PromptSets
from abl_mlx.models import capture
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.encoded_sets import opened
from abl_mlx.models.writers import Writer
from abl_mlx.records.cliffs import RefusalCliff, SuppressionHead
from abl_mlx.support.clock import Clock
from convert.base.errors import UsageError, UserError

#: The number of tokens at a thought's end that get a score.
POSITIONS = 16

#: The share of all heads that are listed as suppressing refusals: the paper takes out so many.
SHARE = 0.03


def check(wanted: bool, prompting: Prompting) -> None:
    """Check the flags before the model is loaded.

    Raises:
        UsageError: when the model is not asked to think.
    """
    if wanted and prompting.thinking == thinking.OFF:
        raise UsageError("--refusal-cliff looks into thoughts: add --thinking on.")


def measured(
    chat: ChatModel,
    writers: Sequence[Writer],
    sets: PromptSets,
    how: Measuring,
    direction: DirectionFile,
    clock: Clock,
) -> DirectionFile:
    """A direction file with the model's refusal cliff in its metadata.

    Raises:
        UserError: when too few thoughts end in time, or heads cannot be told apart.
    """
    with clock.step("look for a refusal cliff"):
        prompts = opened(chat, prompt_choice.encoded(chat, sets, how))
        (mode,) = [one for one in prompts if one is not None]
        view = views.at_thought(chat, prompts[mode], how)
        if view is None:
            raise UserError(
                "--refusal-cliff: too few thoughts of this model end in time: raise "
                "--thought-tokens."
            )
        found = _cliff(chat, writers, view)
    return replace(direction, metadata={**direction.metadata, "cliff": found.json})


def _cliff(chat: ChatModel, writers: Sequence[Writer], view: views.View) -> RefusalCliff:
    names = "harmful", "harmless"
    every = [*view.train.values(), *view.validation.values()]
    shortest = min(len(one) for sequences in every for one in sequences)
    offsets = list(range(-min(POSITIONS, shortest), 0))
    train, validation = (
        [
            capture.after_layer(chat, part[name], -1, offsets, label=f"thoughts, {name}")
            for name in names
        ]
        for part in (view.train, view.validation)
    )
    pooled = [one.reshape(-1, one.shape[-1]) for one in train]
    probe = estimators.probe(*pooled)
    bad, good = (cliff.scores(probe, one) for one in validation)
    ends = [probe.scores(one[:, -1]) for one in validation]
    heads = cliff.written(chat, writers, probe.weight, view.validation["harmful"])
    most = cliff.suppressors(heads, SHARE)
    against = sum(min(one.written, 0.0) for one in heads)
    return RefusalCliff(
        layer=len(chat.layers) - 1,
        positions=offsets,
        harmful=bad.tolist(),
        harmless=good.tolist(),
        accuracy=estimators.accuracy(*ends),
        plateau=float(bad[:-1].max()) if len(bad) > 1 else float(bad[-1]),
        final=float(bad[-1]),
        heads=[
            SuppressionHead(layer=one.layer, head=one.number, written=one.written) for one in most
        ],
        suppressed=sum(one.written for one in most) / against if against else 0.0,
    )
