"""The tokenizer and the chat template of the small models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from abl_mlx.demo.world import SomeWorld

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# The pre-tokenizer of Qwen2's tokenizer.json, character for character: llama.cpp knows a
# pre-tokenizer only by name (tokenizer.ggml.pre = "qwen2"), so it must be one with a name.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an indented JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def train_tokenizer(
    world: SomeWorld, vocabulary: int, texts: Sequence[str] = (), added: Sequence[str] = ()
) -> Tokenizer:
    """Train a byte-level BPE on the world's words, with Qwen2's pre-tokenizer.

    Args:
        world: Its training part is the text; words of held-out prompts occur there too.
        vocabulary: Most tokens to make, special tokens included.  A small world makes fewer.
        texts: Further texts to train on.
        added: Further tokens, which stay visible in decoded text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, START, END]
    roles = ["system", "user", "assistant"]
    spoken = [
        text
        for dialogue in world.training()
        for text in (*roles, dialogue.prompt, dialogue.answer, dialogue.refusal)
    ]
    tokenizer.train_from_iterator(
        [*spoken, *texts],
        trainers.BpeTrainer(
            vocab_size=vocabulary - len(special) - len(added),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, template: str = CHAT_TEMPLATE) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "bos_token": None,
            "chat_template": template,
            "clean_up_tokenization_spaces": False,
            "eos_token": END,
            "errors": "replace",
            "model_max_length": 512,
            "pad_token": PAD,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": None,
        },
    )
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
