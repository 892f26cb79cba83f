"""The value at which an affine edit holds the component along a direction, instead of 0.

The formula is in docs/architecture.md, "Pin"; affine concept editing is of Marshall et al. 2024,
"Refusal in LLMs is an Affine Function" (arXiv 2411.09003).

After every other writer is projected, the embedding alone determines the stream's component along
the directions. So ``--pin harmless`` holds the component at its mean over the embeddings of
harmless prompts. The means after deeper layers would be wrong: they are many times as large, and
earlier layers never get such a component. Pinned at the mean after layer 2, the demo's replies to
harmless prompts moved by 4.75 nats at the first token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from abl_mlx.edits.edit import orthonormal
from abl_mlx.edits.steering import first_input
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.hooks import around
from abl_mlx.models.writers import Writer
from abl_mlx.support.arrays import number, numbers
from convert.base.errors import UserError

#: The names that ``--pin`` accepts besides a number.
NAMES = ("harmful", "harmless")


@dataclass(frozen=True)
class EmbeddingMeans:
    """The mean input of the first layer over all tokens of each prompt set.

    Attributes:
        scale: the constant by which the embedding's output is multiplied to give the first layer's
            input. None where more than a constant lies between them (a norm, embeddings of
            positions), or where the embedding is not among the edit's writers.
        harmful, harmless: (d,) float32, in the stream's units; None if ``scale`` is None.
    """

    scale: float | None
    harmful: mx.array | None = None
    harmless: mx.array | None = None

    def pins(self, selected: mx.array) -> dict[str, list[float]] | None:
        """Name of a set -> its k mean components along orthonormal directions.

        None if ``scale`` is None.

        Args:
            selected: (k, d), or (L, k, d), of which those of layer 0 count.
        """
        if self.harmful is None or self.harmless is None:
            return None
        basis = orthonormal(selected if selected.ndim == 2 else selected[0])
        means = {"harmful": self.harmful, "harmless": self.harmless}
        return {name: numbers(basis @ mean) for name, mean in means.items()}


def embedding_means(
    chat: ChatModel,
    writers: Sequence[Writer],
    harmful: Sequence[Sequence[int]],
    harmless: Sequence[Sequence[int]],
) -> EmbeddingMeans:
    """The mean embeddings of the prompts' tokens; the model itself runs one short prompt only.

    Args:
        chat: the model.
        writers: the edit's writers.
        harmful, harmless: encoded prompts.
    """
    embedding = next((writer for writer in writers if writer.kind == "embedding"), None)
    if embedding is None:  # --tensors left the embedding out
        return EmbeddingMeans(None)
    scale = _scale(chat, embedding)
    if scale is None:
        return EmbeddingMeans(None)

    def mean(sequences: Sequence[Sequence[int]]) -> mx.array:
        counts = Counter(token for sequence in sequences for token in sequence)
        rows = embedding.module(mx.array([list(counts)], mx.int32))[0].astype(mx.float32)
        weights = mx.array(list(counts.values()), mx.float32)
        return scale * (weights @ rows) / weights.sum()

    return EmbeddingMeans(scale, mean(harmful), mean(harmless))


def _scale(chat: ChatModel, embedding: Writer) -> float | None:
    seen: dict[str, mx.array] = {}

    def keep(name: str, states: mx.array) -> mx.array:
        seen[name] = states.astype(mx.float32)
        return states

    def out(call: Any, *args: Any, **kwargs: Any) -> Any:
        return keep("out", call(*args, **kwargs))

    with around([(embedding.module, out)]), first_input(chat, lambda states: keep("in", states)):
        mx.eval(chat.model(mx.array([chat.encode("Hello there.")])))
    before, after = seen["out"].reshape(-1), seen["in"].reshape(-1)
    scale = number((before * after).sum()) / number((before * before).sum())
    off = number(mx.abs(after - scale * before).max()) / number(mx.abs(after).max())
    return scale if off < 1e-2 else None


def held_at(
    wanted: str | None,
    pins: Mapping[str, Sequence[float]] | None,
    scale: float | None,
    count: int,
) -> mx.array | None:
    """The components that ``--pin`` gives the embedding's rows, (count,), in the embedding's units.

    None without ``--pin``.

    Args:
        wanted: the value of ``--pin``: one of `NAMES`, or a number in the stream's units.
        pins: the result of `EmbeddingMeans.pins`, as the direction file has it.
        scale: `EmbeddingMeans.scale`.
        count: the number of directions.

    Raises:
        UserError: when the components cannot be computed because ``pins`` or ``scale`` is missing.
    """
    if wanted is None:
        return None
    if not scale:
        raise UserError(
            "--pin needs a direction measured by abl-mlx on a model whose embedding, times a "
            "constant, is what its first layer gets."
        )
    if wanted not in NAMES:
        return mx.full((count,), float(wanted)) / scale
    if pins is None:
        raise UserError(f"--pin {wanted} needs a direction file that `abl-mlx measure` wrote.")
    return mx.array(list(pins[wanted])) / scale
