"""The strength that a request asks for, by the model's name or by the field ``steering``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

#: Stands between a model's name and a strength.
AT = "@"

#: mlx-lm's name of the model in a request that names none.
UNNAMED = "default_model"

#: The strengths whose names are listed: the unedited model, a half, all of it, and the addition.
_LISTED = (0.0, 0.5, 1.0, -1.0)


class UnknownModel(LookupError):
    """A request names a model that is not served."""


@dataclass(frozen=True)
class Dial:
    """A strength, and the name of the model at this strength.

    Attributes:
        name: ``NAME`` at the default strength, else ``NAME@STRENGTH``.
        strength: 1 removes the direction, 0 changes nothing, -1 adds the difference of the means.
    """

    name: str
    strength: float


@dataclass(frozen=True)
class Dials:
    """The names of one model at all strengths.

    Attributes:
        name: the model's name.
        default: the strength that ``NAME`` alone has.
    """

    name: str
    default: float = 1.0

    def at(self, strength: float) -> Dial:
        """The dial of a strength, of which 6 digits count."""
        rounded = float(f"{strength:g}") + 0.0  # -0.0 becomes 0.0
        same = rounded == self.default
        return Dial(self.name if same else f"{self.name}{AT}{rounded:g}", rounded)

    def of(self, model: str | None, steering: Any = None) -> Dial:
        """The dial of a request.

        Args:
            model: its field ``model``.
            steering: its field ``steering``; None where it has none.

        Raises:
            UnknownModel: when another model is named.
            ValueError: when the strength is no finite number, or two different ones are given.
        """
        named = self._named(model)
        if steering is None:
            return self.at(self.default if named is None else named)
        if isinstance(steering, bool) or not isinstance(steering, int | float):
            raise ValueError("steering must be a number, such as 1, 0.5 or -1.")
        if not math.isfinite(steering):
            raise ValueError("steering must be a finite number, such as 1, 0.5 or -1.")
        found = self.at(float(steering))
        if named is not None and self.at(named) != found:
            raise ValueError(
                f"the model {model} and steering {steering:g} are two strengths: leave one out."
            )
        return found

    def _named(self, model: str | None) -> float | None:
        """The strength behind a model's name; None for the name alone."""
        if model in (None, "", UNNAMED, self.name):
            return None
        assert model is not None
        name, at, behind = model.rpartition(AT)
        if not at or name not in (self.name, UNNAMED):
            raise UnknownModel(
                f"there is no model {model[:100]}: this server has {self.name}, "
                f"{self.name}{AT}0.5 and so on."
            )
        try:
            strength = float(behind)
        except ValueError:
            strength = math.nan
        if not math.isfinite(strength):
            raise ValueError(
                f"{behind[:100]!r} in {model[:100]} is no strength: give a number behind "
                f"{self.name}{AT}, such as {self.name}{AT}0.5."
            )
        return strength

    @property
    def listed(self) -> list[Dial]:
        """The default, and some other strengths."""
        return list(dict.fromkeys(map(self.at, (self.default, *_LISTED))))
