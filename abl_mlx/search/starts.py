"""`--from FILE`: the edit of an earlier record or of a published model card, to start a search.

Both say how strong the edit is in each layer. The parameters of a search describe these strengths
by a kernel for attention and one for MLPs (`space.kernel`), which are fitted by least squares.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.search.space import COMPONENTS, DEFAULT, STRONGEST, Space, kernel
from abl_mlx.support.console import say
from convert.base import json_text, schema
from convert.base.errors import UserError

#: The largest file that is read as a model card, in bytes.
_LONGEST = 2_000_000

#: A row of a model card's table, such as ``| **direction_index** | 17.2 |``.
_ROW = re.compile(r"^\|?[\s*`]*([\w.]+)[\s*`]*\|[\s*`]*([^|*`]+?)[\s*`]*\|?\s*$", re.MULTILINE)

#: The names of a model card's rows about a component: the strength at the peak, the peak's layer,
#: the strength at the largest distance, and that distance. Layers beyond it are not edited.
_NAMES = ("max_weight", "max_weight_position", "min_weight", "min_weight_distance")

#: Component -> its name in a model card.
_GROUPS = {"attention": "attn.o_proj", "mlp": "mlp.down_proj"}


@dataclass(frozen=True)
class Start:
    """An edit of an earlier work.

    Attributes:
        name: of the file.
        layer: the layer whose direction is removed; None for a direction for each layer.
        profile: ``attention`` and ``mlp`` -> the strength in each layer.
        embedding: whether the embedding is edited.
        method: the source of the direction, if that is known.
    """

    name: str
    layer: float | None
    profile: Mapping[str, Sequence[float]]
    embedding: bool = False
    method: str | None = None

    def parameters(self, space: Space) -> dict[str, Any]:
        """The parameters of this edit in a space, as near as these can be."""
        method, measured = self.method, [one for one in space.methods if one != DEFAULT]
        if method not in measured:
            method = measured[0] if measured else DEFAULT
        edited = [
            layer for layer, strengths in enumerate(zip(*self.profile.values(), strict=True))
            if any(strengths)
        ]  # fmt: skip
        first, last = edited[0], edited[-1]
        found: dict[str, Any] = {
            "method": method,
            "per_layer": self.layer is None,
            "first_layer": first,
            "last_layer": last,
            "embedding": self.embedding and space.embedding,
        }
        if self.layer is not None:
            found["index"] = float(min(self.layer, space.deepest))
        for component in COMPONENTS:
            found |= fitted(component, self.profile[component], first, last)
        given = space.uniform(**found)
        self._tell(given, space)
        return given

    def _tell(self, given: Mapping[str, Any], space: Space) -> None:
        """Say how near the parameters are to the file's."""
        made = _strengths(given, space.layers)
        off = max(
            float(np.abs(np.subtract(made[name], self.profile[name])).max()) for name in COMPONENTS
        )
        told = [f"strengths within {off:.2f} of the file's"]
        if self.layer is not None and self.layer > space.deepest:
            told.append(f"the direction after layer {space.deepest} for {self.layer:g}")
        if self.embedding != given["embedding"]:
            told.append("no edit of the embedding")
        if given["method"] == DEFAULT:
            told.append("the given direction in place of its own")
        say(f"  the search starts from {self.name}: {', '.join(told)}")


def beside(found: DirectionFile, space: Space) -> list[dict[str, Any]]:
    """Edits with the directions of the layers beside the chosen one, at the chosen strength.

    Args:
        found: the choice before the search.
        space: the parameters of edits.

    Returns:
        None of them where that is no single layer's direction, or was not measured here.
    """
    layer = found.metadata.get("summary", {}).get("layer")
    if layer is None or found.candidates is None or found.candidates.method not in space.methods:
        return []
    strength = float(np.mean([*space.recipe(space.uniform())["profile"].values()]))
    return [
        space.even(strength, method=found.candidates.method, index=float(other))
        for other in (layer - 1, layer + 1)
        if 0 <= other <= space.deepest
    ]


def _strengths(given: Mapping[str, Any], layers: int) -> dict[str, list[float]]:
    found = {}
    for component in COMPONENTS:
        parts = (given[f"{component}_{name}"] for name in ("peak", "strength", "width", "floor"))
        strengths = enumerate(kernel(layers, *parts))
        inside = range(given["first_layer"], given["last_layer"] + 1)
        found[component] = [value if layer in inside else 0.0 for layer, value in strengths]
    return found


# --- fitting -------------------------------------------------------------------------------------


def fitted(component: str, strengths: Sequence[float], first: int, last: int) -> dict[str, float]:
    """The parameters of the kernel with the least squared distance to some strengths.

    A kernel is a + b·max(0, 1 − |l − p| / w) with a, b >= 0: for each peak p and width w of a grid
    the best a and b follow in closed form. The grid is refined around the best place.

    Args:
        component: the prefix of the parameters' names.
        strengths: the strength in each layer.
        first, last: the layers that count.
    """
    layers = len(strengths)
    at = np.arange(first, last + 1, dtype=float)
    wanted = np.clip(np.asarray(strengths, float)[first : last + 1], 0, STRONGEST)
    ends, widths = (0.0, float(layers - 1)), (0.5, float(max(1, layers)))
    peaks = np.linspace(*ends, 2 * layers + 1)
    reach = np.linspace(*widths, 2 * layers + 1)
    step = np.array([peaks[1] - peaks[0], reach[1] - reach[0]])
    best = (math.inf, 0.0, 1.0, 0.0, 0.0)
    for _ in range(12):
        for peak in peaks:
            best = min(best, *(_level(at, wanted, float(peak), float(width)) for width in reach))
        peaks = np.clip(best[1] + step[0] * np.linspace(-1, 1, 9), *ends)
        reach = np.clip(best[2] + step[1] * np.linspace(-1, 1, 9), *widths)
        step /= 3
    _, peak, width, low, rise = best
    strength = min(low + rise, STRONGEST)
    return {
        f"{component}_peak": peak,
        f"{component}_strength": strength,
        f"{component}_width": width,
        f"{component}_floor": min(low / (low + rise), 1.0) if low + rise else 1.0,
    }


def _level(
    at: np.ndarray, wanted: np.ndarray, peak: float, width: float
) -> tuple[float, float, float, float, float]:
    """(error, peak, width, a, b) of the best kernel with a peak and a width."""
    tent = np.maximum(0, 1 - np.abs(at - peak) / width)
    rise = 0.0
    if (spread := float(((tent - tent.mean()) ** 2).sum())) > 1e-9:
        rise = max(0.0, float((tent - tent.mean()) @ (wanted - wanted.mean())) / spread)
    low = float(wanted.mean() - rise * tent.mean())
    if low < 0:
        low, rise = 0.0, max(0.0, float(tent @ wanted) / max(float(tent @ tent), 1e-9))
    rise = min(rise, STRONGEST - low)
    error = float(((low + rise * tent - wanted) ** 2).sum())
    return round(error, 9), peak, width, low, rise


# --- files ---------------------------------------------------------------------------------------


def read(path: Path, layers: int) -> Start:
    """The edit of an ``abl.json`` or of a model card.

    Args:
        path: the file.
        layers: L, the number of layers of the model that is searched.

    Raises:
        UserError: when the file cannot be read, or holds no parameters of an edit of such a model.
    """
    try:
        raw = path.read_bytes()[: _LONGEST + 1]
    except OSError as error:
        raise UserError(f"--from {path} cannot be read: {error.strerror}.") from None
    if len(raw) <= _LONGEST and not raw.lstrip().startswith(b"{"):
        return _of_card(path, raw.decode("utf-8", "replace"), layers)
    return _of_record(path, layers)


def _nothing(path: Path) -> UserError:
    return UserError(
        f"--from {path} holds no parameters of an edit: give the abl.json of `run`, or a model "
        "card with a table of direction_index, attn.o_proj.max_weight and so on."
    )


def _other(path: Path, what: str, layers: int) -> UserError:
    return UserError(
        f"--from {path} is of a model with another number of layers: {what}, and this one has "
        f"{layers} layers; leave --from out."
    )


def _of_card(path: Path, text: str, layers: int) -> Start:
    rows = dict(_ROW.findall(text))
    groups: dict[str, list[float]] = {}
    try:
        for component, name in _GROUPS.items():
            groups[component] = [float(rows[f"{name}.{one}"]) for one in _NAMES]
        index = rows["direction_index"].strip()
        layer = None if index.lower().replace("_", " ") == "per layer" else float(index)
    except (KeyError, ValueError):
        raise _nothing(path) from None
    numbers = [one for group in groups.values() for one in group] + [layer or 0.0]
    if not all(map(math.isfinite, numbers)) or min(group[3] for group in groups.values()) <= 0:
        raise _nothing(path)
    places = [layer or 0.0, *(group[1] for group in groups.values())]
    if not 0 <= min(places) <= max(places) <= layers - 1:
        raise _other(path, f"it names layer {max(places):g}", layers)
    profile = {}
    for component, (most, peak, least, distance) in groups.items():
        away = [abs(layer_ - peak) for layer_ in range(layers)]
        profile[component] = [
            most + (least - most) * one / distance if one <= distance else 0.0 for one in away
        ]
    return _checked(path, Start(path.name, layer, profile))


def _of_record(path: Path, layers: int) -> Start:
    values = json_text.read(path, _RECORD, mend="give the abl.json of `run`")
    taken, options = values["direction"], values.get("options") or {}
    named = any(taken.get(name) for name in ("per_layer", "rank")) or taken.get("layer") is not None
    edits = (
        options.get("kind", "project") == "project" and options.get("edit", "writers") == "writers"
    )
    if not named or not edits or taken.get("update") is not None:
        raise _nothing(path)
    recipe = taken.get("recipe") or {}
    strength, only = options.get("strength") or 1.0, options.get("layers")
    even = [
        strength if only is None or layer in only else 0.0
        for layer in range(max([layers - 1, *(only or ())]) + 1)
    ]
    known = recipe.get("profile") or {}
    profile = {
        name: [strength * one for one in known[name]] if name in known else even
        for name in COMPONENTS
    }
    for one in profile.values():
        if len(one) != layers:
            raise _other(path, f"it has strengths of {len(one)} layers", layers)
    layer = taken.get("layer")
    if layer is not None and layer > layers - 1:
        raise _other(path, f"it names layer {layer:g}", layers)
    embedding = recipe.get("embedding", options.get("embedding", True)) is not False
    method = taken.get("orthogonal_to") or taken.get("method")
    if taken.get("across") == "layers":
        method = f"layers-rank-{taken.get('rank')}"
        layer = 0.0 if layer is None else layer
    return _checked(path, Start(path.name, layer, profile, embedding, method))


def _checked(path: Path, start: Start) -> Start:
    """The edit, if it changes the layers.

    Raises:
        UserError: when all strengths are 0.
    """
    if not any(map(any, start.profile.values())):
        raise _nothing(path)
    return start


_NUMBER = schema.number(-100, 100)
_PROFILE = schema.record({name: schema.list_of(_NUMBER) for name in COMPONENTS})
_RECIPE = schema.record({"profile": _PROFILE, "embedding": schema.FLAG})
_OPTIONS = schema.record(
    {
        "strength": _NUMBER,
        "layers": schema.list_of(schema.whole(0, 100_000)),
        "embedding": schema.FLAG,
        "kind": schema.TEXT,
        "edit": schema.TEXT,
    }
)
_DIRECTION = schema.record(
    {
        "method": schema.TEXT,
        "orthogonal_to": schema.TEXT,
        "across": schema.TEXT,
        "layer": schema.number(0, 100_000),
        "rank": schema.whole(1),
        "recipe": _RECIPE,
    }
)
_RECORD = schema.record({"options": _OPTIONS}, {"direction": _DIRECTION})
