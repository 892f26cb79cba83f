"""What a search may change about an edit, and the edit that a set of parameters stands for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from abl_mlx.directions.selection import DEEPEST

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Parameters = Mapping[str, Any]

#: The writers that have a kernel each; as `edit.Edit.profile` names them.
COMPONENTS = ("attention", "mlp")

#: The largest strength of a kernel. Beyond 1 a direction is turned round, beyond 2 made longer.
STRONGEST = 1.5

#: The direction that was chosen before the search, as it is: (k, d) or (L, k, d).
DEFAULT = "default"

#: ``(index, per layer) -> (k, d) or (L, k, d)``; the index is a layer, or lies between two.
Directions = Callable[[float, bool], mx.array]


def kernel(layers: int, peak: float, strength: float, width: float, floor: float) -> list[float]:
    """Strengths by layer, a tent over a floor: s·(f + (1 − f)·max(0, 1 − |l − p| / w)).

    Args:
        layers: how many, L.
        peak: p, the layer where it is highest; may lie between two.
        strength: s, its height there.
        width: w, after how many layers it is down on the floor; above 0.
        floor: f, the share of s that every layer has at least; 1 is the same everywhere.
    """
    return [
        strength * (floor + (1 - floor) * max(0.0, 1 - abs(layer - peak) / width))
        for layer in range(layers)
    ]


def _is_number(allowed: Any) -> bool:
    from optuna.distributions import FloatDistribution

    return isinstance(allowed, FloatDistribution)


@dataclass(frozen=True)
class Space:
    """The parameters of a search.

    Attributes:
        layers: L, how many the model has.
        methods: where directions come from, by name; `DEFAULT` is one of them.
        embedding: whether the embedding may be edited.
    """

    layers: int
    methods: Mapping[str, Directions]
    embedding: bool = True

    @property
    def deepest(self) -> int:
        """The last layer whose direction is tried, as in the causal choice."""
        return max(0, math.floor(DEEPEST * self.layers) - 1)

    def distributions(self) -> dict[str, BaseDistribution]:
        """The parameters as Optuna sees them."""
        from optuna.distributions import (
            CategoricalDistribution,
            FloatDistribution,
            IntDistribution,
        )

        last = self.layers - 1
        space: dict[str, BaseDistribution] = {
            "method": CategoricalDistribution(tuple(self.methods)),
            "index": FloatDistribution(0.0, float(self.deepest)),
            "per_layer": CategoricalDistribution((False, True)),
            "first_layer": IntDistribution(0, last),
            "last_layer": IntDistribution(0, last),
            "embedding": CategoricalDistribution((False, True) if self.embedding else (False,)),
        }
        for component in COMPONENTS:
            space |= {
                f"{component}_peak": FloatDistribution(0.0, float(last)),
                f"{component}_strength": FloatDistribution(0.0, STRONGEST),
                f"{component}_width": FloatDistribution(0.5, float(max(1, self.layers))),
                f"{component}_floor": FloatDistribution(0.0, 1.0),
            }
        return space

    def ranges(self) -> dict[str, tuple[float, float]]:
        """The parameters that are numbers between two layers or strengths, with their bounds."""
        space: dict[str, Any] = self.distributions()
        return {
            name: (allowed.low, allowed.high)
            for name, allowed in space.items()
            if _is_number(allowed)
        }

    def uniform(self, **changes: Any) -> dict[str, Any]:
        """The analytic default, the chosen direction at strength 1 everywhere, with changes."""
        found: dict[str, Any] = {
            "method": DEFAULT,
            "index": float(self.deepest),
            "per_layer": False,
            "first_layer": 0,
            "last_layer": self.layers - 1,
            "embedding": self.embedding,
        }
        for component in COMPONENTS:
            found |= {
                f"{component}_peak": (self.layers - 1) / 2,
                f"{component}_strength": 1.0,
                f"{component}_width": float(max(1, self.layers)),
                f"{component}_floor": 1.0,
            }
        return found | changes

    def even(self, strength: float, **changes: Any) -> dict[str, Any]:
        """The chosen direction at one strength in all layers, the embedding left as it is."""
        both = {f"{component}_strength": strength for component in COMPONENTS}
        return self.uniform(**({"embedding": False} | both | changes))

    def analytic(self, strength: float) -> list[dict[str, Any]]:
        """What is tried after the default and the weakest even edit that leaves no refusals.

        Args:
            strength: of the latter.
        """
        variants = [
            self.even(strength, first_layer=min(1, self.layers - 1)),
            # What is left to the first layer the others have to make up for.
            self.even(min(1.25 * strength, STRONGEST), first_layer=min(1, self.layers - 1)),
            self.even(strength, mlp_strength=strength / 2),
            self.even(strength, attention_strength=strength / 2),
        ]
        others = [name for name in self.methods if name != DEFAULT]
        return variants + [self.even(strength, method=name) for name in others]

    def neighbour(self, parameters: Parameters, random: np.random.Generator) -> dict[str, Any]:
        """Parameters with a few of them moved: numbers by up to a fifth of their range or so."""
        from optuna.distributions import CategoricalDistribution, IntDistribution

        space = self.distributions()
        found = dict(parameters)
        scale = float(random.choice([0.03, 0.1, 0.2]))
        # A choice, or a whole layer, is a leap: rarely, and by itself.
        if random.random() < 0.15:
            name = str(random.choice([one for one in space if not _is_number(space[one])]))
            allowed = space[name]
            if isinstance(allowed, CategoricalDistribution):
                found[name] = allowed.choices[int(random.integers(len(allowed.choices)))]
            elif isinstance(allowed, IntDistribution):
                step = int(random.choice([-1, 1]))
                found[name] = int(np.clip(found[name] + step, allowed.low, allowed.high))
            return found
        for component in COMPONENTS:
            if found[f"{component}_floor"] > 0.95 and random.random() < 0.5:
                found |= self._tent(component, found[f"{component}_strength"], random)
        numbers = [name for name in space if _is_number(space[name])]
        share = float(random.choice([0.2, 0.5, 1.0]))
        moved = [name for name in numbers if random.random() < share]
        for name in moved or [str(random.choice(numbers))]:
            low, high = space[name].low, space[name].high
            value = found[name] + scale * (high - low) * random.normal()
            found[name] = float(np.clip(value, low, high))
        return found

    def _tent(
        self, component: str, strength: float, random: np.random.Generator
    ) -> dict[str, float]:
        """A kernel of some shape in place of an even one, of the same strength in the mean.

        Under a floor as high as the peak, peak and width change nothing: no small step leads away.
        """
        peak = float(random.uniform(0, self.layers - 1))
        width = float(random.uniform(0.5, max(1, self.layers)))
        floor = float(random.uniform(0.3, 1))
        mean = float(np.mean(kernel(self.layers, peak, 1.0, width, floor)))
        return {
            f"{component}_peak": peak,
            f"{component}_strength": min(strength / mean, STRONGEST),
            f"{component}_width": width,
            f"{component}_floor": floor,
        }

    def directions(self, parameters: Parameters) -> mx.array:
        """What is removed: (k, d), or (L, k, d) where each layer has its own."""
        make = self.methods[parameters["method"]]
        return make(float(parameters["index"]), bool(parameters["per_layer"]))

    def recipe(self, parameters: Parameters) -> dict[str, Any]:
        """What of an edit is not its directions: ``profile`` and ``embedding``."""
        ends = sorted((int(parameters["first_layer"]), int(parameters["last_layer"])))
        profile = {}
        for component in COMPONENTS:
            strengths = kernel(
                self.layers,
                *(
                    float(parameters[f"{component}_{name}"])
                    for name in ("peak", "strength", "width", "floor")
                ),
            )
            profile[component] = [
                strength if ends[0] <= layer <= ends[1] else 0.0
                for layer, strength in enumerate(strengths)
            ]
        return {"profile": profile, "embedding": bool(parameters["embedding"])}

    def kind(self, parameters: Parameters) -> tuple[Any, ...]:
        """The choices among the parameters, that no number stands for."""
        return tuple(parameters[name] for name in ("method", "per_layer", "embedding"))

    def place(self, parameters: Parameters) -> list[float]:
        """What the numbers come to: the strength of every layer's writers, and the index."""
        profile = self.recipe(parameters)["profile"]
        index = parameters["index"] / max(1, self.deepest)
        return [*profile["attention"], *profile["mlp"], index]

    def changes_something(self, parameters: Parameters) -> bool:
        """Whether any writer at all is edited."""
        recipe = self.recipe(parameters)
        return recipe["embedding"] or any(map(any, recipe["profile"].values()))
