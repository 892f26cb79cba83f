"""Where a search looks: the prompts on which it screens edits, and the directions of these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import mlx.core as mx

from abl_mlx.choices import Measuring
from abl_mlx.directions import measuring
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.directions.measuring import Candidates
from abl_mlx.directions.staying import Staying
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.encoded_sets import EncodedSets
from abl_mlx.search.space import DEFAULT, Directions

#: The number of harmless prompts for the KL, and of harmful prompts to which edits on the front
#: reply. If the validation part has fewer, prompts of the train part are added. A search overfits
#: the prompts that score it: with thirty, two or three prompts would decide.
ENOUGH_PROMPTS = 64


@dataclass(frozen=True)
class SearchPrompts:
    """Token ids of the prompts of a search, whose last tokens are where it looks.

    Attributes:
        train: harmful and harmless ones, of which singular vectors are made.
        harmful, harmless: validation prompts on which edits are screened.
        staying: prompts whose refusals are to stay, if there are any.
        orthogonal: candidates that were made orthogonal to what these prompts have of their own, by
            kind, as of `variants.Variant.orthogonal_to`.
    """

    train: tuple[list[list[int]], list[list[int]]]
    harmful: list[list[int]]
    harmless: list[list[int]]
    staying: Staying | None = None
    orthogonal: Mapping[str, Candidates] = field(default_factory=dict)


def at_prompts(sets: EncodedSets) -> SearchPrompts:
    """The ends of the prompts."""
    return SearchPrompts(
        (sets.train["harmful"].tokens, sets.train["harmless"].tokens),
        sets.validation["harmful"].tokens,
        sets.filled_up("harmless", ENOUGH_PROMPTS).tokens,
    )


def sources_of(
    chat: ChatModel, encoded: SearchPrompts, found: DirectionFile, how: Measuring
) -> dict[str, Directions]:
    """Name -> source of directions for a search: the analytic choice, its method, and others.

    Singular vectors are measured here, with one pass over the train prompts.
    """

    def fixed(chosen: mx.array) -> Directions:
        return lambda index, per_layer: chosen

    made: dict[str, Directions] = {DEFAULT: fixed(found.selected)}
    candidates = found.candidates
    position = found.metadata.get("summary", {}).get("position", -1)
    if candidates is None or how.given.direction is not None:
        return made
    if position not in candidates.positions:
        position = candidates.positions[-1]
    layers = candidates.n_layers

    def of(these: measuring.Candidates, where: int) -> Directions:
        def make(index: float, per_layer: bool) -> mx.array:
            return these.each_layer(where) if per_layer else these.at(index, where)

        return make

    made[candidates.method] = of(candidates, position)
    made |= {kind: of(these, position) for kind, these in encoded.orthogonal.items()}
    if how.finding.method is None:
        for rank in (2, 3):
            if rank <= layers:
                made[f"layers-rank-{rank}"] = fixed(candidates.across_layers(position, rank))
        bad, good = encoded.train
        spans = measuring.measure(chat, bad, good, [position], method="svd", rank=min(2, len(bad)))
        made["svd"] = of(spans, position)
    return made
