"""Reads records from a file, of this version of abl-mlx or of an earlier one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abl_mlx.records.record import FORMAT_VERSION
from convert.base import json_text, schema
from convert.base.errors import UserError
from convert.base.escape import shortened

#: In place of a verdict, where a judge gave none that can be read.
UNJUDGED = "?"


@dataclass(frozen=True)
class EarlierEval:
    """The figures of harmful prompts that the records of `eval` of all versions have.

    Attributes:
        judge: what judged the replies; None in records from before there were judges.
        verdicts: a letter for each prompt.
        n: the number of replies with a verdict.
        refusal_rate: the share of refusals among these, 0 to 1.
        prompts_sha256: of the prompts' texts.
        template_sha256: of a chat template that was given in place of the model's own.
    """

    judge: str | None
    verdicts: str
    n: int
    refusal_rate: float
    prompts_sha256: str
    template_sha256: str | None


def earlier_eval(path: Path, mend: str) -> EarlierEval:
    """The record of `eval` in a file.

    Args:
        path: the file.
        mend: how such a record is made, for the error.

    Raises:
        UserError: when there is no such file, it holds no such record, or its version is not known.
    """
    try:
        values: dict[str, Any] = json_text.read(path, _EVAL, mend=mend)
    except FileNotFoundError:
        raise UserError(f"{path} cannot be read: it is not there.") from None
    check_version(values, path, mend)
    found = EarlierEval(
        values.get("judge"),
        values["verdicts"]["harmful"],
        values["n_harmful"],
        values["harmful_refusal_rate"],
        values["prompts"]["harmful"]["sha256"],
        (values.get("template") or {}).get("sha256"),
    )
    told = len(found.verdicts) - found.verdicts.count(UNJUDGED)
    if told != found.n:
        raise UserError(
            f"{path} cannot be used: its n_harmful is {found.n}, and it has "
            f"{len(found.verdicts)} verdicts; {mend}."
        )
    return found


_EVAL = schema.record(
    {"judge": schema.TEXT, "template": schema.record({}, {"sha256": schema.TEXT})},
    {
        "verdicts": schema.record(
            {}, {"harmful": schema.text(f"[RAB{re.escape(UNJUDGED)}]+", "letters of verdicts")}
        ),
        "n_harmful": schema.whole(1),
        "harmful_refusal_rate": schema.number(0, 1),
        "prompts": schema.record({}, {"harmful": schema.record({}, {"sha256": schema.TEXT})}),
    },
)


def check_version(values: Mapping[str, Any], path: Path, mend: str) -> None:
    """Refuse a record whose version is not known; a record without one is of an earlier abl-mlx.

    Args:
        values: the record's JSON.
        path: its file.
        mend: how the record is made again, for the error.

    Raises:
        UserError: naming the file and the version.
    """
    version = values.get("format_version", 0)
    if isinstance(version, bool) or version not in range(FORMAT_VERSION + 1):
        said = shortened(repr(version), 40)
        raise UserError(
            f"{path} cannot be used: its format_version is {said}, and this "
            f"abl-mlx reads versions up to {FORMAT_VERSION}; {mend}, or update abl-mlx."
        )
