"""Turns the tokenizer of a Hugging Face folder into tokenizer metadata of a GGUF."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gguf import TokenType

from convert.base.errors import UserError
from convert.tokenizers import template_files
from convert.tokenizers.folder_files import FolderFiles
from convert.tokenizers.pre_names import pre_tokenizer
from convert.tokenizers.tokenizer_json import is_byte_level, merges_of, steps_of

_SPACE = "▁"

# Most ids without a token: embeddings are padded, and reserved tokens not always listed.
_GAPS = 1 << 16

KNOWN_ENDS = frozenset(
    (
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<｜end▁of▁sentence｜>",
        "[e~[",
    )
)
"""Texts of tokens at which llama.cpp ends a reply, whatever the metadata say."""

# Texts of tokens that end a turn of a chat rather than a text.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<end_of_utterance>")


@dataclass(frozen=True)
class Form:
    """What llama.cpp's converter does for the tokenizers of one architecture.

    Attributes:
        model: the value of tokenizer.ggml.model, where it is a kind of the architecture's own:
            "gemma4", SentencePiece's tokens with BPE's merges.
        roles: role -> the token's text or id, which comes before what the folder says. A text that
            the vocabulary does not have is passed over.
        first_end: whether the first of generation_config.json's ends is the role eot.
    """

    model: str | None = None
    roles: Mapping[str, str | int] = field(default_factory=dict)
    first_end: bool = False


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as a GGUF describes it.

    Attributes:
        model: "gpt2" (byte-level BPE), "llama" (SentencePiece BPE) or "gemma4".
        pre: the pre-tokenizer's name in llama.cpp; None where the model needs none.
        tokens: text by id, one per row of the embedding.
        types: gguf.TokenType by id.
        scores: by id, not for byte-level BPE; tokens with higher scores are merged earlier.
        merges: texts "left right" in order of rank, not for SentencePiece.
        special: role (bos, eos, eot, eom, unknown, padding) -> id.
        add_bos: put bos before every text.
        add_eos: put eos after every text.
        add_sep: put sep between two texts; None where the tokenizer says nothing of two texts.
        add_space_prefix: put a space before every text; None where it does not apply.
        chat_templates: name -> Jinja source; `template_files.plain` says which one is used.
        ends: ids of all tokens that end a reply, including those for which a GGUF has no role.
        rstrip: whether special tokens swallow the white space after them (Phi-3).
    """

    model: str
    pre: str | None
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool | None
    add_sep: bool | None = None
    chat_templates: dict[str, str] = field(default_factory=dict)
    ends: tuple[int, ...] = ()
    rstrip: bool = False

    def metadata(self) -> dict[str, Any]:
        """GGUF key -> value: str, bool, int (uint32) or a list of str, int (int32) or float."""
        values: dict[str, Any] = {
            "tokenizer.ggml.model": self.model,
            "tokenizer.ggml.pre": self.pre,
            "tokenizer.ggml.tokens": self.tokens,
        }
        if self.pre is None:
            del values["tokenizer.ggml.pre"]
        if self.scores is not None:
            values["tokenizer.ggml.scores"] = self.scores
        values["tokenizer.ggml.token_type"] = self.types
        if self.merges is not None:
            values["tokenizer.ggml.merges"] = self.merges
        for role, token in self.special.items():
            values[f"tokenizer.ggml.{role}_token_id"] = token
        values["tokenizer.ggml.add_bos_token"] = self.add_bos
        values["tokenizer.ggml.add_eos_token"] = self.add_eos
        if self.add_sep is not None:
            values["tokenizer.ggml.add_sep_token"] = self.add_sep
        if self.add_space_prefix is not None:
            values["tokenizer.ggml.add_space_prefix"] = self.add_space_prefix
        named = {name: text for name, text in self.chat_templates.items() if name != "default"}
        default = template_files.plain(self.chat_templates)
        if default is not None:
            values["tokenizer.chat_template"] = self.chat_templates[default]
        if named:
            values["tokenizer.chat_templates"] = sorted(named)
            for name, text in named.items():
                values[f"tokenizer.chat_template.{name}"] = text
        return values


_PLAIN = Form()


# Special tokens swallow white space (Phi-3) only in vocabularies with all of these tokens.
_STRIPPED = ("</s>", "<unk>", "<s>", "<|endoftext|>")


def read_tokenizer(
    folder: Path, rows: int | None = None, *, pre: str | None = None, form: Form = _PLAIN
) -> Tokenizer:
    """Read the tokenizer of a model folder.

    Args:
        folder: a folder with tokenizer.json or tokenizer.model, and their accompanying files.
        rows: rows of the embedding. A shorter vocabulary is padded with unused tokens, and tokens
            past the end are left out. None keeps the vocabulary as it is.
        pre: llama.cpp's name of the pre-tokenizer, where it cannot be found from tokenizer.json.
        form: what is particular to the architecture.

    Raises:
        UserError: naming the file and the part of it that has no counterpart in llama.cpp.
    """
    folder = Path(folder)
    files = FolderFiles(folder)
    if files.tokenizer is None and not files.pieces:
        raise UserError(
            f"{folder} has neither tokenizer.json nor tokenizer.model: copy them from the model's "
            f"publisher."
        )
    byte_level = files.tokenizer is not None and is_byte_level(files.tokenizer)
    own = form.model if files.tokenizer is not None and not byte_level else None
    if own:
        entries = _own_entries(files)
    else:
        entries = _byte_level_entries(files) if byte_level else _sentencepiece_entries(files)
        for token_id, added in files.added.items():
            entries[token_id] = _added_entry(added)
    if not entries:
        raise UserError(f"the tokenizer of {folder} has no tokens: download it again.")
    count = rows if rows is not None else 1 + max(entries)
    if count > 2 * len(entries) + _GAPS:
        raise UserError(
            f"{folder} has {len(entries)} tokens, and the last of {count} is numbered "
            f"{max(entries)}: download its tokenizer.json again."
        )
    tokens, types, scores = _fill(entries, count, folder)
    ids = {text: token_id for token_id, text in enumerate(tokens)}
    raw_ids = {**ids, **{str(a["content"]): i for i, a in files.added.items() if i < count}}
    special, ends = _special(files, raw_ids, tokens)
    for role, token in form.roles.items():
        chosen = ids.get(token) if isinstance(token, str) else token
        if chosen is not None and 0 <= chosen < count:
            special[role] = chosen
    first = files.generation.get("eos_token_id")
    if form.first_end and isinstance(first, list) and len(first) > 1:
        special["eot"] = first[0]
    add_bos, add_eos = _affixes(files, special, byte_level)
    merges = None
    name: str | None = pre or "default"
    if byte_level or own:
        assert files.tokenizer is not None
        merges = _merges(files.tokenizer)
        name = None if own else pre or pre_tokenizer(files.tokenizer)
    return Tokenizer(
        model=own or ("gpt2" if byte_level else "llama"),
        pre=name,
        tokens=tokens,
        types=types,
        scores=None if byte_level else scores,
        merges=merges,
        special=special,
        add_bos=bool(own) or add_bos,
        add_eos=add_eos,
        add_space_prefix=None if byte_level else not own and _space_prefix(files),
        add_sep=_separated(files),
        chat_templates=files.chat_templates,
        ends=ends,
        rstrip=all(token in ids for token in _STRIPPED) and _strips(files),
    )


def _strips(files: FolderFiles) -> bool:
    """Whether a special token swallows the white space after it."""
    return any(token.get("rstrip") for token in files.added.values() if token.get("special"))


def _merges(tokenizer: Mapping[str, Any]) -> list[str]:
    """The merges of tokenizer.json; a space in a part is spelled as in GPT-2's byte alphabet."""
    pairs = merges_of(tokenizer)
    return [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in pairs]


# --------------------------------------------------------------------------------------------------
# Vocabulary


@dataclass(frozen=True)
class _Entry:
    text: str
    kind: TokenType
    score: float = 0.0


def _model(files: FolderFiles) -> dict[str, Any]:
    model = (files.tokenizer or {}).get("model") or {}
    if (model.get("type") or "BPE") != "BPE":
        raise UserError(
            f"{files.folder / 'tokenizer.json'} is a {model['type']} tokenizer, and only BPE ones "
            f"can be written as GGUF: use llama.cpp's convert_hf_to_gguf.py."
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UserError(
                f"{files.folder / 'tokenizer.json'} sets {key}, which llama.cpp does not know: "
                f"this tokenizer cannot be written as GGUF."
            )
    if not isinstance(model.get("vocab"), Mapping):
        raise UserError(f"{files.folder / 'tokenizer.json'} has no model.vocab: download it again.")
    return dict(model)


def _byte_level_entries(files: FolderFiles) -> dict[int, _Entry]:
    model = _model(files)
    return {int(i): _Entry(text, TokenType.NORMAL) for text, i in model["vocab"].items()}


def _sentencepiece_entries(files: FolderFiles) -> dict[int, _Entry]:
    entries: dict[int, _Entry] = {}
    if files.tokenizer is not None:
        model = _model(files)
        if not model.get("byte_fallback"):
            raise UserError(
                f"{files.folder / 'tokenizer.json'} is neither byte-level BPE nor SentencePiece "
                f"with byte fallback, so llama.cpp cannot run it: this tokenizer cannot be written "
                f"as GGUF."
            )
        # The earlier a pair is merged, the higher is the score of the token that it makes.
        scores: dict[str, float] = {}
        for rank, (left, right) in enumerate(merges_of(files.tokenizer)):
            scores.setdefault(left + right, -float(rank))
        unmerged = -float(len(scores) + 1)
        for text, token_id in model["vocab"].items():
            kind = TokenType.NORMAL
            if re.fullmatch(r"<0x[0-9A-F]{2}>", text):
                kind = TokenType.BYTE
            elif text == model.get("unk_token"):
                kind = TokenType.UNKNOWN
            score = scores.get(text, 0.0 if len(text) == 1 else unmerged)
            entries[int(token_id)] = _Entry(text, kind, score)
    for token_id, piece in enumerate(files.pieces):
        # GGUF's types of tokens have the numbers of SentencePiece's.
        kind = TokenType(piece.kind)
        user_defined = kind == TokenType.USER_DEFINED
        text = piece.text.replace(_SPACE, " ") if user_defined else piece.text
        entries[token_id] = _Entry(text, kind, piece.score)
    return entries


_VISIBLE = frozenset(
    (
        *("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>"),
        *("<tool_response|>", '<|"|>'),
    )
)
"""Special tokens of Gemma 4 that llama.cpp writes into replies, so that they can be parsed."""


def _own_entries(files: FolderFiles) -> dict[int, _Entry]:
    """The vocabulary of a gemma4, whose scores are not used."""
    model = _model(files)
    special = {text for role in _ROLES if (text := files.role_text(role))}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        given = files.config.get(key) or ()
        named = given.values() if isinstance(given, Mapping) else given
        special |= {one["content"] if isinstance(one, Mapping) else str(one) for one in named}
    entries: dict[int, _Entry] = {}
    for text, token_id in model["vocab"].items():
        kind = TokenType.NORMAL
        if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", text):
            kind = TokenType.BYTE
        elif text in special:
            kind = TokenType.CONTROL
        entries[int(token_id)] = _Entry(text, kind, -1000.0)
    for token_id, token in files.added.items():
        if token_id not in entries:
            text = str(token["content"])
            kind = TokenType.CONTROL if text in special else TokenType.USER_DEFINED
            entries[token_id] = _Entry(text, kind, -1000.0)
    return {
        token_id: replace(one, kind=TokenType.USER_DEFINED) if one.text in _VISIBLE else one
        for token_id, one in entries.items()
    }


def _added_entry(token: Mapping[str, Any]) -> _Entry:
    text = str(token["content"])
    if text == "<unk>" and not token.get("special"):
        return _Entry(text, TokenType.UNKNOWN, -1000.0)
    looks_special = text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or re.fullmatch(
        r"<\|.*\|>|<｜.*｜>|<unused.*>", text
    )
    if token.get("special") or looks_special:
        return _Entry(text, TokenType.CONTROL, -1000.0)
    # llama.cpp looks for these in the raw text, where spaces are still spaces.
    return _Entry(text.replace(_SPACE, " "), TokenType.USER_DEFINED, -1000.0)


def _fill(
    entries: Mapping[int, _Entry], count: int, folder: Path
) -> tuple[list[str], list[int], list[float]]:
    tokens: list[str] = []
    types: list[int] = []
    scores: list[float] = []
    taken = {entry.text for token_id, entry in entries.items() if token_id < count}
    seen: dict[str, int] = {}
    for token_id in range(count):
        entry = entries.get(token_id)
        if entry is None:
            text = f"[PAD{token_id}]"
            while text in taken:
                text = f"[{text}]"
            entry = _Entry(text, TokenType.UNUSED, -10000.0)
        if entry.text in seen:
            # llama.cpp aborts the process on this.
            raise UserError(
                f"tokens {seen[entry.text]} and {token_id} of {folder} are both {entry.text!r}: "
                f"repair its tokenizer.json."
            )
        seen[entry.text] = token_id
        tokens.append(entry.text)
        types.append(int(entry.kind))
        scores.append(entry.score)
    return tokens, types, scores


# --------------------------------------------------------------------------------------------------
# Special tokens


_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Role in a folder's files -> role in a GGUF."""


def _special(
    files: FolderFiles, ids: Mapping[str, int], tokens: Sequence[str]
) -> tuple[dict[str, int], tuple[int, ...]]:
    special: dict[str, int] = {}
    for role, name in _ROLES.items():
        text = files.role_text(role)
        if text is not None and text in ids:
            special[name] = ids[text]
            continue
        for source in (files.model_config, files.generation):
            configured = source.get(f"{role}_token_id")
            if isinstance(configured, list):
                configured = configured[0] if configured else None
            if isinstance(configured, int) and 0 <= configured < len(tokens):
                special[name] = configured
                break
    ends: list[int] = [special["eos"]] if "eos" in special else []
    for source in (files.generation, files.model_config):
        configured = source.get("eos_token_id")
        for end in configured if isinstance(configured, list) else [configured]:
            if isinstance(end, int) and 0 <= end < len(tokens) and end not in ends:
                ends.append(end)
    # Left unset, llama.cpp takes the first known text it comes across in a hash table.
    turn_ends = [end for end in ends if tokens[end] in _TURN_ENDS]
    unknown = [end for end in ends[1:] if tokens[end] not in KNOWN_ENDS]
    slots = list(dict.fromkeys([*turn_ends[:1], *unknown])) or ends[:1]
    for role, end in zip(("eot", "eom"), slots, strict=False):
        special[role] = end
    return special, tuple(ends)


def _affixes(files: FolderFiles, special: Mapping[str, int], byte_level: bool) -> tuple[bool, bool]:
    steps = steps_of((files.tokenizer or {}).get("post_processor"))
    for step in steps:
        if step.get("type") == "TemplateProcessing":
            single = step.get("single") or []
            kinds = ["SpecialToken" in part for part in single]
            at = kinds.index(False) if False in kinds else len(kinds)
            return any(kinds[:at]) and "bos" in special, any(kinds[at:])
    # Without a template, what is set explicitly; else bos for SentencePiece alone.
    configured = files.config.get("add_bos_token")
    default = not byte_level and files.tokenizer is None
    add_bos = bool(default if configured is None else configured)
    return add_bos and "bos" in special, bool(files.config.get("add_eos_token"))


def _separated(files: FolderFiles) -> bool | None:
    """Whether sep stands between two texts; None where a template says nothing of the place."""
    separators = {files.role_text("sep"), files.role_text("eos")}
    for step in steps_of((files.tokenizer or {}).get("post_processor")):
        if step.get("type") != "TemplateProcessing":
            continue
        single, pair = (
            [(part.get("SpecialToken") or {}).get("id") for part in step.get(key) or []]
            for key in ("single", "pair")
        )
        if len(single) > 1 and pair:
            pair = pair[1:] if single[0] and pair[0] == single[0] else pair
            pair = pair[:-1] if single[-1] and pair[-1:] == single[-1:] else pair
        inner = pair[1:-1]
        if inner:
            last = len(single) > 1 and single[-1]
            return (inner[0] in separators and not last) or (
                len(inner) == 2 and inner[1] in separators
            )
    return None


def _space_prefix(files: FolderFiles) -> bool:
    if files.tokenizer is None:
        configured = files.config.get("add_prefix_space")
        return bool(files.dummy_prefix if configured is None else configured)
    for step in steps_of(files.tokenizer.get("normalizer")):
        if step.get("type") == "Prepend":
            return True
    for step in steps_of(files.tokenizer.get("pre_tokenizer")):
        if step.get("type") == "Metaspace":
            scheme = step.get("prepend_scheme")
            return bool(step.get("add_prefix_space", True)) if not scheme else scheme != "never"
    return False
