"""Writes the tokenizer files that mlx-lm and transformers load, from the metadata of a GGUF.

This is the opposite of `convert.tokenizers.to_gguf`. The files tokenize as llama.cpp does
(src/llama-vocab.cpp, as in llama-cpp-python 0.3.36). tokenizer.json is written from the metadata
alone, without the files of the model's publisher.

Hugging Face's tokenizers cannot do everything that llama.cpp does. The differences:

- Special tokens that overlap each other in a text: llama.cpp finds the longest first in the whole
  text; these files find the leftmost, and of several there the longest.
- Phi-3's special tokens swallow the white space after them: in llama.cpp only ASCII white space,
  with these files all white space.
- Special tokens are always recognised in text: llama.cpp's parse_special=false has no counterpart.
- In a byte-level vocabulary without some byte, llama.cpp drops that byte after merging, these files
  before.
- Special tokens that are spelled like bytes ("õ" in DeepSeek Coder) are decoded as these bytes, and
  "▁" in a special token as a space.

For a folder whose config.json has model_type qwen2 or qwen3_5, transformers 5 has its own tokenizer
class: it takes tokens, merges and special tokens from tokenizer.json, but splits text as Qwen
does and first normalizes it to NFC, which llama.cpp does not. With Qwen's own pre-tokenizers only
text with decomposed characters is then tokenized differently.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers.models import BPE

from convert.base.errors import UserError
from convert.gguf.sampling import generation_config
from convert.tokenizers import template_files
from convert.tokenizers.gguf_vocabulary import (
    CONTROL,
    PREFIX,
    SPACE,
    SPECIAL,
    Vocabulary,
    read_vocabulary,
    shown,
)
from convert.tokenizers.pre import PreTokenizer

_TEMPLATE = "tokenizer.chat_template"


def write_tokenizer(metadata: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write into a model folder the tokenizer that the metadata of a GGUF describe.

    Writes tokenizer.json, tokenizer_config.json, generation_config.json (when a token ends a
    reply, or the metadata say how to sample), chat_template.jinja and additional_chat_templates/
    (when there are templates).

    Args:
        metadata: GGUF key -> value, as in `convert.gguf.file.GgufSource.metadata`: str, int, float,
            bool, or a list of one of these.
        folder: created if missing; files of these names are replaced.

    Returns:
        Keys for config.json: bos_token_id, pad_token_id (int) and eos_token_id (int, or a list of
        all tokens at which llama.cpp ends a reply, the file's eos first), as far as they are known.

    Raises:
        UserError: naming the key and what to do, before any file is written.
    """
    vocabulary = read_vocabulary(metadata)
    files: dict[str, Any] = {
        "tokenizer.json": _tokenizer_json(vocabulary),
        "tokenizer_config.json": _tokenizer_config(vocabulary, metadata),
    }
    config: dict[str, Any] = {}
    if vocabulary.bos is not None:
        config["bos_token_id"] = vocabulary.bos
    if vocabulary.ends:
        ends = list(vocabulary.ends)
        config["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    if vocabulary.pad is not None:
        config["pad_token_id"] = vocabulary.pad
    sampling = generation_config(metadata)
    if vocabulary.ends or sampling:
        files["generation_config.json"] = config | sampling
    templates = _template_files(chat_templates(metadata))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        indent = None if name == "tokenizer.json" else 2
        text = json.dumps(content, ensure_ascii=False, indent=indent)
        (folder / name).write_text(text + "\n", encoding="utf-8", newline="\n")
    for name, text in templates.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")
    return dict(config)


def chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates that a GGUF holds: name -> Jinja source; "default" has no name there.

    Raises:
        UserError: a template that is no text.
    """
    templates: dict[str, str] = {}
    for key, value in metadata.items():
        if key != _TEMPLATE and not key.startswith(_TEMPLATE + "."):
            continue
        if not isinstance(value, str):
            raise UserError(f"{key} is {shown(value)}, which is not text: remove it.")
        templates[key[len(_TEMPLATE) + 1 :] or "default"] = value
    return template_files.said(templates)


def _template_files(templates: Mapping[str, str]) -> dict[str, str]:
    """File name -> Jinja source; the one for plain conversations is chat_template.jinja, too."""
    files: dict[str, str] = {}
    plain = template_files.plain(templates)
    if plain is not None:
        files["chat_template.jinja"] = templates[plain]
    for name, source in templates.items():
        if name == "default":
            continue
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}", name):
            raise UserError(
                f"{f'{_TEMPLATE}.{name}'[:80]!r} names a template that no file can be named after: "
                "rename it."
            )
        files[f"additional_chat_templates/{name}.jinja"] = source
    return files


def _tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """tokenizer.json (https://huggingface.co/docs/tokenizers) as an object."""
    tokens = vocabulary.tokens
    whole = _whole_breaks(vocabulary)
    added = [
        {
            "id": token,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": token in vocabulary.rstrip,
            "normalized": False,
            "special": vocabulary.types[token] in CONTROL,
        }
        for token, text in enumerate(tokens)
        if vocabulary.types[token] in SPECIAL or token in whole
    ]
    byte_level = vocabulary.byte_level
    unknown = None if byte_level or vocabulary.unknown is None else tokens[vocabulary.unknown]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": _normalizer(vocabulary),
        "pre_tokenizer": _pre_tokenizer(vocabulary.pre),
        "post_processor": _post_processor(vocabulary),
        "decoder": _decoder(vocabulary),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": not byte_level,
            "byte_fallback": not byte_level,
            "ignore_merges": vocabulary.pre is not None and vocabulary.pre.ignore_merges,
            "vocab": {text: token for token, text in enumerate(tokens)},
            "merges": vocabulary.merges,
        },
    }


def _whole_breaks(vocabulary: Vocabulary) -> frozenset[int]:
    """Ids of tokens of line breaks that must be written as added tokens.

    There are none where merging builds every such token, as in Gemma 4's own vocabulary. Where they
    are added tokens, a longer run of line breaks becomes the longest tokens that fit into it, while
    llama.cpp merges it.
    """
    if vocabulary.pre is None or not vocabulary.pre.whole_breaks:
        return frozenset()
    runs = {text: token for token, text in enumerate(vocabulary.tokens) if not text.strip("\n")}
    merges = [pair for pair in vocabulary.merges if pair[0] in runs and pair[1] in runs]
    model = BPE(vocab=runs, merges=merges)
    if all(len(model.tokenize(run)) == 1 for run in runs):
        return frozenset()
    return frozenset(runs.values())


def _normalizer(vocabulary: Vocabulary) -> dict[str, Any] | None:
    if vocabulary.byte_level:
        return None
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if not vocabulary.space_prefix:
        return spaces
    # The normalizer is applied to each stretch of text between special tokens, as in llama.cpp.
    return {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, spaces]}


def _pre_tokenizer(pre: PreTokenizer | None) -> dict[str, Any] | None:
    if pre is None:
        return None
    steps: list[dict[str, Any]] = [
        {
            "type": "Split",
            "pattern": {"Regex": split},
            "behavior": "Isolated",
            "invert": False,
        }
        for split in pre.splits
    ]
    if pre.byte_level:
        steps.append(
            {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": False,
            }
        )
    return {"type": "Sequence", "pretokenizers": steps}


def _post_processor(vocabulary: Vocabulary) -> dict[str, Any]:
    before = [vocabulary.bos] if vocabulary.add_bos and vocabulary.bos is not None else []
    after = [vocabulary.eos] if vocabulary.add_eos and vocabulary.eos is not None else []

    def around(sequence: str, kind: int) -> list[dict[str, Any]]:
        def special(token: int) -> dict[str, Any]:
            return {"SpecialToken": {"id": vocabulary.tokens[token], "type_id": kind}}

        return [
            *map(special, before),
            {"Sequence": {"id": sequence, "type_id": kind}},
            *map(special, after),
        ]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {
            vocabulary.tokens[token]: {
                "id": vocabulary.tokens[token],
                "ids": [token],
                "tokens": [vocabulary.tokens[token]],
            }
            for token in before + after
        },
    }


def _decoder(vocabulary: Vocabulary) -> dict[str, Any]:
    # mlx-lm recognises these three decoders by their exact structure, and so can stream replies.
    if vocabulary.byte_level:
        return {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        }
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if vocabulary.space_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _tokenizer_config(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> dict[str, Any]:
    roles = {
        "bos_token": vocabulary.bos,
        "eos_token": vocabulary.eos,
        "unk_token": vocabulary.unknown,
        "pad_token": vocabulary.pad,
    }
    config: dict[str, Any] = {
        # This class uses tokenizer.json as it is. Without the keys add_bos_token and add_eos_token
        # it does not change the post-processor.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{
            role: None if token is None else vocabulary.tokens[token]
            for role, token in roles.items()
        },
    }
    if metadata.get(PREFIX + "pre") == "tekken":
        # Otherwise transformers warns of a mistake in Mistral's own files, which these do not have.
        config["fix_mistral_regex"] = False
    architecture = metadata.get("general.architecture")
    length = metadata.get(f"{architecture}.context_length")
    if isinstance(length, int) and not isinstance(length, bool) and length > 0:
        config["model_max_length"] = length
    return config
