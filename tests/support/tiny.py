"""Tiny random models and real small tokenizers, as folders that mlx-lm and transformers load.

Every model here has random weights, but of a scale at which mistakes show: norm weights differ from
one, biases from zero, and logits are far from flat. Names and layout are those of a folder from the
Hugging Face hub, so what reads these reads real models.
"""

from __future__ import annotations

import functools
import io
import json
import zlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

VOCAB_SIZE = 512
"""Rows of every embedding and tokens of every tokenizer written here."""

_BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {
        **_BASE,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "mlp_bias": False,
    },
    "mistral": {
        **_BASE,
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "head_dim": 32,
        "num_attention_heads": 4,
        "sliding_window": None,
    },
    "qwen2": {
        **_BASE,
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
    },
    "qwen3": {
        **_BASE,
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 32,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
    },
    "gemma2": {
        **_BASE,
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "num_hidden_layers": 4,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 512,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma3_text": {
        **_BASE,
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "sliding_window": 512,
        "sliding_window_pattern": 3,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "phi3": {
        **_BASE,
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "original_max_position_embeddings": 2048,
        "sliding_window": 2047,
        "rope_scaling": None,
    },
    "qwen3_moe": {
        **_BASE,
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
    },
    "olmo2": {
        **_BASE,
        "model_type": "olmo2",
        "architectures": ["Olmo2ForCausalLM"],
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
    },
    "granite": {
        **_BASE,
        "model_type": "granite",
        "architectures": ["GraniteForCausalLM"],
        "attention_bias": False,
        "mlp_bias": False,
        "logits_scaling": 0.8,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 1.5,
        "residual_multiplier": 0.8,
        "tie_word_embeddings": True,
    },
}
"""model_type -> a complete config.json; the keys are mlx-lm's and the hub's."""

TOKENIZERS: dict[str, str] = {
    "llama": "bpe-llama3",
    "mistral": "spm",
    "qwen2": "bpe-qwen2",
    "qwen3": "bpe-qwen2",
    "gemma2": "spm-gemma",
    "gemma3_text": "spm-gemma",
    "phi3": "spm",
    "qwen3_moe": "bpe-qwen2",
    "olmo2": "bpe-gpt2",
    "granite": "bpe-gpt2",
}
"""The tokenizer kind that real models of each architecture have."""

# Widths every K-quant accepts: pass as overrides where blocks of 256 are needed.
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256}

_ZERO_CENTRED_NORMS = {"gemma", "gemma2", "gemma3_text"}


def config(arch: str, **overrides: Any) -> dict[str, Any]:
    """The config of ``arch`` with ``overrides`` on top; a value of ``...`` removes a key."""
    merged = {**ARCHITECTURES[arch], **overrides}
    return {key: value for key, value in merged.items() if value is not ...}


def make_model(arch: str, seed: int = 0, **overrides: Any) -> nn.Module:
    """A float32 mlx-lm model of ``arch`` with random weights, the same for the same seed.

    Each weight depends only on (seed, its path, its shape).
    """
    from mlx_lm.utils import _get_classes

    settings = config(arch, **overrides)
    model_class, args_class = _get_classes(settings)
    model = model_class(args_class.from_dict(settings))
    if settings["tie_word_embeddings"] and "lm_head" in model:
        # Gemma 3 builds a head and drops it when the file has none.
        model.sanitize({})
    weights = [
        (path, mx.array(_weight(path, value.shape, seed, arch)))
        for path, value in tree_flatten(model.parameters())
    ]
    model.update(tree_unflatten(weights))
    model.eval()
    mx.eval(model.parameters())
    return model


def _weight(path: str, shape: tuple[int, ...], seed: int, arch: str) -> np.ndarray:
    random = np.random.default_rng([seed, zlib.crc32(path.encode())])
    noise = random.standard_normal(shape, dtype=np.float32)
    if path.endswith("bias"):
        return 0.3 * noise
    zero_centred = arch in _ZERO_CENTRED_NORMS
    if len(shape) == 1:
        # Gemma multiplies its tied embedding up at the input: without louder layers every token
        # would predict itself.
        loud = path == "model.norm.weight" or "post_" in path
        return 0.2 * noise + ((2.0 if loud else 0.0) if zero_centred else 1.0)
    if "embed_tokens" in path or "lm_head" in path:
        # Logits of a standard deviation of about 2.5, at every width.
        return (0.8 if zero_centred else 2.5) / np.sqrt(np.float32(shape[-1])) * noise
    return 1.2 / np.sqrt(np.float32(shape[-1])) * noise


def hf_weights(model: nn.Module) -> dict[str, mx.array]:
    """Parameters under the names a hub folder has: per-expert matrices, not stacks."""
    weights: dict[str, mx.array] = {}
    for path, value in tree_flatten(model.parameters()):
        if ".switch_mlp." in path:
            for expert in range(value.shape[0]):
                name = path.replace(".switch_mlp.", f".experts.{expert}.")
                weights[name] = value[expert]
        else:
            weights[path] = value
    return weights


def write_model(
    folder: Path,
    arch: str,
    dtype: str = "float16",
    tokenizer: str = "bpe",
    seed: int = 0,
    *,
    shards: int = 1,
    **overrides: Any,
) -> Path:
    """Write a complete model folder that ``mlx_lm.load`` loads, and return it.

    Args:
        folder: created if missing.
        arch: a key of ARCHITECTURES.
        dtype: float16, bfloat16 or float32, for every tensor.
        tokenizer: a kind of `write_tokenizer`, or "native" for the architecture's usual one.
        seed: of the weights.
        shards: with more than 1, model-0000N-of-0000M.safetensors and an index.
        overrides: config keys; hidden_size and intermediate_size 256 (`WIDE`) for K-quants.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kind = TOKENIZERS[arch] if tokenizer == "native" else tokenizer
    special = write_tokenizer(folder, kind)
    settings = {**special, **config(arch, **overrides), "torch_dtype": dtype}
    model = make_model(arch, seed, **overrides)
    weights = {name: value.astype(getattr(mx, dtype)) for name, value in hf_weights(model).items()}
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    if shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
        return folder
    names = list(weights)
    index: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in names[shard::shards]}
        mx.save_safetensors(str(folder / file), part, metadata={"format": "pt"})
        index.update(dict.fromkeys(part, file))
    total = sum(value.nbytes for value in weights.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    return folder


# --------------------------------------------------------------------------------------------------
# Tokenizers

TEXT = """
The garden is small, but it's full of roses, beans and apple trees. How do I plan a garden?
First draw the paths, then choose the plants, and don't forget the water. You'll need 12 bags of
earth, 3 spades and 2048 seeds; they're sold in the old shop near the river.

Can you tell me how to bake bread? Mix the flour with water and salt, let it rest for an hour, then
bake it at 220 degrees. The bread is ready when it sounds hollow. I'm sorry, I can't help with that.
We've baked 365 loaves this year, and we'd bake more if the oven weren't so slow.

def add(a, b):
    return a + b

for i in range(10):
    print(add(i, 1))

Le café est très chaud, et l'été est déjà là. Die Bäume blühen schön über dem Fluß. 你好,世界!
Привет, мир! How many stars are there? There are 1000000 stars, more or less, in the night sky...
What is the best way to learn to play the piano? Practise every day, slowly, and listen to yourself.
The teacher said: "Play it again, and this time count the beats." So they played it again, together.
Where can I find the train to the sea? The train leaves from platform 9 at 10:45, every morning.
"""


def special_tokens(kind: str) -> dict[str, str]:
    """Role -> token text of a tokenizer kind: bos, eos (ends a text), turn_end, ..."""
    return dict(_STYLES[_style(kind)]["special"])


_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' "
    "+ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] "
    "+ '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)

_STYLES: dict[str, dict[str, Any]] = {
    "qwen2": {
        "special": {
            "eos": "<|endoftext|>",
            "turn_start": "<|im_start|>",
            "turn_end": "<|im_end|>",
        },
        "chat_template": _CHATML,
        "regex": (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
    },
    "llama3": {
        "special": {
            "bos": "<|begin_of_text|>",
            "eos": "<|end_of_text|>",
            "header_start": "<|start_header_id|>",
            "header_end": "<|end_header_id|>",
            "turn_end": "<|eot_id|>",
        },
        "chat_template": _LLAMA3,
        "regex": (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
    },
    "gpt2": {
        "special": {
            "eos": "<|endoftext|>",
            "turn_start": "<|im_start|>",
            "turn_end": "<|im_end|>",
        },
        "chat_template": _CHATML,
        "regex": None,
    },
    "llama": {
        "special": {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "turn_end": "</s>"},
        "chat_template": _MISTRAL,
    },
    "gemma": {
        "special": {
            "pad": "<pad>",
            "eos": "<eos>",
            "bos": "<bos>",
            "unk": "<unk>",
            "turn_start": "<start_of_turn>",
            "turn_end": "<end_of_turn>",
        },
        "chat_template": _GEMMA,
    },
}


def _style(kind: str) -> str:
    style = {"bpe": "qwen2", "spm": "llama"}.get(kind, kind.partition("-")[2])
    if style not in _STYLES:
        raise ValueError(f"unknown tokenizer kind {kind!r}")
    return style


def write_tokenizer(folder: Path, kind: str = "bpe", *, model_file: bool = True) -> dict[str, Any]:
    """Write a real, small tokenizer with a chat template into ``folder``.

    Args:
        folder: must exist.
        kind: byte-level BPE as "bpe" (= "bpe-qwen2"), "bpe-llama3" or "bpe-gpt2"; SentencePiece BPE
            with byte fallback as "spm" (= "spm-llama": a space is put before the text) or
            "spm-gemma" (none is).
        model_file: for SentencePiece, write tokenizer.model beside tokenizer.json.

    Returns:
        The special ids for config.json: eos_token_id (the turn's end) and bos_token_id if any.
    """
    folder = Path(folder)
    style = _style(kind)
    spm = style in {"llama", "gemma"}
    if spm:
        model, content = _sentencepiece(style)
        if model_file:
            (folder / "tokenizer.model").write_bytes(model)
    else:
        content = _byte_level(style)
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    special = special_tokens(kind)
    ids = {token["content"]: token["id"] for token in json.loads(content)["added_tokens"]}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        "eos_token": special["turn_end"],
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in json.loads(content)["added_tokens"]
        },
    }
    for role in ("bos", "unk", "pad"):
        if role in special:
            settings[f"{role}_token"] = special[role]
    if spm or "bos" in special:
        settings["add_bos_token"] = True
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "chat_template.jinja").write_text(_STYLES[style]["chat_template"])
    result: dict[str, Any] = {"eos_token_id": ids[special["turn_end"]]}
    if "bos" in special:
        result["bos_token_id"] = ids[special["bos"]]
    ends = sorted({ids[special["eos"]], ids[special["turn_end"]]})
    (folder / "generation_config.json").write_text(
        json.dumps({**result, "eos_token_id": ends if len(ends) > 1 else ends[0]})
    )
    return result


@functools.cache
def _byte_level(style: str) -> str:
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    settings = _STYLES[style]
    special = list(dict.fromkeys(settings["special"].values()))
    tokenizer = Tokenizer(models.BPE(ignore_merges=style == "llama3"))
    if settings["regex"] is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(settings["regex"]), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if style == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        min_frequency=1,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise AssertionError(f"{style}: {tokenizer.get_vocab_size()} tokens")
    if "bos" in settings["special"]:
        bos = settings["special"]["bos"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    return tokenizer.to_str()


@functools.cache
def _sentencepiece(style: str) -> tuple[bytes, str]:
    import sentencepiece

    settings = _STYLES[style]
    special = settings["special"]
    gemma = style == "gemma"
    ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3} if gemma else {"pad_id": -1}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.strip().splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=not gemma,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=(
            ["<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "▁▁", "▁▁▁▁"] if gemma else []
        ),
        unk_piece=special["unk"],
        bos_piece=special["bos"],
        eos_piece=special["eos"],
        pad_piece=special.get("pad", "<pad>"),
        minloglevel=2,
        num_threads=1,
        **ids,
    )
    return model.getvalue(), _fast_from_sentencepiece(model.getvalue(), style)


def _fast_from_sentencepiece(model: bytes, style: str) -> str:
    """The tokenizer.json that says the same as a SentencePiece BPE model."""
    import sentencepiece
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    size = processor.get_piece_size()
    pieces = [processor.id_to_piece(i) for i in range(size)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for i, piece in enumerate(pieces):
        plain = not (processor.is_control(i) or processor.is_byte(i) or processor.is_unknown(i))
        if not plain:
            continue
        splits = [
            (vocabulary[piece[:cut]], vocabulary[piece[cut:]], piece[:cut], piece[cut:])
            for cut in range(1, len(piece))
            if piece[:cut] in vocabulary and piece[cut:] in vocabulary
        ]
        merges += [(-processor.get_score(i), i, *split) for split in sorted(splits)]
    merges.sort(key=lambda merge: merge[:4])
    special = _STYLES[style]["special"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[(left, right) for *_, left, right in merges],
            unk_token=special["unk"],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    replace = normalizers.Replace(" ", "▁")
    if style == "gemma":
        tokenizer.normalizer = replace
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    steps: list[Any] = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if style != "gemma":
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special['bos']} $A",
        pair=f"{special['bos']} $A {special['bos']} $B",
        special_tokens=[(special["bos"], vocabulary[special["bos"]])],
    )
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token in dict.fromkeys(special.values())
        ]
    )
    if style == "gemma":
        tokenizer.add_tokens(
            [
                AddedToken(token, special=False, normalized=False)
                for token in ("\n", "\n\n", "▁▁", "▁▁▁▁")
            ]
        )
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise AssertionError(f"{style}: {tokenizer.get_vocab_size()} tokens")
    return tokenizer.to_str()
