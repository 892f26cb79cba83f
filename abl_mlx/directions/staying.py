"""Prompts whose refusals are to stay, as far as the model refuses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from abl_mlx.inputs.sets import Prompt


@dataclass(frozen=True)
class Staying:
    """Validation prompts that the model refuses as it is, and is to refuse.

    Attributes:
        prompts: set -> these prompts.
        openings: ids of the tokens with which their refusals open.
    """

    prompts: Mapping[str, Sequence[Prompt]]
    openings: Sequence[int]

    @property
    def mixed(self) -> list[Prompt]:
        """The prompts of all sets, in turn."""
        rows = chain.from_iterable(zip_longest(*self.prompts.values()))
        return [one for one in rows if one is not None]
