"""Where the parameters of mlx-lm's model lie in a GGUF: rows (and, rarely, columns) of its tensors.

A place is never values, so that quantized blocks can be moved as they are.
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
