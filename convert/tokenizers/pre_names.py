"""Finds llama.cpp's name for the pre-tokenizer of a tokenizer.json.

llama.cpp's src/llama-vocab.cpp fixes the meaning of each ``tokenizer.ggml.pre`` name: a list of
regular expressions applied one after the other, and whether merges are ignored for whole words in
the vocabulary. The name is found by comparing these with the structure of tokenizer.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from convert.base.errors import UserError
from convert.base.foreign import foreign
from convert.tokenizers.pre import CONTRACTION, DIGIT, GPT2, LINE, PRE
from convert.tokenizers.tokenizer_json import merges_of, steps_of

# The expressions as Hugging Face's files spell them. `convert.tokenizers.pre` has those that
# llama.cpp runs; they differ, if at all, for rare characters.
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
# DeepSeek's expression lists every letter of the cased scripts; this beginning identifies it.
_DEEPSEEK_LETTERS = r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯ"


def _alike(name: str) -> tuple[str, tuple[str, ...], bool]:
    """An entry for a name whose expressions are the same in llama.cpp and Hugging Face's files."""
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
"""(llama.cpp's name, its expressions in order, whether merges are ignored for whole words).

Of several names with the same meaning, this is the one that most versions of llama.cpp and Ollama
support.
"""


def pre_tokenizer(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a byte-level tokenizer.json.

    Args:
        tokenizer: the parsed tokenizer.json.

    Raises:
        UserError: when llama.cpp has no such pre-tokenizer; it names the argument ``pre=``.
    """
    for step in steps_of(tokenizer.get("normalizer")):
        # llama.cpp does not normalize; NFC is accepted because it leaves ordinary text as it is.
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
    for step in steps_of(tokenizer.get("pre_tokenizer")):
        kind = step.get("type")
        if kind == "Split":
            pattern = step.get("pattern") or {}
            behaviour = (step.get("behavior"), bool(step.get("invert")))
            # For patterns that match everything, "remove what does not match" means "isolate".
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
    """A regular expression in one of the several spellings that tokenizer files use for it."""
    text = regex.replace("\r", r"\r").replace("\n", r"\n")
    # Possessive quantifiers: greedy ones are the same here, as the next atom cannot match there.
    text = text.replace("]?+", "]?").replace("]++", "]+").replace("}++", "}+")
    text = text.replace(r"{1,3}+", r"{1,3}").replace(r"\p{N}{1}", r"\p{N}")
    # White space up to the last line break: the first star takes all earlier breaks anyway.
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


# The expressions that `convert.tokenizers.from_gguf` writes.
_OWN = tuple(
    (name, tuple(map(canonical_regex, pre.splits)), pre.ignore_merges)
    for name, pre in PRE.items()
    if pre.byte_level
)


def _unreachable(tokenizer: Mapping[str, Any]) -> str | None:
    """A token that merges do not build, so that ignore_merges makes a difference; None without."""
    from tokenizers import models  # lazily: few tokenizers need it

    model = tokenizer["model"]
    with foreign("tokenizer.json cannot be run"):
        bpe = models.BPE(vocab=model["vocab"], merges=merges_of(tokenizer))
    for text in model["vocab"]:
        pieces = bpe.tokenize(text)
        if len(pieces) != 1:
            return str(text)
    return None
