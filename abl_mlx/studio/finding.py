"""What a measurement found: figures by layer, and where prompts lie along the direction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from abl_mlx.commands.session import Steered
from abl_mlx.directions.estimators import plane
from abl_mlx.edits.edit import orthonormal
from abl_mlx.inputs.sets import PromptSets
from abl_mlx.models import capture
from abl_mlx.outputs.record_parts import measured
from abl_mlx.reports import explain_tables, figures
from abl_mlx.studio import asked
from abl_mlx.studio.desk import Event
from abl_mlx.studio.judging import held_out
from abl_mlx.support.arrays import numpy_of

#: The prompts of each set in the plane, and how many are run between two events.
_MOST, _BATCH = 32, 16


def found(steered: Steered, body: Mapping[str, Any]) -> Iterator[Event]:
    """Yield the charts by layer of `measure --plot` as data, and the measurement's record."""
    record = measured(steered.direction)
    drawn = [*figures.layer_charts(record), *explain_tables.explain_charts(record.explained)]
    yield {"charts": [asdict(one) for one in drawn], "record": record.json}


def clouds(
    steered: Steered, body: Mapping[str, Any], sets: Callable[[], PromptSets]
) -> Iterator[Event]:
    """Yield held-out prompts of both sets as points of the plane of `estimators.plane`.

    Each point has the prompt's ``set`` and ``category``. The states are those after the layer
    ``at``, by default the one after which the direction was measured.
    """
    direction, chat = steered.direction, steered.chat
    summary = direction.metadata.get("summary", {})
    last = len(chat.layers) - 1
    layer = asked.whole(body, "at", round(summary.get("layer") or last), 0, last)
    position = int(summary.get("position") or -1)
    prompts = [(name, one) for name, one in held_out(sets(), _MOST) if name != "borderline"]
    states = []
    for start in range(0, len(prompts), _BATCH):
        tokens = [chat.encode(prompt) for _, prompt in prompts[start : start + _BATCH]]
        states.append(capture.after_layer(chat, tokens, layer, (position,))[:, 0])
        yield {}  # other work takes its turn
    chosen = direction.selected if direction.selected.ndim == 2 else direction.selected[layer]
    harmful = np.array([name == "harmful" for name, _ in prompts])
    found = np.concatenate(states)
    both = plane(found[harmful], found[~harmful], numpy_of(orthonormal(chosen))[0])
    yield {
        "layer": layer,
        "position": position,
        "points": [
            {"set": name, "category": one.category, "prompt": one.text, "place": place}
            for (name, one), place in zip(
                prompts, np.concatenate(both).round(4).tolist(), strict=True
            )
        ],
    }
