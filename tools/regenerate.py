"""Write every document that is derived from the code.

    python -m tools.regenerate                    # all documents: two to four minutes
    python -m tools.regenerate docs/cli.md        # only this document
    python -m tools.regenerate --check            # writes nothing; exit code 1 if one would change

The two tables of mlx-lm's architectures take nearly all of that time, and more on a busy machine.
CI checks every document: the quick ones in tests/whole/test_regenerate.py, those two where their
tables are tested.

Tables of timed or long benchmarks are not included: docs/benchmarks.md names their programs.
"""

from __future__ import annotations

import argparse
import difflib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tools import (
    cli_reference,
    gguf_writers,
    memory_table,
    methods_page,
    mlx_architectures,
    mlx_batches,
    record_schema,
    refusal_detection,
)

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Document:
    """A derived document.

    Attributes:
        name: its path from the root of the repository.
        text: makes its whole text.
        seconds: about how long that takes on one quiet core.
    """

    name: str
    text: Callable[[], str]
    seconds: int


DOCUMENTS = (
    Document("docs/cli.md", cli_reference.document, 1),
    Document("docs/gguf-writers.md", gguf_writers.document, 1),
    Document("docs/methods.md", methods_page.document, 1),
    Document("docs/several-macs.md", memory_table.document, 1),
    Document("docs/records.schema.json", record_schema.text, 1),
    Document("docs/refusal-detection.md", refusal_detection.document, 5),
    Document("docs/mlx-architectures.md", mlx_architectures.document, 15),
    Document("docs/mlx-batches.md", mlx_batches.document, 120),
)


def regenerate(documents: Sequence[Document], root: Path, check: bool) -> int:
    """Write ``documents`` under ``root``, or only compare them: how many differed."""
    changed = 0
    for one in documents:
        print(f"{one.name}: about {one.seconds} s ...", flush=True)
        start = time.monotonic()
        new, path = one.text(), root / one.name
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        if new != old:
            changed += 1
            if not check:
                path.write_text(new, encoding="utf-8")
        state = "as it was" if new == old else "would change" if check else "written"
        print(f"{one.name}: {state} ({time.monotonic() - start:.1f} s)", flush=True)
        if new != old and check:
            lines = difflib.unified_diff(old.splitlines(), new.splitlines(), n=0, lineterm="")
            print("\n".join(islice(lines, 20)))
    return changed


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 1 when --check finds a document that would change."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.regenerate",
        description="Write every document that is derived from the code.",
    )
    names = [one.name for one in DOCUMENTS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 if one would change"
    )
    asked = parser.parse_args(arguments)
    for name in asked.names:
        if name not in names:
            parser.error(f"{name} is not a derived document; these are: {', '.join(names)}")
    chosen = [one for one in DOCUMENTS if not asked.names or one.name in asked.names]
    print(f"{len(chosen)} documents, about {sum(one.seconds for one in chosen)} s in all.")
    changed = regenerate(chosen, ROOT, asked.check)
    return int(asked.check and changed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
