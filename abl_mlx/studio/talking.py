"""Replies, a piece at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import mlx.core as mx

from abl_mlx.behaviour.refusals import classify
from abl_mlx.commands.session import Steered
from abl_mlx.models import heads
from abl_mlx.models.hooks import scope
from abl_mlx.studio import asked
from abl_mlx.studio.desk import Event


def reply(steered: Steered, body: Mapping[str, Any]) -> Iterator[Event]:
    """Yield ``{"text": …}`` for each piece of a reply, and then how it ended.

    Args:
        body: a request, with the fields of `asked.conversation` and `asked.edited`, ``max_tokens``
            and ``temperature``.
    """
    from mlx_lm import stream_generate
    from mlx_lm.sample_utils import make_sampler

    chosen = asked.edited(steered, body)
    chat, prompt = steered.chat, asked.conversation(steered, body)
    tokens = chat.encode_message(prompt)
    strength, told = chosen.strength, None
    if strength != 0:
        decision = steered.decide(tokens)
        told = None if decision is None else str(decision)
        if decision is not None and not decision.met:
            strength = 0.0
    steps: Any = stream_generate(
        chat.model, chat.tokenizer, mx.array(tokens),
        max_tokens=asked.whole(body, "max_tokens", 512, 1, 100_000),
        sampler=make_sampler(temp=asked.number(body, "temperature", 0, 0, 5)),
    )  # fmt: skip
    pieces, last, own = [], None, object()
    with ExitStack() as hooks:
        with scope(own):  # other work takes turns with this, and does not see these hooks
            hooks.enter_context(heads.last_only(chat.model))
            hooks.enter_context(chosen.steered.turned(strength))
        while True:
            with scope(own):
                step = next(steps, None)
            if step is None:
                break
            last = step
            pieces.append(step.text)
            yield {"text": step.text}
    yield {
        "done": "length" if last is None else last.finish_reason,
        "tokens": len(pieces),
        "verdict": classify("".join(pieces), prompt.text).value,
        "condition": told,
    }
