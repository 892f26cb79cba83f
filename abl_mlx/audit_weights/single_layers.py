"""Single layers whose writers hold nothing along one direction that they share.

The search over a whole model wants three writers that agree, and those of one layer are two. But a
full removal leaves both of them next to nothing along the same direction, while their weakest
directions otherwise have little in common: along the best compromise the larger of their energies
is 0.04 or more in each layer of the models of docs/audit.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from abl_mlx.audit_weights import spectrum
from abl_mlx.audit_weights.spectrum import Forms, Found

#: A layer was edited if none of its writers holds more than this along a direction, and not more
#: than this share of what one of them holds along the layer's next direction.
_EMPTY, _OF_NEXT = 0.002, 0.03

#: The same for "cannot tell".
LOW, _DOUBT_OF_NEXT = 0.01, 0.1

#: Least number of writers of a layer, and layers that have a sentence of evidence of their own.
_LEAST, _SHOWN = 2, 3

#: A layer is not judged if it writes so little along some direction because of its dimensions, as
#: where more than half of them were pruned.
_UNUSED = 1e-9


@dataclass(frozen=True)
class Layer:
    """The direction along which the writers of one layer together hold least.

    Attributes:
        number: the layer's number.
        writers: the indices of its writers.
        found: the direction, and the energies of all writers of the model along it.
        following: the largest energy of the layer's own writers along its next direction.
    """

    number: int
    writers: np.ndarray
    found: Found
    following: float

    @property
    def most(self) -> float:
        """The largest energy of the layer's own writers along the direction."""
        return float(self.found.energies[self.writers].max())

    @property
    def empty(self) -> bool:
        """Whether only an edit leaves so little."""
        return self.most < min(_EMPTY, _OF_NEXT * self.following)

    @property
    def doubtful(self) -> bool:
        """Whether it is less than chance leaves."""
        return self.most < min(LOW, _DOUBT_OF_NEXT * self.following)

    def planted(self, energies: np.ndarray) -> Layer:
        """The layer if the writers held these energies along another direction, (N,)."""
        return replace(self, found=replace(self.found, energies=energies), following=self.most)


def weakest(forms: Forms, layers: Sequence[int]) -> list[Layer]:
    """The weakest direction of each layer that has two writers or more, and uses its dimensions.

    Args:
        forms: the energies of all writers.
        layers: the layer of each writer; -1 for an embedding.
    """
    at = np.array(layers)
    found = []
    for number in sorted({*layers} - {-1}):
        inside = np.flatnonzero(at == number)
        if len(inside) < _LEAST:
            continue
        held = np.tensordot(1 / forms.units[inside], forms.held[inside], 1)
        alone = forms.alone[inside].sum(axis=0)
        values = np.linalg.eigvalsh(alone)
        if values[0] <= _UNUSED * values[-1]:
            continue
        # The least vᵀ held v / vᵀ alone v, by whitening.
        white = np.linalg.inv(np.linalg.cholesky(alone))
        turned = white.T @ np.linalg.eigh(white @ held @ white.T)[1][:, :2]
        turned /= np.linalg.norm(turned, axis=0)
        energies = forms.energies(turned)
        one = Found(turned[:, 0], 0.0, energies[:, 0])
        found.append(Layer(number, inside, one, float(energies[inside, 1].max())))
    return found


def emptied(layers: Sequence[Layer], *, doubtful: bool) -> list[Layer]:
    """The layers that were edited; if none surely was and ``doubtful``, those that are in doubt."""
    sure = [one for one in layers if one.empty]
    return sure or [one for one in layers if doubtful and one.doubtful]


def evidence(layers: Sequence[Layer], strength: float) -> list[str]:
    """The evidence for edits of these layers, one sentence each."""
    some = sorted(layers, key=lambda one: one.number)
    lines = [
        f"in layer {one.number} all {len(one.writers)} residual writers hold next to nothing along "
        f"one direction (at most {one.most:.1e} of what they hold along their own weakest ones; "
        f"along the layer's next direction {one.following:.2f})"
        for one in some[:_SHOWN]
    ]
    if len(some) > _SHOWN:
        rest = spectrum.spans([one.number for one in some[_SHOWN:]])
        lines.append(f"and so in layers {rest}")
    lines.append(f"strength about {strength:.2f}, if it was once as strong there as any other")
    if not some[0].empty:
        lines.append("that is less than chance leaves, and more than a full removal does")
    return lines
