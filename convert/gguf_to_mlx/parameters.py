"""Which tensors of a GGUF become which parameters of mlx-lm's model, checked to be complete."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from convert.architectures.keys import Keys
from convert.architectures.table import IN_MLX
from convert.architectures.weights import ROPE_TABLES, Weight
from convert.base.errors import UserError
from convert.gguf.file import GgufSource
from convert.gguf.layout import TensorEntry
from convert.mlx.gemma2_window import give_window


@dataclass(frozen=True)
class Layout:
    """Which tensors of a GGUF become which parameters of mlx-lm's model.

    Attributes:
        config: what config.json would hold.
        weights: parameter path -> the tensors that hold its values.
        model: mlx-lm's model, with parameters that are not yet evaluated.
        modules: module path -> module.
    """

    config: dict[str, Any]
    weights: dict[str, Weight]
    model: nn.Module
    modules: dict[str, nn.Module]

    def places(self) -> dict[str, list[str]]:
        """`places` of its weights."""
        return places(self.weights)


def places(weights: Mapping[str, Weight]) -> dict[str, list[str]]:
    """GGUF tensor -> paths of the parameters that take values from it."""
    found: dict[str, list[str]] = {}
    for path, weight in weights.items():
        for piece in weight.pieces:
            found.setdefault(piece.tensor, []).append(path)
    return found


def layout(source: GgufSource) -> Layout:
    """The mlx-lm model of a GGUF, without its values.

    Raises:
        UserError: when the architecture is not supported, a tensor belongs to no parameter or a
            parameter has no tensor, or metadata are missing or not supported by mlx-lm.
    """
    config, weights = described(source)
    name, family = source.parts[0], IN_MLX[source.architecture]
    model = _skeleton(config, name)
    give_window(model, config)
    parameters = dict(tree_flatten(model.parameters()))
    _check_complete(source, family.unused + Keys(source).drafting, weights, parameters)
    return Layout(config, weights, model, dict(model.named_modules()))


def described(source: GgufSource) -> tuple[dict[str, Any], dict[str, Weight]]:
    """What config.json would hold, and parameter path -> its tensors, before mlx-lm sees them.

    Raises:
        UserError: when the architecture is not supported, or metadata are missing.
    """
    name = source.parts[0]
    if source.architecture not in IN_MLX:
        raise UserError(
            f"{name} is of the architecture {source.architecture}, which cannot be run with MLX "
            f"from a GGUF; supported are {', '.join(sorted(IN_MLX))}."
        )
    family = IN_MLX[source.architecture]
    keys = Keys(source)
    config = family.config(keys)
    weights: dict[str, Weight] = {}
    for weight in family.weights(keys):
        if weight.path in weights:
            raise UserError(f"{name} holds {weight.path} twice: get the file again.")
        weights[weight.path] = weight
    return config, weights


def _skeleton(config: dict[str, Any], name: Path) -> nn.Module:
    from mlx_lm.utils import _get_classes  # lazily: it brings transformers

    try:
        model_class, arguments = _get_classes(config)
        model: nn.Module = model_class(arguments.from_dict(config))
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{name}: mlx-lm cannot make a model of its metadata "
            f"({' '.join(str(error).split())[:200]}): update mlx-lm, or get the file again."
        ) from None
    if config.get("tie_word_embeddings") and "lm_head" in model:
        # Some classes make an output head that their sanitize drops when embeddings are tied.
        model.pop("lm_head")
        if hasattr(model, "tie_word_embeddings"):
            model.tie_word_embeddings = True
    return model


def _check_complete(
    source: GgufSource,
    unused: tuple[str, ...],
    weights: Mapping[str, Weight],
    parameters: Mapping[str, mx.array],
) -> None:
    name = source.parts[0]
    missing = sorted(set(parameters) - set(weights))
    if missing:
        raise UserError(
            f"{name} lacks the tensor for {missing[0]} ({len(missing)} missing in all): it is "
            f"incomplete, or a variant of {source.architecture} that cannot be run with MLX."
        )
    stray = sorted(set(weights) - set(parameters))
    if stray:
        raise UserError(
            f"{name} holds {weights[stray[0]].pieces[0].tensor}, for which mlx-lm's model has no "
            f"{stray[0]}: this variant of {source.architecture} cannot be run with MLX."
        )
    used = {piece.tensor for weight in weights.values() for piece in weight.pieces}
    for tensor in source.tensors:
        known = tensor in used or tensor in ROPE_TABLES
        if not known and not any(re.search(pattern, tensor) for pattern in unused):
            raise UserError(
                f"{name} holds {tensor}, which has no place in mlx-lm's model for "
                f"{source.architecture}: this variant cannot be run with MLX."
            )
    for path, weight in weights.items():
        if weight.change is None:
            shape = shape_of(source, weight)
            if shape != parameters[path].shape:
                raise UserError(
                    f"{name}: {weight.pieces[0].tensor} has the shape {shape}, but its metadata "
                    f"ask for {parameters[path].shape}: get the file again."
                )


def shape_of(source: GgufSource, weight: Weight) -> tuple[int, ...]:
    """The shape of a parameter's values before ``weight.change`` is applied to them."""
    if weight.shape is not None:
        return weight.shape
    entries = [source.tensor(piece.tensor) for piece in weight.pieces]
    if len(entries) == 1 and weight.pieces[0].rows is None:
        return entries[0].shape
    rows = sum(
        _row_count(entry) if piece.rows is None else len(piece.rows)
        for piece, entry in zip(weight.pieces, entries, strict=True)
    )
    return (rows,) if len(entries[0].shape) == 1 else (rows, entries[0].shape[-1])


def _row_count(entry: TensorEntry) -> int:
    return entry.shape[0] if len(entry.shape) == 1 else entry.rows
