"""Candidate directions, and the direction file that keeps and shares them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from abl_mlx import __version__, capture
from abl_mlx.arrays import numbers
from abl_mlx.models import ChatModel
from convert.atomic import new_file
from convert.errors import UserError

METHOD = "difference-of-means"


@dataclass(frozen=True)
class Candidates:
    """Mean residual states and the difference directions between them (Arditi et al. 2024).

    Attributes:
        harmful_mean: (L, P, d) float32, mean state over harmful prompts after layer l at
            position p.
        harmless_mean: (L, P, d) float32, the same over harmless prompts.
        positions: the P token offsets from the prompt's end, -1 being the last token.
    """

    harmful_mean: mx.array
    harmless_mean: mx.array
    positions: tuple[int, ...]

    @property
    def directions(self) -> mx.array:
        """Unit vectors (L, P, d) float32: normalize(harmful_mean − harmless_mean)."""
        difference = self.harmful_mean - self.harmless_mean
        return difference / mx.maximum(
            mx.sqrt((difference * difference).sum(axis=-1, keepdims=True)), 1e-30
        )

    @property
    def n_layers(self) -> int:
        """L."""
        return int(self.harmful_mean.shape[0])


def measure(
    chat: ChatModel,
    harmful: Sequence[Sequence[int]],
    harmless: Sequence[Sequence[int]],
    positions: Sequence[int],
) -> Candidates:
    """Means over the encoded prompts at every layer and the given positions.

    Sums are float32 and streamed: memory does not grow with the number of prompts.

    Raises:
        UserError: a state that is not finite, naming the layer.
    """
    harmful_mean = capture.mean(chat, harmful, positions, label="harmful prompts")
    harmless_mean = capture.mean(chat, harmless, positions, label="harmless prompts")
    finite = numbers(mx.isfinite(harmful_mean + harmless_mean).all(axis=(1, 2)))
    if not all(finite):
        raise UserError(
            f"the residual stream after layer {finite.index(False)} is not finite: the model's "
            "weights are damaged, or overflow their dtype."
        )
    return Candidates(harmful_mean, harmless_mean, tuple(positions))


@dataclass(frozen=True)
class DirectionFile:
    """What a direction file holds; docs/direction-file.md describes it byte by byte.

    Attributes:
        selected: (k, d) float32, the chosen directions, unit length.
        candidates: everything they were chosen from; None in a file that holds only `selected`.
        metadata: method, layer, position, model, prompt hashes, scores and version.
    """

    selected: mx.array
    candidates: Candidates | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """Hash of the selected directions' float32 bytes: the edit's identity."""
        values = self.selected.astype(mx.float32)
        mx.eval(values)
        return hashlib.sha256(memoryview(values)).hexdigest()  # type: ignore[arg-type]


def save(path: Path, file: DirectionFile) -> None:
    """Write a direction file; it appears whole or not at all."""
    tensors = {"selected": file.selected.astype(mx.float32)}
    metadata = {"format": "abl-mlx direction", "format_version": "1", "abl_mlx": __version__}
    if file.candidates is not None:
        tensors["candidates"] = file.candidates.directions
        tensors["harmful_mean"] = file.candidates.harmful_mean
        tensors["harmless_mean"] = file.candidates.harmless_mean
        metadata["positions"] = json.dumps(list(file.candidates.positions))
    for key, value in file.metadata.items():
        metadata[key] = value if isinstance(value, str) else json.dumps(value)
    with new_file(path) as temporary:
        # mx.save_safetensors insists on the suffix, which the temporary name does not have.
        named = temporary.with_name(temporary.name + ".safetensors")
        try:
            mx.save_safetensors(str(named), tensors, metadata)
            named.rename(temporary)
        finally:
            named.unlink(missing_ok=True)


def read(path: Path) -> DirectionFile:
    """Read a direction file, or a bare vector: a .npy of (d,) or (k, d), a .safetensors with
    `selected` alone.

    Raises:
        UserError: when the file is missing, damaged, holds no `selected`, or numbers that are
            not finite.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file: make one with `abl-mlx measure MODEL -o {path}`.")
    metadata: dict[str, Any] = {}
    try:
        if path.suffix == ".npy":
            tensors: dict[str, mx.array] = {"selected": mx.load(str(path))}  # type: ignore[dict-item]
        elif path.suffix == ".safetensors":
            tensors, raw = mx.load(str(path), return_metadata=True)  # type: ignore[assignment]
            metadata = {key: _decoded(value) for key, value in raw.items()}  # type: ignore[union-attr]
        else:
            raise UserError(f"{path}: a direction is a .safetensors or a .npy file.")
        for tensor in tensors.values():
            mx.eval(tensor)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"{path} could not be read as a direction file: {reason}") from None
    if "selected" not in tensors:
        raise UserError(
            f"{path} holds no tensor named `selected` (found: {', '.join(sorted(tensors))})."
        )
    selected = tensors["selected"].astype(mx.float32)
    if selected.ndim == 1:
        selected = selected[None]
    if selected.ndim != 2 or not mx.isfinite(selected).all().item():
        raise UserError(
            f"{path}: `selected` must be finite numbers of the shape (d,) or (k, d), not "
            f"{tuple(selected.shape)}."
        )
    candidates = None
    if "harmful_mean" in tensors and "harmless_mean" in tensors:
        positions = metadata.get("positions", list(range(-tensors["harmful_mean"].shape[1], 0)))
        candidates = Candidates(tensors["harmful_mean"], tensors["harmless_mean"], tuple(positions))
    return DirectionFile(selected, candidates, metadata)


def _decoded(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def check_width(file: DirectionFile, path: Path, chat: ChatModel) -> None:
    """Refuse a direction of another width than the model's residual stream."""
    if file.selected.shape[1] != chat.width:
        raise UserError(
            f"{path} holds directions of {file.selected.shape[1]} dimensions, but the residual "
            f"stream of {chat.folder} has {chat.width}: it was measured on another model."
        )
