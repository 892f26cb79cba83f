"""The tensors of the GGUF that a model folder becomes, and the tensors of the folder they hold.

An architecture's entry says how a GGUF's tensors make up the parameters of mlx-lm's model
(`InMlx`), and how a folder's do (`FromFolder.stored`). The plan reads the first backwards: from the
folder to parameters, and from these to the GGUF.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gguf import GGMLQuantizationType

from convert.architectures import mtp
from convert.architectures.folder_config import architecture, text_config
from convert.architectures.hf_keys import Config, count, query_rescale
from convert.architectures.hf_metadata import hyperparameters
from convert.architectures.keys import Keys
from convert.architectures.moves import whole_groups
from convert.architectures.stored import Folder, Shape, canonical_name, parameters
from convert.architectures.table import IN_MLX, Written
from convert.architectures.weights import SWAPPED, Names, Weight
from convert.base.errors import UserError
from convert.gguf.layout import TensorEntry

_VISION = re.compile(
    r"(^|\.)(vision_tower|vision_model|multi_modal_projector|embed_vision|visual|audio_tower|"
    r"embed_audio|vision_embedder)\."
)
_SKIPPED = re.compile(rf"{_VISION.pattern}|\.rotary_emb\.(?:inv_freq|cos_cached|sin_cached)$")

#: Names in a block for multi-token prediction -> names of its parts in folders.
_DRAFTING = {
    "nextn.eh_proj": "eh_proj",
    "nextn.enorm": "enorm",
    "nextn.hnorm": "hnorm",
    "nextn.shared_head_norm": "shared_head.norm",
    "nextn.shared_head_head": "shared_head.head",
    "nextn.embed_tokens": "embed_tokens",
}
_OTHER_DRAFTING = {
    r"^mtp\.fc\.": "eh_proj.",
    r"^mtp\.pre_fc_norm_embedding\.": "enorm.",
    r"^mtp\.pre_fc_norm_hidden\.": "hnorm.",
    r"^mtp\.norm\.": "shared_head.norm.",
}

_SQUEEZED = re.compile(r"\.(ssm_conv1d|shortconv\.conv)\.weight$")
"""Tensors that lack the last dimension, of 1, that mlx-lm's parameters have."""


@dataclass(frozen=True, eq=False)
class Target:
    """One tensor of the GGUF file.

    Attributes:
        name: its name in the GGUF file.
        shape: its shape in NumPy's order.
        weights: the parameters of mlx-lm's model that are made of it.
        sources: the tensors of the folder that hold those parameters.
        scale: factor of every value, where llama.cpp fixes a scale that config.json sets otherwise.
    """

    name: str
    shape: Shape
    weights: tuple[Weight, ...]
    sources: tuple[str, ...]
    scale: float = 1.0

    @property
    def layer(self) -> int | None:
        """The number of its block; None for a tensor outside the blocks."""
        found = re.match(r"blk\.(\d+)\.", self.name)
        return int(found[1]) if found else None

    @property
    def moves(self) -> bool:
        """Whether its rows and blocks are moved only, so that those of quantized types may be."""
        columns = [piece.columns for weight in self.weights for piece in weight.pieces]
        return self.scale == 1.0 and all(
            [weight.change is None for weight in self.weights]
            + [one is None or whole_groups(one) is not None for one in columns]
        )


@dataclass(frozen=True, eq=False)
class Plan:
    """How a folder becomes a GGUF.

    Attributes:
        targets: the tensors of the GGUF in the file's order, embeddings first.
        stored: path of a parameter of mlx-lm's model -> the folder's tensors that hold it.
        placed: the same path -> the GGUF's tensors that hold it.
        metadata: the architecture's metadata.
        shapes: the folder's tensor -> its shape.
        left_out: the folder's tensors that the GGUF does not hold.
    """

    targets: list[Target]
    stored: dict[str, Weight]
    placed: dict[str, Weight]
    metadata: dict[str, Any]
    shapes: Mapping[str, Shape]
    left_out: tuple[str, ...] = ()


def plan(config: Config, shapes: Mapping[str, Shape], folder: Path = Path("the folder")) -> Plan:
    """How a model with these tensors becomes a GGUF.

    The names may be those of Hugging Face models or of mlx-lm's parameters, with or without a
    prefix ``language_model.``. Tensors of a vision tower are left out.

    Args:
        config: the parsed config.json.
        shapes: the folder's tensors -> their shapes.
        folder: for messages.

    Raises:
        UserError: naming a tensor that has no place in the architecture, or a missing expert.
    """
    arch, flat = architecture(config), text_config(config)
    in_mlx = IN_MLX[arch.gguf]
    layers = count(flat, "num_hidden_layers")
    drafting = {one.name for one in mtp.mtp_tensors(shapes, layers)}
    kept = [name for name in shapes if not is_skipped(name) and not _is_tied_head(name, flat, arch)]
    blocks = 0
    if arch.folder.drafting:
        blocks = max((_drafting_block(name, layers) + 1 for name in drafting), default=0)
    elif arch.folder.drafting is False:
        kept = [name for name in kept if name not in drafting]
    elif drafting:
        raise _no_place(min(drafting), arch)
    names = arch.folder.names or in_mlx.names
    names = Names({**names.block, **_DRAFTING}, names.outside, names.layers)
    renamed = {_as_layer(name, layers): shapes[name] for name in kept}
    original = {_as_layer(name, layers): name for name in kept}
    stored = _from_originals(
        parameters(Folder(flat, renamed), names, arch.folder.stored, renamed, _experts(flat)),
        original,
    )
    metadata = hyperparameters(config, blocks)
    tensors = _tensors(arch, names, stored, shapes)
    placed = _placed(arch, names, metadata, tensors, folder)
    stray = [path for path in stored if path not in placed]
    if stray:
        raise _no_place(stored[stray[0]].pieces[0].tensor, arch)
    holders: dict[str, list[Weight]] = {}
    for path, weight in placed.items():
        if path not in stored:
            raise UserError(f"the folder has no {path}: download the model again.")
        for tensor in dict.fromkeys(piece.tensor for piece in weight.pieces):
            holders.setdefault(tensor, []).append(weight)
    if "token_embd.weight" not in tensors:
        raise UserError("the folder has no embedding (model.embed_tokens.weight): download again.")
    targets = [
        Target(
            name,
            shape,
            tuple(holders[name]),
            tuple(
                dict.fromkeys(
                    piece.tensor for one in holders[name] for piece in stored[one.path].pieces
                )
            ),
            query_rescale(flat, arch.folder.rescaled, arch.folder.largest, holders[name][0].path),
        )
        for name, shape in tensors.items()
    ]
    used = {source for target in targets for source in target.sources}
    left_out = tuple(name for name in shapes if name not in used and not _is_table(name))
    return Plan(sorted(targets, key=_file_order), stored, placed, metadata, shapes, left_out)


def is_skipped(source: str) -> bool:
    """Whether a tensor is left out: one of a vision tower, or a recomputed rotary table."""
    return _SKIPPED.search(source) is not None


def is_gpt_oss(config: Config) -> bool:
    """Whether a folder may hold MXFP4 as gpt-oss's publisher stores it."""
    return config.get("model_type") == "gpt_oss"


def is_vision(source: str) -> bool:
    """Whether a tensor is one of a vision tower, which a GGUF of the language model lacks."""
    return _VISION.search(source) is not None


def _is_table(source: str) -> bool:
    return is_skipped(source) and not is_vision(source)


def _is_tied_head(source: str, flat: Config, arch: Written) -> bool:
    tied = arch.folder.always_tied or bool(
        flat.get("tie_word_embeddings", arch.folder.tied_by_default)
    )
    return tied and canonical_name(source) in ("lm_head.weight", "model.lm_head.weight")


def _drafting_block(name: str, layers: int) -> int:
    found = re.search(r"\.layers\.(\d+)\.", _as_layer(name, layers))
    return int(found[1]) - layers if found else 0


def _as_layer(name: str, layers: int) -> str:
    """The name of a block's tensor (``mtp.*``) as if the block were a further layer."""
    path = re.sub(r"^(model\.)?(language_model\.)?(?=mtp\.)", "", name)
    block = re.match(r"mtp\.layers\.(\d+)\.", path)
    if block:
        return f"model.layers.{layers + int(block[1])}.{path[block.end() :]}"
    for pattern, new in _OTHER_DRAFTING.items():
        if re.search(pattern, path):
            return f"model.layers.{layers}.{re.sub(pattern, new, path)}"
    return name


def _from_originals(found: dict[str, Weight], original: Mapping[str, str]) -> dict[str, Weight]:
    return {
        path: replace(
            weight,
            pieces=tuple(replace(piece, tensor=original[piece.tensor]) for piece in weight.pieces),
        )
        for path, weight in found.items()
    }


def _experts(flat: Config) -> int:
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return next((count(flat, name) for name in names if flat.get(name)), 0)


def _shape(weight: Weight, shapes: Mapping[str, Shape]) -> Shape:
    """A parameter's shape."""
    shape = weight.shape or shapes[weight.pieces[0].tensor]
    return (*shape[:-2], shape[-1], shape[-2]) if weight.change is SWAPPED else shape


def _tensors(
    arch: Written, names: Names, stored: Mapping[str, Weight], shapes: Mapping[str, Shape]
) -> dict[str, Shape]:
    """The GGUF's tensors and their shapes, in the order of the parameters."""
    named: dict[str, Shape] = {}
    others: dict[str, Shape] = {}
    for path, weight in stored.items():
        shape, name = _shape(weight, shapes), names.tensor(path)
        if name is None:
            others[path] = shape
        else:
            named[name] = shape[:-1] if _SQUEEZED.search(name) else shape
    return arch.folder.tensors(named, others)


class _Planned:
    """Metadata and tensors of a GGUF that is to be written, in place of a `GgufSource`."""

    def __init__(
        self, folder: Path, architecture: str, metadata: Mapping[str, Any], shapes: dict[str, Shape]
    ) -> None:
        self.parts = (folder,)
        self.architecture = architecture
        # Blocks for multi-token prediction are arranged as the model's own are.
        self.metadata = {
            key: value for key, value in metadata.items() if "nextn_predict_layers" not in key
        }
        self.tensors = MappingProxyType(
            {
                name: TensorEntry(name, GGMLQuantizationType.F32, shape, 0, 0, 0)
                for name, shape in shapes.items()
            }
        )

    def tensor(self, name: str) -> TensorEntry:
        if name not in self.tensors:
            raise UserError(f"{self.parts[0]} has nothing that becomes {name}: download it again.")
        return self.tensors[name]


def _placed(
    arch: Written,
    names: Names,
    metadata: Mapping[str, Any],
    tensors: dict[str, Shape],
    folder: Path,
) -> dict[str, Weight]:
    """Path of a parameter -> the rows of the GGUF's tensors that it is made of."""
    source: Any = _Planned(folder, arch.gguf, metadata, tensors)
    arranged = arch.folder.arranged or IN_MLX[arch.gguf].arranged
    return {weight.path: weight for weight in arranged(Keys(source), names)}


def _no_place(source: str, arch: Written) -> UserError:
    return UserError(
        f"{source} has no place in a GGUF of architecture {arch.gguf}: remove it, or write "
        f"the model with llama.cpp's convert_hf_to_gguf.py."
    )


def _file_order(target: Target) -> tuple[int, int, str]:
    if target.layer is not None:
        return 1, target.layer, target.name
    return (0 if target.name.startswith("token_embd") else 2), 0, target.name


def sources_of(targets: list[Target]) -> Iterator[tuple[str, str]]:
    """Pairs of a folder's tensor and the first GGUF tensor that holds it."""
    seen: set[str] = set()
    for target in targets:
        for source in target.sources:
            if source not in seen:
                seen.add(source)
                yield source, target.name
