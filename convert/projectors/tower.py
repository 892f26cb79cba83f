"""The records of facts about vision towers, which the modules of the families fill in."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from convert.base.errors import UserError

Shape = tuple[int, ...]

Change = Callable[[np.ndarray], np.ndarray]


def _same(values: np.ndarray) -> np.ndarray:
    return values


@dataclass(frozen=True)
class Part:
    """A tensor of a projector that is made from one tensor of a folder.

    Attributes:
        name: its name in the GGUF.
        change: makes its values from those of the folder's tensor, both float32.
    """

    name: str
    change: Change = _same


@dataclass(frozen=True)
class Tower:
    """What a folder says about its vision tower.

    Attributes:
        folder: where it is.
        config: its config.json.
        vision: vision_config in config.json, with the family's defaults for missing keys.
        processor: its preprocessor_config.json and processor_config.json, as one object.
        shapes: the tensors of the tower by their publisher's names -> their shapes.
    """

    folder: Path
    config: Mapping[str, Any]
    vision: Mapping[str, Any]
    processor: Mapping[str, Any]
    shapes: Mapping[str, Shape]

    @property
    def text(self) -> dict[str, Any]:
        """The language model's keys."""
        nested = self.config.get("text_config")
        return {**self.config, **(nested if isinstance(nested, dict) else {})}

    def count(self, *names: str) -> int:
        """The first of these whole numbers that vision_config has.

        Raises:
            UserError: when it has none of them.
        """
        found = self._first(names)
        if not isinstance(found, int) or isinstance(found, bool) or found < 1:
            raise UserError(f"vision_config in config.json has no {names[0]} that is a number")
        return found

    def real(self, *names: str) -> float:
        """The first of these numbers that vision_config has.

        Raises:
            UserError: when it has none of them.
        """
        found = self._first(names)
        if not isinstance(found, int | float) or isinstance(found, bool):
            raise UserError(f"vision_config in config.json has no {names[0]} that is a number")
        return float(found)

    def layers(self, name: str) -> list[int]:
        """A list of layers in vision_config, which may be empty.

        Raises:
            UserError: when it is no list of numbers.
        """
        found = self.vision.get(name) or []
        if not isinstance(found, list) or not all(type(one) is int for one in found):
            raise UserError(f"{name} in config.json's vision_config is no list of layers")
        return found

    def _first(self, names: tuple[str, ...]) -> Any:
        vision = self.vision
        return next((vision[name] for name in names if vision.get(name) is not None), None)

    def numbers(self, name: str, length: int) -> list[float]:
        """A list of numbers from the processor's settings, such as image_mean.

        Raises:
            UserError: when there is no such list of this length.
        """
        found = self.processor.get(name)
        numbers = isinstance(found, list) and all(isinstance(one, int | float) for one in found)
        if not numbers or len(found) != length:  # type: ignore[arg-type]
            raise UserError(
                f"there is no {name} in preprocessor_config.json or processor_config.json"
            )
        return [float(one) for one in found]  # type: ignore[union-attr]


Rule = Callable[[Tower, str], list[Part]]
"""Makes, from a tower and the name of one of its tensors, the projector's tensors from it."""


def _nothing(vision: Mapping[str, Any]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """How the vision towers of a family become projectors.

    Attributes:
        kind: the projector's type, by which llama.cpp finds the tower's graph.
        fits: whether a config.json is of this family.
        keys: the metadata beside those that all projectors have. It raises UserError for what
            llama.cpp cannot represent.
        prefixes: pattern -> replacement, which turn the names that MLX's programs and newer
            versions of transformers give to tensors into those of the publisher.
        names: pattern of a publisher's whole name -> its name in the GGUF; ``\\1`` is the first
            group.
        rules: pattern of a publisher's whole name -> the rule for tensors that do more than take
            another name.
        unused: pattern of the names of tensors that llama.cpp's graph has no use for.
        types: pattern of a name in the GGUF -> its type in every file.
        defaults: the values that transformers uses for keys that vision_config lacks.
        derived: makes further values from those of vision_config, or others in their place.
        borrowed: finds a tensor of the language model of which the projector holds a part.
        type_key: the key of the projector's type.
    """

    kind: str
    fits: Callable[[Mapping[str, Any]], bool]
    keys: Callable[[Tower], dict[str, Any]]
    prefixes: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    rules: Mapping[str, Rule] = field(default_factory=dict)
    unused: str = r"(?!)"
    types: Mapping[str, GGMLQuantizationType] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    derived: Callable[[Mapping[str, Any]], dict[str, Any]] = _nothing
    borrowed: str = r"(?!)"
    type_key: str = "clip.projector_type"

    def vision(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """vision_config, with defaults for missing keys."""
        stored = config.get("vision_config")
        found = {**self.defaults, **(stored if isinstance(stored, dict) else {})}
        return {**found, **self.derived(found)}

    def published(self, name: str) -> str:
        """The publisher's name of a tensor."""
        for pattern, new in self.prefixes.items():
            name = re.sub(pattern, new, name)
        return name

    def parts(self, tower: Tower, name: str) -> list[Part]:
        """The projector's tensors that are made from a tensor with this publisher's name.

        Raises:
            UserError: when the tensor has no place in the projector.
        """
        if re.fullmatch(self.unused, name):
            return []
        for pattern, rule in self.rules.items():
            if re.fullmatch(pattern, name):
                return rule(tower, name)
        for pattern, new in self.names.items():
            if found := re.fullmatch(pattern, name):
                return [Part(found.expand(new))]
        raise UserError(f"{name} has no place in a projector of the type {self.kind}")


def of_types(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    """Whether the model_type of a config.json is one of these."""
    return lambda config: config.get("model_type") in names


def kernel(tower: Tower, name: str, channels: int, axes: int) -> Change:
    """Brings a kernel into PyTorch's layout: (out, channels, *axes) from (out, *axes, channels).

    Args:
        tower: the tower.
        name: the kernel's publisher's name.
        channels: the number of colours.
        axes: 2 for pictures, 3 for films.

    Raises:
        UserError: when the shape is neither.
    """
    shape = tower.shapes[name]
    if len(shape) == axes + 2:
        if shape[1] == channels:
            return _same
        if shape[-1] == channels:
            return lambda values: np.moveaxis(values, -1, 1)
    raise UserError(f"{name} has the shape {shape}, which is no kernel for {channels} colours")
