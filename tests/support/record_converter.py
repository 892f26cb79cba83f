"""Record what llama.cpp's own converter makes of the tiny folders of `tests.support.published`.

    python -m tests.support.record_converter --python VENV/bin/python --llama-cpp FOLDER

FOLDER is llama.cpp's source, such as vendor/llama.cpp in llama-cpp-python's source distribution
(pip download llama-cpp-python --no-binary :all: --no-deps), and VENV an environment of its own with
torch, transformers, sentencepiece, protobuf and safetensors. The tiny tokenizers are not among
those that the converter knows by a hash, so that it is told the pre-tokenizer's name.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from convert.gguf.file import GgufSource
from tests.support import published, tiny
from tests.support.gguf_recipes import RECIPES

RECORD = Path(__file__).parent / "converter_record.json"

_RUN = """
import json, sys, traceback
from pathlib import Path
where, pre, jobs = sys.argv[1:]
sys.path.insert(0, where)
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
import convert_hf_to_gguf
for source, out, kind in json.loads(jobs):
    sys.argv = ["convert_hf_to_gguf.py", source, "--outfile", out, "--outtype", kind.lower()]
    try:
        convert_hf_to_gguf.main()
    except BaseException:
        Path(out + ".error").write_text(traceback.format_exc(limit=-2))
"""

PRE = "qwen2"

FILE_TYPES = ("F32", "F16")

#: Names and provenance, which the two programs write differently.
PROVENANCE = (
    "general.name", "general.basename", "general.size_label", "general.finetune", "general.version",
    "general.sampling",
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
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", required=True)
    parser.add_argument("--llama-cpp", required=True, type=Path)
    parser.add_argument("--only", default="", help="a part of the names of recipes")
    given = parser.parse_args()
    record = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    found: dict[str, dict[str, Any]] = record.get("models", {})
    tokenizers: dict[str, Any] = record.get("tokenizers", {})
    chosen = [name for name in recipes() if given.only in name]
    with tempfile.TemporaryDirectory() as scratch:
        jobs, places = [], {}
        for at, name in enumerate(chosen):
            folder = published.write(Path(scratch) / f"model{at}", name)
            for kind in FILE_TYPES:
                places[name, kind] = Path(scratch) / f"{at}-{kind}.gguf"
                jobs.append([str(folder), str(places[name, kind]), kind])
        where = str(given.llama_cpp.resolve())
        command = [given.python, "-c", _RUN, where, PRE, json.dumps(jobs)]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": ""}, stderr=subprocess.DEVNULL)
        for (name, kind), path in places.items():
            error = path.with_name(path.name + ".error")
            if error.exists():
                print(f"{name} {kind}: {error.read_text()}", file=sys.stderr)
            else:
                one = described(path)
                tokenizer = one.pop("tokenizer")
                one["tokenizer"] = _short(json.dumps(tokenizer).encode())
                tokenizers[one["tokenizer"]] = tokenizer
                found.setdefault(name, {})[kind] = one
    used = {one["tokenizer"] for kinds in found.values() for one in kinds.values()}
    record = {
        "made by": "python -m tests.support.record_converter",
        "llama.cpp": "as in llama-cpp-python 0.3.36",
        "tokenizers": {key: one for key, one in tokenizers.items() if key in used},
        "models": found,
    }
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
