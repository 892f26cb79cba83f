"""Records of which rows and columns of stored tensors make up the parameters of mlx-lm's model.

They hold indices and no values, so that quantized blocks can be moved without being decoded. The
stored tensors are those of a GGUF, or those of a Hugging Face folder; every record can be read in
both directions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from convert.architectures.keys import Keys
from convert.base.errors import UserError
from convert.gguf.layout import TensorEntry


@dataclass(frozen=True, eq=False)
class Change:
    """A change of values between the stored tensor and the parameter, and the way back.

    Attributes:
        apply: from the stored float32 values to the parameter's.
        undo: from the parameter's values to the stored ones; None where there is no way back.
    """

    apply: Callable[[np.ndarray], np.ndarray]
    undo: Callable[[np.ndarray], np.ndarray] | None = None

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return self.apply(values)


def _log_of_negative(decay: np.ndarray) -> np.ndarray:
    # A number that is not negative becomes NaN or infinite here, which is refused later.
    with np.errstate(all="ignore"):
        return np.log(-decay)


def _negative_exponential(logarithm: np.ndarray) -> np.ndarray:
    # Rounded once: NumPy's exponential of float32 is often one step off.
    return (-np.exp(logarithm.astype(np.float64))).astype(np.float32)


def _swapped(values: np.ndarray) -> np.ndarray:
    return values.swapaxes(-1, -2)


PLUS_ONE = Change(lambda gain: gain + np.float32(1), lambda gain: gain - np.float32(1))
LESS_ONE = Change(lambda gain: gain - np.float32(1), lambda gain: gain + np.float32(1))
LOG_OF_NEGATIVE = Change(_log_of_negative, _negative_exponential)
SWAPPED = Change(_swapped, _swapped)


@dataclass(frozen=True, eq=False)
class Piece:
    """A stored tensor, or some of its rows and columns.

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
    change: Change | None = None


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


@dataclass(frozen=True)
class Names:
    """Names of a GGUF's tensors and of the parameters of mlx-lm's model, in both directions.

    Keys of the tables are names without ``.weight`` or ``.bias``, which stay as they are, or whole
    names where the ending differs ("ssm_dt.bias": "linear_attn.dt_bias").

    Attributes:
        block: names in ``blk.N.`` -> modules of a layer.
        outside: names of tensors outside the blocks -> modules of the model.
        layers: the path of the model's list of layers.
    """

    block: Mapping[str, str]
    outside: Mapping[str, str] = field(default_factory=lambda: OUTSIDE)
    layers: str = "model.layers"

    def path(self, tensor: str) -> str | None:
        """The parameter that a tensor becomes; None for a tensor in neither table."""
        inside = re.fullmatch(r"blk\.(\d+)\.(.+)", tensor)
        if inside is None:
            return _looked_up(self.outside, tensor)
        found = _looked_up(self.block, inside[2])
        return found and f"{self.layers}.{inside[1]}.{found}"

    def tensor(self, path: str) -> str | None:
        """The tensor that a parameter comes from; None for a parameter in neither table."""
        inside = re.fullmatch(rf"{re.escape(self.layers)}\.(\d+)\.(.+)", path)
        if inside is None:
            return _looked_up({new: old for old, new in self.outside.items()}, path)
        found = _looked_up({new: old for old, new in self.block.items()}, inside[2])
        return found and f"blk.{inside[1]}.{found}"


def _looked_up(table: Mapping[str, str], name: str) -> str | None:
    if name in table:
        return table[name]
    for ending in (".weight", ".bias"):
        stem = name.removesuffix(ending)
        if stem != name and stem in table:
            return f"{table[stem]}{ending}"
    return None


def renamed(keys: Keys, names: Names, *, skip: Iterable[str] = ()) -> list[Weight]:
    """A Weight for each tensor of the file under its name in mlx-lm's model.

    Args:
        keys: the file.
        names: the names of its architecture.
        skip: regular expressions of tensors that are left to the caller.

    Raises:
        UserError: naming a tensor that is in neither table.
    """
    found = []
    skip = (*skip, *keys.drafting)
    for name in keys.tensors:
        if name in ROPE_TABLES or any(re.search(pattern, name) for pattern in skip):
            continue
        path = names.path(name)
        if path is None:
            raise UserError(
                f"{keys.source.parts[0]} holds {name}, which has no place in mlx-lm's model for "
                f"{keys.architecture}: this variant cannot be run with MLX."
            )
        found.append(Weight(path, (Piece(name),)))
    return found


def changed(weights: Iterable[Weight], pattern: str, change: Change) -> list[Weight]:
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
