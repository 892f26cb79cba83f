"""Record what llama.cpp's own converter makes of the towers of `tests.support.seeing`.

    python -m tests.support.record_projectors --python VENV/bin/python --llama-cpp FOLDER

The arguments are those of `tests.support.record_converter`.
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

from tests.support import seeing
from tests.support.record_converter import described

RECORD = Path(__file__).parent / "projector_record.json"

FILE_TYPES = ("F32", "F16", "BF16")

_RUN = """
import json, sys, traceback
from pathlib import Path
where, jobs = sys.argv[1:]
sys.path.insert(0, where)
import convert_hf_to_gguf
for source, out, kind in json.loads(jobs):
    sys.argv = ["convert_hf_to_gguf.py", source, "--outfile", out, "--outtype", kind.lower(),
                "--mmproj"]
    try:
        convert_hf_to_gguf.main()
    except BaseException:
        Path(out + ".error").write_text(traceback.format_exc(limit=-2))
"""


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
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", required=True)
    parser.add_argument("--llama-cpp", required=True, type=Path)
    parser.add_argument("--only", default="", help="a part of the names of families")
    given = parser.parse_args()
    found: dict[str, Any] = json.loads(RECORD.read_text())["towers"] if RECORD.is_file() else {}
    with tempfile.TemporaryDirectory() as scratch:
        jobs, places = [], {}
        for at, name in enumerate(one for one in seeing.FAMILIES if given.only in one):
            folder = seeing.write(Path(scratch) / f"model{at}", name)
            for kind in FILE_TYPES:
                places[name, kind] = Path(scratch) / f"{at}-{kind}.gguf"
                jobs.append([str(folder), str(places[name, kind]), kind])
        command = [given.python, "-c", _RUN, str(given.llama_cpp.resolve()), json.dumps(jobs)]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": ""}, stderr=subprocess.DEVNULL)
        for (name, kind), path in places.items():
            # The converter puts "mmproj-" before the name that it is given.
            error, written = Path(f"{path}.error"), path.with_name(f"mmproj-{path.name}")
            if error.exists():
                print(f"{name} {kind}: {error.read_text()}", file=sys.stderr)
                continue
            found.setdefault(name, {})[kind] = told(written if written.exists() else path)
    record = {
        "made by": "python -m tests.support.record_projectors",
        "llama.cpp": "as in llama-cpp-python 0.3.36",
        "towers": {name: one for name, one in found.items() if name in seeing.FAMILIES},
    }
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
