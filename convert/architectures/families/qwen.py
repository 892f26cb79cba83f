"""Qwen's mixtures of experts, and its hybrids of linear and full attention."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from convert.architectures.architecture import (
    Architecture,
    FromFolder,
    InMlx,
    edited,
    plain,
    refused,
)
from convert.architectures.config_keys import EXPERTS as EXPERT_KEYS
from convert.architectures.families.reasons import SPEECH
from convert.architectures.hf_keys import Config, count
from convert.architectures.keys import Keys
from convert.architectures.mlx_config import (
    base_config,
    rope_scaling,
    rotary_factor,
    unscaled_rotary,
    unsupported,
    whole_rotary,
)
from convert.architectures.weights import (
    ATTENTION,
    EXPERTS,
    FEED_FORWARD,
    OUTSIDE,
    Piece,
    Weight,
    renamed,
    repathed,
)
from convert.base.errors import UserError

_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}

_LINEAR_ATTENTION = {
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_a": "linear_attn.A_log",
    "ssm_dt": "linear_attn.dt",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}

_HYBRID = {
    **{name: module for name, module in (ATTENTION | FEED_FORWARD).items() if name != "ffn_norm"},
    **EXPERTS,
    **_SHARED_EXPERT,
    **_LINEAR_ATTENTION,
    # In spite of its name, this norm stands before the feed-forward network.
    "post_attention_norm": "post_attention_layernorm",
}


def _expert_config(keys: Keys) -> dict[str, Any]:
    count, used = (
        keys.integer(EXPERT_KEYS[name]) for name in ("num_experts", "num_experts_per_tok")
    )
    if not 1 <= used <= count:
        raise UserError(
            f"{keys.source.parts[0]} asks for {used} of {count} experts: get the file again."
        )
    dense = keys.integer("feed_forward_length", 0)
    return {
        "num_experts": count,
        "num_experts_per_tok": used,
        "intermediate_size": dense,
        "moe_intermediate_size": keys.integer(EXPERT_KEYS["moe_intermediate_size"], 0)
        or dense // used,
        "shared_expert_intermediate_size": (
            keys.integer("expert_shared_feed_forward_length", 0) or dense
        ),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _shared_gates(keys: Keys, weights: list[Weight]) -> list[Weight]:
    """The shared expert's gate: a vector in GGUF, a matrix of one row in mlx-lm."""
    return [
        replace(weight, shape=(1, *keys.tensor(weight.pieces[0].tensor).shape[-1:]))
        if weight.path.endswith("shared_expert_gate.weight")
        else weight
        for weight in weights
    ]


# --------------------------------------------------------------------------------------------------
# qwen2moe and qwen3moe


def _moe_config(model_type: str, *, normalized: bool) -> Callable[[Keys], dict[str, Any]]:
    def config(keys: Keys) -> dict[str, Any]:
        unscaled_rotary(keys)
        whole_rotary(keys)
        return base_config(keys, model_type) | _expert_config(keys) | {"norm_topk_prob": normalized}

    return config


def _qwen2moe_config(keys: Keys) -> dict[str, Any]:
    if keys.tied:
        raise UserError(
            f"{keys.source.parts[0]} has no output.weight, which every {keys.architecture} file "
            "needs: get the file again."
        )
    return _moe_config("qwen2_moe", normalized=False)(keys)


def _moe_weights(keys: Keys) -> list[Weight]:
    table = {**ATTENTION, **EXPERTS, **_SHARED_EXPERT, "ffn_norm": FEED_FORWARD["ffn_norm"]}
    return _shared_gates(keys, renamed(keys, table))


# --------------------------------------------------------------------------------------------------
# qwen3next, qwen35 and qwen35moe: gated delta nets, and full attention in every fourth layer


def _hybrid_config(model_type: str) -> Callable[[Keys], dict[str, Any]]:
    def config(keys: Keys) -> dict[str, Any]:
        text = base_config(keys, f"{model_type}_text")
        if keys.integer("expert_count", 0):
            text |= _expert_config(keys) | {"norm_topk_prob": True}
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


class _Heads:
    """The sizes of linear attention, and the order of its rows.

    mlx-lm keeps the value heads of one key head together. Files of qwen35 and qwen35moe have the
    first value head of every key head, then the second of every key head, and so on (``tiled``).
    """

    def __init__(self, keys: Keys, *, tiled: bool) -> None:
        self.count = keys.integer("ssm.group_count")
        values = keys.integer("ssm.time_step_rank")
        self.size = keys.integer("ssm.state_size")
        self.value_size = keys.integer("ssm.inner_size") // max(1, values)
        if self.count < 1 or values % self.count:
            raise UserError(
                f"{keys.source.parts[0]} has {values} value heads for {self.count} key heads in "
                "its linear attention: get the file again."
            )
        self.each = values // self.count
        order = np.arange(values)
        if tiled:
            order = order.reshape(self.each, self.count).T.reshape(-1)
        self.order = order

    @property
    def is_moved(self) -> bool:
        return bool((np.diff(self.order) != 1).any())

    @property
    def values(self) -> np.ndarray:
        """The order of the value heads' rows that mlx-lm has."""
        return (self.order[:, None] * self.value_size + np.arange(self.value_size)).reshape(-1)

    @property
    def mixed(self) -> np.ndarray:
        """The order of rows where queries and keys precede the value heads."""
        before = 2 * self.count * self.size
        return np.concatenate((np.arange(before), before + self.values))

    def parts(self, *sizes: int) -> list[np.ndarray]:
        """The rows of each part, where parts of these sizes are interleaved by key head."""
        firsts = np.arange(self.count)[:, None] * sum(sizes)
        starts = np.cumsum((0, *sizes))
        return [
            (firsts + start + np.arange(size)).reshape(-1)
            for start, size in zip(starts, sizes, strict=False)
        ]


def _log_of_negative(decay: np.ndarray) -> np.ndarray:
    # A number that is not negative becomes NaN or infinite here, which is refused later.
    with np.errstate(all="ignore"):
        return np.log(-decay)


def _hybrid_weights(*, tiled: bool) -> Callable[[Keys], list[Weight]]:
    def weights(keys: Keys) -> list[Weight]:
        heads = _Heads(keys, tiled=tiled)
        found = _split(keys, heads)
        apart = {piece.tensor for weight in found for piece in weight.pieces}
        outside = {name: f"language_model.{module}" for name, module in OUTSIDE.items()}
        plain = renamed(
            keys,
            _HYBRID,
            outside,
            layers="language_model.model.layers",
            skip=[f"^{name}$" for name in apart],
        )
        plain = repathed(plain, {r"\.dt\.bias$": ".dt_bias"})
        return found + [_placed(keys, heads, one) for one in _shared_gates(keys, plain)]

    return weights


def _placed(keys: Keys, heads: _Heads, weight: Weight) -> Weight:
    """A Weight of linear attention with its heads in mlx-lm's order; any other Weight unchanged."""
    tensor = weight.pieces[0].tensor
    block = re.match(r"blk\.\d+\.([^.]+)", tensor)
    stem = block[1] if block else ""
    shape = keys.tensor(tensor).shape
    if stem == "ssm_a":
        weight = replace(weight, change=_log_of_negative)
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
    value = heads.each * heads.value_size
    for name in keys.tensors:
        block = re.match(r"blk\.(\d+)\.([^.]+)", name)
        if block is None or int(block[1]) >= keys.layers:
            continue
        layer, stem = block[1], block[2]
        module = f"language_model.model.layers.{layer}"
        if stem == "ssm_ba":
            beta, alpha = heads.parts(heads.each, heads.each)
            _check_rows(keys, name, beta, alpha)
            found += [
                Weight(f"{module}.linear_attn.in_proj_b.weight", (Piece(name, beta),)),
                Weight(f"{module}.linear_attn.in_proj_a.weight", (Piece(name, alpha),)),
            ]
        elif stem == "ssm_in":
            # Only in qwen3next's first files.
            *mixed, gate = heads.parts(heads.size, heads.size, value, value)
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


def _qwen3moe_keys(flat: Config) -> dict[str, Any]:
    if not flat.get("norm_topk_prob", False):
        raise UserError(
            "config.json sets norm_topk_prob to false, but llama.cpp always normalizes "
            "Qwen3-MoE's expert weights: this model cannot be written as GGUF."
        )
    return {ours: count(flat, name) for name, ours in EXPERT_KEYS.items()}


_HYBRID_STREAM = plain(
    "ssm_out",
    reads="post_attention_norm cls.output",
    note="post_attention_norm stands before the feed-forward network",
)

ARCHITECTURES = (
    Architecture("qwen2moe", plain(), InMlx(_qwen2moe_config, _moe_weights)),
    Architecture(
        "qwen3moe",
        plain(),
        InMlx(_moe_config("qwen3_moe", normalized=True), _moe_weights),
        FromFolder(("qwen3_moe",), _qwen3moe_keys),
    ),
    # mlx-lm's qwen3_next is the same model, but its class joins matrices that are separate in the
    # file and may have different types there.
    Architecture(
        "qwen3next",
        _HYBRID_STREAM,
        InMlx(_hybrid_config("qwen3_5_moe"), _hybrid_weights(tiled=False)),
    ),
    Architecture(
        "qwen35", _HYBRID_STREAM, InMlx(_hybrid_config("qwen3_5"), _hybrid_weights(tiled=True))
    ),
    Architecture(
        "qwen35moe",
        _HYBRID_STREAM,
        InMlx(_hybrid_config("qwen3_5_moe"), _hybrid_weights(tiled=True)),
    ),
    *edited("qwen qwen2vl qwen3vlmoe", plain()),
    *edited("qwen3vl", plain(reads="cls.output")),
    *refused("rwkv6qwen2", "its recurrent blocks have not been proved in llama.cpp."),
    *refused(
        "qwen4exp",
        "its streams are mixed by learned maps (hyper-connections) and written to by per-layer "
        "n-gram embeddings.",
    ),
    *refused("qwen3tts", SPEECH),
)
