"""A Hugging Face tokenizer folder as GGUF tokenizer metadata.

What each ``tokenizer.ggml.pre`` name means is fixed in llama.cpp's src/llama-vocab.cpp: a list of
regular expressions applied one after the other, and whether merges are ignored for whole words in
the vocabulary. The name is found by comparing that with the structure of tokenizer.json.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import TokenType

from convert.base import json_text
from convert.base.errors import UserError
from convert.base.foreign import foreign
from convert.base.hf_config import CONFIG, GENERATION
from convert.base.schema import OBJECT, Kind
from convert.tokenizers import template_files
from convert.tokenizers.hf_files import ADDED_TOKENS, SPECIAL_TOKENS, TOKENIZER, TOKENIZER_CONFIG
from convert.tokenizers.pre import CONTRACTION, DIGIT, GPT2, LINE, PRE

_SPACE = "▁"

# Embeddings are padded, and reserved tokens not always listed.
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
"""llama.cpp ends a reply at tokens of these texts, whatever the metadata says."""

# Tokens that end a turn rather than a text.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<end_of_utterance>")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer in GGUF's terms.

    Attributes:
        model: "gpt2" (byte-level BPE) or "llama" (SentencePiece BPE).
        pre: the pre-tokenizer's name in llama.cpp.
        tokens: text by id, one per row of the embedding.
        types: gguf.TokenType by id.
        scores: by id, SentencePiece only: the higher, the earlier merged.
        merges: "left right", byte-level BPE only.
        special: role (bos, eos, eot, eom, unknown, padding) -> id.
        add_bos: put bos before every text.
        add_eos: put eos after every text.
        add_space_prefix: put a space before every text; None where it does not apply.
        chat_templates: name -> Jinja source; "default" is the one used.
        ends: ids that end a reply, all of them, even those GGUF has no role for.
        rstrip: special tokens swallow the white space after them (Phi-3).
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool | None
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
        if self.scores is not None:
            values["tokenizer.ggml.scores"] = self.scores
        values["tokenizer.ggml.token_type"] = self.types
        if self.merges is not None:
            values["tokenizer.ggml.merges"] = self.merges
        for role, token in self.special.items():
            values[f"tokenizer.ggml.{role}_token_id"] = token
        values["tokenizer.ggml.add_bos_token"] = self.add_bos
        values["tokenizer.ggml.add_eos_token"] = self.add_eos
        if self.add_space_prefix is not None:
            values["tokenizer.ggml.add_space_prefix"] = self.add_space_prefix
        named = {name: text for name, text in self.chat_templates.items() if name != "default"}
        if "default" in self.chat_templates:
            values["tokenizer.chat_template"] = self.chat_templates["default"]
        if named:
            values["tokenizer.chat_templates"] = sorted(named)
            for name, text in named.items():
                values[f"tokenizer.chat_template.{name}"] = text
        return values


def read_tokenizer(folder: Path, rows: int | None = None, *, pre: str | None = None) -> Tokenizer:
    """Read the tokenizer of a model folder.

    Args:
        folder: with tokenizer.json or tokenizer.model, and what accompanies them.
        rows: rows of the embedding; shorter vocabularies are padded with unused tokens, tokens
            past the end are left out. None takes the vocabulary as it is.
        pre: llama.cpp's name of the pre-tokenizer, where the structure alone does not tell.

    Raises:
        UserError: naming the file and what about it has no counterpart in llama.cpp.
    """
    folder = Path(folder)
    files = _Files(folder)
    if files.tokenizer is None and not files.pieces:
        raise UserError(
            f"{folder} has neither tokenizer.json nor tokenizer.model: copy them from the model's "
            f"publisher."
        )
    byte_level = files.tokenizer is not None and _is_byte_level(files.tokenizer)
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
    add_bos, add_eos = _affixes(files, special, byte_level)
    merges = None
    if byte_level:
        assert files.tokenizer is not None
        merges = [" ".join(pair) for pair in _merges(files.tokenizer)]
        name = pre or pre_tokenizer(files.tokenizer)
    else:
        name = pre or "default"
    needed = ("</s>", "<unk>", "<s>", "<|endoftext|>")
    return Tokenizer(
        model="gpt2" if byte_level else "llama",
        pre=name,
        tokens=tokens,
        types=types,
        scores=None if byte_level else scores,
        merges=merges,
        special=special,
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=None if byte_level else _space_prefix(files),
        chat_templates=files.chat_templates,
        ends=ends,
        rstrip=all(token in ids for token in needed)
        and any(token.get("rstrip") for token in files.added.values() if token.get("special")),
    )


# --------------------------------------------------------------------------------------------------
# Files


class _Files:
    """What the folder says, parsed once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer: dict[str, Any] | None = _json(folder / "tokenizer.json", TOKENIZER) or None
        self.config = _json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
        self.model_config = _json(folder / "config.json", CONFIG)
        nested = self.model_config.get("text_config")
        if isinstance(nested, dict):
            self.model_config = {**nested, **self.model_config}
        self.generation = _json(folder / "generation_config.json", GENERATION)
        self.special_map = _json(folder / "special_tokens_map.json", SPECIAL_TOKENS)
        model = folder / "tokenizer.model"
        self.pieces: list[_Piece] = []
        self.dummy_prefix = True
        skip = self.tokenizer is not None and _is_byte_level(self.tokenizer)
        if model.is_file() and not skip:
            self.pieces, self.dummy_prefix = _read_sentencepiece(model)
        self.added = self._added()
        older = _json(folder / "chat_template.json", OBJECT)
        self.chat_templates = template_files.read(folder, self.config, older)

    def _added(self) -> dict[int, dict[str, Any]]:
        added: dict[int, dict[str, Any]] = {}
        for text, token_id in _json(self.folder / "added_tokens.json", ADDED_TOKENS).items():
            added[int(token_id)] = {"content": text, "special": False}
        for token_id, token in (self.config.get("added_tokens_decoder") or {}).items():
            added[int(token_id)] = dict(token)
        for token in (self.tokenizer or {}).get("added_tokens") or []:
            added[int(token["id"])] = dict(token)
        return added

    def role_text(self, role: str) -> str | None:
        """The token text configured for bos, eos, unk or pad."""
        for source in (self.config, self.special_map):
            value = source.get(f"{role}_token")
            if isinstance(value, Mapping):
                value = value.get("content")
            if isinstance(value, str) and value:
                return value
        return None


def _json(path: Path, kind: Kind) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found: dict[str, Any] = json_text.read(path, kind, mend="download it again", infinite=True)
    return found


@dataclass(frozen=True)
class _Piece:
    text: str
    score: float
    kind: int


def _read_sentencepiece(path: Path) -> tuple[list[_Piece], bool]:
    """Pieces and add_dummy_prefix of a SentencePiece model.

    The file is one protocol buffer message (sentencepiece_model.proto): field 1 repeats the pieces
    {1 text, 2 score, 3 type}, 2 is the trainer {3 model type}, 3 the normalizer {3 dummy prefix}.
    """
    pieces: list[_Piece] = []
    model_type, dummy_prefix = 1, True
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                text, score, kind = "", 0.0, 1
                for inner, content in _fields(value):
                    if inner == 1:
                        text = bytes(memoryview(content)).decode("utf-8")
                    elif inner == 2:
                        score = struct.unpack("<f", content)[0]
                    elif inner == 3:
                        kind = TokenType(content)
                pieces.append(_Piece(text, score, kind))
            elif number == 2:
                model_type = next((int(v) for n, v in _fields(value) if n == 3), 1)
            elif number == 3:
                dummy_prefix = next((bool(v) for n, v in _fields(value) if n == 3), True)
    except (IndexError, ValueError, TypeError, struct.error):
        raise UserError(f"{path} is no SentencePiece model: download it again.") from None
    if not pieces:
        raise UserError(f"{path} is no SentencePiece model: download it again.")
    if model_type != 2:
        raise UserError(
            f"{path} is not of SentencePiece's BPE type, the only one llama.cpp reads as such: "
            f"write this model with llama.cpp's convert_hf_to_gguf.py."
        )
    return pieces, dummy_prefix


def _fields(message: Any) -> Iterator[tuple[int, Any]]:
    view = memoryview(message)
    at = 0

    def varint() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            byte = view[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if shift > 70:
                raise ValueError("a number of more than 64 bits")
            if byte < 0x80:
                return value

    while at < len(view):
        key = varint()
        wire = key & 7
        if wire == 0:
            yield key >> 3, varint()
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            yield key >> 3, view[at : at + size]
            at += size
        elif wire == 2:
            size = varint()
            if at + size > len(view):
                raise ValueError("truncated")
            yield key >> 3, view[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {wire}")


# --------------------------------------------------------------------------------------------------
# Vocabulary


@dataclass(frozen=True)
class _Entry:
    text: str
    kind: TokenType
    score: float = 0.0


def _is_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    return any(
        step.get("type") == "ByteLevel"
        for part in ("pre_tokenizer", "decoder")
        for step in _sequence(tokenizer.get(part))
    )


def _sequence(part: Any) -> list[dict[str, Any]]:
    """A pre-tokenizer, normalizer, decoder or post-processor as a flat list of steps."""
    if not isinstance(part, Mapping):
        return []
    if part.get("type") != "Sequence":
        return [dict(part)]
    inner = next((value for value in part.values() if isinstance(value, list)), [])
    return [step for entry in inner for step in _sequence(entry)]


def _model(files: _Files) -> dict[str, Any]:
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


def _merges(tokenizer: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = []
    for merge in tokenizer["model"].get("merges") or []:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        pairs.append((left, right))
    return pairs


def _byte_level_entries(files: _Files) -> dict[int, _Entry]:
    model = _model(files)
    return {int(i): _Entry(text, TokenType.NORMAL) for text, i in model["vocab"].items()}


def _sentencepiece_entries(files: _Files) -> dict[int, _Entry]:
    entries: dict[int, _Entry] = {}
    if files.tokenizer is not None:
        model = _model(files)
        if not model.get("byte_fallback"):
            raise UserError(
                f"{files.folder / 'tokenizer.json'} is neither byte-level BPE nor SentencePiece "
                f"with byte fallback, so llama.cpp cannot run it: this tokenizer cannot be written "
                f"as GGUF."
            )
        # The earlier a pair merges, the higher the score of what it becomes.
        scores: dict[str, float] = {}
        for rank, (left, right) in enumerate(_merges(files.tokenizer)):
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
        # SentencePiece's types have GGUF's numbers.
        kind = TokenType(piece.kind)
        user_defined = kind == TokenType.USER_DEFINED
        text = piece.text.replace(_SPACE, " ") if user_defined else piece.text
        entries[token_id] = _Entry(text, kind, piece.score)
    return entries


def _added_entry(token: Mapping[str, Any]) -> _Entry:
    text = str(token["content"])
    if text == "<unk>":
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


def _special(
    files: _Files, ids: Mapping[str, int], tokens: Sequence[str]
) -> tuple[dict[str, int], tuple[int, ...]]:
    special: dict[str, int] = {}
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for role, name in roles.items():
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


def _affixes(files: _Files, special: Mapping[str, int], byte_level: bool) -> tuple[bool, bool]:
    steps = _sequence((files.tokenizer or {}).get("post_processor"))
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


def _space_prefix(files: _Files) -> bool:
    if files.tokenizer is None:
        configured = files.config.get("add_prefix_space")
        return bool(files.dummy_prefix if configured is None else configured)
    for step in _sequence(files.tokenizer.get("normalizer")):
        if step.get("type") == "Prepend":
            return True
    for step in _sequence(files.tokenizer.get("pre_tokenizer")):
        if step.get("type") == "Metaspace":
            scheme = step.get("prepend_scheme")
            return bool(step.get("add_prefix_space", True)) if not scheme else scheme != "never"
    return False


# --------------------------------------------------------------------------------------------------
# Pre-tokenizers

# As Hugging Face's files spell them. What llama.cpp runs in their place is in
# `convert.tokenizers.pre`; the difference, if any, is in rare characters.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_DIGITS = r"\p{N}+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + LINE
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + LINE
)
_DEEPSEEK_HAN = "[一-龥ࠀ-一가-퟿]+"
# DeepSeek spells out every letter of the cased scripts; its beginning tells it from all others.
_DEEPSEEK_LETTERS = r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯ"


def _alike(name: str) -> tuple[str, tuple[str, ...], bool]:
    """A name whose splits in llama.cpp are those of the Hugging Face files."""
    splits = (split.replace(CONTRACTION, _CONTRACTION) for split in PRE[name].splits)
    return name, tuple(splits), PRE[name].ignore_merges


PRE_TOKENIZERS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    _alike("gpt-2"),
    _alike("smollm"),
    _alike("llama-bpe"),
    _alike("smaug-bpe"),
    _alike("qwen2"),
    _alike("qwen35"),
    _alike("ufakzeka"),
    ("tekken", (_TEKKEN,), True),
    ("gpt-4o", (_GPT4O,), False),
    _alike("deepseek-v3"),
    (
        "deepseek-llm",
        (
            r"[\r\n]",
            _DEEPSEEK_LETTERS,
            r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
            r"\s+$",
            _DEEPSEEK_HAN,
            DIGIT,
        ),
        False,
    ),
    (
        "deepseek-coder",
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_HAN, DIGIT),
        False,
    ),
    ("falcon", ("punctuation", GPT2, "[0-9][0-9][0-9]"), False),
    _alike("seed-coder"),
    ("bloom", (r" ?[^(\s|[.,!?…。，、।۔،])]+",), False),
    _alike("minicpm5"),
)
"""(llama.cpp's name, its splits in order, whether whole words ignore merges).

Where several names mean the same, the one that the most versions of llama.cpp and Ollama know.
"""


def pre_tokenizer(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a byte-level tokenizer.json.

    Args:
        tokenizer: tokenizer.json as parsed.

    Raises:
        UserError: when llama.cpp implements no such splitting, naming the ``pre=`` override.
    """
    for step in _sequence(tokenizer.get("normalizer")):
        # llama.cpp normalizes nothing; NFC leaves ordinary text as it is.
        if step.get("type") != "NFC":
            raise _unknown(f"the normalizer {step.get('type')}")
    splits = _splits(tokenizer)
    ignores = bool((tokenizer.get("model") or {}).get("ignore_merges"))
    known = [
        (name, flag) for name, expected, flag in (*PRE_TOKENIZERS, *_OWN) if expected == splits
    ]
    if not known:
        raise _unknown(f"the splits {json.dumps(splits, ensure_ascii=False)}")
    for name, flag in known:
        if flag == ignores:
            return name
    unreachable = _unreachable(tokenizer)
    if unreachable is not None:
        raise _unknown(
            f'ignore_merges {str(ignores).lower()} (it matters for the token "{unreachable}")'
        )
    return known[0][0]


def _unknown(what: str) -> UserError:
    return UserError(
        f"tokenizer.json has {what}, for which no llama.cpp pre-tokenizer is known: pass pre= with "
        f"the name llama.cpp's convert_hf_to_gguf.py gives this model, such as pre='llama-bpe'."
    )


def _splits(tokenizer: Mapping[str, Any]) -> tuple[str, ...]:
    splits: list[str] = []
    for step in _sequence(tokenizer.get("pre_tokenizer")):
        kind = step.get("type")
        if kind == "Split":
            pattern = step.get("pattern") or {}
            behaviour = (step.get("behavior"), bool(step.get("invert")))
            # Removing what does not match is isolating what does, for patterns that match all.
            if behaviour not in (("Isolated", False), ("Removed", True)):
                raise _unknown(f"a Split with behavior {behaviour[0]}, invert {behaviour[1]}")
            text = pattern.get("Regex")
            splits.append(
                canonical_regex(text) if text is not None else re.escape(pattern.get("String", ""))
            )
        elif kind == "Digits":
            splits.append(DIGIT if step.get("individual_digits") else _DIGITS)
        elif kind == "ByteLevel":
            if step.get("add_prefix_space"):
                raise _unknown("a ByteLevel step with add_prefix_space")
            if step.get("use_regex", True):
                splits.append(GPT2)
        elif kind == "Punctuation" and step.get("behavior") == "Contiguous":
            splits.append("punctuation")
        else:
            raise _unknown(f"the pre-tokenizer step {json.dumps(step, ensure_ascii=False)[:200]}")
    return tuple(splits)


def canonical_regex(regex: str) -> str:
    """One spelling for the spellings of one pattern that tokenizer files use."""
    text = regex.replace("\r", r"\r").replace("\n", r"\n")
    # Possessive where the next atom cannot match what was taken: greedy is the same.
    text = text.replace("]?+", "]?").replace("]++", "]+").replace("}++", "}+")
    text = text.replace(r"{1,3}+", r"{1,3}").replace(r"\p{N}{1}", r"\p{N}")
    # White space up to the last line break: the first star takes all other breaks anyway.
    text = text.replace(r"|\s*[\r\n]|", r"|\s*[\r\n]+|")
    if text.startswith(_DEEPSEEK_LETTERS):
        return _DEEPSEEK_LETTERS
    for contraction in (
        CONTRACTION,
        r"'(?i:[sdmt]|ll|ve|re)",
        r"(?i:'(?:[sdmt]|ll|ve|re))",
    ):
        text = text.replace(contraction, _CONTRACTION)
    return text


# What `convert.tokenizers.from_gguf` writes.
_OWN = tuple(
    (name, tuple(map(canonical_regex, pre.splits)), pre.ignore_merges)
    for name, pre in PRE.items()
    if pre.byte_level
)


def _unreachable(tokenizer: Mapping[str, Any]) -> str | None:
    """A token that merges alone do not build, for which ignore_merges makes a difference."""
    from tokenizers import models

    model = tokenizer["model"]
    with foreign("tokenizer.json cannot be run"):
        bpe = models.BPE(vocab=model["vocab"], merges=_merges(tokenizer))
    for text in model["vocab"]:
        pieces = bpe.tokenize(text)
        if len(pieces) != 1:
            return str(text)
    return None
