"""The constant of `run --induce`: chosen by its effect, or that of a direction file."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from abl_mlx.choices import RunOptions
from abl_mlx.commands import condition_choice
from abl_mlx.directions import direction_file, induction
from abl_mlx.directions.induction import Induction
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.encoded_sets import EncodedSets
from abl_mlx.support.arrays import number
from convert.base.errors import UserError


def choose(chat: ChatModel, sets: EncodedSets, options: RunOptions, first_layer: int) -> Induction:
    """The constant that makes a model refuse.

    Args:
        chat: the model.
        sets: the prompts, followed by what replies open with.
        options: the chosen options.
        first_layer: the first layer after which the outputs can hold it.

    Raises:
        UserError: when no constant works, or the direction file does not fit.
    """
    if options.given.direction is not None:
        return of_file(options.given.direction, chat, options, first_layer)
    return induction.choose(
        chat, sets, options.finding, strength=options.editing.strength,
        batch_size=options.replying.batch_size, first_layer=first_layer,
    )  # fmt: skip


def of_file(path: Path, chat: ChatModel, options: RunOptions, first_layer: int) -> Induction:
    """The difference of the means of a direction file, after its layer, times ``--strength``.

    It is what ``--steer add`` adds at runtime, and is added to every prompt.
    """
    file = direction_file.read(path, layer=options.finding.layer)
    direction_file.check_width(file, path, chat)
    vector = condition_choice.addition(file, options.editing.strength)
    layer = round(file.metadata["summary"]["layer"])
    if not first_layer <= layer < len(chat.layers):
        raise UserError(
            f"{path} holds a direction after layer {layer}, and a constant can be added after the "
            f"layers {first_layer} to {len(chat.layers) - 1}: measure one with --layer."
        )
    condition_choice.warn_unconditional(file)
    added = vector.strength * vector.directions[0]
    summary = {
        **file.metadata["summary"],
        "layer": layer,
        "multiple": options.editing.strength,
        "length": number(mx.sqrt((added * added).sum())),
        "chosen_by": "hand",
        "file": path.name,
    }
    return Induction(added, layer, summary)
