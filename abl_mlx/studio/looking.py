"""What the residual stream of a prompt holds: components, dimensions, and the logit lens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx.commands.session import Steered
from abl_mlx.commands.show import cosines, stream
from abl_mlx.edits.edit import orthonormal
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.hooks import around
from abl_mlx.models.residuals import replaced
from abl_mlx.studio import asked
from abl_mlx.studio.desk import Event
from abl_mlx.support.arrays import numpy_of
from convert.base.errors import UserError

#: The tokens of the logit lens at each layer.
_TOP = 5

#: The longest prompt whose stream is shown, in tokens.
_LONGEST = 2048


def components(steered: Steered, body: Mapping[str, Any]) -> Iterator[Event]:
    """Yield the component along the direction after every layer at every token.

    ``before`` and ``after`` are (L, T): r·h / |h| of the original and of the edited model.
    """
    chosen, tokens = _prompt(steered, body)
    before = cosines(stream(steered.chat, tokens), chosen.steered.direction.selected)
    with chosen.steered.turned(chosen.strength):
        after = cosines(stream(steered.chat, tokens), chosen.steered.direction.selected)
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise UserError("the residual stream of this prompt is not finite.")
    yield {
        "tokens": [steered.chat.tokenizer.decode([token]) for token in tokens],
        "before": before.round(5).tolist(),
        "after": after.round(5).tolist(),
    }


def token(steered: Steered, body: Mapping[str, Any]) -> Iterator[Event]:
    """Yield one token's stream: the share of each dimension in the component, and the logit lens.

    ``before`` and ``after`` are (d,): r_i h_i / |h| after a layer; they add up to the component.
    ``lens`` has, for every layer, the likeliest next tokens if that layer were the last.
    """
    chosen, tokens = _prompt(steered, body)
    chat = steered.chat
    at = asked.whole(body, "token", len(tokens) - 1, 0, len(tokens) - 1)
    layer = asked.whole(body, "state", len(chat.layers) - 1, 0, len(chat.layers) - 1)
    selected = chosen.steered.direction.selected
    unit = numpy_of(orthonormal(selected if selected.ndim == 2 else selected[layer]))
    found: dict[str, Any] = {"token": at, "layer": layer}
    lenses = []
    for name, strength in (("before", 0.0), ("after", chosen.strength)):
        with chosen.steered.turned(strength):
            states = stream(chat, tokens)[:, at]
            lenses.append(lens(chat, states))
        state = numpy_of(states[layer])
        shares = (unit * state).sum(axis=0) if len(unit) == 1 else (unit @ state) @ unit * state
        size = max(float(np.linalg.norm(state)), 1e-30)
        found[name] = (shares / size).astype(float).round(5).tolist()
    found["lens"] = [
        {"layer": number, "before": before, "after": after}
        for number, (before, after) in enumerate(zip(*lenses, strict=True))
    ]
    yield found


def lens(chat: ChatModel, states: mx.array) -> list[list[tuple[str, float]]]:
    """The likeliest next tokens of states (N, d) behind the last layer: (text, probability) each.

    The model runs on as many tokens as there are states, and the last layer's output is replaced
    by them, so its own last norm and head read them (nostalgebraist 2020, the logit lens).
    """

    def wrapper(call: Any, *args: Any, **kwargs: Any) -> Any:
        return replaced(call(*args, **kwargs), states[None])

    blank = mx.zeros((1, states.shape[0]), mx.int32)
    with around([(chat.layers[-1], wrapper)]):
        logits = chat.model(blank)[0].astype(mx.float32)
    shares = numpy_of(mx.softmax(logits, axis=-1))
    rows = []
    for row in shares:
        best = np.argsort(-row)[:_TOP]
        rows.append(
            [(chat.tokenizer.decode([int(one)]), round(float(row[one]), 4)) for one in best]
        )
    return rows


def _prompt(steered: Steered, body: Mapping[str, Any]) -> tuple[asked.Edited, list[int]]:
    messages = [{"role": "user", "content": asked.text(body, "prompt")}]
    prompt = asked.conversation(steered, {**body, "messages": messages})
    tokens = steered.chat.encode(prompt)
    if len(tokens) > _LONGEST:
        raise UserError(f"the prompt has {len(tokens)} tokens, and at most {_LONGEST} are shown.")
    return asked.edited(steered, body), tokens
