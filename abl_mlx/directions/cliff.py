"""The refusal cliff of models that think, and the heads that suppress refusals at its edge.

Yin et al. 2025, "Refusal Falls off a Cliff: How Safety Alignment Fails in Reasoning?" (arXiv
2510.06036): a linear probe of the stream gives each token of a thought a refusal score. In many
reasoning models the score of harmful prompts stays high through the thought and falls at its last
tokens, because a few attention heads write against refusal there (refusal suppression heads); the
paper takes 3% of them out. A head h of a layer adds W_h x_h to the stream, W_h being the columns of
the attention's last weight that multiply the head's output x_h, so that it adds w·(W_h x_h) to the
score of a probe with the weight w.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx.directions.estimators import Array, Probe
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.hooks import around
from abl_mlx.models.writers import Writer
from abl_mlx.support.arrays import numpy_of
from convert.base.errors import UserError

# Names that mlx-lm's attentions give to their number of heads.
_COUNTS = ("n_heads", "num_heads", "num_attention_heads")


@dataclass(frozen=True)
class Head:
    """An attention head.

    Attributes:
        layer, number: which one, counted from 0.
        written: what it writes along a direction, the mean over prompts.
    """

    layer: int
    number: int
    written: float


def scores(probe: Probe, states: Array) -> Array:
    """Mean probability of refusal at each position, (P,), from states (N, P, d)."""
    shares = 0.5 * (1 + np.tanh(probe.scores(states) / 2))
    found: Array = shares.mean(axis=0)
    return found


def suppressors(heads: Sequence[Head], share: float) -> list[Head]:
    """The heads that write most against the direction: a share of all, at least one, if any do."""
    against = sorted((one for one in heads if one.written < 0), key=lambda one: one.written)
    return against[: max(1, round(share * len(heads)))]


def written(
    chat: ChatModel, writers: Sequence[Writer], vector: Array, prompts: Sequence[Sequence[int]]
) -> list[Head]:
    """What every attention head writes along a vector (d,) at the prompts' last tokens.

    Gains between a head and the stream (post-norms) multiply the vector, without a norm's scale.

    Args:
        chat: the model.
        writers: its residual writers.
        vector: in the residual stream, of any length.
        prompts: encoded prompts.

    Raises:
        UserError: when the model has no attention whose heads can be told apart.
    """
    modules = dict(chat.model.named_modules())
    counts: dict[str, int] = {}
    for one in writers:
        parent = modules.get(one.path.rpartition(".")[0])
        count = next((getattr(parent, name) for name in _COUNTS if hasattr(parent, name)), None)
        if one.kind == "linear" and one.component == "attention" and isinstance(count, int):
            counts[one.path] = count
    attending = [one for one in writers if one.path in counts]
    if not attending:
        raise UserError(
            f"{chat.model_type} has no attention whose heads can be told apart: leave "
            "--refusal-cliff out."
        )
    sums = {path: np.zeros(count) for path, count in counts.items()}

    def watch(writer: Writer) -> Any:
        along = _gained(vector, writer)
        count = counts[writer.path]

        def wrapper(call: Any, x: mx.array, *args: Any, **kwargs: Any) -> Any:
            # One pass of the module for all heads, each with the inputs of the others at 0.
            last = x[:1, -1:]
            width = last.shape[-1] // count
            mask = mx.repeat(mx.eye(count), width, axis=1)[:, None].astype(last.dtype)
            nothing = call(mx.zeros_like(last))
            each = (call(last * mask) - nothing).astype(mx.float32)[:, 0]
            sums[writer.path] += numpy_of(each) @ along
            return call(x, *args, **kwargs)

        return wrapper

    with around([(one.module, watch(one)) for one in attending]):
        for tokens in prompts:
            mx.eval(chat.model(mx.array([list(tokens)], mx.int32)))
    return [
        Head(one.layer, head, float(sums[one.path][head] / len(prompts)))
        for one in attending
        for head in range(counts[one.path])
    ]


def _gained(vector: Array, writer: Writer) -> Array:
    vector = np.asarray(vector, np.float64)
    return vector if writer.gain is None else vector * numpy_of(writer.gain)
