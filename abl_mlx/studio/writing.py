"""The edit written to files, and the command that does the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from abl_mlx.choices import ApplyOptions, SteerOptions
from abl_mlx.commands import measure_apply
from abl_mlx.commands.session import Steered
from abl_mlx.directions import direction_file
from abl_mlx.reports.replay import command_line
from abl_mlx.studio import asked
from abl_mlx.studio.desk import Event
from convert.base.atomic import claim
from convert.base.errors import UserError


def written(steered: Steered, body: Mapping[str, Any], options: SteerOptions) -> Iterator[Event]:
    """Yield the command that writes the edit; with ``write`` also write it, and yield what was.

    Args:
        body: a request with ``output``, the fields of `asked.edited`, and ``direction``, the place
            for the direction file if the direction was measured or chosen here.
        options: those of the command line.
    """
    output = asked.text(body, "output").strip()
    if not output:
        raise UserError("name an output: a folder, NAME.gguf, NAME.lora.gguf or NAME.adapter.")
    chosen = asked.edited(steered, body)
    direction = chosen.steered.direction
    measured = direction is steered.direction and body.get("point") is None
    given = options.direction if measured else None
    place = given or Path(asked.text(body, "direction").strip() or "direction.safetensors")
    if chosen.strength < 0:
        raise UserError("weights have no negative strength here: choose one above 0.")
    editing = replace(chosen.steered.editing, strength=chosen.strength)
    flags = {"strength": editing.strength, "layers": editing.layers}
    defaults = {"strength": 1.0, "layers": None}
    command = command_line(["apply", str(place), steered.name], flags, defaults, [output])
    yield {"command": command, "direction": None if given else str(place)}
    if body.get("write") is not True:
        return
    if given is None:
        claim(place)
        direction_file.save(place, direction)
    record = measure_apply.apply(
        direction, steered.name, [Path(output)], ApplyOptions(editing=editing)
    )
    yield {"written": [one.json for one in record.written]}
