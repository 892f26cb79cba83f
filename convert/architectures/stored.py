"""Which tensors of a folder hold each parameter of mlx-lm's model.

A folder that MLX wrote holds the parameters themselves. A publisher's folder holds experts one by
one, or several parameters in one tensor; mlx-lm's ``sanitize`` rearranges them when it loads the
model. Here the same is described by records of rows, so that it can be done tensor by tensor, and
undone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from convert.architectures.hf_keys import Config
from convert.architectures.weights import PLUS_ONE, SWAPPED, Names, Piece, Weight
from convert.base.errors import UserError

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Folder:
    """A folder's config.json and the shapes of its tensors.

    Attributes:
        config: the language model's part of config.json, by `folder_config.text_config`.
        shapes: tensor -> its shape; that of the weights it stands for, where it is quantized.
    """

    config: Config
    shapes: Mapping[str, Shape]


Rule = Callable[[Folder, str, str], list[Weight]]
"""Makes the parameters held by a tensor from (the folder, the tensor's path, its name)."""


@dataclass(frozen=True)
class Stored:
    """How an architecture's tensors lie in a publisher's folder.

    Paths are names without ``language_model`` prefixes: ``model.layers.0.mlp.up_proj.weight``.

    Attributes:
        paths: regular expressions in paths -> their replacements, for other names.
        rules: regular expressions of paths, after that -> the parameters that the tensor holds.
    """

    paths: Mapping[str, str] = field(default_factory=dict)
    rules: Mapping[str, Rule] = field(default_factory=dict)


EXPERTS = {r"\.experts\.(\d+)\.w1\.": r".experts.\1.gate_proj.",
           r"\.experts\.(\d+)\.w2\.": r".experts.\1.down_proj.",
           r"\.experts\.(\d+)\.w3\.": r".experts.\1.up_proj."}  # fmt: skip
"""For `Stored.paths`: experts whose matrices are numbered."""


def parameters(
    folder: Folder, names: Names, stored: Stored, sources: Iterable[str], experts: int
) -> dict[str, Weight]:
    """Parameter path -> the tensors of the folder that hold it.

    Args:
        folder: the folder.
        names: the names of the architecture; `Names.layers` says how paths of parameters begin.
        stored: how its tensors lie.
        sources: the tensors to look at.
        experts: how many experts a layer has; 0 for none.

    Raises:
        UserError: naming a parameter that is there twice, or a missing expert.
    """
    prefix = names.layers.removesuffix("model.layers")
    found: dict[str, Weight] = {}
    stacks: dict[str, dict[int, str]] = {}
    for source in sources:
        path = canonical_name(source)
        for pattern, new in stored.paths.items():
            path = re.sub(pattern, new, path)
        expert = re.match(r"(.*)\.experts\.(\d+)\.(.*)$", path)
        if expert:
            stack = f"{prefix}{expert[1]}.switch_mlp.{expert[3]}"
            stacks.setdefault(stack, {})[int(expert[2])] = source
            continue
        rule = next((one for key, one in stored.rules.items() if re.search(key, path)), plain)
        for weight in rule(folder, f"{prefix}{path}", source):
            if weight.path in found:
                both = (source, found[weight.path].pieces[0].tensor)
                raise UserError(
                    f"{' and '.join(both)} are both {weight.path}: the folder holds the same "
                    "tensor twice; remove one."
                )
            found[weight.path] = weight
    for path, parts in stacks.items():
        if sorted(parts) != list(range(experts)):
            raise UserError(
                f"{path} is made of experts {sorted(parts)}, but config.json says there are "
                f"{experts}: download the model again."
            )
        pieces = tuple(Piece(parts[expert]) for expert in range(experts))
        found[path] = Weight(path, pieces, (experts, *folder.shapes[pieces[0].tensor]))
    return found


def canonical_name(source: str) -> str:
    """A tensor's name without ``language_model`` prefixes, as in a model that is not multimodal."""
    name = re.sub(r"^(model\.)?language_model\.", "", source)
    if not name.startswith(("model.", "lm_head.", "mtp.")):
        name = f"model.{name}"
    return name


# --------------------------------------------------------------------------------------------------
# Rules


def plain(folder: Folder, path: str, source: str) -> list[Weight]:
    """A tensor that is the parameter itself."""
    return [Weight(path, (Piece(source),), folder.shapes[source])]


def kernels(folder: Folder, path: str, source: str) -> list[Weight]:
    """One kernel for each channel, (C, 1, K), which MLX has as (C, K, 1)."""
    channels, *sizes = folder.shapes[source]
    return [Weight(path, (Piece(source),), (channels, max(sizes), 1))]


def norm_less_one(folder: Folder, path: str, source: str) -> list[Weight]:
    """A norm that multiplies by one plus the stored values, which MLX stores added up."""
    return [Weight(path, (Piece(source),), folder.shapes[source], PLUS_ONE)]


def halves(folder: Folder, path: str, source: str) -> list[Weight]:
    """The gate's rows before those of up, in each expert of a stack: (E, 2 f, n)."""
    return _parts(folder, path, source, lambda half: (slice(None, half), slice(half, None)))


def alternate(folder: Folder, path: str, source: str) -> list[Weight]:
    """Rows of the gate and of up by turns, in each expert of a stack: (E, 2 f, n)."""
    return _parts(folder, path, source, lambda half: (slice(0, None, 2), slice(1, None, 2)))


def _parts(
    folder: Folder, path: str, source: str, places: Callable[[int], tuple[slice, slice]]
) -> list[Weight]:
    *lead, rows, width = folder.shapes[source]
    index = np.arange(math.prod(lead) * rows).reshape(-1, rows)
    return [
        Weight(
            path.replace("gate_up_proj", f"{name}_proj"),
            (Piece(source, index[:, place].reshape(-1)),),
            (*lead, rows // 2, width),
        )
        for name, place in zip(("gate", "up"), places(rows // 2), strict=True)
    ]


def alternate_columns(folder: Folder, path: str, source: str) -> list[Weight]:
    """The same of biases (E, 2 f) and of transposed matrices (E, n, 2 f)."""
    columns = folder.shapes[source][-1]
    return _column_parts(folder, path, source, (np.arange(0, columns, 2), np.arange(1, columns, 2)))


def halved_columns(folder: Folder, path: str, source: str) -> list[Weight]:
    """The gate's columns before those of up, in transposed matrices (E, n, 2 f)."""
    gate, up = np.split(np.arange(folder.shapes[source][-1]), 2)
    return _column_parts(folder, path, source, (gate, up))


def _column_parts(
    folder: Folder, path: str, source: str, parts: tuple[np.ndarray, np.ndarray]
) -> list[Weight]:
    *lead, columns = folder.shapes[source]
    return [
        Weight(
            path.replace("gate_up_proj", f"{name}_proj"),
            (Piece(source, columns=part),),
            (*lead, columns // 2),
            SWAPPED if len(lead) > 1 else None,
        )
        for name, part in zip(("gate", "up"), parts, strict=True)
    ]


def swapped(folder: Folder, path: str, source: str) -> list[Weight]:
    """A stack of matrices that are transposed: (E, in, out)."""
    return [Weight(path, (Piece(source),), folder.shapes[source], SWAPPED)]


def swapped_down(folder: Folder, path: str, source: str) -> list[Weight]:
    """A publisher's stack ``down_proj``, transposed; blocks of it and MLX's stack are not."""
    return (swapped if source.endswith("down_proj") else plain)(folder, path, source)
