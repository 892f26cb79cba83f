"""What came of a case."""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass

#: Columns of the table; only the first two are no faults.
KINDS = (
    "accepted", "sentence", "traceback", "hang", "crash", "control", "memory", "partial", "unclear"
)  # fmt: skip

GOOD = ("accepted", "sentence")

# Terminal control characters, characters that hide or reverse text, and lone surrogates.
_UNFIT = re.compile(
    "(?![\\n\\t])[\\x00-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069\\ufeff\\ud800-\\udfff]"
)

_LONGEST = 1500


@dataclass(frozen=True)
class Verdict:
    """The kind of an outcome, and a text by which equal faults are counted together."""

    kind: str
    detail: str = ""

    @property
    def is_fault(self) -> bool:
        return self.kind not in GOOD


def of_output(code: int, error: BaseException | None, output: str) -> Verdict:
    """The verdict on a command that ended by itself.

    Args:
        code: its exit code.
        error: the exception that it raised, if other than SystemExit.
        output: everything that it printed.
    """
    if error is not None:
        return Verdict("traceback", _place(error))
    unfit = _UNFIT.search(output)
    if unfit is not None:
        around = output[max(0, unfit.start() - 60) : unfit.end() + 20]
        return Verdict("control", ascii(around))
    traced = re.search(r"^Traceback \(most recent call last\)(.|\n)*", output, re.MULTILINE)
    if traced is not None:
        return Verdict("traceback", " ".join(traced[0][-200:].split()))
    if code in (0, 3):
        return Verdict("accepted")
    said = output.rpartition("Error: ")[2].strip()
    if code not in (1, 2) or "Error: " not in output or not said or len(said) > _LONGEST:
        return Verdict("unclear", f"exit code {code}, {len(said)} characters: {said[:100]}")
    return Verdict("sentence", said[:200])


def _place(error: BaseException) -> str:
    """The innermost line of the tool's own code, and the exception."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [one for one in frames if re.search(r"/(abl_mlx|convert)/[\w/]+\.py$", one.filename)]
    where = "?"
    if own:
        parts = own[-1].filename.split("/")
        start = max(parts.index(name) for name in ("abl_mlx", "convert") if name in parts)
        where = f"{'/'.join(parts[start:])}:{own[-1].lineno}:{own[-1].name}"
    try:
        said = " ".join(str(error).split())[:120]
    except Exception:
        said = "?"
    return ascii(f"{where} {type(error).__name__}: {said}")[1:-1]
