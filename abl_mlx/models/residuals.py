"""Finding and replacing the residual stream in a layer's output."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from convert.base.errors import UserError


def residual(output: Any, layer: int, width: int) -> mx.array:
    """The residual stream in a layer's output, (B, T, d): the output, or a tuple's first element.

    Raises:
        UserError: when it has another shape.
    """
    states = output[0] if isinstance(output, tuple | list) else output
    if isinstance(states, mx.array) and states.ndim == 4 and states.shape[-1] == width:
        count = states.size // max(1, width * states.shape[0] * states.shape[1])
        raise UserError(
            f"this model runs {count} residual streams side by side (layer {layer} puts out the "
            f"form {tuple(states.shape)}), and a direction is measured on one: no direction can be "
            "found on it, but one that is given can be removed: `abl-mlx apply DIRECTION MODEL`."
        )
    if not isinstance(states, mx.array) or states.ndim != 3 or states.shape[-1] != width:
        form = states.shape if isinstance(states, mx.array) else type(states).__name__
        raise UserError(
            f"the output of layer {layer} has the form {form} instead of (batch, tokens, {width}): "
            "this architecture has no single residual stream to read."
        )
    return states


def replaced(output: Any, states: mx.array) -> Any:
    """A layer's output with other states in the place of those that `residual` finds."""
    return type(output)([states, *output[1:]]) if isinstance(output, tuple | list) else states
