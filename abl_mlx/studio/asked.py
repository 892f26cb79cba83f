"""The fields of requests, checked, and the edit that they choose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from abl_mlx.commands.session import Steered
from abl_mlx.inputs import thinking
from abl_mlx.inputs.sets import Prompt
from convert.base.errors import UserError

_ROLES = ("user", "assistant")

#: The longest text of a message, in characters, and the largest number of messages.
_LONGEST, _MOST = 100_000, 200


def number(body: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    """A number in a request.

    Raises:
        UserError: when it is none, or out of bounds.
    """
    value = body.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name} must be a number.")
    if not low <= value <= high:
        raise UserError(f"{name} must be from {low:g} to {high:g}.")
    return float(value)


def whole(body: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    """A whole number in a request; raises UserError as `number` does."""
    value = number(body, name, default, low, high)
    if value != int(value):
        raise UserError(f"{name} must be a whole number.")
    return int(value)


def text(body: Mapping[str, Any], name: str) -> str:
    """A text in a request, "" where there is none; raises UserError when it is none."""
    value = body.get(name) or ""
    if not isinstance(value, str) or len(value) > _LONGEST:
        raise UserError(f"{name} must be a text of at most {_LONGEST} characters.")
    return value


@dataclass(frozen=True)
class Edited:
    """A model with the edit that a request chooses.

    Attributes:
        steered: the model, with the chosen direction and layers.
        strength: 0 for the model as it is.
    """

    steered: Steered
    strength: float


def edited(steered: Steered, body: Mapping[str, Any]) -> Edited:
    """The edit of a request: its strength, direction, rank and layers.

    Raises:
        UserError: when a field has a wrong value.
    """
    strength = number(body, "strength", steered.editing.strength, -8, 8)
    layers = len(steered.chat.layers)
    if body.get("layer") is not None:
        steered = _after_layer(steered, whole(body, "layer", 0, 0, layers - 1))
    if body.get("rank") is not None:
        selected = steered.direction.selected
        rank = whole(body, "rank", 1, 1, selected.shape[-2])
        direction = replace(steered.direction, selected=selected[..., :rank, :])
        steered = replace(steered, direction=direction)
    chosen = body.get("layers")
    if chosen is not None:
        if not isinstance(chosen, list) or not all(type(one) is int for one in chosen):
            raise UserError("layers must be a list of whole numbers.")
        if not chosen or not all(0 <= one < layers for one in chosen):
            raise UserError(f"layers must be some of 0 to {layers - 1}.")
        steered = replace(steered, editing=replace(steered.editing, layers=frozenset(chosen)))
    return Edited(steered, strength)


def _after_layer(steered: Steered, layer: int) -> Steered:
    """The same model with the difference of the means after another layer as its direction."""
    direction = steered.direction
    summary = direction.metadata.get("summary", {})
    position = summary.get("position")
    if direction.candidates is None or position is None:
        raise UserError("this direction file has no means of prompts, so it has one layer only.")
    found = direction.candidates.difference(layer, position)
    unit = found / mx.maximum(mx.linalg.norm(found, stream=mx.cpu), 1e-30)
    metadata = {**direction.metadata, "summary": {**summary, "layer": layer}}
    metadata.pop("recipe", None)
    other = replace(direction, selected=unit[None], metadata=metadata, updates=None)
    return replace(steered, direction=other)


def conversation(steered: Steered, body: Mapping[str, Any]) -> Prompt:
    """The conversation of a request, which ends with a user's message.

    Raises:
        UserError: when it does not.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not 0 < len(messages) <= _MOST:
        raise UserError(f"messages must be a list of 1 to {_MOST} messages.")
    turns = []
    for one in messages:
        if not isinstance(one, dict) or one.get("role") not in _ROLES:
            raise UserError("a message needs the role user or assistant.")
        turns.append((str(one["role"]), text(one, "content")))
    if turns[-1][0] != "user" or not turns[-1][1].strip():
        raise UserError("the last message must be the user's, and not empty.")
    prompt = steered.prompt(turns[-1][1])
    system = text(body, "system").strip() or prompt.system
    mode = thinking.ON if body.get("thinking") is True else prompt.thinking
    return replace(prompt, earlier=tuple(turns[:-1]), system=system, thinking=mode)
