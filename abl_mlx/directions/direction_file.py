"""The direction file: the measured candidates and the chosen directions."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx import __version__
from abl_mlx.choices import NORMS
from abl_mlx.directions import foreign
from abl_mlx.directions.measuring import METHOD, Candidates, float32
from abl_mlx.directions.methods import METHODS
from abl_mlx.edits.condition import Condition
from abl_mlx.edits.update import Factors
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.records.cliffs import RefusalCliff
from abl_mlx.records.conditions import ConditionFound
from abl_mlx.records.directions import (
    Chosen,
    Looked,
    SaeFound,
    ScoredCandidate,
    TriedEdit,
    TriedUpdate,
)
from abl_mlx.records.explained import Explained
from abl_mlx.records.kinds import fields_of, kind_of
from abl_mlx.support.arrays import numpy_of
from abl_mlx.support.strict_json import finite
from convert.base import json_text
from convert.base.atomic import new_file
from convert.base.errors import UserError
from convert.base.schema import FLAG, Refused, list_of, map_of, number, one_of, record, whole
from convert.base.suffixes import ends_in


@dataclass(frozen=True)
class DirectionFile:
    """The contents of a direction file; docs/direction-file.md describes the format.

    Attributes:
        selected: float32, the chosen directions: (k, d), or (L, k, d) with separate directions for
            the writers of each layer; orthonormal, or of unit length.
        candidates: the candidates that they were chosen from; None in a file without them.
        metadata: method, layer, position, model, prompt hashes, scores and version.
        clouds: (harmful (N, 2), harmless (M, 2)): held-out states in the plane of
            `estimators.plane`, for plots.
        condition: (d,) the vector of a condition, which ``metadata`` describes; None without one.
        updates: layer -> the change of that layer's MLP, for a method that changes these and
            removes no directions; None for all other methods.
    """

    selected: mx.array
    candidates: Candidates | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    clouds: tuple[np.ndarray, np.ndarray] | None = None
    condition: mx.array | None = None
    updates: Mapping[int, Factors] | None = None

    @property
    def when(self) -> Condition | None:
        """The prompts on which an edit at runtime is made; None for all."""
        if self.condition is None:
            return None
        found = ConditionFound.of(self.metadata["condition"])
        return Condition(self.condition, found.layer, found.tokens, found.threshold, found.above)

    def conditional(self, condition: Condition, found: ConditionFound) -> DirectionFile:
        """The same directions with a condition."""
        metadata = {**self.metadata, "condition": found.json}
        return replace(self, condition=condition.vector, metadata=metadata)

    @property
    def sha256(self) -> str:
        """SHA-256 of the float32 bytes of the chosen directions, in hex, which identifies them.

        Those of the updates follow, layer by layer, if there are updates.
        """
        values = mx.contiguous(self.selected.astype(mx.float32))
        mx.eval(values)
        digest = hashlib.sha256(memoryview(values))  # type: ignore[arg-type]
        for _, one in sorted((self.updates or {}).items()):
            for part in (one.left, one.right, one.keys):
                digest.update(np.ascontiguousarray(part, np.float32).tobytes())
        return digest.hexdigest()


def save(path: Path, file: DirectionFile) -> None:
    """Write a direction file; it appears complete or not at all."""
    tensors = {"selected": file.selected.astype(mx.float32)}
    metadata = {"format": "abl-mlx direction", "format_version": "1", "abl_mlx": __version__}
    if file.candidates is not None:
        tensors["candidates"] = file.candidates.directions
        tensors["harmful_mean"] = file.candidates.harmful_mean
        tensors["harmless_mean"] = file.candidates.harmless_mean
        metadata["positions"] = json.dumps(list(file.candidates.positions))
    if file.clouds is not None:
        for name, cloud in zip(_CLOUDS, file.clouds, strict=True):
            tensors[name] = float32(cloud)
    if file.condition is not None:
        tensors["condition"] = file.condition.astype(mx.float32)
    for layer, one in (file.updates or {}).items():
        parts = {"left": one.left, "right": one.right, "keys": one.keys}
        found = {f"update.{layer}.{name}": float32(part) for name, part in parts.items()}
        tensors |= {name: part for name, part in found.items() if part.size}
    for key, value in file.metadata.items():
        metadata[key] = value if isinstance(value, str) else json.dumps(finite(value))
    with new_file(path) as temporary:
        # mx.save_safetensors adds the suffix if a name does not have it.
        named = temporary.with_name(temporary.name + ".safetensors")
        try:
            mx.save_safetensors(str(named), tensors, metadata)
            named.rename(temporary)
        finally:
            named.unlink(missing_ok=True)


_CLOUDS = ("harmful_cloud", "harmless_cloud")


def read(path: Path, *, layer: float | None = None, tensor: str | None = None) -> DirectionFile:
    """Read a direction file, or directions from another kind of file (`foreign.read`).

    Args:
        path: the file.
        layer: the layer whose direction is read from a control vector.
        tensor: the name of the tensor to read from a .safetensors or .npz file.

    Raises:
        UserError: when the file is missing or damaged, does not hold the wanted direction, or has
            numbers that are not finite.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file: make one with `abl-mlx measure MODEL -o {path}`.")
    if not ends_in(path, ".safetensors") or tensor is not None:
        return DirectionFile(foreign.read(path, layer=layer, tensor=tensor))
    tensors, raw = foreign.safetensors(path)
    if "selected" not in tensors:
        return DirectionFile(foreign.read(path, layer=layer, tensor=tensor))
    if layer is not None:
        raise UserError(
            f"--layer {layer:g}: {path} says itself which direction was chosen; leave it out."
        )
    metadata = {key: _decoded(value) for key, value in raw.items()}
    json_text.checked(path, metadata, _METADATA, mend="measure it again")
    selected = foreign.checked(tensors["selected"], f"{path}: `selected`", most=3)
    clouds = None
    if all(name in tensors for name in _CLOUDS):
        for name in _CLOUDS:
            if tensors[name].ndim != 2 or tensors[name].shape[1] != 2:
                raise _misshapen(path, name, tensors[name], "(N, 2)")
        clouds = numpy_of(tensors[_CLOUDS[0]]), numpy_of(tensors[_CLOUDS[1]])
    candidates = _candidates(path, tensors, metadata)
    condition = _condition(path, tensors, metadata, selected.shape[-1])
    updates = _updates(path, tensors, selected)
    return DirectionFile(selected, candidates, metadata, clouds, condition, updates)


def _condition(
    path: Path, tensors: Mapping[str, mx.array], metadata: Mapping[str, Any], width: int
) -> mx.array | None:
    if "condition" not in tensors or "condition" not in metadata:
        return None
    vector = tensors["condition"]
    if vector.shape != (width,):
        raise _misshapen(path, "condition", vector, f"({width},)")
    return foreign.checked(vector, f"{path}: `condition`")[0]


def _candidates(
    path: Path, tensors: Mapping[str, mx.array], metadata: Mapping[str, Any]
) -> Candidates | None:
    if "harmful_mean" not in tensors or "harmless_mean" not in tensors:
        return None
    high, low = tensors["harmful_mean"], tensors["harmless_mean"]
    if high.ndim != 3 or not high.size:
        raise _misshapen(path, "harmful_mean", high, "(L, P, d)")
    if low.shape != high.shape:
        raise _misshapen(path, "harmless_mean", low, str(tuple(high.shape)))
    positions = metadata.get("positions") or list(range(-high.shape[1], 0))
    if len(positions) != high.shape[1]:
        raise UserError(
            f"{path} names {len(positions)} positions, but its means are of {high.shape[1]}: "
            "measure it again."
        )
    method = metadata.get("candidate_method") or METHOD
    found = tensors.get("candidates") if method != METHOD else None
    if found is not None and found.ndim == 3:
        found = found[:, :, None]
    if found is not None and (found.ndim != 4 or (*found.shape[:2], found.shape[3]) != high.shape):
        raise _misshapen(path, "candidates", found, "(L, P, d) or (L, P, k, d)")
    return Candidates(high, low, tuple(positions), method, found)


_UPDATE = re.compile(r"update\.(\d{1,5})\.(left|right|keys)")


def _updates(
    path: Path, tensors: Mapping[str, mx.array], selected: mx.array
) -> dict[int, Factors] | None:
    """The changes of layers' MLPs that a direction file holds; None if it holds none."""
    layers: dict[int, dict[str, np.ndarray]] = {}
    for name, values in tensors.items():
        if found := _UPDATE.fullmatch(name):
            if values.ndim != 2 or not values.size:
                raise _misshapen(path, name, values, "(d, k) or (k, n)")
            part = foreign.checked(values, f"{path}: `{name}`", most=2)
            layers.setdefault(int(found[1]), {})[found[2]] = numpy_of(part)
    updates = {}
    for layer, parts in sorted(layers.items()):
        if missing := {"left", "right"} - set(parts):
            raise UserError(f"{path} lacks `update.{layer}.{min(missing)}`: measure it again.")
        left, right = parts["left"], parts["right"]
        if (left.shape[0], right.shape[0]) != (selected.shape[-1], left.shape[1]):
            name = f"update.{layer}.right"
            raise _misshapen(path, name, tensors[name], f"({left.shape[1]}, n)")
        keys = parts.get("keys", np.zeros((0, right.shape[1]), np.float32))
        if keys.shape[1] != right.shape[1]:
            name = f"update.{layer}.keys"
            raise _misshapen(path, name, tensors[name], f"(m, {right.shape[1]})")
        try:
            updates[layer] = Factors(left, right, keys)
            updates[layer].basis  # noqa: B018 - raises where rows are not independent
        except ValueError:
            raise UserError(
                f"{path}: the rows of `update.{layer}.right` depend on each other; measure it "
                "again."
            ) from None
    return updates or None


def _misshapen(path: Path, name: str, values: mx.array, wanted: str) -> UserError:
    return UserError(
        f"{path}: `{name}` must be of the shape {wanted}, not {tuple(values.shape)}; measure it "
        "again."
    )


_PLACE = {"layer": number(0, 1 << 16), "position": whole(-(1 << 20), -1)}


_PINS = record({}, dict.fromkeys(("harmful", "harmless"), list_of(number())))


_METADATA = record(
    {
        **_PLACE,
        "positions": list_of(_PLACE["position"]),
        "candidate_method": one_of(METHODS),
        "summary": record({**fields_of(Chosen), **_PLACE, "rank": whole(1)}),
        "first_look": map_of(kind_of(Looked)),
        "scores": list_of(record(fields_of(ScoredCandidate), _PLACE)),
        "trials": list_of(record({**fields_of(TriedEdit), **_PLACE})),
        "cloud": record(_PLACE),
        "sae": kind_of(SaeFound),
        "condition": kind_of(ConditionFound),
        "updates": list_of(kind_of(TriedUpdate)),
        "explained": kind_of(Explained),
        "cliff": kind_of(RefusalCliff),
        "pins": _PINS,
        "embedding_scale": number(),
        "recipe": record(
            {
                "embedding": FLAG,
                "strength": number(-100, 100),
                "norm": one_of(NORMS),
                "profile": record({}, dict.fromkeys(("attention", "mlp"), list_of(number()))),
            }
        ),
    }
)


def _decoded(value: str) -> Any:
    """A value of the metadata, decoded if it is JSON, else as text."""
    try:
        return json_text.parse(value)
    except Refused:
        return value


def check_width(file: DirectionFile, path: Path | str, chat: ChatModel) -> None:
    """Check that directions have the model's width and number of layers.

    Args:
        path: their file, or another name for messages.

    Raises:
        UserError: when they do not.
    """
    if file.selected.shape[-1] != chat.width:
        raise UserError(
            f"{path} holds directions of {file.selected.shape[-1]} dimensions, but the residual "
            f"stream of {chat.folder} has {chat.width}: it was measured on another model."
        )
    if file.selected.ndim == 3 and file.selected.shape[0] != len(chat.layers):
        raise UserError(
            f"{path} holds directions for {file.selected.shape[0]} layers, but {chat.folder} has "
            f"{len(chat.layers)}: it was measured on another model."
        )
    if (when := file.when) is not None and when.layer >= len(chat.layers):
        raise UserError(
            f"{path} has a condition on the states after layer {when.layer}, but {chat.folder} has "
            f"the layers 0 to {len(chat.layers) - 1}: it was measured on another model."
        )
