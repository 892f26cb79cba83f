"""GGUF tokenizer metadata as the tokenizer files that mlx-lm and transformers load.

The opposite of `convert.tokenizers.to_gguf`. The files tokenize as llama.cpp does
(src/llama-vocab.cpp, as in llama-cpp-python 0.3.36): tokenizer.json is written from the metadata
alone, without any knowledge of what the model's publisher wrote in the first place.

What Hugging Face's tokenizers cannot say, and what is written instead:

- llama.cpp looks for special tokens longest first over the whole text; here the leftmost is taken,
  and the longest of those. It differs for special tokens that overlap each other.
- Phi-3's special tokens swallow the white space after them: in ASCII there, all of it here.
- Special tokens are always recognised in text: llama.cpp's parse_special=false has no counterpart.
- A byte-level vocabulary that lacks a byte: llama.cpp leaves the byte out after merging, here it is
  left out before.
- Special tokens that are spelled like bytes ("õ" in DeepSeek Coder) are decoded as these bytes, and
  "▁" in a special token as a space.

transformers 5 has its own idea of the tokenizer of a folder whose config.json has model_type qwen2
or qwen3_5, publishers' folders included: it takes tokens, merges and special tokens from
tokenizer.json, cuts text as Qwen does, and normalizes it to NFC first, which llama.cpp does not.
For Qwen's own pre-tokenizers only text with decomposed characters is tokenized differently.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers.models import BPE

from convert.base.errors import UserError
from convert.tokenizers import phi3
from convert.tokenizers.pre import PRE, PreTokenizer
from convert.tokenizers.to_gguf import KNOWN_ENDS

_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
_SPACE = "▁"

_REFUSED = {
    "bert": "a WordPiece vocabulary of an embedding model",
    "t5": "a Unigram vocabulary of an encoder",
    "rwkv": "an RWKV vocabulary",
    "plamo2": "a PLaMo 2 vocabulary",
    "hybriddna": "a vocabulary of DNA",
    "whitespace": "a vocabulary of whole words of an embedding model",
    "none": "no vocabulary",
    "no_vocab": "no vocabulary",
}

# Tokens for filling in the middle, looked for by text where the metadata name none: llama.cpp makes
# them control tokens. Role: (texts, whether the token ends a reply).
_FILL_IN: dict[str, tuple[frozenset[str], bool]] = {
    "fim_pre": (
        frozenset(
            (
                "<|fim_prefix|>",
                "<fim-prefix>",
                "<fim_prefix>",
                "<｜fim▁begin｜>",
                "<PRE>",
                "▁<PRE>",
                "<|code_prefix|>",
                "<|prefix|>",
            )
        ),
        False,
    ),
    "fim_suf": (
        frozenset(
            (
                "<|fim_suffix|>",
                "<fim-suffix>",
                "<fim_suffix>",
                "<｜fim▁hole｜>",
                "<SUF>",
                "▁<SUF>",
                "<|code_suffix|>",
                "<|suffix|>",
            )
        ),
        False,
    ),
    "fim_mid": (
        frozenset(
            (
                "<|fim_middle|>",
                "<fim-middle>",
                "<fim_middle>",
                "<｜fim▁end｜>",
                "<MID>",
                "▁<MID>",
                "<|code_middle|>",
                "<|middle|>",
            )
        ),
        False,
    ),
    "fim_pad": (frozenset(("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]")), True),
    "fim_rep": (
        frozenset(("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>")),
        True,
    ),
    "fim_sep": (frozenset(("<|file_sep|>",)), True),
}
_OLD_NAMES = {"fim_pre": "prefix", "fim_suf": "suffix", "fim_mid": "middle"}

# gpt-oss: shown in replies, though they are special.
_SHOWN = frozenset(("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"))

_NO_TOKEN = (-1, 2**32 - 1)


def write_tokenizer(metadata: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write the tokenizer that a GGUF's metadata describe into a model folder.

    Writes tokenizer.json, tokenizer_config.json, generation_config.json (when a token ends a
    reply), chat_template.jinja and additional_chat_templates/ (when there are templates).

    Args:
        metadata: GGUF key -> value, as `convert.gguf.file.GgufSource.metadata` gives: str, int,
            float, bool, or a list of one of these.
        folder: created if missing; files of these names are replaced.

    Returns:
        What config.json should say: bos_token_id, pad_token_id (int), eos_token_id (int, or a list
        of all tokens at which llama.cpp ends a reply, the file's eos first). Keys without a value
        are left out.

    Raises:
        UserError: naming the key and the mend, before any file is written.
    """
    vocabulary = _read(metadata)
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
    if vocabulary.ends:
        files["generation_config.json"] = config
    templates = _chat_templates(metadata)
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


# --------------------------------------------------------------------------------------------------
# Metadata


@dataclass(frozen=True)
class _Vocabulary:
    """The metadata, checked, with what llama.cpp reads into them.

    Attributes:
        tokens: text by id, all different, none empty.
        types: by id, after llama.cpp's corrections.
        merges: pairs in the order of their rank.
        pre: how text is cut; None for SentencePiece, which does not.
        space_prefix: put a space before every stretch of ordinary text.
        bos, eos, unknown, pad: ids.
        add_bos, add_eos: put them around every text.
        ends: ids that end a reply, eos first.
        rstrip: ids of special tokens that swallow the white space after them.
    """

    tokens: list[str]
    types: list[int]
    merges: list[tuple[str, str]]
    pre: PreTokenizer | None
    space_prefix: bool
    bos: int | None
    eos: int | None
    unknown: int | None
    pad: int | None
    add_bos: bool
    add_eos: bool
    ends: tuple[int, ...]
    rstrip: frozenset[int]

    @property
    def byte_level(self) -> bool:
        return self.pre is not None and self.pre.byte_level


def _read(metadata: Mapping[str, Any]) -> _Vocabulary:
    model = _one(metadata, "model", str)
    if model is None:
        raise UserError(
            f"the metadata have no {_PREFIX}model: convert the model again with llama.cpp's "
            f"convert_hf_to_gguf.py."
        )
    if model not in ("llama", "gpt2", "gemma4"):
        what = _REFUSED.get(model, "a kind of vocabulary that is not known here")
        raise UserError(
            f'{_PREFIX}model is "{model}", {what}, which has no counterpart in MLX: copy '
            f"tokenizer.json and tokenizer_config.json from the model's publisher."
        )
    tokens = _tokens(metadata)
    ids = {text: token for token, text in enumerate(tokens)}
    pre = _pre(metadata, model)
    special = {
        role: _role(metadata, name, len(tokens), _default(role, model))
        for role, name in (
            ("bos", "bos"),
            ("eos", "eos"),
            ("eot", "eot"),
            ("eom", "eom"),
            ("unknown", "unknown"),
            ("pad", "padding"),
        )
    }
    types, ends = _corrected(metadata, tokens, ids, special)
    merges = (
        _merges_by_score(tokens, types, ids, _scores(metadata, len(tokens)))
        if pre is None
        else _merges(metadata, ids)
    )
    add_bos = _one(metadata, "add_bos_token", bool)
    if add_bos is None or (pre is not None and pre.forced_bos):
        add_bos = pre is None or pre.add_bos or pre.forced_bos
    add_eos = bool(_one(metadata, "add_eos_token", bool))
    for role, wanted in (("bos", add_bos), ("eos", add_eos)):
        if wanted and special[role] is None:
            raise UserError(
                f"{role} is to be added to every text but {_PREFIX}{role}_token_id names no token: "
                f"set it, or {_PREFIX}add_{role}_token to false."
            )
    space_prefix = _one(metadata, "add_space_prefix", bool)
    return _Vocabulary(
        tokens=tokens,
        types=types,
        merges=merges,
        pre=pre,
        space_prefix=pre is None and (space_prefix is None or space_prefix),
        bos=special["bos"],
        eos=special["eos"],
        unknown=special["unknown"],
        pad=special["pad"],
        add_bos=add_bos,
        add_eos=add_eos,
        ends=ends,
        rstrip=_rstrip(metadata, tokens, types),
    )


def _one(metadata: Mapping[str, Any], name: str, kind: type) -> Any:
    """The value of tokenizer.ggml.``name``, of type ``kind``, or None where there is none."""
    value = metadata.get(_PREFIX + name)
    if value is None:
        return None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        words = {str: "text", int: "a whole number", bool: "true or false"}
        raise UserError(
            f"{_PREFIX}{name} is {_shown(value)}, which is not {words[kind]}: convert the model "
            f"again with llama.cpp's convert_hf_to_gguf.py."
        )
    return value


def _list(metadata: Mapping[str, Any], name: str, kinds: tuple[type, ...]) -> list[Any] | None:
    value = metadata.get(_PREFIX + name)
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not {type(item) for item in value} <= set(kinds):
        what = "texts" if str in kinds else "numbers"
        raise UserError(
            f"{_PREFIX}{name} is {_shown(value)}, which is not a list of {what}: convert the model "
            f"again with llama.cpp's convert_hf_to_gguf.py."
        )
    return list(value)


def _shown(value: Any) -> str:
    text = repr(value[:3] if isinstance(value, (list, tuple, str)) else value)
    return text if len(text) <= 60 else text[:57] + "..."


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    listed = _list(metadata, "tokens", (str,))
    if not listed:
        raise UserError(
            f"the metadata have no {_PREFIX}tokens: take a GGUF of the whole model, not of its "
            f"weights alone."
        )
    # llama.cpp names nameless tokens like this.
    tokens = [text or f"[EMPTY_{token}]" for token, text in enumerate(listed)]
    if len(set(tokens)) != len(tokens):
        text, _ = Counter(tokens).most_common(1)[0]
        first = tokens.index(text)
        raise UserError(
            f"{_PREFIX}tokens has {text!r} twice, as {first} and {tokens.index(text, first + 1)}: "
            f"convert the model again, for llama.cpp cannot load this file either."
        )
    try:
        "".join(tokens).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{_PREFIX}tokens has a text that is no UTF-8: convert the model again with "
            f"llama.cpp's convert_hf_to_gguf.py."
        ) from None
    return tokens


def _per_token(
    metadata: Mapping[str, Any], name: str, kinds: tuple[type, ...], count: int
) -> list[Any] | None:
    values = _list(metadata, name, kinds)
    if values is not None and len(values) != count:
        raise UserError(
            f"{_PREFIX}{name} has {len(values)} entries for {count} tokens: convert the model "
            f"again with llama.cpp's convert_hf_to_gguf.py."
        )
    return values


def _scores(metadata: Mapping[str, Any], count: int) -> list[float]:
    values = _per_token(metadata, "scores", (int, float), count)
    if values is None:
        raise UserError(
            f"the metadata have no {_PREFIX}scores, which a vocabulary of the kind "
            f'"llama" merges by: convert the model again with llama.cpp\'s convert_hf_to_gguf.py.'
        )
    if not all(map(math.isfinite, values)):
        raise UserError(
            f"{_PREFIX}scores has a value that is no finite number: convert the model again with "
            f"llama.cpp's convert_hf_to_gguf.py."
        )
    return values


def _pre(metadata: Mapping[str, Any], model: str) -> PreTokenizer | None:
    if model == "llama":
        return None
    name = _one(metadata, "pre", str)
    if model == "gemma4":
        return PRE["gemma4"]
    # llama.cpp warns of a file that names none, and goes on.
    found = PRE.get(name or "default")
    if found is None:
        raise UserError(
            f'{_PREFIX}pre is "{name}", a pre-tokenizer that is not known here: copy '
            f"tokenizer.json and tokenizer_config.json from the model's publisher."
        )
    return found


def _default(role: str, model: str) -> int | None:
    # For the other kinds llama.cpp's default is token 11 of GPT-2, which is no special token.
    return {"bos": 1, "eos": 2, "unknown": 0}.get(role) if model == "llama" else None


def _role(metadata: Mapping[str, Any], name: str, count: int, default: int | None) -> int | None:
    key = f"{name}_token_id"
    token: int | None = _one(metadata, key, int)
    if token is None or token in _NO_TOKEN:
        return default if default is not None and default < count else None
    if not 0 <= token < count:
        raise UserError(
            f"{_PREFIX}{key} is {token}, but there are {count} tokens: set it to the right one."
        )
    return token


def _corrected(
    metadata: Mapping[str, Any],
    tokens: list[str],
    ids: Mapping[str, int],
    special: Mapping[str, int | None],
) -> tuple[list[int], tuple[int, ...]]:
    """Types by id, and the ids that end a reply: the file's own, corrected by the tokens' texts."""
    types = _per_token(metadata, "token_type", (int,), len(tokens))
    if types is None:
        types = [int(TokenType.NORMAL)] * len(tokens)
    ends: dict[int, None] = {}
    for role in ("eos", "eot", "eom"):
        token = special[role]
        if token is not None:
            ends[token] = None
    named = sorted(ids[text] for text in KNOWN_ENDS if text in ids)
    for token in named:
        types[token] = int(TokenType.CONTROL)
        ends[token] = None
    for role, (texts, ending) in _FILL_IN.items():
        token = _role(metadata, role, len(tokens), None)
        if token is None and role in _OLD_NAMES:
            token = _role(metadata, _OLD_NAMES[role], len(tokens), None)
        found = [token] if token is not None else sorted(ids[t] for t in texts if t in ids)
        for one in found:
            if token is None:
                types[one] = int(TokenType.CONTROL)
            if ending:
                ends[one] = None
    for text in _SHOWN:
        if text in ids:
            types[ids[text]] = int(TokenType.USER_DEFINED)
    texts_of_ends = {tokens[token] for token in ends}
    calls = texts_of_ends & {"<|call|>", "<|calls|>"}
    if calls and texts_of_ends & {"<|return|>", "<|flush|>"} and "<|end|>" in texts_of_ends:
        # gpt-oss and Solar end a part of a reply with it.
        types[ids["<|end|>"]] = int(TokenType.USER_DEFINED)
        del ends[ids["<|end|>"]]
    if "<|tool_response>" in texts_of_ends and "</s>" in texts_of_ends:
        # Gemma 4 has it as an ordinary word.
        types[ids["</s>"]] = int(TokenType.NORMAL)
        del ends[ids["</s>"]]
    return types, tuple(ends)


def _rstrip(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> frozenset[int]:
    """Special tokens that swallow the white space after them: Phi-3's, known by its name."""
    if not phi3.says_phi3(str(metadata.get("general.name") or "")):
        return frozenset()
    return frozenset(
        token
        for token, text in enumerate(tokens)
        if text == "</s>"
        or (types[token] in _SPECIAL and text not in ("<unk>", "<s>", "<|endoftext|>"))
    )


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """File name -> Jinja source."""
    templates: dict[str, str] = {}
    for key, value in metadata.items():
        if key != _TEMPLATE and not key.startswith(_TEMPLATE + "."):
            continue
        name = key[len(_TEMPLATE) + 1 :]
        if not isinstance(value, str):
            raise UserError(f"{key} is {_shown(value)}, which is not text: remove it.")
        if key == _TEMPLATE:
            templates["chat_template.jinja"] = value
        elif re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}", name):
            templates[f"additional_chat_templates/{name}.jinja"] = value
        else:
            raise UserError(
                f"{key[:80]!r} names a template that no file can be named after: rename it."
            )
    return templates


# --------------------------------------------------------------------------------------------------
# Merges


def _merges(metadata: Mapping[str, Any], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """The file's merges, the first of two that are alike."""
    listed = _list(metadata, "merges", (str,))
    if listed is None:
        if metadata.get(_PREFIX + "pre") == "kimi-k2":
            return []
        raise UserError(
            f"the metadata have no {_PREFIX}merges, without which a byte-pair vocabulary has no "
            f"use: convert the model again with llama.cpp's convert_hf_to_gguf.py."
        )
    merges: dict[tuple[str, str], None] = {}
    for rank, merge in enumerate(listed):
        at = merge.find(" ", 1)
        left, right = merge[:at], merge[at + 1 :]
        if at < 0 or not right:
            raise UserError(
                f'{_PREFIX}merges has {_shown(merge)} as {rank}, which is not "left right": '
                f"convert the model again with llama.cpp's convert_hf_to_gguf.py."
            )
        if left not in ids or right not in ids or left + right not in ids:
            raise UserError(
                f"{_PREFIX}merges has {merge[:60]!r} as {rank}, of which not all parts are in "
                f"{_PREFIX}tokens: convert the model again with llama.cpp's convert_hf_to_gguf.py."
            )
        merges[left, right] = None
    return list(merges)


def _merges_by_score(
    tokens: Sequence[str], types: Sequence[int], ids: Mapping[str, int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """The pairs that SentencePiece would merge, in the order in which it would.

    It merges the neighbours that make the token of the highest score, the leftmost of equals. Here
    every pair that makes a token is listed, by the score of that token. That all pairs of one token
    share a score does no harm: what happens inside a stretch of text that becomes a token does not
    depend on what surrounds it, so a token always arises from the same two pieces, those it arises
    from when it is the whole text. Other pairs that make it are torn apart by higher scores before
    they can meet.

    Different tokens of one score are another matter, for here the order cannot be the position's.
    SentencePiece gives all runs of spaces one score, and merges them from the left into ever longer
    ones: the same as taking the longest first.

    Raises:
        UserError: when most tokens have one score, so that position alone would decide.
    """
    cuts: dict[int, list[int]] = {}
    for token, text in enumerate(tokens):
        if len(text) > 1 and types[token] not in _CONTROL:
            found = [cut for cut in range(1, len(text)) if text[:cut] in ids and text[cut:] in ids]
            if found:
                cuts[token] = found
    words = Counter(scores[token] for token in cuts if tokens[token].strip(_SPACE))
    if words:
        score, count = words.most_common(1)[0]
        if count > max(1, words.total() // 2):
            raise UserError(
                f"{_PREFIX}scores gives {count} of {words.total()} tokens the score {score:g}, "
                f"which says nothing about the order of merges: copy tokenizer.json and "
                f"tokenizer_config.json from the model's publisher."
            )
    order = sorted(cuts, key=lambda token: (-scores[token], -len(tokens[token]), token))
    return [(tokens[token][:cut], tokens[token][cut:]) for token in order for cut in cuts[token]]


# --------------------------------------------------------------------------------------------------
# Files

_SPECIAL = (int(TokenType.UNKNOWN), int(TokenType.CONTROL), int(TokenType.USER_DEFINED))
_CONTROL = (int(TokenType.UNKNOWN), int(TokenType.CONTROL))


def _tokenizer_json(vocabulary: _Vocabulary) -> dict[str, Any]:
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
            "special": vocabulary.types[token] in _CONTROL,
        }
        for token, text in enumerate(tokens)
        if vocabulary.types[token] in _SPECIAL or token in whole
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


def _whole_breaks(vocabulary: _Vocabulary) -> frozenset[int]:
    """Runs of line breaks that have to be found as added tokens.

    None where merges make a token of every run that is one, as in Gemma 4's own vocabulary. Else
    runs that are no token come out as the longest that are, while llama.cpp merges them.
    """
    if vocabulary.pre is None or not vocabulary.pre.whole_breaks:
        return frozenset()
    runs = {text: token for token, text in enumerate(vocabulary.tokens) if not text.strip("\n")}
    merges = [pair for pair in vocabulary.merges if pair[0] in runs and pair[1] in runs]
    model = BPE(vocab=runs, merges=merges)
    if all(len(model.tokenize(run)) == 1 for run in runs):
        return frozenset()
    return frozenset(runs.values())


def _normalizer(vocabulary: _Vocabulary) -> dict[str, Any] | None:
    if vocabulary.byte_level:
        return None
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if not vocabulary.space_prefix:
        return spaces
    # It is applied to each stretch of text between special tokens, as in llama.cpp.
    return {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _SPACE}, spaces]}


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


def _post_processor(vocabulary: _Vocabulary) -> dict[str, Any]:
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


def _decoder(vocabulary: _Vocabulary) -> dict[str, Any]:
    # mlx-lm knows how to stream these three by their exact structure.
    if vocabulary.byte_level:
        return {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        }
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if vocabulary.space_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _tokenizer_config(vocabulary: _Vocabulary, metadata: Mapping[str, Any]) -> dict[str, Any]:
    roles = {
        "bos_token": vocabulary.bos,
        "eos_token": vocabulary.eos,
        "unk_token": vocabulary.unknown,
        "pad_token": vocabulary.pad,
    }
    config: dict[str, Any] = {
        # The class that takes tokenizer.json as it is. What it adds by itself is said here to be
        # absent: without add_bos_token and add_eos_token it leaves the post-processor alone.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{
            role: None if token is None else vocabulary.tokens[token]
            for role, token in roles.items()
        },
    }
    if metadata.get(_PREFIX + "pre") == "tekken":
        # transformers warns of a mistake in Mistral's own files, which is not in these.
        config["fix_mistral_regex"] = False
    architecture = metadata.get("general.architecture")
    length = metadata.get(f"{architecture}.context_length")
    if isinstance(length, int) and not isinstance(length, bool) and length > 0:
        config["model_max_length"] = length
    return config
