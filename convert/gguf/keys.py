"""Types and ranges of the metadata keys of a GGUF that this project reads.

They are checked when a file is opened; other keys may have any value. Long arrays are not decoded:
only the type of their items, which the header gives, is checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from gguf import GGUFValueType

from convert.base.errors import UserError
from convert.base.schema import FLAG, TEXT, Kind, Refused, check, either, list_of, number, whole


class Field(Protocol):
    """What the header says about a value: its type and, for an array, the type of its items."""

    @property
    def type(self) -> GGUFValueType: ...

    @property
    def item(self) -> GGUFValueType | None: ...


_V = GGUFValueType
_WHOLES = {_V.UINT8, _V.INT8, _V.UINT16, _V.INT16, _V.UINT32, _V.INT32, _V.UINT64, _V.INT64}
_NUMBERS = _WHOLES | {_V.FLOAT32, _V.FLOAT64}

_MOST_BLOCKS = 1 << 16
_COUNTS = either(whole(), list_of(whole()))

_GENERAL: dict[str, Kind] = {
    **dict.fromkeys(("general.architecture", "general.name", "general.type"), TEXT),
    "general.tags": list_of(TEXT),
    "general.base_model.count": whole(0, 1 << 16),
    "general.file_type": whole(0, 1 << 16),
    **dict.fromkeys(("tokenizer.ggml.model", "tokenizer.ggml.pre"), TEXT),
    "tokenizer.chat_template": TEXT,
    **dict.fromkeys(
        (f"tokenizer.ggml.add_{what}" for what in ("bos_token", "eos_token", "space_prefix")), FLAG
    ),
    "controlvector.layer_count": whole(0, _MOST_BLOCKS),
    "controlvector.model_hint": TEXT,
    "adapter.type": TEXT,
    "adapter.lora.alpha": number(),
}
"""Key -> the kind of its values."""

_ARRAYS: dict[str, tuple[set[GGUFValueType], str]] = {
    "tokenizer.ggml.tokens": ({_V.STRING}, "a list of texts"),
    "tokenizer.ggml.merges": ({_V.STRING}, "a list of texts"),
    "tokenizer.ggml.scores": (_NUMBERS, "a list of numbers"),
    "tokenizer.ggml.token_type": (_WHOLES, "a list of whole numbers"),
}
"""Key of an array -> the accepted types of its items, and the same in words."""

_TOKEN_ID = re.compile(r"tokenizer\.ggml\.\w+_token_id")
# The id of a token; -1, or all 32 bits set, means that there is no such token.
_TOKEN = whole(-1, 2**32 - 1)

_OF_THE_ARCHITECTURE: dict[str, Kind] = {
    "block_count": whole(0, _MOST_BLOCKS),
    "nextn_predict_layers": whole(0, _MOST_BLOCKS),
    **dict.fromkeys(("embedding_length", "context_length"), whole(1)),
    **dict.fromkeys(("vocab_size", "attention.key_length", "attention.value_length"), whole(0)),
    **dict.fromkeys(
        (
            *("attention.head_count", "attention.head_count_kv", "feed_forward_length"),
            *("expert_count", "expert_used_count", "rope.dimension_count"),
        ),
        _COUNTS,
    ),
    "attention.layer_norm_rms_epsilon": number(0, 1),
    "rope.freq_base": number(0),
    "rope.scaling.type": TEXT,
    "rope.scaling.factor": number(0),
}
"""The kinds of values of keys that begin with the architecture's name."""


def check_keys(
    path: Path,
    fields: Mapping[str, Field],
    metadata: Mapping[str, Any],
    tensors: Iterable[str],
) -> None:
    """Check the types and ranges of metadata, and the number of blocks against the tensors.

    Args:
        path: the file, for messages.
        fields: key -> what the header says about its value.
        metadata: key -> its value, decoded when it is read.
        tensors: the names of the file's tensors.

    Raises:
        UserError: naming the file, the key and what belongs there.
    """
    for key, (items, says) in _ARRAYS.items():
        if key in fields and fields[key].item not in items:
            raise _wrong(path, f"its {key} must be {says}")
    kinds = dict(_GENERAL)
    architecture = metadata.get("general.architecture")
    if isinstance(architecture, str):
        kinds |= {f"{architecture}.{name}": kind for name, kind in _OF_THE_ARCHITECTURE.items()}
    kinds |= {key: _TOKEN for key in fields if _TOKEN_ID.fullmatch(key)}
    try:
        for key, kind in kinds.items():
            if key in fields:
                check(metadata[key], kind, key)
    except Refused as refused:
        raise _wrong(path, str(refused)) from None
    found = [int(match[1]) for name in tensors if (match := re.match(r"blk\.(\d{1,9})\.", name))]
    blocks, claimed = 1 + max(found, default=-1), metadata.get(f"{architecture}.block_count", 0)
    if blocks and claimed > 2 * blocks + 16:
        raise _wrong(
            path,
            f"its {architecture}.block_count is {claimed}, but its tensors are of {blocks} blocks",
        )


def _wrong(path: Path, why: str) -> UserError:
    return UserError(f"{path} cannot be used: {why}; download it again.")
