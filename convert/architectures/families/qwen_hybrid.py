"""Qwen's hybrids of gated delta nets and full attention: qwen3next, qwen35 and qwen35moe."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from convert.architectures.architecture import (
    Architecture,
    FromFolder,
    InMlx,
    plain,
)
from convert.architectures.families.qwen import (
    EXPERT_COUNTS,
    SHARED_EXPERT,
    STORED_EXPERTS,
    expert_config,
    shared_gates,
)
from convert.architectures.hf_keys import Config, count, head_dim, named
from convert.architectures.keys import Keys
from convert.architectures.mlx_config import (
    base_config,
    rope_scaling,
    rotary_factor,
    unsupported,
)
from convert.architectures.stored import Folder, Shape, Stored, kernels, norm_less_one
from convert.architectures.stored import plain as plain_rule
from convert.architectures.weights import (
    ATTENTION,
    EXPERTS,
    FEED_FORWARD,
    LOG_OF_NEGATIVE,
    OUTSIDE,
    Names,
    Piece,
    Weight,
    renamed,
)
from convert.base.errors import UserError

_LINEAR_ATTENTION = {
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_a": "linear_attn.A_log",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}


_HYBRID = {
    **{name: module for name, module in (ATTENTION | FEED_FORWARD).items() if name != "ffn_norm"},
    **EXPERTS,
    **SHARED_EXPERT,
    **_LINEAR_ATTENTION,
    # In spite of its name, this norm stands before the feed-forward network.
    "post_attention_norm": "post_attention_layernorm",
}


def _hybrid_config(model_type: str) -> Callable[[Keys], dict[str, Any]]:
    def config(keys: Keys) -> dict[str, Any]:
        text = base_config(keys, f"{model_type}_text")
        if keys.integer("expert_count", 0):
            text |= expert_config(keys) | {"norm_topk_prob": True}
        value_heads = keys.integer("ssm.time_step_rank")
        text |= {
            "linear_num_key_heads": keys.integer("ssm.group_count"),
            "linear_num_value_heads": value_heads,
            "linear_key_head_dim": keys.integer("ssm.state_size"),
            "linear_value_head_dim": keys.integer("ssm.inner_size") // max(1, value_heads),
            "linear_conv_kernel_dim": keys.integer("ssm.conv_kernel"),
            "full_attention_interval": _interval(keys),
            # The sections are for positions in images; a token of text has the same position in
            # all of them, so they do not matter here.
            "rope_parameters": {
                "type": "default",
                "rope_type": "default",
                "rope_theta": text["rope_theta"],
                "partial_rotary_factor": rotary_factor(keys),
            }
            | (rope_scaling(keys) or {}),
        }
        return {
            "model_type": model_type,
            "tie_word_embeddings": text["tie_word_embeddings"],
            "text_config": text,
        }

    return config


def _interval(keys: Keys) -> int:
    """n, where every n-th layer has full attention."""
    recurrent = keys.get("attention.recurrent_layers")
    every = int(keys.integer("full_attention_interval", 4))
    if recurrent is not None:
        pattern = [bool(one) for one in keys.per_layer("attention.recurrent_layers")]
        every = pattern.index(False) + 1 if False in pattern else 0
    else:
        pattern = [every > 0 and (layer + 1) % every != 0 for layer in range(keys.layers)]
    if (
        not 1 <= every <= keys.layers
        or pattern != [(layer + 1) % every != 0 for layer in range(keys.layers)]
    ):  # fmt: skip
        raise unsupported(
            keys,
            "does not have its layers of full attention at a regular distance, which is all that "
            f"mlx-lm can run for {keys.architecture}",
        )
    return every


def _check_rows(keys: Keys, tensor: str, *rows: np.ndarray) -> None:
    entry = keys.tensor(tensor)
    held = entry.rows if len(entry.shape) > 1 else entry.shape[0]
    expected = sum(len(part) for part in rows)
    if held != expected:
        raise UserError(
            f"{keys.source.parts[0]}: {tensor} has {held} rows where {expected} are expected: get "
            "the file again."
        )


@dataclass(frozen=True)
class _Sizes:
    """Numbers of key and value heads of linear attention, and their dimensions."""

    count: int
    values: int
    size: int
    value_size: int

    @property
    def each(self) -> int:
        """Value heads for each key head."""
        return self.values // self.count

    def mixed_parts(self) -> list[np.ndarray]:
        """The rows of queries, keys, values and gates, interleaved by key head."""
        value = self.each * self.value_size
        return self.parts(self.size, self.size, value, value)

    def gate_parts(self) -> list[np.ndarray]:
        """The rows of beta and alpha, interleaved by key head."""
        return self.parts(self.each, self.each)

    def parts(self, *sizes: int) -> list[np.ndarray]:
        """The rows of each part, where parts of these sizes are interleaved by key head."""
        firsts = np.arange(self.count)[:, None] * sum(sizes)
        starts = np.cumsum((0, *sizes))
        return [
            (firsts + start + np.arange(size)).reshape(-1)
            for start, size in zip(starts, sizes, strict=False)
        ]


class _Heads:
    """The sizes of linear attention, and the order of its rows.

    mlx-lm keeps the value heads of one key head together. Files of qwen35 and qwen35moe have the
    first value head of every key head, then the second of every key head, and so on (``tiled``).
    """

    def __init__(self, keys: Keys, *, tiled: bool) -> None:
        count, values = keys.integer("ssm.group_count"), keys.integer("ssm.time_step_rank")
        if count < 1 or values % count:
            raise UserError(
                f"{keys.source.parts[0]} has {values} value heads for {count} key heads in "
                "its linear attention: get the file again."
            )
        self.sizes = _Sizes(
            count,
            values,
            keys.integer("ssm.state_size"),
            keys.integer("ssm.inner_size") // max(1, values),
        )
        order = np.arange(values)
        if tiled:
            order = order.reshape(self.sizes.each, count).T.reshape(-1)
        self.order = order

    @property
    def is_moved(self) -> bool:
        return bool((np.diff(self.order) != 1).any())

    @property
    def values(self) -> np.ndarray:
        """The order of the value heads' rows that mlx-lm has."""
        size = self.sizes.value_size
        return (self.order[:, None] * size + np.arange(size)).reshape(-1)

    @property
    def mixed(self) -> np.ndarray:
        """The order of rows where queries and keys precede the value heads."""
        before = 2 * self.sizes.count * self.sizes.size
        return np.concatenate((np.arange(before), before + self.values))


_HYBRID_NAMES = Names(
    _HYBRID,
    {name: f"language_model.{module}" for name, module in OUTSIDE.items()},
    "language_model.model.layers",
)


def _hybrid_weights(*, tiled: bool) -> Callable[[Keys, Names], list[Weight]]:
    def weights(keys: Keys, names: Names) -> list[Weight]:
        heads = _Heads(keys, tiled=tiled)
        found = _split(keys, heads)
        apart = {piece.tensor for weight in found for piece in weight.pieces}
        plain = renamed(keys, names, skip=[f"^{name}$" for name in apart])
        return found + [_placed(keys, heads, one) for one in shared_gates(keys, plain)]

    return weights


def _placed(keys: Keys, heads: _Heads, weight: Weight) -> Weight:
    """A Weight of linear attention with its heads in mlx-lm's order; any other Weight unchanged."""
    tensor = weight.pieces[0].tensor
    block = re.match(r"blk\.\d+\.([^.]+)", tensor)
    stem = block[1] if block else ""
    shape = keys.tensor(tensor).shape
    if stem == "ssm_a":
        weight = replace(weight, change=LOG_OF_NEGATIVE)
    if stem == "ssm_conv1d":
        # One kernel for each channel.
        weight = replace(weight, shape=(*shape, 1))
    if not heads.is_moved:
        return weight
    if stem == "ssm_out":
        if shape[-1] != len(heads.values):
            raise UserError(
                f"{keys.source.parts[0]}: {tensor} has {shape[-1]} columns where "
                f"{len(heads.values)} are expected: get the file again."
            )
        return replace(weight, pieces=(Piece(tensor, columns=heads.values),))
    rows = {
        "attn_qkv": heads.mixed,
        "ssm_conv1d": heads.mixed,
        "attn_gate": heads.values,
        **dict.fromkeys(("ssm_alpha", "ssm_beta", "ssm_a", "ssm_dt"), heads.order),
    }
    if stem not in rows:
        return weight
    _check_rows(keys, tensor, rows[stem])
    return replace(weight, pieces=(Piece(tensor, rows[stem]),))


def _split(keys: Keys, heads: _Heads) -> list[Weight]:
    """The Weights of tensors that each hold several parameters."""
    found = []
    for name in keys.tensors:
        block = re.match(r"blk\.(\d+)\.([^.]+)", name)
        if block is None or int(block[1]) >= keys.layers:
            continue
        layer, stem = block[1], block[2]
        module = f"language_model.model.layers.{layer}"
        if stem == "ssm_ba":
            beta, alpha = heads.sizes.gate_parts()
            _check_rows(keys, name, beta, alpha)
            found += [
                Weight(f"{module}.linear_attn.in_proj_b.weight", (Piece(name, beta),)),
                Weight(f"{module}.linear_attn.in_proj_a.weight", (Piece(name, alpha),)),
            ]
        elif stem == "ssm_in":
            # Only in qwen3next's first files.
            *mixed, gate = heads.sizes.mixed_parts()
            rows = np.concatenate(mixed)
            _check_rows(keys, name, rows, gate)
            found += [
                Weight(f"{module}.linear_attn.in_proj_qkv.weight", (Piece(name, rows),)),
                Weight(f"{module}.linear_attn.in_proj_z.weight", (Piece(name, gate),)),
            ]
        elif stem == "ffn_gate_up_exps" and len(keys.tensor(name).shape) == 3:
            experts, out, width = keys.tensor(name).shape
            half = out // 2
            firsts = np.arange(experts)[:, None] * out
            found += [
                Weight(
                    f"{module}.mlp.switch_mlp.{part}_proj.weight",
                    (Piece(name, (firsts + start + np.arange(half)).reshape(-1)),),
                    (experts, half, width),
                )
                for part, start in (("gate", 0), ("up", half))
            ]
    return found


_INTERVAL = 4
"""Every n-th layer has full attention where config.json does not say otherwise."""


def _hybrid_keys(flat: Config) -> dict[str, Any]:
    values = count(flat, "linear_num_value_heads")
    share = (flat.get("rope_parameters") or flat).get("partial_rotary_factor")
    found = named(flat, EXPERT_COUNTS) | {
        "ssm.conv_kernel": count(flat, "linear_conv_kernel_dim"),
        "ssm.state_size": count(flat, "linear_key_head_dim"),
        "ssm.group_count": count(flat, "linear_num_key_heads"),
        "ssm.time_step_rank": values,
        "ssm.inner_size": count(flat, "linear_value_head_dim") * values,
        "full_attention_interval": int(flat.get("full_attention_interval") or _INTERVAL),
        "rope.dimension_count": int(head_dim(flat) * (0.25 if share is None else float(share))),
    }
    every = found["full_attention_interval"]
    found["attention.recurrent_layers"] = (
        [kind == "linear_attention" for kind in flat["layer_types"]]
        if flat.get("layer_types")
        else [(layer + 1) % every != 0 for layer in range(count(flat, "num_hidden_layers"))]
    )
    return found


def _qwen35_keys(flat: Config) -> dict[str, Any]:
    """The hybrid's keys with sections for positions in images, which llama.cpp requires."""
    rope = flat.get("rope_parameters") or flat.get("rope_scaling") or {}
    sections = [int(one) for one in rope.get("mrope_section") or (11, 11, 10)]
    return _hybrid_keys(flat) | {"rope.dimension_sections": (sections + [0] * 4)[:4]}


def _published(folder: Folder) -> bool:
    """Whether tensors lie as the publisher stores them: kernels (C, 1, K), norms less one."""
    return any(
        name.endswith("conv1d.weight") and shape[-1] != 1 for name, shape in folder.shapes.items()
    )


def _norm(folder: Folder, path: str, source: str) -> list[Weight]:
    return (norm_less_one if _published(folder) else plain_rule)(folder, path, source)


def _keys_of(config: Config) -> _Sizes:
    return _Sizes(
        count(config, "linear_num_key_heads"),
        count(config, "linear_num_value_heads"),
        count(config, "linear_key_head_dim"),
        count(config, "linear_value_head_dim"),
    )


def _mixed_rows(folder: Folder, path: str, source: str) -> list[Weight]:
    """in_proj_qkvz: queries, keys, values and gates of one key head after the other."""
    *mixed, gate = _keys_of(folder.config).mixed_parts()
    return _rows_apart(folder, path, source, {"qkv": np.concatenate(mixed), "z": gate})


def _gate_rows(folder: Folder, path: str, source: str) -> list[Weight]:
    """in_proj_ba: gates of one key head after the other."""
    beta, alpha = _keys_of(folder.config).gate_parts()
    return _rows_apart(folder, path, source, {"b": beta, "a": alpha})


def _rows_apart(
    folder: Folder, path: str, source: str, parts: dict[str, np.ndarray]
) -> list[Weight]:
    module, width = path[: path.rindex("in_proj_")], folder.shapes[source][-1]
    return [
        Weight(f"{module}in_proj_{name}.weight", (Piece(source, rows),), (len(rows), width))
        for name, rows in parts.items()
    ]


_STORED = Stored(
    STORED_EXPERTS.paths,
    {
        **STORED_EXPERTS.rules,
        r"\.conv1d\.weight$": kernels,
        r"\.in_proj_qkvz\.weight$": _mixed_rows,
        r"\.in_proj_ba\.weight$": _gate_rows,
        r"(?<!linear_attn\.)norm\.weight$": _norm,
    },
)


def _next_tensors(named: dict[str, Shape], others: dict[str, Shape]) -> dict[str, Shape]:
    """The tensors, with the gates of linear attention in one, as files of qwen3next have them."""
    found: dict[str, Shape] = {}
    for name, (rows, *rest) in named.items():
        if ".ssm_beta." in name:
            found[name.replace("ssm_beta", "ssm_ba")] = (2 * rows, *rest)
        elif ".ssm_alpha." not in name:
            found[name] = (rows, *rest)
    return found


_HYBRID_STREAM = plain(
    "ssm_out",
    reads="post_attention_norm cls.output",
    note="post_attention_norm stands before the feed-forward network",
)


ARCHITECTURES = (
    # mlx-lm's qwen3_next is the same model, but its class joins matrices that are separate in the
    # file and may have different types there.
    Architecture(
        "qwen3next",
        _HYBRID_STREAM,
        InMlx(_hybrid_config("qwen3_5_moe"), _HYBRID_NAMES, _hybrid_weights(tiled=False)),
        (FromFolder(("qwen3_next",), _hybrid_keys, _STORED, tensors=_next_tensors, drafting=True),),
    ),
    Architecture(
        "qwen35",
        _HYBRID_STREAM,
        InMlx(_hybrid_config("qwen3_5"), _HYBRID_NAMES, _hybrid_weights(tiled=True)),
        (FromFolder(("qwen3_5", "qwen3_5_text"), _qwen35_keys, _STORED, drafting=True),),
    ),
    Architecture(
        "qwen35moe",
        _HYBRID_STREAM,
        InMlx(_hybrid_config("qwen3_5_moe"), _HYBRID_NAMES, _hybrid_weights(tiled=True)),
        (FromFolder(("qwen3_5_moe", "qwen3_5_moe_text"), _qwen35_keys, _STORED, drafting=True),),
    ),
)
