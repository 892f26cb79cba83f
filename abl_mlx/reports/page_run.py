"""Where the page of a run goes, and what of the replies is on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from abl_mlx.behaviour import evaluate
from abl_mlx.choices import Options
from abl_mlx.inputs.prompts import PromptSets
from abl_mlx.outputs import staging
from abl_mlx.outputs.provenance import without_home


def write_run_page(
    record: Mapping[str, Any],
    paths: Sequence[Path],
    options: Options,
    replies: Mapping[str, evaluate.Behaviour],
    sets: PromptSets,
) -> None:
    """Write the page of a run into or beside each output, or where ``--report`` says.

    Args:
        replies: who -> what they did; shown with ``--save-completions`` alone.
    """
    from abl_mlx.reports import pages

    lines = evaluate.reply_lines(replies, sets) if options.save_completions else []
    text = pages.run_page(without_home(record), lines)
    places = [staging.report_place(path) for path in paths]
    for place in places if options.report is None else [options.report]:
        pages.write(place, text)


def staged_run_page(
    record: Mapping[str, Any],
    staged: Sequence[Path],
    options: Options,
    replies: Mapping[str, evaluate.Behaviour],
    sets: PromptSets,
) -> bool:
    """The same while the outputs are staged, so that they get their names with their pages.

    Returns:
        False where the page has a place of its own, or could not be written: it is then written,
        or what is wrong with it is told, when the outputs have their names. A model that took an
        hour is not lost with its page.
    """
    if options.report is not None:
        return False
    try:
        write_run_page(record, staged, options, replies, sets)
    except Exception:  # told by the second attempt
        return False
    return True
