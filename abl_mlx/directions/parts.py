"""Which attention heads write along a direction, and which experts harmful prompts are sent to.

The output of an attention is Σ_h W_h x_h over its heads, W_h being the columns of its last weight
that multiply head h's output x_h. So head h adds u·(W_h x_h) to the stream's component along u,
and heads are ranked by the difference of that between harmful and harmless prompts (Elhage et al.
2021, "A Mathematical Framework for Transformer Circuits"; heads that matter for safety: Zhou et al.
2024, arXiv 2410.13708).

Experts are ranked by how much more often the router sends the tokens of harmful prompts to them
(SAFEx, arXiv 2506.17368). As there, the choice must be stable: prompts are drawn anew, with
replacement, and ``stable`` is the share of these draws in which the expert is among the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx.edits.edit import Edit, Pairs
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.hooks import around
from abl_mlx.models.module_weights import module_parts, module_shape
from abl_mlx.models.writers import Writer
from abl_mlx.support.arrays import numpy_of
from convert.base.errors import UserError

#: How many heads and experts a record lists.
LISTED = 32

_DRAWS = 200


@dataclass(frozen=True)
class Part:
    """A head or an expert, with a figure of harmful and of harmless prompts.

    Attributes:
        layer, number: which one.
        harmful, harmless: of a head the mean component that it writes along the directions (their
            norm's sign is that of the first direction's); of an expert the mean number of times
            that a token is sent to it.
        stable: of an expert, the share of draws in which it is among the first; else None.
    """

    layer: int
    number: int
    harmful: float
    harmless: float
    stable: float | None = None

    @property
    def difference(self) -> float:
        """Harmful less harmless."""
        return self.harmful - self.harmless

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        found = {
            "layer": self.layer, "number": self.number, "harmful": self.harmful,
            "harmless": self.harmless,
        }  # fmt: skip
        return found if self.stable is None else {**found, "stable": self.stable}


def heads(
    chat: ChatModel,
    writers: Sequence[Writer],
    directions: mx.array,
    harmful: Sequence[Sequence[int]],
    harmless: Sequence[Sequence[int]],
    position: int = -1,
) -> list[Part]:
    """All heads by what they write along the first direction, the largest difference first.

    Args:
        chat: the model.
        writers: its residual writers.
        directions: (k, d) or (L, k, d).
        harmful, harmless: encoded prompts.
        position: the token, counted from the prompt's end.

    Raises:
        UserError: when the model has no attention heads to tell apart.
    """
    attending = [one for one in writers if one.kind == "linear" and one.parts]
    if not attending:
        raise UserError("--heads: this model has no attention whose heads could be told apart.")
    columns = {one.path: _along(Edit(directions), one) for one in attending}
    seen: dict[str, list[np.ndarray]] = {}

    def watch(writer: Writer) -> Any:
        def wrapper(call: Any, x: mx.array, *args: Any, **kwargs: Any) -> Any:
            state = x.reshape(-1, x.shape[-1])[position].astype(mx.float32)
            parts = (state * columns[writer.path]).reshape(writer.parts, -1).sum(axis=-1)
            seen.setdefault(writer.path, []).append(numpy_of(parts))
            return call(x, *args, **kwargs)

        return wrapper

    means = []
    for prompts in (harmful, harmless):
        seen.clear()
        with around([(one.module, watch(one)) for one in attending]):
            for tokens in prompts:
                mx.eval(chat.model(mx.array([list(tokens)], mx.int32)))
        means.append({path: np.mean(rows, axis=0) for path, rows in seen.items()})
    found = [
        Part(one.layer, head, float(means[0][one.path][head]), float(means[1][one.path][head]))
        for one in attending
        for head in range(one.parts)
    ]
    return sorted(found, key=lambda part: -part.difference)


def _along(edit: Edit, writer: Writer) -> mx.array:
    """uᵀW of the first direction: (n,)."""
    unit = edit.basis(writer)[0]
    whole = mx.zeros(module_shape(writer.module)[-1])
    for index, values in module_parts(writer.module):
        whole = whole + unit[index[-2]] @ values
    return whole


def experts(
    chat: ChatModel,
    writers: Sequence[Writer],
    harmful: Sequence[Sequence[int]],
    harmless: Sequence[Sequence[int]],
    first: int = LISTED,
) -> list[Part]:
    """All experts by how often tokens of the prompts are sent to them, most on harmful ones first.

    Args:
        chat: the model.
        writers: its residual writers.
        harmful, harmless: encoded prompts.
        first: how many experts count as the first, for `Part.stable`.

    Raises:
        UserError: when the model has no stacks of experts.
    """
    stacks = [one for one in writers if one.kind == "experts"]
    if not stacks:
        raise UserError("--experts: this model has no experts in one stack for each layer.")
    counts = [_routed(chat, stacks, prompts) for prompts in (harmful, harmless)]
    bad, good = (count.mean(axis=0) for count in counts)  # (layers, E)
    draws = np.random.default_rng(0)
    among = np.zeros(bad.shape)
    for _ in range(_DRAWS):
        drawn = [count[draws.integers(len(count), size=len(count))] for count in counts]
        change = (drawn[0].mean(axis=0) - drawn[1].mean(axis=0)).ravel()
        among.ravel()[np.argsort(-change)[:first]] += 1 / _DRAWS
    found = [
        Part(one.layer, e, float(bad[i, e]), float(good[i, e]), float(among[i, e]))
        for i, one in enumerate(stacks)
        for e in range(one.parts)
    ]
    return sorted(found, key=lambda part: -part.difference)


def _routed(
    chat: ChatModel, stacks: Sequence[Writer], prompts: Sequence[Sequence[int]]
) -> np.ndarray:
    """How often a token of each prompt is sent to each expert: (prompts, layers, E)."""
    modules = dict(chat.model.named_modules())
    most = max(one.parts for one in stacks)
    found = np.zeros((len(prompts), len(stacks), most))
    now = 0

    def watch(index: int) -> Any:
        def wrapper(call: Any, *args: Any, **kwargs: Any) -> Any:
            chosen = next(
                one
                for one in [*args, *kwargs.values()]
                if isinstance(one, mx.array) and mx.issubdtype(one.dtype, mx.integer)
            )
            sent = np.array(chosen.astype(mx.int32)).ravel()
            found[now, index] += np.bincount(sent, minlength=most)[:most]
            return call(*args, **kwargs)

        return wrapper

    # The parent is given the experts of each token before tokens are sorted by expert.
    parents = [modules[one.path.rpartition(".")[0]] for one in stacks]
    with around([(parent, watch(index)) for index, parent in enumerate(parents)]):
        for now, tokens in enumerate(prompts):
            mx.eval(chat.model(mx.array([list(tokens)], mx.int32)))
            found[now] /= len(tokens)
    return found


def is_count(text: str) -> bool:
    """Whether a flag's value says how many are taken of a ranking, and names none."""
    return "." not in text


def chosen(text: str, ranking: Sequence[dict[str, Any]] | None, flag: str) -> Pairs:
    """The (layer, number) pairs that a flag names.

    Args:
        text: ``LAYER.NUMBER,…``, or a number N: the first N of the ranking.
        ranking: records of `Part`, the first first; None where there is none.
        flag: the flag's name, for messages.

    Raises:
        UserError: when N is given without a ranking, or with a shorter one.
    """
    if not is_count(text):
        pairs = (one.split(".") for one in text.split(","))
        return frozenset((int(layer), int(number)) for layer, number in pairs)
    count = int(text)
    if ranking is None or count > len(ranking):
        have = "none" if ranking is None else f"one of {len(ranking)}"
        raise UserError(
            f"{flag} {count} takes the first {count} of a ranking, and the direction file has "
            f"{have}: `abl-mlx measure --rank-parts` makes one of {LISTED}, or name them as "
            f"{flag} LAYER.NUMBER,LAYER.NUMBER."
        )
    return frozenset((one["layer"], one["number"]) for one in ranking[:count])
