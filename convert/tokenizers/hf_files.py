"""Types and ranges of the values in a Hugging Face tokenizer's files that this project reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from convert.base.schema import (
    ANYTHING,
    FLAG,
    OBJECT,
    TEXT,
    Kind,
    either,
    list_of,
    map_of,
    record,
    text,
    whole,
)

_ID = whole(0, (1 << 24) - 1)
_ID_AS_TEXT = text(r"\d{1,8}", "the number of a token")
_ADDED = {"special": FLAG, "rstrip": FLAG}
_ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "pad"))


def _steps(value: Any) -> Iterator[tuple[str, Any, Kind]]:
    return _STEP.inside(value)


# A normalizer, pre-tokenizer, decoder or post-processor; one of type Sequence holds a list of them.
_ANY_STEP = Kind("an object", OBJECT.fits, _steps)
_STEP = record(
    {
        **dict.fromkeys(("type", "behavior", "prepend_scheme"), TEXT),
        **dict.fromkeys(("invert", "individual_digits", "add_prefix_space", "use_regex"), FLAG),
        **dict.fromkeys(
            ("normalizers", "pretokenizers", "decoders", "processors"), list_of(_ANY_STEP)
        ),
        "pattern": record({"Regex": TEXT, "String": TEXT}),
        "single": list_of(OBJECT),
    }
)

_MERGE = either(text(r".+ .+", "a pair with a space between"), list_of(TEXT, 2))

TOKENIZER = record(
    {
        "model": record(
            {
                "type": TEXT,
                # In a Unigram model the vocabulary is a list of pairs.
                "vocab": either(map_of(_ID), list_of(ANYTHING)),
                "merges": list_of(_MERGE),
                "byte_fallback": FLAG,
                "ignore_merges": FLAG,
                **dict.fromkeys(
                    ("unk_token", "continuing_subword_prefix", "end_of_word_suffix"), TEXT
                ),
            }
        ),
        "added_tokens": list_of(record(_ADDED, {"id": _ID, "content": TEXT})),
        **dict.fromkeys(("normalizer", "pre_tokenizer", "decoder", "post_processor"), _ANY_STEP),
    }
)
"""tokenizer.json."""

_ROLE_TOKENS = dict.fromkeys(_ROLES, either(TEXT, record({"content": TEXT})))

TOKENIZER_CONFIG = record(
    {
        "added_tokens_decoder": map_of(record(_ADDED, {"content": TEXT}), names=_ID_AS_TEXT),
        **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space"), FLAG),
        **_ROLE_TOKENS,
    }
)
"""tokenizer_config.json, except its chat templates (`convert.tokenizers.template_files`)."""

SPECIAL_TOKENS = record(_ROLE_TOKENS)
"""special_tokens_map.json."""

ADDED_TOKENS = map_of(_ID)
"""added_tokens.json."""
