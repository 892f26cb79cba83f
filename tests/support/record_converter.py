"""Record what llama.cpp's own converter makes of the tiny folders of `tests.support.published`.

    python -m tests.support.record_converter --python VENV/bin/python --llama-cpp FOLDER

FOLDER is llama.cpp's source, such as vendor/llama.cpp in llama-cpp-python's source distribution
(pip download llama-cpp-python --no-binary :all: --no-deps), and VENV an environment of its own with
torch, transformers, sentencepiece, protobuf and safetensors. The tiny tokenizers are not among
those that the converter knows by a hash, so that it is told the pre-tokenizer's name.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from convert.gguf.file import GgufSource
from tests.support import published, tiny
from tests.support.gguf_recipes import RECIPES
from tests.support.their_converter import VERSION, TheirConverter

RECORD = Path(__file__).parent / "converter_record.json"

PRE = "qwen2"

FILE_TYPES = ("F32", "F16")

#: Names and provenance, which the two programs write differently.
PROVENANCE = (
    "general.name", "general.basename", "general.size_label", "general.finetune", "general.version",
)  # fmt: skip


def described(path: Path) -> dict[str, Any]:
    """What a file holds: its tensors, its metadata and the metadata of its tokenizer.

    Tensors are told by a hash of their layers, types, shapes and bytes for each name in a block;
    metadata by type and value, or by its hash where it is long.
    """
    with GgufSource(path) as source:
        lines: dict[str, list[bytes]] = {}
        for name in sorted(source.tensors):
            entry = source.tensor(name)
            layer, stem = re.match(r"(blk\.\d+\.)?(.*)", name).groups()  # type: ignore[union-attr]
            raw = hashlib.sha256(source.raw(name).tobytes()).hexdigest()
            line = f"{layer} {entry.type.name} {entry.shape} {raw}".encode()
            lines.setdefault(stem, []).append(line)
        fields = GGUFReader(path).fields
        keys: dict[str, list[Any]] = {}
        for key, value in sorted(source.metadata.items()):
            if not key.startswith(PROVENANCE):
                text = json.dumps(value)
                kind = " ".join(one.name for one in fields[key].types)
                keys[key] = [kind, value if len(text) < 80 else _short(text.encode())]
    return {
        "tensors": {stem: _short(b"\n".join(one)) for stem, one in lines.items()},
        "metadata": {key: one for key, one in keys.items() if not key.startswith("tokenizer.")},
        "tokenizer": {key: one for key, one in keys.items() if key.startswith("tokenizer.")},
    }


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def recipes() -> list[str]:
    """The recipes that have a published form, and further folders."""
    hub = [f"hub {name}" for name in tiny.ARCHITECTURES]
    return [*hub, *published.VARIANTS] + [name for name in RECIPES if name not in UNPUBLISHED]


UNPUBLISHED = frozenset(
    {
        # Other forms of a GGUF, which no folder becomes.
        "llama, linear, old key",
        "deepseek v2, older",
        "deepseek v3, older",
        "gemma4, experts apart",
        # Its publisher's rows lie otherwise.
        "glm4, of a model that sees",
        # The converter wants yarn of every ministral3.
        "mistral3",
    }
)


def main() -> None:
    """Write `RECORD`."""
    converter = TheirConverter.of_arguments()
    record = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    found: dict[str, dict[str, Any]] = record.get("models", {})
    tokenizers: dict[str, Any] = record.get("tokenizers", {})
    for name, kind, path in converter.written(recipes(), published.write, FILE_TYPES, pre=PRE):
        one = described(path)
        tokenizer = one.pop("tokenizer")
        one["tokenizer"] = _short(json.dumps(tokenizer).encode())
        tokenizers[one["tokenizer"]] = tokenizer
        found.setdefault(name, {})[kind] = one
    used = {one["tokenizer"] for kinds in found.values() for one in kinds.values()}
    record = {
        "made by": "python -m tests.support.record_converter",
        "llama.cpp": VERSION,
        "tokenizers": {key: one for key, one in tokenizers.items() if key in used},
        "models": found,
    }
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
