"""Records that are read back from a file, of this version of abl-mlx or of an earlier one."""

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
    """What `eval` found of the harmful prompts, as every version's record says it.

    Attributes:
        judge: None in records of before there were judges.
        verdicts: a letter for each prompt.
        n: how many replies have a verdict.
        refusal_rate: of these.
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
    """The record of `eval` that a file holds.

    Args:
        mend: how a record is made anew.

    Raises:
        UserError: when it is not there, is none, or is of a version that is not known.
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
    """Refuse a record of a version that is not known; one that says none is of an earlier abl-mlx.

    Args:
        mend: how the record is made anew.

    Raises:
        UserError: naming the file and its version.
    """
    version = values.get("format_version", 0)
    if isinstance(version, bool) or version not in range(FORMAT_VERSION + 1):
        said = shortened(repr(version), 40)
        raise UserError(
            f"{path} cannot be used: its format_version is {said}, and this "
            f"abl-mlx reads versions up to {FORMAT_VERSION}; {mend}, or update abl-mlx."
        )
