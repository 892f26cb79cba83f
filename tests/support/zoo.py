"""Tiny random models of every architecture that mlx-lm has, made from public config fields.

`config` gives a complete config.json: the fields that an architecture's ``ModelArgs`` names, filled
from `FIELDS`, and what is particular to it from `SPECIAL`. Sizes are as small as the architecture
allows, and no two of them agree by chance: a mistake about which width is which would show.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
import re
import sys
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from abl_mlx.edits.edit import Edit, target
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.hooks import around
from abl_mlx.models.writers import find_writers
from convert.base.errors import UserError

# The zoo is that of mlx-lm 0.32, which wants Python 3.11.
pytest.importorskip("mlx_lm.models.mistral4", reason="this mlx-lm is older than 0.32")


VOCABULARY = 97

FIELDS: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "hidden_dim", "n_embd", "d_model", "model_dim"], 32),
    **dict.fromkeys(["vocab_size", "num_vocab"], VOCABULARY),
    **dict.fromkeys(
        ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers"], 3
    ),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "n_kv_heads"], 2),
    **dict.fromkeys(["swa_num_attention_heads"], 4),
    **dict.fromkeys(["swa_num_key_value_heads"], 2),
    **dict.fromkeys(["head_dim", "swa_head_dim", "swa_v_head_dim", "hidden_size_per_head"], 8),
    **dict.fromkeys(
        ["intermediate_size", "n_inner", "ffn_hidden_size", "ff_intermediate_size"], 48
    ),
    **dict.fromkeys(["intermediate_size_mlp", "shared_intermediate_size"], 40),
    **dict.fromkeys(
        ["moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"], 24
    ),
    **dict.fromkeys(["moe_shared_expert_intermediate_size", "share_expert_dim"], 24),
    **dict.fromkeys(["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"], 4),
    **dict.fromkeys(
        ["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"], 2
    ),
    **dict.fromkeys(
        ["num_shared_experts", "n_shared_experts", "num_shared_expert", "moe_num_shared_experts"], 1
    ),
    **dict.fromkeys(["n_group", "topk_group", "num_expert_group"], 1),
    **dict.fromkeys(["first_k_dense_replace", "num_dense_layers", "decoder_sparse_step"], 1),
    **dict.fromkeys(
        ["max_position_embeddings", "n_positions", "n_ctx", "block_size", "model_max_length"], 128
    ),
    **dict.fromkeys(
        ["rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"], 1e-5
    ),
    **dict.fromkeys(["layernorm_epsilon"], 1e-5),
    **dict.fromkeys(["rope_theta", "rotary_emb_base", "swa_rope_theta"], 10000.0),
    **dict.fromkeys(["rope_freq_constant", "rope_local_base_freq", "rope_embedding_base"], 10000),
    **dict.fromkeys(["attention_bias", "mlp_bias", "use_bias", "use_qkv_bias", "bias"], False),
    **dict.fromkeys(["use_conv_bias", "conv_bias", "mamba_proj_bias", "no_bias"], False),
    **dict.fromkeys(["norm_topk_prob", "use_qk_norm", "qk_norm"], True),
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "routed_scaling_factor": 1.5,
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 10,
    "moe_layer_freq": 1,
    "mlp_only_layers": [],
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "partial_rotary_factor": 0.5,
    "query_pre_attn_scalar": 8,
    "sliding_window": 8,
    "logits_scaling": 0.8,
    "attention_multiplier": 0.2,
    "embedding_multiplier": 1.5,
    "residual_multiplier": 0.8,
    "hidden_act": "silu",
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 3,
    "conv_kernel": 3,
    "group_norm_size": 2,
    "scale_depth": 1.4,
    "scale_emb": 2.0,
    "dim_model_base": 16,
}
"""Field of a config -> a tiny value. Fields that are not here keep mlx-lm's default."""


def config(name: str) -> dict[str, Any]:
    """A complete config.json of one of mlx-lm's architectures (module names of mlx_lm.models).

    Args:
        name: an architecture, or one of `VARIANTS`, such as ``gemma4_text, dense``.
    """
    arch = name.split(",")[0]
    return {**_fields(arch), **SPECIAL.get(arch, {}), **VARIANTS.get(name, {})}


def _fields(arch: str) -> dict[str, Any]:
    arguments = _module(arch).ModelArgs
    names = [field.name for field in dataclasses.fields(arguments)]
    return {"model_type": arch, **{name: FIELDS[name] for name in names if name in FIELDS}}


def architectures() -> list[str]:
    """Names of all modules of mlx_lm.models that define a model."""
    import mlx_lm.models

    names = [module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)]
    modules = {name: _module(name) for name in names}
    return [name for name, one in modules.items() if hasattr(one, "ModelArgs")]


def _module(arch: str) -> ModuleType:
    # olmo's module leaves Python when this package is missing, and does not use it.
    sys.modules.setdefault("hf_olmo", ModuleType("hf_olmo"))
    return importlib.import_module(f"mlx_lm.models.{arch}")


def build(settings: dict[str, Any], seed: int = 0) -> nn.Module:
    """mlx-lm's model of a config with random float32 weights of a scale at which mistakes show."""
    from mlx_lm.utils import _get_classes

    model_class, arguments = _get_classes(settings)
    model: nn.Module = model_class(arguments.from_dict(settings))
    size = sum(value.size for _, value in tree_flatten(model.parameters()))
    if size > 4_000_000:
        raise ValueError(f"{settings['model_type']} has {size} parameters: a size is missing.")
    weights = [
        (path, _weight(path, value, seed))
        for path, value in tree_flatten(model.parameters())
        if mx.issubdtype(value.dtype, mx.floating)
    ]
    model.update(tree_unflatten(weights))
    model.eval()
    mx.eval(model.parameters())
    return model


def _weight(path: str, value: mx.array, seed: int) -> mx.array:
    random = np.random.default_rng([seed, zlib.crc32(path.encode())])
    noise = random.standard_normal(value.shape, dtype=np.float32)
    if path.endswith("bias"):
        return mx.array(0.3 * noise)
    if value.ndim <= 1:
        return mx.array(1 + 0.2 * noise)
    if "embed" in path or "wte" in path:
        return mx.array(noise)
    return mx.array(1.2 / np.sqrt(np.float32(value.shape[-1])) * noise)


class Letters:
    """A tokenizer for these models: one token for each letter, and no special ones."""

    eos_token_ids = (0,)

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> list[int]:
        """Token ids of the last message, in 1 … VOCABULARY - 1."""
        return [1 + byte % (VOCABULARY - 1) for byte in messages[-1]["content"].encode()]


def chat(arch: str, seed: int = 0) -> ChatModel:
    """A random model of an architecture."""
    settings = config(arch)
    return ChatModel(Path(arch), build(settings, seed), Letters(), settings)


def component(chat: ChatModel, directions: mx.array, prompt: str = "What is a garden?") -> float:
    """The largest |r·h| / |h| before or after any layer and at any token of a prompt, in float64.

    Reads every array of the model's width that a layer is handed or hands on, whatever its form.
    """
    states: list[mx.array] = []

    def keep(call: Any, *args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        whole = output[0] if isinstance(output, tuple | list) else output
        streams = [a for a in args if isinstance(a, mx.array) and a.shape[2:][-1:] == (chat.width,)]
        for one in [*streams, whole]:
            states.append(one.reshape(-1, chat.width))  # what later writes into it is not meant
        return output

    with around([(layer, keep) for layer in chat.layers]):
        mx.eval(chat.model(mx.array([chat.encode(prompt)])), states)
    unit = np.array(directions.astype(mx.float32)).astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    worst = 0.0
    for one in states:
        values = np.array(one.astype(mx.float32)).astype(np.float64)
        along = np.abs(values @ unit.T).max(axis=-1)
        worst = max(worst, float((along / np.linalg.norm(values, axis=-1)).max()))
    return worst


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a random model of an architecture.

    Attributes:
        writers: path -> whether a gain stands behind it; layers as N.
        reason: why it was refused, or None.
        before, after: the component of a random direction, around the edit.
        without: the component when one group of writers is left unedited, by group.
    """

    writers: dict[str, bool]
    reason: str | None
    before: float = 0.0
    after: float = 0.0
    without: dict[str, float] = dataclasses.field(default_factory=dict)


@functools.cache
def outcome(name: str) -> Outcome:
    """Find the writers of an architecture, edit it with the real edit code, and measure."""
    model = chat(name)
    try:
        writers = find_writers(model)
    except UserError as error:
        return Outcome({}, str(error))
    direction = mx.random.normal((1, model.width), key=mx.random.key(5))
    before = component(model, direction)
    original = model.model.parameters()
    edited = {}
    for writer in Edit(direction).chosen(writers):
        for path in writer.parameters:
            parameter = path.rsplit(".", 1)[1]
            edited[path] = target(Edit(direction), writer, parameter, writer.module[parameter])
    groups = {pattern(writer.path): writer.gain is not None for writer in writers}
    without = {}
    for group in groups:
        some = {path: v for path, v in edited.items() if pattern(path.rpartition(".")[0]) != group}
        model.model.update(tree_unflatten(list(some.items())))
        without[group] = component(model, direction)
        model.model.update(original)
    model.model.update(tree_unflatten(list(edited.items())))
    return Outcome(groups, None, before, component(model, direction), without)


def pattern(path: str) -> str:
    """A writer's path with numbers of layers and experts as N."""
    return re.sub(r"\.\d+(?=\.)", ".N", path)


_SLIDING = ["sliding_attention", "sliding_attention", "full_attention"]
_MLA = {"num_key_value_heads": 4, "rope_scaling": None}
_QWEN35 = {
    **{name: FIELDS[name] for name in ("hidden_size", "intermediate_size", "vocab_size")},
    **{name: FIELDS[name] for name in FIELDS if name.startswith("linear_")},
    "model_type": "qwen3_5",
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "full_attention_interval": 4,
    "tie_word_embeddings": False,
}
_EXPERTS = {
    name: FIELDS[name]
    for name in (
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
    )
}
_GEMMA4 = {
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "global_head_dim": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 12,
    "sliding_window_pattern": 3,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 24,
}
_KDA = {
    "num_heads": 4,
    "head_dim": 8,
    "short_conv_kernel_size": 3,
    "kda_layers": [1, 3],
    "full_attn_layers": [2],
}
_LFM2 = {
    "conv_L_cache": 3,
    "block_dim": 32,
    "block_multiple_of": 8,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
    "layer_types": ["conv", "full_attention", "conv"],
}
_LONGCAT = {
    "zero_expert_num": 2,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    "moe_topk": 3,
}
_ROPES = {
    "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
}
_LLAMA4_SCALING = {
    "rope_theta": 10000.0,
    "rope_type": "yarn",
    "type": "yarn",
    "factor": 2.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 64,
    "llama_4_scaling_beta": 0.1,
}

SPECIAL: dict[str, dict[str, Any]] = {
    "afm7": {"num_kv_reuse_layers": 1},
    "afmoe": {"layer_types": _SLIDING, "num_dense_layers": 1},
    "apertus": {"post_norm": False},
    "baichuan_m1": {
        "sliding_window_layers": [1],
        "conv_window": 2,
        "num_swa_attention_heads": 4,
        "num_swa_key_value_heads": 2,
    },
    "bailing_hybrid": {**_MLA, "layer_group_size": 2},
    "bailing_moe_linear": {"layer_group_size": 2},
    "bailing_moe_v3": {**_MLA, "layer_group_size": 2, "short_conv_kernel_size": 3},
    "cohere2": {"sliding_window_pattern": 3},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
    },
    "deepseek_v2": {
        **_MLA,
        "topk_method": "greedy",
        "rope_scaling": {
            "type": "yarn",
            "factor": 2,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32,
            "beta_slow": 1,
        },
    },
    "deepseek_v3": _MLA,
    "deepseek_v32": _MLA,
    "exaone4": {"rope_scaling": {"rope_type": "default"}, "sliding_window_pattern": "LLG"},
    "exaone_moe": {"layer_types": _SLIDING, "is_moe_layer": [False, True, True]},
    "gear": {"layer_types": ["conv_mixer", "sliding_attention", "full_attention"]},
    "gemma3": {"text_config": {**_fields("gemma3_text"), "sliding_window_pattern": 3}},
    "gemma3_text": {"sliding_window_pattern": 3},
    "gemma3n": {
        "text_config": {
            "model_type": "gemma3n_text",
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "head_dim": 16,
            "rms_norm_eps": 1e-5,
            "vocab_size": VOCABULARY,
            "num_key_value_heads": 2,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCABULARY,
            "sliding_window": 8,
            "max_position_embeddings": 128,
            "rope_local_base_freq": 10000.0,
            "rope_theta": 1e6,
            "final_logit_softcapping": 30.0,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
            "hidden_size_per_layer_input": 8,
            "altup_num_inputs": 4,
            "altup_coef_clip": 120.0,
            "altup_correct_scale": True,
            "altup_active_idx": 0,
            "laurel_rank": 8,
        }
    },
    "gemma4": {"text_config": {**_fields("gemma4_text"), **_GEMMA4}},
    "gemma4_text": _GEMMA4,
    "glm4_moe": {"rope_scaling": None},
    "glm_moe_dsa": {**_MLA, "rope_parameters": {"rope_theta": 10000.0}},
    "gpt_neox": {"rotary_pct": 0.5},
    "gptj": {"rotary_dim": 4},
    "gpt_oss": {
        "layer_types": _SLIDING,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 2.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 64,
        },
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_proj_bias": False,
        "mamba_d_state": 16,
        "mamba_d_conv": 3,
        "mamba_n_groups": 1,
        "mamba_conv_bias": True,
    },
    "hunyuan": {
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
    },
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 3,
        "mamba_d_state": 8,
        "mamba_expand": 2,
    },
    "kimi_k25": {"text_config": {**_fields("deepseek_v3"), **_MLA}},
    "kimi_k3": {
        "text_config": {
            **_fields("kimi_linear"),
            "q_lora_rank": 20,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 10,
            "hidden_act": "situ",
            "activation_situ_beta": 1.0,
            "activation_situ_linear_beta": 1.0,
            "num_key_value_heads": 4,
            "routed_expert_hidden_size": 16,
            "latent_moe_use_norm": True,
            "linear_attn_config": _KDA,
        }
    },
    "kimi_linear": {**_MLA, "linear_attn_config": _KDA},
    "kimi_vl": {"text_config": {**_fields("deepseek_v3"), **_MLA}},
    "lfm2": _LFM2,
    "lfm2-vl": {"text_config": {**_fields("lfm2"), **_LFM2, "model_type": "lfm2"}},
    "lfm2_moe": {**_LFM2, "use_expert_bias": True},
    "lille-130m": {"n_embd": 128},
    "llama4": {
        "text_config": {
            **_fields("llama4_text"),
            "num_hidden_layers": 4,
            "attention_chunk_size": 8,
            "interleave_moe_layer_step": 2,
            "max_position_embeddings": 128,
            "num_experts_per_tok": 1,
            "num_local_experts": 4,
            "rope_scaling": None,
            "attention_bias": False,
        }
    },
    "llama4_text": {"no_rope_layers": [1, 1, 0]},
    "longcat_flash": {**_LONGCAT, "attention_method": "MLA", "zero_expert_type": "identity"},
    "longcat_flash_ngram": {**_LONGCAT, "emb_neighbor_num": 3, "emb_split_num": 2},
    "mamba": {"state_size": 8, "time_step_rank": 4, "intermediate_size": 64},
    "mamba2": {
        "state_size": 16,
        "n_groups": 1,
        "time_step_limit": [0.0, 100.0],
        "time_step_rank": 4,
        "head_dim": 16,
        "intermediate_size": 64,
    },
    "mellum": {
        "layer_types": _SLIDING,
        "rope_parameters": _ROPES,
    },
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 0],
        "moe_layer_freq": [0, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": 8,
        "head_dim": 8,
        "swa_v_head_dim": 10,
    },
    "minicpm3": {
        **_MLA,
        "rope_scaling": {
            "type": "longrope",
            "original_max_position_embeddings": 64,
            "short_factor": [1.0, 1.0],
            "long_factor": [1.0, 1.0],
        },
    },
    "minimax": {"rotary_dim": 4},
    "minimax_m3_vl": {
        "text_config": {
            **_fields("minimax"),
            "dense_intermediate_size": 40,
            "moe_layer_freq": [0, 1, 1],
            "rotary_dim": 4,
        }
    },
    "ministral3": {"rope_parameters": _LLAMA4_SCALING, "layer_types": _SLIDING},
    "mistral3": {"text_config": {**_fields("llama"), "model_type": "mistral"}},
    "mistral4": {**_MLA, "rope_parameters": _LLAMA4_SCALING},
    "muse_glimmer": {"layer_types": _SLIDING},
    "muse_spark": {
        "text_config": {
            **{
                name: FIELDS[name]
                for name in (
                    "hidden_size",
                    "num_attention_heads",
                    "num_key_value_heads",
                    "head_dim",
                    "num_hidden_layers",
                    "vocab_size",
                    "rms_norm_eps",
                    "sliding_window",
                    "num_local_experts",
                    "num_experts_per_tok",
                    "moe_intermediate_size",
                )
            },
            "post_norm_eps": 1e-8,
            "rope_parameters": {"rope_theta": 10000.0},
            "layer_rope_theta": [10000.0, 10000.0, 0],
            "layer_types": _SLIDING,
            "final_logit_softcapping": 20.0,
            "output_multiplier": 0.2,
            "moe_hidden_size": 16,
        }
    },
    "nanbeige": {"num_loops": 2},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"replace_with_linear": True}, "ffn": {"replace_with_linear": True}},
        ],
    },
    "nemotron_h": {
        "hybrid_override_pattern": ["M", "*", "E", "-"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
        "moe_latent_size": 16,
    },
    "olmo": {"mlp_hidden_size": 64, "embedding_size": VOCABULARY},
    "olmo3": {"layer_types": _SLIDING},
    "olmo_hybrid": {
        "linear_allow_neg_eigval": True,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        "linear_num_key_heads": 4,
    },
    "openelm": {
        "ffn_dim_divisor": 8,
        "num_query_heads": [4, 6, 8],
        "num_kv_heads": [2, 3, 4],
        "ffn_multipliers": [0.5, 1.0, 1.5],
    },
    "phi3small": {
        # Its code masks tokens up to 100351 by number, without looking whether there are as many.
        "vocab_size": 100352,
        "dense_attention_every_n_layers": 2,
        "gegelu_limit": 20.0,
        "blocksparse_block_size": 32,
        "blocksparse_num_local_blocks": 2,
        "blocksparse_vert_stride": 2,
    },
    "phixtral": {"rotary_dim": 4},
    "pixtral": {"text_config": {**_fields("llama"), "model_type": "mistral"}},
    "plamo": {"n_shared_head": 2},
    "plamo2": {
        "mamba_d_state": 8,
        "mamba_d_conv": 3,
        "mamba_num_heads": 4,
        "num_hidden_layers": 4,
    },
    "plamo3": {"sliding_window_pattern": 2},
    "prism_hadamard_qwen35": {
        "text_config": {**_QWEN35, "hidden_size": 128},
        "tensor_namespace": "mlx-vlm-qwen3_5",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {
                "path": "model.embed_tokens",
                "embedding": True,
                "dtype": "float16",
                "block": 0,
            }
        ],
    },
    "qwen": {"kv_channels": 8},
    "qwen2_vl": {"text_config": _fields("qwen2")},
    "qwen3_5": {"text_config": _QWEN35},
    "qwen3_5_moe": {"text_config": {**_QWEN35, **_EXPERTS, "model_type": "qwen3_5_moe"}},
    "qwen3_next": {"num_hidden_layers": 4, "head_dim": 16},
    "qwen3_vl": {"text_config": _fields("qwen3")},
    "qwen3_vl_moe": {"text_config": _fields("qwen3_moe")},
    "recurrent_gemma": {
        "conv1d_width": 3,
        "logits_soft_cap": 30.0,
        "attention_window_size": 8,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "rwkv7": {
        "a_low_rank_dim": 4,
        "v_low_rank_dim": 4,
        "gate_low_rank_dim": 4,
        "decay_low_rank_dim": 4,
    },
    "spark2_5": {"layer_types": _SLIDING, "rope_parameters": _ROPES, "hidden_act": "gelu"},
    "step3p5": {
        "layer_types": _SLIDING,
        "num_attention_groups": 2,
        "moe_layers_enum": "1,2",
        "attention_other_setting": {"num_attention_heads": 6, "num_attention_groups": 2},
    },
    "talkie": {},
}
"""Architecture -> what its config says beside or instead of `FIELDS`."""

VARIANTS: dict[str, dict[str, Any]] = {
    "apertus, biases": {"attention_bias": True, "mlp_bias": True},
    "cohere, norms of queries": {"use_qk_norm": True, "layer_norm_bias": True},
    "dbrx, more experts than tokens": {
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 40, "moe_top_k": 1}
    },
    "deepseek_v3, no query rank": {"q_lora_rank": None, "attention_bias": True},
    "exaone_moe, dense": {"is_moe_layer": [False, False, False]},
    "falcon_h1, biases": {"mamba_proj_bias": True, "attention_bias": True, "mlp_bias": True},
    "gemma4_text, dense": {"enable_moe_block": False, "use_double_wide_mlp": False},
    "gemma4_text, no inputs of layers": {"hidden_size_per_layer_input": 0},
    "gpt_bigcode, one key": {"multi_query": True, "tie_word_embeddings": True},
    "gpt_neox, not parallel": {"use_parallel_residual": False},
    "granitemoehybrid, experts": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "kimi_k3, mixed blocks": {
        "text_config": {**SPECIAL["kimi_k3"]["text_config"], "attn_res_block_size": 2}
    },
    "llama, tied, biases": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "longcat_flash, no identity": {"zero_expert_num": 0},
    "mamba, norms": {"use_bcdt_rms": True, "use_bias": True},
    "mamba2, bias": {"use_bias": True, "n_groups": 2},
    "mistral3, mistral4": {
        "text_config": {**_fields("mistral4"), **SPECIAL["mistral4"], "model_type": "mistral4"}
    },
    "nanbeige, one loop": {"num_loops": 1},
    "nanbeige, no norm between": {"num_loops": 2, "skip_loop_final_norm": True},
    "nemotron_h, no latent": {"moe_latent_size": None, "mamba_proj_bias": True, "use_bias": True},
    "qwen, biases": {"no_bias": False},
    "rwkv7, tied": {"tie_word_embeddings": True},
    "stablelm, parallel": {"use_parallel_residual": True, "qk_layernorm": True},
}
"""Settings of an architecture's config under which it writes in other ways, tried beside the one of
`config`: name -> what differs."""
