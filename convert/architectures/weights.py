"""Records of which rows (rarely, columns) of GGUF tensors make up each parameter of mlx-lm's model.

They hold indices and no values, so that quantized blocks can be moved without being decoded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from convert.architectures.keys import Keys
from convert.base.errors import UserError
from convert.gguf.layout import TensorEntry


@dataclass(frozen=True, eq=False)
class Piece:
    """A GGUF tensor, or some of its rows and columns.

    Attributes:
        tensor: the tensor's name.
        rows: indices of its rows, counted over all dimensions but the fastest (row e * out + o of
            an expert stack (E, out, in)), or of the elements of a vector; None for all in order.
        columns: indices into the fastest dimension; None for all in order. Quantized blocks lie
            along this dimension, so a tensor with reordered columns may have to be dequantized.
    """

    tensor: str
    rows: np.ndarray | None = None
    columns: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Weight:
    """One parameter of mlx-lm's model and where its values come from.

    Attributes:
        path: the parameter's path as in ``tree_flatten(model.parameters())``, such as
            ``model.layers.0.self_attn.q_proj.weight``: its name after the class's ``sanitize``.
        pieces: the tensors that hold its values, joined along the rows in this order.
        shape: the shape of the joined pieces; None for the shape of the only piece, or for
            (number of rows, n) of several.
        change: applied to the float32 values of that shape, where the parameter has other values
            (norms minus one, logarithms, transposed kernels); the result may have another shape.
    """

    path: str
    pieces: tuple[Piece, ...]
    shape: tuple[int, ...] | None = None
    change: Callable[[np.ndarray], np.ndarray] | None = None


# --------------------------------------------------------------------------------------------------
# Names that most families share

OUTSIDE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
"""Names of tensors outside the blocks -> modules of mlx-lm's model."""

ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
"""Names of tensors in a block -> modules of a layer: attention and the norm before it."""

FEED_FORWARD = {
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""The same for a gated feed-forward network and the norm before it."""

EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.switch_mlp.gate_proj",
    "ffn_up_exps": "mlp.switch_mlp.up_proj",
    "ffn_down_exps": "mlp.switch_mlp.down_proj",
}
"""The same for a mixture of experts, whose stacks are (E, out, in) in GGUF and in MLX."""

ROPE_TABLES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Names of tensors whose values become part of config.json."""


def renamed(
    keys: Keys,
    block: Mapping[str, str],
    outside: Mapping[str, str] = OUTSIDE,
    *,
    layers: str = "model.layers",
    skip: Iterable[str] = (),
) -> list[Weight]:
    """A Weight for each tensor of the file under its name in mlx-lm's model, with the same suffix.

    Args:
        keys: the file.
        block: names in ``blk.N.`` without ``.weight`` or ``.bias`` -> modules of a layer.
        outside: names of tensors outside the blocks -> modules of the model.
        layers: the path of the model's list of layers.
        skip: regular expressions of tensors that are left to the caller.

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
    """The weights with changed paths; ``names`` maps regular expressions to replacements."""
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
    """The weights, with ``change`` for those whose path matches the regular expression."""
    return [
        replace(weight, change=change) if re.search(pattern, weight.path) else weight
        for weight in weights
    ]


def reordered(
    weights: Iterable[Weight], pattern: str, rows: Callable[[TensorEntry], np.ndarray], keys: Keys
) -> list[Weight]:
    """The weights, with reordered rows for those whose path matches the regular expression.

    Args:
        weights: all weights.
        pattern: the regular expression.
        rows: makes from a tensor's entry the order of its rows, as in `Piece.rows`.
        keys: the file.
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
    """The order of Q or K rows that undoes llama.cpp's interleaving, for ``reordered``.

    For llama, llama.cpp rotates dimension 2i with 2i + 1; mlx-lm rotates i with i + d/2.

    Args:
        rows: the number of rows, heads * d.
        heads: the number of heads.
    """
    half = rows // heads // 2
    return np.arange(rows).reshape(heads, half, 2).swapaxes(1, 2).reshape(-1)


def halved_experts(keys: Keys, tensor: str, module: str) -> list[Weight]:
    """The two Weights, gate and up projection, of a stack of experts that holds both.

    Args:
        keys: the file.
        tensor: the stack (E, 2 f, n), in each expert the gate's rows before those of up.
        module: the module that has gate_proj and up_proj.
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
