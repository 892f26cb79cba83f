"""Checked access to a GGUF's metadata under its architecture's prefix, and to its tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from convert.architectures.config_keys import SHARED
from convert.base.errors import UserError
from convert.gguf.file import GgufSource
from convert.gguf.layout import TensorEntry

MISSING = object()
"""Given as the default of a key that must exist."""


class Keys:
    """A GGUF's metadata, read under its architecture's prefix, and its tensors.

    ``keys.integer("block_count")`` is the value of ``llama.block_count`` in a file of the
    architecture llama. Keys ``general.*`` and ``tokenizer.*`` are in ``keys.source.metadata``.
    """

    def __init__(self, source: GgufSource) -> None:
        self.source = source
        self.architecture = source.architecture
        self.tensors: Mapping[str, TensorEntry] = source.tensors

    def get(self, key: str, default: Any = None) -> Any:
        """The value of ``ARCHITECTURE.key``, or the default where the key is missing."""
        return self.source.metadata.get(f"{self.architecture}.{key}", default)

    def __contains__(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.source.metadata

    def integer(self, key: str, default: Any = MISSING) -> Any:
        """The value of ``ARCHITECTURE.key`` as an int, or the default where the key is missing.

        Raises:
            UserError: when there is neither a value nor a default, or the value is not one number.
        """
        return self._number(key, int, default)

    def count(self, key: str, default: Any = MISSING) -> Any:
        """The value as by `integer`, which must be at least 1."""
        value = self.integer(key, default)
        if value < 1:
            raise UserError(
                f"{self._name} has {self.architecture}.{key} = {value}: get the file again."
            )
        return value

    def number(self, key: str, default: Any = MISSING) -> Any:
        """The value as by `integer`, but as a float."""
        return self._number(key, float, default)

    def _number(self, key: str, kind: Callable[[Any], Any], default: Any) -> Any:
        value = self.get(key)
        if value is None:
            if default is MISSING:
                raise self._lacks(key)
            return default
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, str | list) or not math.isfinite(value) or kind(value) != value:
            raise UserError(
                f"{self._name} has {self.architecture}.{key} = {value!r} where one number is "
                "expected: get the file again."
            )
        return kind(value)

    def per_layer(self, key: str, default: Any = MISSING) -> list[Any]:
        """One value for each layer: the array in the file, or its single value repeated."""
        value = self.get(key, default)
        if value is MISSING:
            raise self._lacks(key)
        if not isinstance(value, list):
            return [value] * self.layers
        if len(value) < self.layers:
            raise UserError(
                f"{self._name} has {len(value)} values of {self.architecture}.{key} for "
                f"{self.layers} layers: get the file again."
            )
        return value[: self.layers]

    @property
    def layers(self) -> int:
        """The number of transformer blocks without those for multi-token prediction."""
        return int(self.integer(SHARED["num_hidden_layers"])) - int(
            self.integer("nextn_predict_layers", 0)
        )

    @property
    def drafting(self) -> tuple[str, ...]:
        """Regular expressions of the tensors of the last blocks, for multi-token prediction."""
        return tuple(
            rf"^blk\.{n}\." for n in range(self.layers, self.integer(SHARED["num_hidden_layers"]))
        )

    @property
    def vocabulary(self) -> int:
        """The number of rows of the embedding."""
        return self.tensor("token_embd.weight").shape[0]

    @property
    def tied(self) -> bool:
        """Whether the embedding is the output head as well."""
        return "output.weight" not in self.tensors

    def tensor(self, name: str) -> TensorEntry:
        """The entry of the tensor ``name``.

        Raises:
            UserError: when there is no such tensor.
        """
        return self.source.tensor(name)

    def values(self, name: str) -> np.ndarray:
        """A tensor's values, float32, with dimensions in NumPy's order."""
        return self.source.values(name)

    def _lacks(self, key: str) -> UserError:
        return UserError(
            f"{self._name} has no {self.architecture}.{key} in its metadata: get the file again."
        )

    @property
    def _name(self) -> str:
        return str(self.source.parts[0])
