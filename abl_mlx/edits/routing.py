"""`Routing`: routers are biased against some experts, so that fewer tokens are sent to these.

Harmful prompts are sent to some experts more often than others are (SAFEx, Lai et al. 2025,
arXiv:2506.17368; `abl_mlx.directions.parts` ranks them). Where a router adds a bias to what it
chooses experts by, the bias of these experts is lowered:

- by 2 α where it is added to scores between 0 and 1 (DeepSeek's ``e_score_correction_bias``, which
  chooses experts and is not in their weights). At α = 1 an expert loses to every other one whose
  bias was not lower by more than 1;
- by 20 α nats where it is added to logits (the router of gpt-oss), which multiplies the expert's
  odds by e⁻²⁰ at α = 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx.choices import Editing
from abl_mlx.edits.edit import Edit, Pairs
from abl_mlx.edits.weight_edit import WeightEdit
from abl_mlx.models.writers import LOGIT_ROUTER, SCORE_ROUTER, Writer
from convert.base.errors import UserError

#: How much a bias is lowered at strength 1, by the kind of the router.
LOWERED = {SCORE_ROUTER: 2.0, LOGIT_ROUTER: 20.0}


@dataclass(frozen=True)
class Routing:
    """The bias of some experts in their routers, lowered.

    Its lines are the biases of a router, one entry for each of E experts, and its basis has a unit
    vector for each chosen expert.

    Attributes:
        experts: (layer, expert) each; None for all, where they are not known yet.
        strength: α.
        layers: the layers whose routers may be edited; None for all.
        norm: always ``none``.
        places: always ``routers``.
    """

    experts: Pairs | None
    strength: float = 1.0
    layers: frozenset[int] | None = None
    norm: str = "none"
    places: str = "routers"

    @property
    def width(self) -> int:
        """0: it has no directions in the residual stream."""
        return 0

    def strength_of(self, writer: Writer) -> float:
        """The strength α for one router."""
        return self.strength

    def numbers(self, writer: Writer) -> list[int]:
        """The numbers of a router's experts that are lowered."""
        if self.layers is not None and writer.layer not in self.layers:
            return []
        if self.experts is None:
            return list(range(writer.inputs))
        return sorted(number for layer, number in self.experts if layer == writer.layer)

    def touches(self, writer: Writer) -> bool:
        """Whether this router is edited."""
        return writer.kind in LOWERED and bool(self.numbers(writer))

    def chosen(self, writers: Iterable[Writer]) -> list[Writer]:
        """The routers that are edited.

        Raises:
            UserError: when there are none, an expert is not there, or the strength is 0.
        """
        routers = [one for one in writers if one.kind in LOWERED]
        have = {one.layer: one.inputs for one in routers}
        for layer, number in sorted(self.experts or ()):
            if number >= have.get(layer, 0):
                count = f"{have[layer]} experts" if layer in have else "no router with a bias"
                raise UserError(
                    f"--experts {layer}.{number}: layer {layer} of this model has {count}, counted "
                    "from 0."
                )
        chosen = [one for one in routers if self.touches(one)]
        if not chosen or self.strength == 0:
            raise UserError(
                "this edit changes nothing: name experts in layers that are edited (--experts, "
                "--layers) and a --strength other than 0."
            )
        return chosen

    def parameters(self, writer: Writer) -> tuple[str, ...]:
        """The parameter that holds the biases."""
        return (writer.router,)

    def axis(self, writer: Writer, parameter: str) -> int:
        """The axis of the experts."""
        return -1

    def basis(self, writer: Writer) -> mx.array:
        """A unit vector for each chosen expert: float32 (k, E)."""
        return mx.array(np.eye(writer.inputs, dtype=np.float32)[self.numbers(writer)])

    def taken(self, writer: Writer, along: Any, axis: int) -> Any:
        """By how much the chosen experts' biases, of the shape (…, k), are lowered."""
        lowered = self.strength * LOWERED[writer.kind]
        if isinstance(along, mx.array):
            return mx.full(along.shape, lowered, dtype=mx.float32)
        return np.full(along.shape, lowered, along.dtype)

    def without_norms(self) -> Routing:
        """The same edit, which keeps no norms."""
        return self

    def of_slab(self, rows: slice, columns: slice) -> Routing:
        """The edit itself: biases are edited whole."""
        return self

    def of_expert(self, expert: int) -> Routing:
        """The edit itself, which changes no experts."""
        return self

    def low_rank(self, writer: Writer, along: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Not there: no adapter holds a bias, which is checked before (`destinations.check`)."""
        raise UserError(f"{writer.path}: an adapter holds no bias of a router.")


def of_any_directions(width: int, editing: Editing) -> WeightEdit:
    """An edit of the chosen places, along directions that are not known yet.

    Args:
        width: d.
        editing: the chosen options.
    """
    if editing.edit == "routers":
        return Routing(None, 1.0, editing.layers)
    return Edit(mx.ones((1, width)), 1.0, editing.layers, editing.embedding, places=editing.edit)
