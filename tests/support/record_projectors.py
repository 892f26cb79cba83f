"""Record what llama.cpp's own converter makes of the towers of `tests.support.seeing`.

    python -m tests.support.record_projectors --python VENV/bin/python --llama-cpp FOLDER

The arguments are those of `tests.support.record_converter`.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from tests.support import seeing
from tests.support.record_converter import described
from tests.support.their_converter import VERSION, TheirConverter

RECORD = Path(__file__).parent / "projector_record.json"

FILE_TYPES = ("F32", "F16", "BF16")


def told(path: Path) -> dict[str, Any]:
    """A projector's metadata, and a hash of its tensors for each name in a block."""
    found = described(path)
    lines: dict[str, list[str]] = {}
    for name, one in sorted(found["tensors"].items()):
        number = re.search(r"\.(\d+)\.", name)
        stem = name.replace(number[0], ".N.", 1) if number else name
        lines.setdefault(stem, []).append(f"{number[1] if number else ''} {one}")
    tensors = {
        name: hashlib.sha256("\n".join(each).encode()).hexdigest()[:16]
        for name, each in lines.items()
    }
    return {"metadata": found["metadata"], "tensors": tensors}


def main() -> None:
    """Write `RECORD`."""
    converter = TheirConverter.of_arguments()
    found: dict[str, Any] = json.loads(RECORD.read_text())["towers"] if RECORD.is_file() else {}
    names = list(seeing.FAMILIES)
    for name, kind, path in converter.written(names, seeing.write, FILE_TYPES, "--mmproj"):
        found.setdefault(name, {})[kind] = told(path)
    record = {
        "made by": "python -m tests.support.record_projectors",
        "llama.cpp": VERSION,
        "towers": {name: one for name, one in found.items() if name in seeing.FAMILIES},
    }
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
