"""Tiny folders as their publishers would lay them out, of every architecture that becomes a GGUF.

Each is made of a recipe of `tests.support.gguf_recipes`: its values as mlx-lm's parameters, put
under the names and in the shapes that a folder from the Hugging Face hub has. llama.cpp's converter
reads these folders (`tests.support.record_converter`), which shows that they are laid out right.
"""

from __future__ import annotations

import json
import re
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType

from convert.gguf.file import GgufSource
from convert.gguf_to_mlx import layout
from convert.gguf_to_mlx.values import values_of
from tests.support import tiny, tiny_gguf
from tests.support.gguf_recipes import RECIPES

Values = dict[str, np.ndarray]
Config = dict[str, Any]

CLASSES = {
    "cohere": "CohereForCausalLM",
    "cohere2": "Cohere2ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "ernie4_5": "Ernie4_5ForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "exaone4": "Exaone4ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma4_text": "Gemma4ForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "granite": "GraniteForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
    "mistral3": "Mistral3ForConditionalGeneration",
    "hunyuan_v1_dense": "HunYuanDenseV1ForCausalLM",
    "lfm2": "Lfm2ForCausalLM",
    "lfm2_moe": "Lfm2MoeForCausalLM",
    "llama": "LlamaForCausalLM",
    "llama4": "Llama4ForConditionalGeneration",
    "ministral3": "Ministral3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "nemotron": "NemotronForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "qwen3_next": "Qwen3NextForCausalLM",
    "seed_oss": "SeedOssForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "youtu_llm": "YoutuForCausalLM",
}
"""model_type -> the class that the converter goes by."""

SENTENCEPIECE = {
    "ernie4_5", "ernie4_5_moe", "gemma", "gemma2", "gemma3_text", "gemma4_text", "nemotron", "phi3",
    "mixtral",
}  # fmt: skip
"""Model types whose tokenizer the converter reads from tokenizer.model."""


def model(recipe: str) -> tuple[Config, Values]:
    """A recipe's config.json and its parameters under mlx-lm's names, float32."""
    with tempfile.TemporaryDirectory() as folder:
        path = tiny_gguf.write(
            Path(folder) / "tiny.gguf", RECIPES[recipe], GGMLQuantizationType.F32
        )
        with GgufSource(path) as source:
            found = layout(source)
            values = {name: values_of(source, one) for name, one in found.weights.items()}
    return found.config, values


def write(folder: Path, recipe: str, dtype: str = "float32") -> Path:
    """Write a recipe's model as its publisher would; "hub NAME" is `tiny`'s, in bfloat16."""
    if name_of := re.match(r"hub (.*)", recipe):
        return tiny.write_model(folder, name_of[1], "bfloat16", "native")
    of, change = VARIANTS.get(recipe, (recipe, None))
    config, values = model(of)
    if recipe.startswith("qwen3next"):
        config = {**config["text_config"], "model_type": "qwen3_next"}
        values = {name.removeprefix("language_model."): one for name, one in values.items()}
    if recipe == "qwen3vlmoe":
        change = _transposed
    values = (change or _PUBLISHED.get(str(config["model_type"]), _same))(config, values)
    if recipe in ("qwen2vl", "qwen3vl", "qwen3vlmoe"):
        config, values = _seeing(recipe, config, values)
    kind = str(config["model_type"])
    config |= _further(config)
    folder.mkdir(parents=True)
    tokenizer = "bpe"
    if kind in SENTENCEPIECE:
        tokenizer = "spm-gemma" if kind.startswith("gemma") else "spm"
    special = tiny.write_tokenizer(folder, tokenizer)
    if kind in ("glm4", "glm4_moe_lite"):
        _rename_token(folder, "<|im_start|>", "<|user|>")
    if kind == "glm4_moe_lite":
        # Two of the tokenizer's merged tokens become those that the converter asks for.
        _add_tokens(folder, "[gMASK]", "<|observation|>")
    if kind == "mistral3":
        config = {**{key: config[key] for key in ("model_type",)}, "text_config": {
            **config, "model_type": "mistral"}}  # fmt: skip
    config = {**config, **special, "architectures": [CLASSES[kind]]}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    if recipe in CARDS:
        (folder / "README.md").write_text(CARDS[recipe], encoding="utf-8")
    if recipe in SAMPLING:
        path = folder / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | SAMPLING[recipe]))
    mx.save_safetensors(
        str(folder / "model.safetensors"),
        {name: mx.array(one).astype(getattr(mx, dtype)) for name, one in values.items()},
        metadata={"format": "pt"},
    )
    return folder


def _further(config: Config) -> Config:
    """Keys that mlx-lm does not need, and the converter or transformers does."""
    kind = config["model_type"]
    if kind == "granitemoehybrid":
        found = {"n_heads": 4, "n_groups": 1, "d_head": 64, "expand": 1, "d_state": 16, "d_conv": 4}
        return {f"mamba_{name}": value for name, value in found.items()}
    if kind == "gpt_oss" and not config.get("rope_scaling"):
        # Without it, transformers takes yarn.
        return {"rope_parameters": {"rope_type": "default", "rope_theta": config["rope_theta"]}}
    if kind == "olmo3":
        rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
        return {"rope_parameters": {"full_attention": rope, "sliding_attention": rope}}
    if kind == "hunyuan_v1_dense":
        # tests.support.tiny's end of a turn; without it, transformers takes a number of its own.
        return {"eod_token_id": 511}
    if kind == "cohere2":
        return {"rotary_pct": 1.0}
    if kind == "exaone4":
        pattern = config.pop("sliding_window_pattern") or "G"
        slides = [pattern[n % len(pattern)] == "L" for n in range(config["num_hidden_layers"])]
        return {"layer_types": [("full", "sliding")[one] + "_attention" for one in slides]}
    return {}


def _seeing(recipe: str, config: Config, values: Values) -> tuple[Config, Values]:
    """The language model of a model that sees, without its tower."""
    keys = RECIPES[recipe].keys
    sections = keys["rope.dimension_sections"][:3]
    text = {**config, "rope_scaling": {"type": "mrope", "mrope_section": sections}}
    if recipe == "qwen2vl":
        return text | {"model_type": "qwen2_5_vl"}, values
    kind = "qwen3_vl_moe" if recipe == "qwen3vlmoe" else "qwen3_vl"
    text["model_type"] = f"{kind}_text"
    deep = list(range(1, 1 + keys["n_deepstack_layers"]))
    return {
        "model_type": kind,
        "text_config": text,
        "vision_config": {"deepstack_visual_indexes": deep},
        "tie_word_embeddings": text["tie_word_embeddings"],
    }, {name.replace("model.", "model.language_model.", 1): one for name, one in values.items()}


def _add_tokens(folder: Path, *texts: str) -> None:
    """Make the last tokens that are not special ones special, under other texts."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    known = {one["id"] for one in content["added_tokens"]}
    last = sorted((number for number in vocab.values() if number not in known), reverse=True)
    for number, text in zip(last, texts, strict=False):
        old = next(one for one, at in vocab.items() if at == number)
        del vocab[old]
        pairs = [one if isinstance(one, list) else one.split(" ") for one in merges]
        merges[:] = [one for one in pairs if "".join(one) != old and old not in one]
        added = {**content["added_tokens"][-1], "id": number, "content": text}
        content["added_tokens"].append(added)
    content["added_tokens"].sort(key=lambda one: one["id"])
    path.write_text(json.dumps(content), encoding="utf-8")


def _rename_token(folder: Path, old: str, new: str) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        path = folder / name
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")


def _same(config: Config, values: Values) -> Values:
    return values


def _singly(values: Values, names: dict[str, str], stack: str = "switch_mlp") -> Values:
    """Experts one by one, their matrices under other names."""
    found: Values = {}
    for name, one in values.items():
        if f".{stack}." not in name:
            found[name] = one
            continue
        for expert, matrix in enumerate(one):
            new = name.replace(f".{stack}.", f".experts.{expert}.")
            for old, short in names.items():
                new = new.replace(f".{old}.", f".{short}.")
            found[new] = matrix
    return found


_NUMBERED = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def _experts(config: Config, values: Values) -> Values:
    return _singly(values, {})


def _mixtral(config: Config, values: Values) -> Values:
    return _singly(values, _NUMBERED)


def _with_halves(values: Values, gate: str, down: str) -> Values:
    """Gate and up of the experts in one tensor: ``gate`` and ``down`` are its and down's names."""
    found: Values = {}
    for name, one in values.items():
        stack = re.search(r"(switch_mlp|switch_glu)\.(gate|up|down)_proj\.weight$", name)
        if stack is None:
            found[name] = one
        elif stack[2] == "gate":
            up = values[name.replace("gate_proj", "up_proj")]
            found[name[: stack.start()] + gate] = np.concatenate((one, up), axis=1)
        elif stack[2] == "down":
            found[name[: stack.start()] + down] = one
    return found


def _granite(config: Config, values: Values) -> Values:
    return _with_halves(values, "input_linear.weight", "output_linear.weight")


def _kernels(values: Values, name: str) -> Values:
    return {key: one.swapaxes(1, 2) if name in key else one for key, one in values.items()}


def _lfm2(config: Config, values: Values) -> Values:
    return _kernels(values, ".conv.conv.")


def _lfm2_moe(config: Config, values: Values) -> Values:
    found = _singly(_kernels(values, ".conv.conv."), _NUMBERED)
    for old, new in _NUMBERED.items():
        found = {key.replace(f"feed_forward.{old}.", f"feed_forward.{new}."): one
                 for key, one in found.items()}  # fmt: skip
    return found


def _deepseek(config: Config, values: Values) -> Values:
    found: Values = {}
    for name, one in _singly(values, {}).items():
        if name.endswith("embed_q.weight"):
            keys, rest = one.swapaxes(1, 2), values[name.replace("embed_q", "unembed_out")]
            both = np.concatenate((keys, rest), axis=1)
            found[name.replace("embed_q", "kv_b_proj")] = both.reshape(-1, both.shape[-1])
        elif not name.endswith("unembed_out.weight"):
            found[name] = one
    return found


def _gpt_oss(config: Config, values: Values) -> Values:
    found: Values = {}
    for name, one in values.items():
        stack = re.search(r"\.experts\.(gate|up|down)_proj\.(weight|bias)$", name)
        new = re.sub(r"_proj\.(weight|bias)$", lambda m: "_proj" + {"weight": "", "bias": "_bias"}[
            m[1]], name)  # fmt: skip
        if stack is None:
            found[name] = one
        elif stack[1] == "gate":
            up = values[name.replace("gate_proj", "up_proj")]
            turns = np.stack((one, up), axis=2).reshape(len(one), -1, *one.shape[2:])
            turns = turns.swapaxes(1, 2) if turns.ndim == 3 else turns
            found[new.replace("gate_proj", "gate_up_proj")] = turns
        elif stack[1] == "down":
            found[new] = one.swapaxes(1, 2) if one.ndim == 3 else one
    return found


def _llama4(config: Config, values: Values) -> Values:
    # As of Llama 4 Scout: both limits are one.
    config["text_config"]["rope_scaling"] |= {
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 64,
    }
    return _transposed(config, values)


def _transposed(config: Config, values: Values) -> Values:
    """Stacks of experts (E, in, out), with the gate's columns before those of up."""
    found: Values = {}
    for name, one in values.items():
        stack = re.search(r"\.(experts|switch_mlp)\.(gate|up|down)_proj\.weight$", name)
        if stack is None:
            found[name] = one
            continue
        stem, turned = f"{name[: stack.start()]}.experts.", one.swapaxes(1, 2)
        if stack[2] == "gate":
            up = values[name.replace("gate_proj", "up_proj")].swapaxes(1, 2)
            found[f"{stem}gate_up_proj"] = np.concatenate((turned, up), axis=2)
        elif stack[2] == "down":
            found[f"{stem}down_proj"] = turned
    return found


def _ernie(config: Config, values: Values) -> Values:
    found = _singly(values, {})
    for name in values:
        if name.endswith("mlp.gate.weight"):
            count = len(values[name])
            bias = name.replace("gate.weight", "moe_statics.e_score_correction_bias")
            found[bias] = np.full((1, count), 0.25, np.float32)
    return found


def _gemma4(config: Config, values: Values) -> Values:
    values = _with_halves(values, "gate_up_proj", "down_proj")
    return {name.replace("model.", "model.language_model.", 1): one for name, one in values.items()}


def _less_one(values: Values) -> Values:
    return {
        name: one - 1 if re.search(r"(?<!linear_attn\.)norm\.weight$", name) else one
        for name, one in values.items()
    }


def _drafting(values: Values, layer: str) -> Values:
    """A block for multi-token prediction: another of full attention, and what leads into it."""
    found: Values = {}
    width = next(one for name, one in values.items() if name.endswith("input_layernorm.weight"))
    size = len(width)
    shapes = {"fc.weight": (size, 2 * size), "pre_fc_norm_embedding.weight": (size,),
              "pre_fc_norm_hidden.weight": (size,), "norm.weight": (size,)}  # fmt: skip
    for name, shape in shapes.items():
        noise = np.random.default_rng(zlib.crc32(name.encode()))
        found[f"mtp.{name}"] = noise.standard_normal(shape, dtype=np.float32) / 8
    for name, one in values.items():
        if f"layers.{layer}." in name:
            found[f"mtp.layers.0.{name.split(f'layers.{layer}.')[1]}"] = one / 2
    return found


def _full_layer(values: Values) -> str:
    return max(
        (m[1] for name in values if (m := re.search(r"layers\.(\d+)\.self_attn\.q_proj", name))),
        key=int,
    )


def _qwen35(config: Config, values: Values) -> Values:
    config["text_config"]["mtp_num_hidden_layers"] = 1
    _layer_types(config["text_config"])
    values = _less_one(_kernels(values, ".conv1d."))
    values = _with_halves(values, "switch_mlp.gate_up_proj", "switch_mlp.down_proj")
    values = {name.replace("switch_mlp.", "experts."): one for name, one in values.items()}
    found = {
        name.replace("language_model.model.", "model.language_model.").replace(
            "language_model.lm_head", "lm_head"
        ): one
        for name, one in values.items()
    }
    return found | _drafting(found, _full_layer(found))


def _layer_types(config: Config) -> None:
    """Name every layer's kind, as publishers do; transformers forgets the interval then."""
    every = config.pop("full_attention_interval")
    kinds = [
        "full" if (n + 1) % every == 0 else "linear" for n in range(config["num_hidden_layers"])
    ]
    config["layer_types"] = [f"{kind}_attention" for kind in kinds]


def _qwen3_next(config: Config, values: Values) -> Values:
    _layer_types(config)
    values = _singly(_less_one(_kernels(values, ".conv1d.")), {})
    keys, size = config["linear_num_key_heads"], config["linear_key_head_dim"]
    each = config["linear_num_value_heads"] // keys
    value = each * config["linear_value_head_dim"]
    found: Values = {}
    for name, one in values.items():
        if name.endswith("in_proj_qkv.weight"):
            z = values[name.replace("qkv", "z")]
            parts = np.split(one, [keys * size, 2 * keys * size])
            widths = (size, size, value, value)
            rows = [
                part.reshape(keys, width, -1)
                for part, width in zip((*parts, z), widths, strict=True)
            ]
            mixed = np.concatenate(rows, axis=1)
            found[name.replace("qkv", "qkvz")] = mixed.reshape(-1, mixed.shape[-1])
        elif name.endswith("in_proj_b.weight"):
            a = values[name.replace("in_proj_b", "in_proj_a")]
            both = np.concatenate([m.reshape(keys, each, -1) for m in (one, a)], axis=1)
            found[name.replace("in_proj_b", "in_proj_ba")] = both.reshape(-1, both.shape[-1])
        elif not name.endswith(("in_proj_z.weight", "in_proj_a.weight")):
            found[name] = one
    return found | _drafting(found, _full_layer(found))


def _as_hybrid(config: Config, values: Values) -> Values:
    """Granite 4 without experts and state-space layers, in a hybrid's config."""
    config |= {
        "model_type": "granitemoehybrid",
        "layer_types": ["attention"] * config["num_hidden_layers"],
        "shared_intermediate_size": config["intermediate_size"],
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
    }
    found: Values = {}
    for name, one in values.items():
        if name.endswith("mlp.gate_proj.weight"):
            up = values[name.replace("gate_proj", "up_proj")]
            new = name.replace("mlp.gate_proj", "shared_mlp.input_linear")
            found[new] = np.concatenate((one, up))
        elif name.endswith("mlp.down_proj.weight"):
            found[name.replace("mlp.down_proj", "shared_mlp.output_linear")] = one
        elif not name.endswith("mlp.up_proj.weight"):
            found[name] = one
    return found


def _as_glm(config: Config, values: Values) -> Values:
    """GLM 4.7 Flash, whose block for multi-token prediction is a further layer."""
    config |= {"model_type": "glm4_moe_lite", "num_nextn_predict_layers": 1}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    del config["rope_scaling"]
    found = _deepseek(config, values)
    layers = config["num_hidden_layers"]
    width = config["hidden_size"]
    more = {name.replace(f"layers.{layers - 1}.", f"layers.{layers}."): one / 2
            for name, one in found.items() if f"layers.{layers - 1}." in name}  # fmt: skip
    noise = np.random.default_rng(7)
    at = f"model.layers.{layers}"
    more[f"{at}.eh_proj.weight"] = noise.standard_normal((width, 2 * width), dtype=np.float32)
    for name in ("enorm", "hnorm", "shared_head.norm"):
        more[f"{at}.{name}.weight"] = noise.standard_normal(width, dtype=np.float32)
    return found | more


def _with_pictures(config: Config, values: Values) -> Values:
    """Mistral Small 3.1: the language model of a model that sees."""
    config |= {"model_type": "mistral3"}
    return {f"language_model.{name}": one for name, one in values.items()}


CARDS = {
    "llama, with a card": """---
license: other
license_name: some-licence
license_link: https://huggingface.co/some/model/blob/main/LICENSE
language:
- en
- no
library_name: transformers
pipeline_tag: text-generation
tags:
- chat
- überall
base_model: Qwen/Qwen2.5-7B-v0.3
datasets:
- some/set
- https://huggingface.co/datasets/other
model_creator: Somebody
---

# A card
""",
    "qwen3, merged, with a card": """---
base_model:
- mistralai/Mistral-7B-Instruct-v0.2
- https://huggingface.co/some/Model-1.5
- name: By hand
  organization: Someone
license: apache-2.0
language: multilingual
---
""",
}
"""What the test calls a model -> the model card that its publisher wrote."""


SAMPLING: dict[str, dict[str, Any]] = {
    "llama, with a card": {
        **{"sequence": "temperature;top_k", "temperature": 0.6, "top_k": 20, "top_p": 0.95},
        **{"min_p": 0, "xtc_probability": 0.5, "xtc_threshold": 0.1, "penalty_last_n": -1},
        **{"penalty_repeat": 1.05, "mirostat": 2, "mirostat_tau": 5.0, "mirostat_eta": 0.1},
        **{"do_sample": True, "repetition_penalty": 1.1},
    },
    "qwen3, merged, with a card": {"temperature": 1, "top_k": 64, "top_p": None},
}
"""What the test calls a model -> what its generation_config.json says of sampling."""


VARIANTS: dict[str, tuple[str, Callable[[Config, Values], Values]]] = {
    "granite 4, dense": ("granite", _as_hybrid),
    "glm 4.7 flash": ("deepseek v3", _as_glm),
    "mistral small 3.1": ("mistral3", _with_pictures),
    "llama, with a card": ("llama", _same),
    "qwen3, merged, with a card": ("qwen3", _same),
}
"""What the test calls a model -> the recipe that it is made of, and how."""

_PUBLISHED: dict[str, Callable[[Config, Values], Values]] = {
    **dict.fromkeys(("qwen2_moe", "qwen3_moe"), _experts),
    **dict.fromkeys(("granitemoe", "granitemoehybrid"), _granite),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), _deepseek),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe"), _qwen35),
    "mixtral": _mixtral,
    "lfm2": _lfm2,
    "lfm2_moe": _lfm2_moe,
    "gpt_oss": _gpt_oss,
    "llama4": _llama4,
    "ernie4_5_moe": _ernie,
    "gemma4_text": _gemma4,
    "qwen3_next": _qwen3_next,
}
