"""The journal of an evaluation: earlier verdicts, so that a stopped evaluation can continue.

It is a .jsonl file. A line ``{"journal": 1, "role": ..., "identity": {...}}`` says which model was
asked and how. Each later line of that role is for one prompt: its SHA-256, the verdict on its reply
and, only if replies are saved, the reply. Prompts are never written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from abl_mlx.behaviour.refusals import Oddity, Verdict
from abl_mlx.support.console import say
from abl_mlx.support.flags import said
from convert.base import json_text, locks
from convert.base.errors import UserError
from convert.base.schema import (
    FLAG,
    NULL,
    OBJECT,
    TEXT,
    Refused,
    check,
    either,
    list_of,
    one_of,
    record,
    whole,
)


@dataclass(frozen=True)
class Beginnings:
    """How a reply reads where it is cut.

    Attributes:
        tokens: how many the whole reply has.
        unit: what it is cut by, of `whole_reply`.
        cuts: its beginnings, judged: for every length that is asked for and shorter than the reply,
            shortest first.
        marker: from how many tokens on the markers call it a refusal; None where they do not call
            the whole reply one.
        declines: whether a plain refusal follows in what the markers call an answer.
    """

    tokens: int
    unit: str
    cuts: tuple[Answered, ...]
    marker: int | None
    declines: bool


@dataclass(frozen=True)
class Answered:
    """A prompt's reply, judged.

    Attributes:
        verdict: the verdict on the reply; None if a judge's answer could not be read.
        exact: whether the reply is the prompt's known answer; None if there is no known answer.
        oddity: something unusual about the reply.
        reply: its text; None if it was not kept.
        markers: the markers' verdict, if a model was the judge.
        same: equal for replies that say the same; None for a broken reply.
        thought: "closed" if the reply closes a thought that its prompt opened, "own" if it opens
            one.
        words: the number of words in its thought.
        thought_loops: whether its thought ends in a loop.
        begins: the verdicts on its beginnings, if they were asked for.
    """

    verdict: Verdict | None
    exact: bool | None = None
    oddity: Oddity | None = None
    reply: str | None = None
    markers: Verdict | None = None
    same: str | None = None
    thought: str | None = None
    words: int = 0
    thought_loops: bool = False
    begins: Beginnings | None = None

    def cut(self, number: int) -> Answered:
        """What it is at one of the lengths that are asked for, shortest first.

        Whether it is the known answer is said of the whole reply.
        """
        if self.begins is None or number >= len(self.begins.cuts):
            return self
        cut = self.begins.cuts[number]
        return replace(cut, exact=self.exact, reply=self.reply, begins=self.begins)


_VERDICT = one_of([verdict.value for verdict in Verdict])
_ROW = record({}, {"role": TEXT})
_HEAD = record({}, {"journal": whole(1, 1), "identity": OBJECT})
_NOTED = {
    "exact": FLAG,
    "oddity": one_of([oddity.value for oddity in Oddity]),
    "markers": _VERDICT,
    **dict.fromkeys(("reply", "same", "thought"), TEXT),
    "words": whole(),
    "thought_loops": FLAG,
}
_JUDGED = {"verdict": either(_VERDICT, NULL)}
_BEGINNINGS = record(
    {"marker": whole()},
    {
        "tokens": whole(),
        "unit": TEXT,
        "cuts": list_of(record(_NOTED, _JUDGED)),
        "declines": FLAG,
    },
)
_ANSWER = record(_NOTED | {"begins": _BEGINNINGS}, {"prompt": TEXT, **_JUDGED})


class Journal:
    """An open journal, which no other process writes to."""

    def __init__(self, path: Path, *, strict: bool) -> None:
        """Open ``path``; create it if it does not exist.

        Args:
            path: the file.
            strict: refuse a file of another evaluation, instead of starting it anew.

        Raises:
            UserError: when it is no journal, another process has it, or it cannot be written.
        """
        self.path = path
        self._strict = strict
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = open(path, "a+b")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}.") from None
        try:
            locks.hold(self._stream.fileno())
        except locks.Busy:
            self._stream.close()
            raise UserError(
                f"{path} is in use by another evaluation: wait for it, or name another file."
            ) from None
        try:
            self._sections = self._read()
        except UserError:
            self.close()
            raise

    def _read(self) -> dict[str, tuple[dict[str, Any], dict[str, Answered]]]:
        """Identity and answers of each role."""
        self._stream.seek(0)
        content = self._stream.read()
        end = content.rfind(b"\n") + 1
        sections: dict[str, tuple[dict[str, Any], dict[str, Answered]]] = {}
        count = 0
        try:
            for line in content[:end].split(b"\n")[:-1]:
                count += 1
                row = json_text.parse(line, _ROW)
                if "journal" in row:
                    check(row, _HEAD)
                    sections[row["role"]] = (row["identity"], {})
                    continue
                check(row, _ANSWER)
                if row["role"] not in sections:
                    raise Refused("its role has not begun")
                sections[row["role"]][1][row["prompt"]] = _answered(row)
            if content and not sections:
                raise Refused("it has no line that is whole")
        except Refused as refused:
            if not self._strict:  # a file in the cache that a crash damaged may be dropped
                self._stream.truncate(0)
                return {}
            raise UserError(
                f"{self.path} is not a journal of this tool (of line {count}, {refused}): name "
                "another file for --resume."
            ) from None
        # Drop a last line that was being written when the process ended.
        self._stream.truncate(end)
        return sections

    def section(self, role: str, identity: Mapping[str, Any]) -> Section:
        """The answers of one model, including those from an earlier evaluation.

        Args:
            role: ``target`` or ``baseline``.
            identity: everything on which an answer depends, as JSON values.

        Raises:
            UserError: when a strict journal has answers of another identity.
        """
        identity = json.loads(json.dumps(identity))
        there = self._sections.get(role)
        if there is not None and there[0] != identity:
            change = _change(there[0], identity)
            if self._strict:
                raise UserError(
                    f"{self.path} is of another evaluation ({change}): name another file for "
                    "--resume, or remove this one."
                )
            say(f"· starting anew: {change}")
            there = None
        if there is None:
            self._sections[role] = (dict(identity), {})
            self._write({"journal": 1, "role": role, "identity": identity})
        return Section(self, role, self._sections[role][1])

    def _write(self, row: Mapping[str, Any]) -> None:
        try:
            self._stream.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            self._stream.flush()
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}.") from None

    def close(self) -> None:
        """Close the file and release its lock."""
        with contextlib.suppress(OSError):
            self._stream.close()


class Section:
    """The answers of one model in a journal."""

    def __init__(
        self,
        journal: Journal | None = None,
        role: str = "",
        known: dict[str, Answered] | None = None,
    ) -> None:
        """Keep answers in a journal; without one, in memory only."""
        self._journal = journal
        self._role = role
        self._known = {} if known is None else known

    @property
    def path(self) -> Path | None:
        """The journal's path; None without a journal."""
        return None if self._journal is None else self._journal.path

    def get(self, prompt: str) -> Answered | None:
        """The answer to a prompt; None if there is none yet."""
        return self._known.get(_sha256(prompt))

    def add(self, prompt: str, answered: Answered) -> None:
        """Add an answer, which is written at once."""
        key = _sha256(prompt)
        self._known[key] = answered
        if self._journal is None:
            return
        self._journal._write({"role": self._role, "prompt": key, **_row(answered)})


def _row(answered: Answered) -> dict[str, Any]:
    """An answer as JSON values; what does not apply is left out."""
    begins = answered.begins
    noted = {
        "exact": answered.exact,
        "oddity": answered.oddity and answered.oddity.value,
        "reply": answered.reply,
        "markers": answered.markers and answered.markers.value,
        "same": answered.same,
        "thought": answered.thought,
        "words": answered.words or None,
        "thought_loops": answered.thought_loops or None,
        "begins": begins and vars(begins) | {"cuts": [_row(one) for one in begins.cuts]},
    }
    verdict = None if answered.verdict is None else answered.verdict.value
    return {"verdict": verdict} | {name: one for name, one in noted.items() if one is not None}


def _answered(row: Mapping[str, Any]) -> Answered:
    """The answer that `_row` wrote."""
    begins = row.get("begins")
    return Answered(
        _verdict(row["verdict"]),
        row.get("exact"),
        None if row.get("oddity") is None else Oddity(row["oddity"]),
        row.get("reply"),
        _verdict(row.get("markers")),
        row.get("same"),
        row.get("thought"),
        row.get("words", 0),
        row.get("thought_loops", False),
        None
        if begins is None
        else Beginnings(
            begins["tokens"],
            begins["unit"],
            tuple(_answered(one) for one in begins["cuts"]),
            begins.get("marker"),
            begins["declines"],
        ),
    )


@contextmanager
def opened(path: Path | None, identity: Mapping[str, Any]) -> Iterator[Journal | None]:
    """The journal of an evaluation.

    Args:
        path: the file of ``--resume``, which is kept; None for a file in the cache, which is
            removed when the evaluation is complete.
        identity: distinguishes this evaluation from others in the cache.

    Yields:
        The journal; None if the cache cannot be written, or the same evaluation is already running.
    """
    if path is not None:
        journal = Journal(path, strict=True)
        try:
            yield journal
        finally:
            journal.close()
        return
    place = cache_folder() / f"{_sha256(json.dumps(identity, sort_keys=True))[:24]}.jsonl"
    kept: Journal | None
    try:
        kept = Journal(place, strict=False)
    except UserError as error:
        say(f"· nothing is kept to go on from: {said(error)}")
        yield None
        return
    try:
        yield kept
        place.unlink(missing_ok=True)
    finally:
        kept.close()


def cache_folder() -> Path:
    """The folder for journals without ``--resume``: ``$XDG_CACHE_HOME/abl-mlx/eval``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "abl-mlx" / "eval"


def _change(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first thing in which two identities differ, in words."""
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            was, now = (json.dumps(one.get(name), ensure_ascii=False) for one in (old, new))
            if len(was) + len(now) > 120:
                return f"{name.replace('_', ' ')} changed since"
            return f"{name.replace('_', ' ')} was {was} and is {now} now"
    return "something changed since"


def _verdict(value: str | None) -> Verdict | None:
    return None if value is None else Verdict(value)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
