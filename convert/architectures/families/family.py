"""What is to be said about one GGUF architecture so that mlx-lm can run its files.

A family gives two things: config.json, and for every parameter of mlx-lm's model where in the GGUF
it lies. A place is rows (and, rarely, columns) of named tensors, never values, so that quantized
blocks can be moved as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from convert.base.errors import UserError
from convert.gguf.file import GgufSource
from convert.gguf.layout import TensorEntry

_MISSING = object()


class Keys:
    """A GGUF's metadata, read under its architecture's prefix, and its tensors.

    ``keys.integer("block_count")`` is the value of ``llama.block_count`` in a llama file. Keys that
    hold a dot-less name are looked up the same way; ``general.`` and ``tokenizer.`` ones are found
    in ``keys.source.metadata``.
    """

    def __init__(self, source: GgufSource) -> None:
        self.source = source
        self.architecture = source.architecture
        self.tensors: Mapping[str, TensorEntry] = source.tensors

    def get(self, key: str, default: Any = None) -> Any:
        """The value of ``ARCHITECTURE.key``, or the default."""
        return self.source.metadata.get(f"{self.architecture}.{key}", default)

    def __contains__(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.source.metadata

    def integer(self, key: str, default: Any = _MISSING) -> Any:
        """An int. Raises UserError when it is missing without a default, or no single number."""
        return self._number(key, int, default)

    def count(self, key: str, default: Any = _MISSING) -> Any:
        """The same, refusing what is below one."""
        value = self.integer(key, default)
        if value < 1:
            raise UserError(
                f"{self._name} has {self.architecture}.{key} = {value}: get the file again."
            )
        return value

    def number(self, key: str, default: Any = _MISSING) -> Any:
        """The same as a float."""
        return self._number(key, float, default)

    def _number(self, key: str, kind: Callable[[Any], Any], default: Any) -> Any:
        value = self.get(key)
        if value is None:
            if default is _MISSING:
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

    def per_layer(self, key: str, default: Any = _MISSING) -> list[Any]:
        """One value for each layer: an array as it is, a single value repeated."""
        value = self.get(key, default)
        if value is _MISSING:
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
        """Number of transformer blocks; those that only draft further tokens do not count."""
        return int(self.integer("block_count")) - int(self.integer("nextn_predict_layers", 0))

    @property
    def drafting(self) -> tuple[str, ...]:
        """Regular expressions of the tensors of such blocks, which stand behind all others."""
        return tuple(rf"^blk\.{n}\." for n in range(self.layers, self.integer("block_count")))

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return self.tensor("token_embd.weight").shape[0]

    @property
    def tied(self) -> bool:
        """Whether the embedding is the output head as well."""
        return "output.weight" not in self.tensors

    def tensor(self, name: str) -> TensorEntry:
        """The entry of a tensor. Raises UserError when there is none."""
        return self.source.tensor(name)

    def values(self, name: str) -> np.ndarray:
        """A tensor's values, float32 in NumPy's order of dimensions."""
        return self.source.values(name)

    def _lacks(self, key: str) -> UserError:
        return UserError(
            f"{self._name} has no {self.architecture}.{key} in its metadata: get the file again."
        )

    @property
    def _name(self) -> str:
        return str(self.source.parts[0])


@dataclass(frozen=True, eq=False)
class Piece:
    """A GGUF tensor, or some of its rows and columns.

    Attributes:
        tensor: its name.
        rows: indices into its rows, which are the product of all dimensions but the fastest (row
            e * out + o of an expert stack (E, out, in)), or into the elements of a vector; None for
            all of them in order.
        columns: indices into the fastest dimension; None for all in order. Blocks of quantized
            weights run along it, so a tensor whose columns move may have to be dequantized.
    """

    tensor: str
    rows: np.ndarray | None = None
    columns: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Weight:
    """One parameter of mlx-lm's model and where its values come from.

    Attributes:
        path: as in ``tree_flatten(model.parameters())``, such as
            ``model.layers.0.self_attn.q_proj.weight``: the name after the class's ``sanitize``.
        pieces: joined along the rows, in this order.
        shape: of the parameter; None for the only piece's own shape, or (rows in all, n).
        change: applied to the float32 values of that shape, for what is no mere move (norms less
            one, logarithms, transposed kernels); the result may have another shape.
    """

    path: str
    pieces: tuple[Piece, ...]
    shape: tuple[int, ...] | None = None
    change: Callable[[np.ndarray], np.ndarray] | None = None


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        architecture: general.architecture in the GGUF.
        config: the keys of config.json that mlx-lm needs, "model_type" among them; sizes, rope,
            everything but the tokenizer's ids. Refuses with UserError what mlx-lm would run
            otherwise than llama.cpp.
        weights: every parameter of the model.
        unused: regular expressions of tensors that mlx-lm's model has no place for and that do not
            belong to the text model's forward pass, such as multi-token prediction heads.
    """

    architecture: str
    config: Callable[[Keys], dict[str, Any]]
    weights: Callable[[Keys], list[Weight]]
    unused: tuple[str, ...] = field(default=())


# --------------------------------------------------------------------------------------------------
# What most families share

OUTSIDE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
"""Tensors outside the blocks -> modules."""

ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
"""blk.N.* -> modules of a layer: attention with a norm in front."""

FEED_FORWARD = {
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""The same for a gated feed-forward network with a norm in front."""

EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.switch_mlp.gate_proj",
    "ffn_up_exps": "mlp.switch_mlp.up_proj",
    "ffn_down_exps": "mlp.switch_mlp.down_proj",
}
"""The same for a mixture of experts, whose stacks (E, out, in) are alike in both."""

ROPE_TABLES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that become part of config.json."""


def renamed(
    keys: Keys,
    block: Mapping[str, str],
    outside: Mapping[str, str] = OUTSIDE,
    *,
    layers: str = "model.layers",
    skip: Iterable[str] = (),
) -> list[Weight]:
    """A Weight for each tensor of the file, renamed; ``.weight`` and ``.bias`` stay what they are.

    Args:
        block: names within ``blk.N.`` without their ending -> modules within a layer.
        outside: the same for tensors outside the blocks.
        layers: where the model's layers are.
        skip: regular expressions of names that the caller takes care of itself.

    Raises:
        UserError: naming a tensor that is in neither table.
    """
    found = []
    skip = (*skip, *keys.drafting)
    for name in keys.tensors:
        if name in ROPE_TABLES or any(re.search(pattern, name) for pattern in skip):
            continue
        inside = re.fullmatch(r"blk\.(\d+)\.(.+?)(\.weight|\.bias)?", name)
        stem, ending = (inside[2], inside[3]) if inside else _split(name)
        table = block if inside else outside
        if stem not in table:
            raise UserError(
                f"{keys.source.parts[0]} holds {name}, which has no place in mlx-lm's model for "
                f"{keys.architecture}: this variant cannot be run with MLX."
            )
        module = f"{layers}.{inside[1]}.{table[stem]}" if inside else table[stem]
        found.append(Weight(f"{module}{ending or ''}", (Piece(name),)))
    return found


def _split(name: str) -> tuple[str, str]:
    for ending in (".weight", ".bias"):
        if name.endswith(ending):
            return name.removesuffix(ending), ending
    return name, ""


def repathed(weights: Iterable[Weight], names: Mapping[str, str]) -> list[Weight]:
    """The weights with their paths changed: regular expression -> what to put in its place."""
    found = []
    for weight in weights:
        path = weight.path
        for pattern, new in names.items():
            path = re.sub(pattern, new, path)
        found.append(replace(weight, path=path))
    return found


def changed(
    weights: Iterable[Weight], pattern: str, change: Callable[[np.ndarray], np.ndarray]
) -> list[Weight]:
    """The weights, with ``change`` on those whose path matches the regular expression."""
    return [
        replace(weight, change=change) if re.search(pattern, weight.path) else weight
        for weight in weights
    ]


def reordered(
    weights: Iterable[Weight], pattern: str, rows: Callable[[TensorEntry], np.ndarray], keys: Keys
) -> list[Weight]:
    """The weights, those whose path matches with their tensor's rows in another order.

    Args:
        rows: tensor entry -> indices, as in `Piece.rows`.
    """
    return [
        replace(
            weight,
            pieces=tuple(
                replace(piece, rows=rows(keys.tensor(piece.tensor))) for piece in weight.pieces
            ),
            shape=weight.shape or keys.tensor(weight.pieces[0].tensor).shape,
        )
        if re.search(pattern, weight.path)
        else weight
        for weight in weights
    ]


def half_split_rows(rows: int, heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of Q and K rows, for ``reordered``.

    Its llama rotates dimension 2i with 2i + 1, mlx-lm i with i + d/2.

    Args:
        rows: heads * d.
    """
    half = rows // heads // 2
    return np.arange(rows).reshape(heads, half, 2).swapaxes(1, 2).reshape(-1)


def halved_experts(keys: Keys, tensor: str, module: str) -> list[Weight]:
    """A stack of experts (E, 2 f, n), the gate's rows before the up projection's, as two stacks.

    Args:
        module: holds gate_proj and up_proj.
    """
    experts, rows, n = keys.tensor(tensor).shape
    index = np.arange(experts * rows).reshape(experts, 2, rows // 2)
    return [
        Weight(
            f"{module}.{half}.weight",
            (Piece(tensor, index[:, at].reshape(-1)),),
            (experts, rows // 2, n),
        )
        for at, half in enumerate(("gate_proj", "up_proj"))
    ]


def base_config(keys: Keys, model_type: str) -> dict[str, Any]:
    """The keys of config.json that nearly every model has."""
    heads = keys.count("attention.head_count")
    width = keys.count("embedding_length")
    config = {
        "model_type": model_type,
        "hidden_size": width,
        "num_hidden_layers": keys.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": keys.integer("attention.key_length", width // heads),
        "vocab_size": keys.vocabulary,
        "max_position_embeddings": keys.integer("context_length"),
        "rope_theta": keys.number("rope.freq_base", 10000.0),
        "tie_word_embeddings": keys.tied,
    }
    if "attention.layer_norm_rms_epsilon" in keys:
        config["rms_norm_eps"] = short(keys.number("attention.layer_norm_rms_epsilon"))
    inner = keys.get("feed_forward_length")
    if isinstance(inner, int) or (isinstance(inner, list) and len(set(inner)) == 1):
        config["intermediate_size"] = keys.integer("feed_forward_length")
    return config


def short(value: float) -> float:
    """The float32 that a file holds, in its shortest decimal form: 1e-05, not 9.99e-06."""
    return float(str(np.float32(value)))


def unsupported(keys: Keys, why: str) -> UserError:
    """A refusal of the file: ``why`` goes on after its name."""
    return UserError(f"{keys.source.parts[0]} {why}: this file cannot be run with MLX.")


def rotary_factor(keys: Keys) -> float:
    """The share of a head that is rotated, such that int(head * share) is exact.

    Raises:
        UserError: it is no even number of a head's dimensions.
    """
    head, rotated = _rotated(keys)
    share = float(rotated / head)
    return share if int(head * share) == rotated else (rotated + 0.5) / head


def _rotated(keys: Keys) -> tuple[int, int]:
    """A head's dimensions, and how many of them are rotated."""
    head = keys.count(
        "attention.key_length",
        keys.integer("embedding_length") // keys.count("attention.head_count"),
    )
    rotated = keys.integer("rope.dimension_count", head)
    if not 2 <= rotated <= head or rotated % 2:
        raise UserError(
            f"{keys.source.parts[0]} rotates {rotated} of the {head} dimensions of each head: get "
            "the file again."
        )
    return head, rotated


def sliding_window(keys: Keys, default: Any = _MISSING) -> int:
    """attention.sliding_window, at least one token."""
    return int(keys.count("attention.sliding_window", default))


def whole_rotary(keys: Keys) -> None:
    """Refuse a file that rotates only a part of each head, where mlx-lm's model rotates all of it.

    Raises:
        UserError: it does.
    """
    if rotary_factor(keys) != 1.0:
        raise unsupported(
            keys,
            f"rotates {keys.integer('rope.dimension_count')} dimensions of each head, but mlx-lm's "
            f"model for {keys.architecture} rotates all of them",
        )


def unscaled_rotary(keys: Keys) -> None:
    """Refuse a file that stretches its rotary embedding, where mlx-lm's model cannot.

    Raises:
        UserError: it does.
    """
    if rope_scaling(keys) is not None:
        raise unsupported(
            keys,
            f"stretches its rotary embedding, which mlx-lm's model for {keys.architecture} does "
            "not do",
        )


def experts_used(keys: Keys) -> int:
    """expert_used_count, at least one and no more than there are."""
    used, count = keys.count("expert_used_count"), keys.count("expert_count")
    if used > count:
        raise UserError(
            f"{keys.source.parts[0]} asks for {used} of {count} experts: get the file again."
        )
    return int(used)


def sliding_layers(keys: Keys, period: int) -> list[bool]:
    """Which layers look back over attention.sliding_window tokens only.

    The pattern is an array in newer files. A number n, or else ``period``, leaves every n-th layer
    the whole context.
    """
    pattern = keys.get("attention.sliding_window_pattern", period)
    if isinstance(pattern, list):
        return [bool(one) for one in keys.per_layer("attention.sliding_window_pattern")]
    count = keys.integer("attention.sliding_window_pattern", period)
    return [count == 0 or layer % count < count - 1 for layer in range(keys.layers)]


def rope_scaling(keys: Keys) -> dict[str, Any] | None:
    """config.json's rope_scaling: none, linear, yarn, or llama3's from the table of factors.

    Raises:
        UserError: a kind that mlx-lm has no counterpart for.
    """
    base = keys.number("rope.freq_base", 10000.0)
    if base <= 1.0:
        raise UserError(
            f"{keys.source.parts[0]} has {keys.architecture}.rope.freq_base = {base:g}: get the "
            "file again."
        )
    kind = keys.get("rope.scaling.type", "linear")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0)) or 1.0
    factor = 1.0 if kind == "none" else short(factor)
    attention = keys.number("rope.scaling.attn_factor", 1.0)
    if kind not in ("none", "linear", "yarn"):
        raise unsupported(
            keys,
            f"stretches its rotary embedding by the method {kind!r}, which mlx-lm does not have "
            f"for {keys.architecture}",
        )
    if attention != 1.0 and (kind != "yarn" or factor <= 1.0):
        raise unsupported(
            keys,
            f"multiplies its rotary embedding by {attention:g} (rope.scaling.attn_factor) without "
            "stretching it by yarn, which mlx-lm cannot do",
        )
    if "rope_freqs.weight" in keys.tensors:
        if factor != 1.0:
            raise unsupported(
                keys,
                f"stretches its rotary embedding twice, by rope_freqs.weight and by the method "
                f"{kind!r}, of which mlx-lm can do one only",
            )
        return _llama3_scaling(keys)
    if factor == 1.0:
        return None
    if kind == "linear":
        return {"type": "linear", "rope_type": "linear", "factor": factor}
    scaling = {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.integer("rope.scaling.original_context_length", 0)
        or keys.integer("context_length"),
    }
    if attention != 1.0:
        # llama.cpp multiplies by attention * (1 + grown), mlx-lm by 1 + mscale * grown.
        grown = 0.1 * math.log(factor)
        scaling["mscale"] = (attention * (1 + grown) - 1) / grown
    return scaling


def _llama3_scaling(keys: Keys) -> dict[str, Any] | None:
    """The parameters that make the file's factors: the inverse of `hf_to_gguf`'s table.

    A wave of length w has the factor 1 / ((1 - s) / f + s), s = clip((c / w - low) / (high - low)).
    Only c / low and c / high show, so c is the usual 8192.
    """
    factors = keys.values("rope_freqs.weight").astype(np.float64).reshape(-1)
    refusal = unsupported(
        keys,
        "has a rope_freqs.weight that is no table of llama3's kind, which is the only one mlx-lm "
        "can run",
    )
    if len(factors) != _rotated(keys)[1] // 2 or not np.all(np.isfinite(factors) & (factors > 0)):
        raise refusal
    base = keys.number("rope.freq_base", 10000.0)
    context, largest = 8192, float(np.round(factors.max(), 4))
    waves = 2 * np.pi * base ** (np.arange(len(factors)) / len(factors))
    if np.all(factors == 1.0):
        return None
    if largest <= 1.0:
        low, high = 1.0, 4.0
    else:
        share = (1 / factors - 1 / largest) / (1 - 1 / largest)
        blended = (share > 1e-4) & (share < 1 - 1e-4)
        if blended.sum() >= 2:
            # share = slope * (c / w) - low * slope
            slope, intercept = np.polyfit(context / waves[blended], share[blended], 1)
            low, high = -intercept / slope, (1 - intercept) / slope
        else:
            stretched = context / waves[factors > (1 + largest) / 2]
            kept = context / waves[factors <= (1 + largest) / 2]
            low = float(stretched.max()) if len(stretched) else 1.0
            high = float(kept.min()) if len(kept) else 4.0
            if blended.any():
                # Any line through the one point between will do that meets neither side.
                at, value = (context / waves[blended])[0], share[blended][0]
                low = max(low if len(stretched) else 0.0, (at - value * high) / (1 - value))
                high = low + (at - low) / value
        low, high = float(np.round(low, 4)), float(np.round(high, 4))
    scaling = {
        "type": "llama3",
        "rope_type": "llama3",
        "factor": largest,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }
    share = np.clip((context / waves - low) / (high - low), 0.0, 1.0)
    made = 1 / ((1 - share) / largest + share)
    if not np.all(np.abs(made / factors - 1) < 2e-3):
        raise refusal
    return scaling
