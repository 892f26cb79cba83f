"""The type of each tensor in a GGUF of a given file type, as llama.cpp's quantizer chooses it.

A file type such as Q4_K_M names one type for most tensors and finer ones for some: those of
attention values, outputs and down projections, in some layers, in models with grouped queries or
with experts. The choice depends on names, shapes and a few numbers of the metadata only. The rules
are those of llama.cpp's src/llama-quant.cpp, tested tensor by tensor against its quantizer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gguf
from gguf import GGMLQuantizationType as Q

from convert.base.errors import OPTION, UserError
from convert.gguf.file_types import FILE_TYPES, FLOATS

# Parts of the names of matrices that are never quantized: small ones, and tables of other kinds.
_KEPT = (
    *("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel"),
    *("per_layer_model_proj", "ssm_conv1d", "shortconv.conv.weight", "attn_rel_b.weight"),
    *("indexer.k_proj.weight", "indexer.q_proj.weight", "time_mix_first.weight"),
    *(f"time_mix_{name}.weight" for name in ("w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2")),
    *(f"time_mix_{name}.weight" for name in ("g1", "g2", "decay_w1", "decay_w2", "lerp_fused")),
    *(".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd"),
    *(".patch_merger", "a.rvq.codebook", "mm.a.code_embd"),
)
_KEPT_NAMES = ("position_embd.weight", "token_types.weight")
_KEPT_IN = {
    "glm5-next": (
        *("hc_", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "indexer_compressor_gate"),
        *("indexer_compressor_ape", "ssm_f_a.weight", "ssm_f_b.weight", "ssm_g_a.weight"),
        *("ssm_g_b.weight", "ssm_beta.weight", "attn_kv_a_mqa.weight", "attn_k_b.weight"),
        "attn_v_b.weight",
    )
}
_EIGHT_BITS_IN = {"glm5-next": ("attn_q_a", "attn_q_b", "nextn.eh_proj")}

# The type to write where a row is no whole number of the chosen type's blocks.
_NARROW = {
    **dict.fromkeys((Q.IQ1_S, Q.IQ1_M, Q.IQ2_XXS, Q.IQ2_XS, Q.IQ2_S, Q.IQ3_XXS), Q.IQ4_NL),
    **dict.fromkeys((Q.IQ3_S, Q.IQ4_XS), Q.IQ4_NL),
    **dict.fromkeys((Q.Q2_K, Q.Q3_K, Q.TQ1_0, Q.TQ2_0), Q.Q4_0),
    **{Q.Q4_K: Q.Q5_0, Q.Q5_K: Q.Q5_1, Q.Q6_K: Q.Q8_0},
}

_TWO_BITS = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")
_NEED_IMPORTANCE = (Q.IQ1_S, Q.IQ1_M, Q.IQ2_XXS, Q.IQ2_XS, Q.IQ2_S, Q.IQ3_XXS)

# What a part of a tensor's name says about its role, in the order of the search.
_ROLES = {
    "attn_qkv.weight": "value",
    "attn_kv_b.weight": "value",
    "attn_v.weight": "value",
    "attn_k.weight": "key",
    "attn_q.weight": "query",
    "attn_output.weight": "attention output",
    "ffn_up": "up",
    "ffn_gate": "gate",
    "ffn_down": "down",
}

_LARGE = {"llama": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}


@dataclass(frozen=True)
class Facts:
    """What the choice of types depends on besides the tensors.

    Attributes:
        architecture: general.architecture.
        layers: the number of blocks.
        group: query heads for each key-value head, in the first block; 0 without key-value heads.
        experts: experts in a block; 0 in a dense model.
        large: whether llama.cpp counts the model among those of 70 billion weights, by its layers.
    """

    architecture: str
    layers: int
    group: int = 1
    experts: int = 0
    large: bool = False

    @classmethod
    def of(cls, metadata: Mapping[str, Any], architecture: str | None = None) -> Facts:
        """The facts in a GGUF's metadata.

        Args:
            metadata: key -> value.
            architecture: general.architecture, where ``metadata`` does not have it.
        """
        arch = architecture or str(metadata["general.architecture"])

        def first(key: str, default: int) -> int:
            found = metadata.get(f"{arch}.{key}", default)
            found = found[0] if isinstance(found, list) and found else found
            return found if type(found) is int else default

        layers = first("block_count", 0)
        heads = first("attention.head_count", 0)
        shared = first("attention.head_count_kv", heads)
        return cls(
            architecture=arch,
            layers=layers,
            group=heads // shared if shared else 0,
            experts=first("expert_count", 0),
            large=_LARGE.get(arch) == layers and (arch != "llama" or heads != shared),
        )


def types(
    file_type: str,
    tensors: Mapping[str, tuple[tuple[int, ...], Q]],
    facts: Facts,
    *,
    importance: bool = False,
) -> dict[str, Q]:
    """The type of every tensor in a file of this type.

    Args:
        file_type: a key of `FILE_TYPES`.
        tensors: GGUF name -> (shape in NumPy's order, the type in which it is kept if it is not to
            be quantized).
        facts: what else is known of the model.
        importance: whether an importance matrix is used, with which some tensors get other types.

    Returns:
        A type for each name, in the order of ``tensors``.
    """
    chooser = _Chooser(file_type, facts, importance, tied="output.weight" not in tensors)
    chooser.values = sum(_role(name) == "value" for name in tensors)
    chosen = {}
    for name in sorted(tensors, key=_order):
        shape, kept = tensors[name]
        chosen[name] = chooser(name, shape) if quantizable(name, shape, facts) else kept
    return {name: chosen[name] for name in tensors}


def quantizable(name: str, shape: tuple[int, ...], facts: Facts) -> bool:
    """Whether llama.cpp's quantizer changes the type of this tensor at all."""
    sides = len(shape) - next((i for i, side in enumerate(shape) if side != 1), len(shape))
    kept = (*_KEPT, *_KEPT_IN.get(facts.architecture, ()))
    return (
        sides >= 2
        and name.endswith("weight")
        and name not in _KEPT_NAMES
        and not any(part in name for part in kept)
    )


def check_importance(file_type: str, types: Mapping[str, Q]) -> None:
    """Check that no tensor has a type that is useless without an importance matrix.

    Raises:
        UserError: naming the first such tensor.
    """
    for name, kind in types.items():
        if needs_importance(file_type, name, kind):
            raise UserError(
                f"{name} would be written as {kind.name}, which is useless without an importance "
                f"matrix: give one by {OPTION} FILE, or choose a larger type.",
                option="imatrix",
            )


def needs_importance(file_type: str, name: str, kind: Q) -> bool:
    """Whether llama.cpp's quantizer refuses to write this tensor without an importance matrix."""
    if name in ("token_embd.weight", "per_layer_token_embd.weight", "output.weight"):
        return False
    return kind in _NEED_IMPORTANCE or (kind == Q.Q2_K and file_type == "Q2_K_S")


def _order(name: str) -> tuple[int, bytes]:
    """The order in which llama.cpp counts tensors: by block, those outside blocks first."""
    found = re.match(r"blk\.(\d+)", name)
    return (int(found[1]) if found else -1, name.encode())


def _role(name: str) -> str:
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "embedding"
    return next((role for part, role in _ROLES.items() if part in name), "")


@dataclass
class _Chooser:
    """Chooses types; called with the quantizable tensors in llama.cpp's order, which it counts.

    Attributes:
        values: the number of tensors with attention values.
        seen: how many tensors of each role have been asked for.
    """

    file_type: str
    facts: Facts
    importance: bool
    tied: bool
    values: int = 0
    seen: dict[str, int] = field(default_factory=dict)

    def __call__(self, name: str, shape: tuple[int, ...]) -> Q:
        kind = FILE_TYPES[self.file_type][1]
        if kind in FLOATS:
            return kind
        kind = self._mixed(name, shape, kind)
        width = shape[-1]
        if width % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = _NARROW.get(kind, kind)
        return kind if width % gguf.GGML_QUANT_SIZES[kind][0] == 0 else Q.F16

    def _mixed(self, name: str, shape: tuple[int, ...], kind: Q) -> Q:
        role = _role(name)
        if any(part in name for part in _EIGHT_BITS_IN.get(self.facts.architecture, ())):
            return Q.Q8_0
        if role == "output" or (self.tied and role == "embedding"):
            return self._output(shape, kind)
        if self.file_type == "MXFP4_MOE":
            return self._float_four(role, shape)
        index = self.seen.get(role, 0)
        if role in ("value", "down", "gate", "up"):
            self.seen[role] = index + 1
        if role in ("down", "gate", "up") and self.facts.experts > 1:
            index = self._layer(name)
        chooser = {
            "embedding": self._embedding,
            "value": self._value,
            "key": self._key,
            "query": self._query,
            "attention output": self._attention_output,
            "down": self._down,
            "gate": self._inner,
            "up": self._inner,
        }.get(role)
        return chooser(index, kind) if chooser else kind

    def _layer(self, name: str) -> int:
        found = re.match(r"blk\.(\d+)\.", name)
        if not found or int(found[1]) >= self.facts.layers:
            raise UserError(
                f"{name} belongs to none of the model's {self.facts.layers} blocks, so its type "
                "cannot be chosen: the file is damaged, download it again."
            )
        return int(found[1])

    def _output(self, shape: tuple[int, ...], kind: Q) -> Q:
        odd = shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] != 0
        if self.file_type == "MXFP4_MOE" or self.facts.architecture == "falcon" or odd:
            return Q.Q8_0
        if self.file_type in _TWO_BITS or self.file_type == "IQ3_XXS":
            return Q.Q5_K
        return kind if kind == Q.Q8_0 else Q.Q6_K

    def _float_four(self, role: str, shape: tuple[int, ...]) -> Q:
        experts = len(shape) > 2 and shape[-3] > 1
        if self.facts.architecture == "bailingmoe3":
            experts = experts and role in ("up", "gate", "down")
        return Q.MXFP4 if experts else Q.Q8_0

    def _embedding(self, index: int, kind: Q) -> Q:
        if self.file_type in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"):
            return Q.Q2_K
        if self.file_type in ("IQ2_S", "IQ2_M", "IQ3_XXS"):
            return Q.IQ3_S
        return Q.Q4_K if self.file_type in ("TQ1_0", "TQ2_0") else kind

    def _value(self, index: int, kind: Q) -> Q:
        grouped = self.facts.group >= 4
        if self.file_type in _TWO_BITS:
            if grouped or self.facts.experts >= 4:
                return Q.Q4_K
            return Q.IQ3_S if self.file_type in ("IQ2_S", "IQ2_M") else Q.Q2_K
        if self.facts.experts == 8:
            return Q.Q8_0
        if self.file_type in ("Q2_K", "Q2_K_S", "IQ3_XXS", "IQ3_XS", "IQ3_S") and grouped:
            kind = Q.Q4_K
        elif self.file_type == "Q2_K":
            kind = Q.Q3_K
        elif self.file_type == "IQ3_XXS" and not self.importance:
            kind = Q.IQ3_S
        elif self.file_type == "IQ3_M":
            kind = Q.Q4_K
        elif self.file_type == "Q3_K_M":
            kind = Q.Q5_K if index < 2 else Q.Q4_K
        elif (
            self.file_type == "Q3_K_L"
            or (self.file_type == "Q4_K_S" and index < 4)
            or (self.file_type in ("IQ4_NL", "IQ4_XS") and grouped)
        ):
            kind = Q.Q5_K
        elif self.file_type in ("Q4_K_M", "Q5_K_M") and _more_bits(index, self.values):
            kind = Q.Q6_K
        return Q.Q5_K if self.facts.large and kind in (Q.Q3_K, Q.Q4_K) else kind

    def _key(self, index: int, kind: Q) -> Q:
        if self.facts.experts == 8:
            return Q.Q4_K if self.file_type in _TWO_BITS else Q.Q8_0
        return self._query(index, kind)

    def _query(self, index: int, kind: Q) -> Q:
        return {"IQ3_XS": Q.IQ3_XXS, "IQ3_XXS": Q.IQ2_S}.get(self.file_type, kind)

    def _attention_output(self, index: int, kind: Q) -> Q:
        if self.file_type in _TWO_BITS:
            if self.facts.experts == 8:
                return Q.Q5_K
            small = {"IQ1_S": Q.IQ2_XXS, "IQ1_M": Q.IQ2_XXS, "IQ2_S": Q.IQ3_S, "IQ2_M": Q.IQ3_S}
            return small.get(self.file_type, kind)
        if self.facts.architecture == "falcon":
            return Q.Q4_K if self.file_type == "Q3_K_L" else kind
        if self.facts.experts == 8:
            three = ("Q2_K", "Q3_K_S", "Q3_K_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M")
            four = ("Q4_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS")
            return Q.Q5_K if self.file_type in (*three, *four) else kind
        mixes = {"Q2_K": Q.Q3_K, "IQ3_XXS": Q.IQ3_S, "Q3_K_M": Q.Q4_K}
        return {**mixes, "Q3_K_L": Q.Q5_K, "IQ3_M": Q.Q4_K}.get(self.file_type, kind)

    def _down(self, index: int, kind: Q) -> Q:
        layers, falcon = self.facts.layers, self.facts.architecture == "falcon"
        first, more = index < layers // 8, _more_bits(index, layers)
        if self.file_type in _TWO_BITS:
            finer = Q.IQ3_S if self.file_type in ("IQ2_S", "IQ2_M") else Q.Q2_K
            return finer if self.seen["down"] <= layers // 8 else kind
        if self.file_type == "Q3_K_M":
            if index < layers // 16:
                return Q.Q5_K
            return Q.Q3_K if falcon and not more else Q.Q4_K
        if self.file_type == "Q4_K_M" and falcon:
            if index < layers // 16:
                return Q.Q6_K
            return Q.Q5_K if more else Q.Q4_K
        if self.file_type == "IQ3_M" and self.facts.experts == 8 and more:
            return Q.Q4_K
        if self.file_type == "IQ3_XXS" and not self.importance:
            return Q.Q4_K if first else Q.Q3_K
        if self.file_type in ("Q4_K_M", "Q5_K_M"):
            return Q.Q6_K if more else kind
        everywhere = {"Q2_K": Q.Q3_K, "Q3_K_L": Q.Q4_K if falcon else Q.Q5_K}
        in_first = {"Q2_K_S": Q.Q4_K, "IQ3_M": Q.Q4_K}
        if not falcon:
            in_first["Q4_K_S"] = Q.Q5_K
        # An importance matrix makes up for coarse codes, but it lets Q4_0 and Q5_0 go astray.
        if self.importance:
            in_first |= {"Q4_0": Q.Q4_1, "Q5_0": Q.Q5_1}
        else:
            in_first |= {"IQ4_NL": Q.Q5_K, "IQ4_XS": Q.Q5_K}
        kind = everywhere.get(self.file_type, kind)
        return in_first.get(self.file_type, kind) if first else kind

    def _inner(self, index: int, kind: Q) -> Q:
        eighth, last = self.facts.layers // 8, 7 * self.facts.layers // 8
        return Q.IQ3_XXS if self.file_type == "IQ3_XS" and eighth <= index < last else kind


def _more_bits(index: int, count: int) -> bool:
    """Whether a file type that ends with _M gives this layer more bits."""
    eighth = count // 8
    return index < eighth or index >= 7 * count // 8 or (index - eighth) % 3 == 2
