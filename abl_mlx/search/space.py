"""The parameters of edits that a search may change, and the edit for given parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from abl_mlx.directions.selection import DEEPEST

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Parameters = Mapping[str, Any]

#: The groups of writers with a strength kernel each, named as in `edit.Edit.profile`.
COMPONENTS = ("attention", "mlp")

#: The largest strength of a kernel. Beyond 1 the component changes its sign, beyond 2 it grows.
STRONGEST = 1.5

#: The name of the direction that was chosen before the search, (k, d) or (L, k, d).
DEFAULT = "default"

#: A function ``(index, per_layer) -> (k, d) or (L, k, d)``; the index is a layer number, which may
#: lie between two layers.
Directions = Callable[[float, bool], mx.array]


def kernel(layers: int, peak: float, strength: float, width: float, floor: float) -> list[float]:
    """The strength for each layer l: s·(f + (1 − f)·max(0, 1 − |l − p| / w)).

    Args:
        layers: L, the number of layers.
        peak: p, the layer of the largest strength; it may lie between two layers.
        strength: s, the largest strength.
        width: w, how many layers from the peak the strength reaches its smallest value; above 0.
        floor: f, the smallest strength as a share of s; 1 means equal strengths.
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
        layers: L, the number of the model's layers.
        methods: name -> source of directions; `DEFAULT` is one of them.
        embedding: whether the embedding may be edited.
        profile: the strengths of each layer that were chosen before the search, by which those of
            an edit with the direction `DEFAULT` are multiplied; None for 1.
    """

    layers: int
    methods: Mapping[str, Directions]
    embedding: bool = True
    profile: Mapping[str, Sequence[float]] | None = None

    @property
    def deepest(self) -> int:
        """The last layer whose direction is tried, as in the causal choice."""
        return max(0, math.floor(DEEPEST * self.layers) - 1)

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distributions of the parameters."""
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
        """The parameters that are real numbers, with their bounds."""
        space: dict[str, Any] = self.distributions()
        return {
            name: (allowed.low, allowed.high)
            for name, allowed in space.items()
            if _is_number(allowed)
        }

    def uniform(self, **changes: Any) -> dict[str, Any]:
        """The parameters of the default edit, strength 1 everywhere, with these changes."""
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
        """The parameters of an edit with one strength in all layers and an unedited embedding."""
        both = {f"{component}_strength": strength for component in COMPONENTS}
        return self.uniform(**({"embedding": False} | both | changes))

    def analytic(self, strength: float, **kin: Any) -> list[dict[str, Any]]:
        """The parameters to try after the default and the weakest even edit without refusals.

        Args:
            strength: the strength of that edit.
            kin: its direction.
        """
        second = min(1, self.layers - 1)
        variants = [
            self.even(strength, first_layer=second, **kin),
            # The first layer is left out, so the others get a larger strength.
            self.even(min(1.25 * strength, STRONGEST), first_layer=second, **kin),
            self.even(strength, mlp_strength=strength / 2, **kin),
            self.even(strength, attention_strength=strength / 2, **kin),
        ]
        others = [name for name in self.methods if name != DEFAULT]
        variants += [self.even(strength, method=name) for name in others]
        if self.embedding:
            # With the embedding edited, layers need far less, or nothing at all.
            variants.append(self.even(strength / 2, embedding=True))
            variants += [self.even(0.0, method=name, embedding=True) for name in self.methods]
        return variants

    def neighbour(self, parameters: Parameters, random: np.random.Generator) -> dict[str, Any]:
        """The parameters with a few changed at random, numbers by up to about a fifth of their
        range."""
        from optuna.distributions import CategoricalDistribution, IntDistribution

        space = self.distributions()
        found = dict(parameters)
        scale = float(random.choice([0.03, 0.1, 0.2]))
        # A change of a choice or of a whole layer is large, so it is made rarely and alone.
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
        """The parameters of a random kernel with the mean strength of an even one.

        An even kernel (floor 1) does not depend on peak and width, so small changes of these have
        no effect, and a larger change is needed.
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
        """The directions to remove: (k, d), or (L, k, d) with separate ones for each layer."""
        make = self.methods[parameters["method"]]
        return make(float(parameters["index"]), bool(parameters["per_layer"]))

    def recipe(self, parameters: Parameters) -> dict[str, Any]:
        """The edit's arguments besides the directions: ``profile`` and ``embedding``."""
        ends = sorted((int(parameters["first_layer"]), int(parameters["last_layer"])))
        default = parameters["method"] == DEFAULT and self.profile is not None
        profile = {}
        for component in COMPONENTS:
            strengths = kernel(
                self.layers,
                *(
                    float(parameters[f"{component}_{name}"])
                    for name in ("peak", "strength", "width", "floor")
                ),
            )
            before = self.profile[component] if default and self.profile else [1.0] * self.layers
            profile[component] = [
                strength * chosen if ends[0] <= layer <= ends[1] else 0.0
                for layer, (strength, chosen) in enumerate(zip(strengths, before, strict=True))
            ]
        return {"profile": profile, "embedding": bool(parameters["embedding"])}

    def kind(self, parameters: Parameters) -> tuple[Any, ...]:
        """The parameters that are choices and not numbers."""
        return tuple(parameters[name] for name in ("method", "per_layer", "embedding"))

    def place(self, parameters: Parameters) -> list[float]:
        """The parameters as a vector for the regression: the strengths of all layers, the index."""
        profile = self.recipe(parameters)["profile"]
        index = parameters["index"] / max(1, self.deepest)
        return [*profile["attention"], *profile["mlp"], index]

    def changes_something(self, parameters: Parameters) -> bool:
        """Whether the edit changes any writer."""
        recipe = self.recipe(parameters)
        return recipe["embedding"] or any(map(any, recipe["profile"].values()))
