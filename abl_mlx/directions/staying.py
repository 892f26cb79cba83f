"""Prompts whose refusals are to stay, as far as the model refuses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import TypeVar

from abl_mlx.inputs.sets import Prompt
from abl_mlx.models.encoded_sets import EncodedSet

Item = TypeVar("Item")


@dataclass(frozen=True)
class Staying:
    """Validation prompts that the model refuses as it is, and is to refuse.

    Attributes:
        sets: name -> these prompts.
        openings: ids of the tokens with which their refusals open.
    """

    sets: Mapping[str, EncodedSet]
    openings: Sequence[int]

    @property
    def prompts(self) -> dict[str, tuple[Prompt, ...]]:
        """Name of the set -> its prompts, without their tokens."""
        return {name: one.prompts for name, one in self.sets.items()}

    @property
    def mixed(self) -> list[list[int]]:
        """The token ids of the prompts of all sets, in turn."""
        return in_turn([one.tokens for one in self.sets.values()])


def in_turn(parts: Sequence[Sequence[Item]]) -> list[Item]:
    """What is in several lists, one of each at a time."""
    rows = chain.from_iterable(zip_longest(*parts))
    return [one for one in rows if one is not None]
