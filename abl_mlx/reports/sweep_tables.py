"""How refusals depend on how much of a reply is read: rows and sentences for tables and pages."""

from __future__ import annotations

from abl_mlx.records.evaluations import Asked
from abl_mlx.records.measurements import LengthSweep

#: What a reply was cut by, where that is not the model's own tokens.
_CUT_BY = {
    "spread": "the server tells only how many tokens a reply has: they are taken to be of one "
    "length",
    "words": "the server tells nothing of its tokens: three words are taken for four of them",
}


def head(sweep: LengthSweep) -> tuple[str, ...]:
    """The head of a table of `rows`."""
    return ("refusals by tokens read", *map(str, sweep.lengths))


def rows(record: Asked, baseline: Asked | None) -> list[tuple[str, ...]]:
    """A row for each prompt set of each model: refused of asked, at each length."""
    found = []
    for who, one in (("baseline: ", baseline), ("", record)):
        if one is None or one.length_sweep is None:
            continue
        for name, swept in one.length_sweep.sets.items():
            cells = [f"{count}/{swept.n}" for count in swept.refused]
            found.append((f"{who}{_titled(name)}", *cells))
            pairs = zip(swept.broken, swept.unfinished, strict=True)
            others = [broken - unfinished for broken, unfinished in pairs]
            if any(others):
                found.append((f"{who}{_titled(name)}: empty or looping", *map(str, others)))
            if any(swept.unfinished):
                found.append(
                    (f"{who}{_titled(name)}: inside a thought", *map(str, swept.unfinished))
                )
    return found


def sentences(record: Asked, baseline: Asked | None) -> list[str]:
    """What a sweep found, for a person."""
    found = []
    models = [("", record)] if baseline is None else [("baseline: ", baseline), ("", record)]
    for who, one in models:
        if one.length_sweep is not None:
            found += [f"{who}{text}" for text in _of_one(one.length_sweep)]
    found.append(f"rates are of replies of at most {record.max_tokens} tokens")
    return found


def _of_one(sweep: LengthSweep) -> list[str]:
    first, last = sweep.lengths[0], sweep.lengths[-1]
    if sweep.suffices is None:
        found = [f"no refusal is seen in {last} tokens"]
    else:
        found = [
            f"{sweep.suffices} tokens suffice: {sweep.share:.0%} of the refusals that are seen at "
            f"{last} tokens are seen by then"
        ]
    for name, swept in sweep.sets.items():
        if swept.markers is not None:
            places = swept.markers
            found.append(
                f"{_titled(name)}: half of the {places.n} refusals read as such from "
                f"{places.median} tokens on, 95% from {places.p95}, all from {places.last}"
                if places.median < places.last
                else f"{_titled(name)}: the refusals read as such from {places.last} tokens on"
            )
        if swept.late:
            found.append(
                f"{_titled(name)}: {_replies(swept.late)} as an answer at {first} tokens and as "
                f"a refusal at {last}"
            )
        if swept.turned:
            found.append(
                f"{_titled(name)}: {_replies(swept.turned)} as a refusal first and as an answer "
                f"at {last} tokens"
            )
        if swept.declining:
            found.append(
                f"{_titled(name)}: in {swept.declining} of the answers a plain refusal follows"
            )
    if sweep.cut_by in _CUT_BY:
        found.append(_CUT_BY[sweep.cut_by])
    return found


def _replies(count: int) -> str:
    return "1 reply reads" if count == 1 else f"{count} replies read"


def _titled(name: str) -> str:
    """A set's name for a person; that of another mode of thinking ends with the mode."""
    first, comma, mode = name.partition(", ")
    return f"{first} prompts{comma}{mode}"
