"""The work of each view, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from abl_mlx.choices import SteerOptions
from abl_mlx.commands import prompt_choice
from abl_mlx.commands.session import Steered
from abl_mlx.inputs.sets import PromptSets
from abl_mlx.outputs.model_file import find_model
from abl_mlx.studio import checking, finding, judging, looking, talking, writing
from abl_mlx.studio.app import Reports
from abl_mlx.studio.desk import Event, Work
from abl_mlx.studio.dropped import Dropped


def works(text: str, options: SteerOptions, reports: Reports, dropped: Dropped) -> dict[str, Work]:
    """Name -> work.

    Args:
        text: the model, as the user typed it.
        options: those of the command line.
        reports: keeps pages that work makes.
        dropped: the files that were dropped on the page.
    """
    sets = lru_cache(None)(lambda: _sets(text, options))
    return {
        "talk": talking.reply,
        "look": looking.components,
        "token": looking.token,
        "find": finding.found,
        "examples": _with(judging.examples, sets),
        "judge": _with(judging.judged, sets),
        "capability": judging.capable,
        "check": _with(checking.audited, reports.keep, dropped),
        "write": _with(writing.written, options),
    }


def _with(work: Callable[..., Iterator[Event]], *more: Any) -> Work:
    def given(steered: Steered, body: Mapping[str, Any]) -> Iterator[Event]:
        return work(steered, body, *more)

    return given


def _sets(text: str, options: SteerOptions) -> PromptSets:
    with find_model(text, options.chatting.template) as file:
        return prompt_choice.load(file, options.prompting, options.finding.borderline)
