"""Reads the vocabulary from a GGUF's metadata, checked and corrected as llama.cpp corrects it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf import TokenType

from convert.base.errors import UserError
from convert.tokenizers import phi3
from convert.tokenizers.pre import PRE, PreTokenizer
from convert.tokenizers.to_gguf import KNOWN_ENDS

PREFIX = "tokenizer.ggml."
SPACE = "▁"

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

# Tokens for filling in the middle, found by their text where the metadata name none. llama.cpp
# makes them control tokens. Role -> (texts, whether the token ends a reply).
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

# Special tokens of gpt-oss that are nevertheless shown in replies.
_SHOWN = frozenset(("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"))

_NO_TOKEN = (-1, 2**32 - 1)
SPECIAL = (int(TokenType.UNKNOWN), int(TokenType.CONTROL), int(TokenType.USER_DEFINED))
CONTROL = (int(TokenType.UNKNOWN), int(TokenType.CONTROL))


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of a GGUF, checked and corrected as llama.cpp corrects it.

    Attributes:
        tokens: the text of each token by id, all different, none empty.
        types: gguf.TokenType by id, after llama.cpp's corrections.
        merges: pairs of token texts, in the order of their rank.
        pre: how text is split before merging; None for SentencePiece, which does not split it.
        space_prefix: whether a space is put before every stretch of ordinary text.
        bos, eos, unknown, pad: ids of these tokens; None where there is none.
        add_bos, add_eos: whether bos and eos are put around every text.
        ends: ids of the tokens that end a reply, eos first.
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


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    model = _one(metadata, "model", str)
    if model is None:
        raise UserError(
            f"the metadata have no {PREFIX}model: convert the model again with llama.cpp's "
            f"convert_hf_to_gguf.py."
        )
    if model not in ("llama", "gpt2", "gemma4"):
        what = _REFUSED.get(model, "a kind of vocabulary that is not known here")
        raise UserError(
            f'{PREFIX}model is "{model}", {what}, which has no counterpart in MLX: copy '
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
    add_bos, add_eos = _added(metadata, pre, special)
    space_prefix = _one(metadata, "add_space_prefix", bool)
    return Vocabulary(
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


def _added(
    metadata: Mapping[str, Any], pre: PreTokenizer | None, special: Mapping[str, int | None]
) -> tuple[bool, bool]:
    """Whether bos is put before, and eos after, every text."""
    add_bos = _one(metadata, "add_bos_token", bool)
    if add_bos is None or (pre is not None and pre.forced_bos):
        add_bos = pre is None or pre.add_bos or pre.forced_bos
    add_eos = bool(_one(metadata, "add_eos_token", bool))
    for role, wanted in (("bos", add_bos), ("eos", add_eos)):
        if wanted and special[role] is None:
            raise UserError(
                f"{role} is to be added to every text but {PREFIX}{role}_token_id names no token: "
                f"set it, or {PREFIX}add_{role}_token to false."
            )
    return bool(add_bos), add_eos


def _one(metadata: Mapping[str, Any], name: str, kind: type) -> Any:
    """The value of tokenizer.ggml.``name``, or None where there is none.

    Raises:
        UserError: when its type is not ``kind``.
    """
    value = metadata.get(PREFIX + name)
    if value is None:
        return None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        words = {str: "text", int: "a whole number", bool: "true or false"}
        raise UserError(
            f"{PREFIX}{name} is {shown(value)}, which is not {words[kind]}: convert the model "
            f"again with llama.cpp's convert_hf_to_gguf.py."
        )
    return value


def _list(metadata: Mapping[str, Any], name: str, kinds: tuple[type, ...]) -> list[Any] | None:
    value = metadata.get(PREFIX + name)
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not {type(item) for item in value} <= set(kinds):
        what = "texts" if str in kinds else "numbers"
        raise UserError(
            f"{PREFIX}{name} is {shown(value)}, which is not a list of {what}: convert the model "
            f"again with llama.cpp's convert_hf_to_gguf.py."
        )
    return list(value)


def shown(value: Any) -> str:
    text = repr(value[:3] if isinstance(value, (list, tuple, str)) else value)
    return text if len(text) <= 60 else text[:57] + "..."


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    listed = _list(metadata, "tokens", (str,))
    if not listed:
        raise UserError(
            f"the metadata have no {PREFIX}tokens: take a GGUF of the whole model, not of its "
            f"weights alone."
        )
    # llama.cpp gives tokens without a text this text.
    tokens = [text or f"[EMPTY_{token}]" for token, text in enumerate(listed)]
    if len(set(tokens)) != len(tokens):
        text, _ = Counter(tokens).most_common(1)[0]
        first = tokens.index(text)
        raise UserError(
            f"{PREFIX}tokens has {text!r} twice, as {first} and {tokens.index(text, first + 1)}: "
            f"convert the model again; llama.cpp cannot load this file either."
        )
    try:
        "".join(tokens).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{PREFIX}tokens has a text that is no UTF-8: convert the model again with "
            f"llama.cpp's convert_hf_to_gguf.py."
        ) from None
    return tokens


def _per_token(
    metadata: Mapping[str, Any], name: str, kinds: tuple[type, ...], count: int
) -> list[Any] | None:
    values = _list(metadata, name, kinds)
    if values is not None and len(values) != count:
        raise UserError(
            f"{PREFIX}{name} has {len(values)} entries for {count} tokens: convert the model "
            f"again with llama.cpp's convert_hf_to_gguf.py."
        )
    return values


def _scores(metadata: Mapping[str, Any], count: int) -> list[float]:
    values = _per_token(metadata, "scores", (int, float), count)
    if values is None:
        raise UserError(
            f"the metadata have no {PREFIX}scores, which a vocabulary of the kind "
            f'"llama" merges by: convert the model again with llama.cpp\'s convert_hf_to_gguf.py.'
        )
    if not all(map(math.isfinite, values)):
        raise UserError(
            f"{PREFIX}scores has a value that is no finite number: convert the model again with "
            f"llama.cpp's convert_hf_to_gguf.py."
        )
    return values


def _pre(metadata: Mapping[str, Any], model: str) -> PreTokenizer | None:
    if model == "llama":
        return None
    name = _one(metadata, "pre", str)
    if model == "gemma4":
        return PRE["gemma4"]
    # If a file names none, llama.cpp warns and uses its default.
    found = PRE.get(name or "default")
    if found is None:
        raise UserError(
            f'{PREFIX}pre is "{name}", a pre-tokenizer that is not known here: copy '
            f"tokenizer.json and tokenizer_config.json from the model's publisher."
        )
    return found


def _default(role: str, model: str) -> int | None:
    # For other kinds of vocabulary llama.cpp's default is GPT-2's token 11, which is not special.
    return {"bos": 1, "eos": 2, "unknown": 0}.get(role) if model == "llama" else None


def _role(metadata: Mapping[str, Any], name: str, count: int, default: int | None) -> int | None:
    key = f"{name}_token_id"
    token: int | None = _one(metadata, key, int)
    if token is None or token in _NO_TOKEN:
        return default if default is not None and default < count else None
    if not 0 <= token < count:
        raise UserError(
            f"{PREFIX}{key} is {token}, but there are {count} tokens: set it to the right one."
        )
    return token


def _corrected(
    metadata: Mapping[str, Any],
    tokens: list[str],
    ids: Mapping[str, int],
    special: Mapping[str, int | None],
) -> tuple[list[int], tuple[int, ...]]:
    """Types by id, and the ids that end a reply: those of the file, corrected by tokens' texts."""
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
        # In gpt-oss and Solar, <|end|> ends a part of a reply, not the reply.
        types[ids["<|end|>"]] = int(TokenType.USER_DEFINED)
        del ends[ids["<|end|>"]]
    if "<|tool_response>" in texts_of_ends and "</s>" in texts_of_ends:
        # In Gemma 4, </s> is an ordinary token.
        types[ids["</s>"]] = int(TokenType.NORMAL)
        del ends[ids["</s>"]]
    return types, tuple(ends)


def _rstrip(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> frozenset[int]:
    """Ids of special tokens that swallow the white space after them, if the file is a Phi-3."""
    if not phi3.says_phi3(str(metadata.get("general.name") or "")):
        return frozenset()
    return frozenset(
        token
        for token, text in enumerate(tokens)
        if text == "</s>"
        or (types[token] in SPECIAL and text not in ("<unk>", "<s>", "<|endoftext|>"))
    )


# --------------------------------------------------------------------------------------------------
# Merges


def _merges(metadata: Mapping[str, Any], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """The file's merges, without repetitions."""
    listed = _list(metadata, "merges", (str,))
    if listed is None:
        if metadata.get(PREFIX + "pre") == "kimi-k2":
            return []
        raise UserError(
            f"the metadata have no {PREFIX}merges, without which a byte-pair vocabulary cannot be "
            f"used: convert the model again with llama.cpp's convert_hf_to_gguf.py."
        )
    merges: dict[tuple[str, str], None] = {}
    for rank, merge in enumerate(listed):
        at = merge.find(" ", 1)
        left, right = merge[:at], merge[at + 1 :]
        if at < 0 or not right:
            raise UserError(
                f'{PREFIX}merges has {shown(merge)} as {rank}, which is not "left right": '
                f"convert the model again with llama.cpp's convert_hf_to_gguf.py."
            )
        if left not in ids or right not in ids or left + right not in ids:
            raise UserError(
                f"{PREFIX}merges has {merge[:60]!r} as {rank}, whose parts are not all in "
                f"{PREFIX}tokens: convert the model again with llama.cpp's convert_hf_to_gguf.py."
            )
        merges[left, right] = None
    return list(merges)


def _merges_by_score(
    tokens: Sequence[str], types: Sequence[int], ids: Mapping[str, int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """A list of merges, in order of rank, that has the effect of SentencePiece's scores.

    SentencePiece merges the two neighbours that make the token with the highest score; of several
    with that score, the leftmost. The list returned here has every pair that makes a token, ordered
    by the token's score. Several pairs may make the same token and so have the same score; their
    order does not matter. How a stretch of text becomes a token does not depend on the text around
    it, so a token always arises from the same two pieces, and the pieces of other pairs are merged
    otherwise, with higher scores, before they can meet.

    Different tokens with the same score do matter, because a list of merges cannot prefer the
    leftmost. SentencePiece gives all runs of spaces the same score, and merging them from the left
    has the effect of merging the longest first, so they are listed in that order.

    Raises:
        UserError: when most tokens have one score, so that position alone would decide.
    """
    cuts: dict[int, list[int]] = {}
    for token, text in enumerate(tokens):
        if len(text) > 1 and types[token] not in CONTROL:
            found = [cut for cut in range(1, len(text)) if text[:cut] in ids and text[cut:] in ids]
            if found:
                cuts[token] = found
    words = Counter(scores[token] for token in cuts if tokens[token].strip(SPACE))
    if words:
        score, count = words.most_common(1)[0]
        if count > max(1, words.total() // 2):
            raise UserError(
                f"{PREFIX}scores gives {count} of {words.total()} tokens the score {score:g}, "
                f"which says nothing about the order of merges: copy tokenizer.json and "
                f"tokenizer_config.json from the model's publisher."
            )
    order = sorted(cuts, key=lambda token: (-scores[token], -len(tokens[token]), token))
    return [(tokens[token][:cut], tokens[token][cut:]) for token in order for cut in cuts[token]]
