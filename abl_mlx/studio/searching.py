"""A search for a gentler edit, trial by trial, and the edits of its front to talk to."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from abl_mlx.choices import Measuring, Searching, SteerOptions
from abl_mlx.commands import prompt_choice
from abl_mlx.commands.find import set_reply_prefixes
from abl_mlx.commands.session import Steered
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.inputs.sets import PromptSets
from abl_mlx.models.encoded_sets import opened
from abl_mlx.search import loop, outcome
from abl_mlx.search.loop import Search
from abl_mlx.studio import asked
from abl_mlx.studio.desk import Event
from abl_mlx.studio.turns import Tell, in_turns
from abl_mlx.support.arrays import evaluate
from convert.base.errors import UserError


class Searches:
    """Runs searches, and keeps the edits on the front of the last one."""

    def __init__(self, options: SteerOptions, sets: Callable[[], PromptSets]) -> None:
        """
        Args:
            options: those of the command line.
            sets: gives the prompts.
        """
        self._options, self._sets = options, sets
        self._folder = tempfile.TemporaryDirectory(prefix="abl-mlx-search-")
        self._points: dict[int, DirectionFile] = {}

    def run(self, steered: Steered, body: Mapping[str, Any]) -> Iterator[Event]:
        """Yield the trials of a search as they are made, those of its journal first.

        An event has new ``trials``, and the numbers of those on the ``front``. The last one says
        why the search ``ended``, which trial was ``chosen``, and how those of the front reply. A
        request that is given up ends the search after the trial; the same request goes on with it.

        Args:
            body: a request with ``trials``, the largest number of them, and ``journal``, the file
                that keeps them; without one they are kept until the studio ends.
        """
        journal = asked.text(body, "journal").strip()
        searching = Searching(
            search=asked.whole(body, "trials", 64, 1, 100_000),
            search_journal=Path(journal or Path(self._folder.name, "journal")),
        )
        measuring = self._options.measuring
        how = replace(
            measuring, searching=searching, finding=replace(measuring.finding, layer=None)
        )
        loop.check(how, len(steered.chat.layers))
        yield {"told": "encode the prompts"}
        evaluate(steered)  # another thread uses it
        yield from in_turns(lambda tell: self._search(steered, how, tell))

    def _search(self, steered: Steered, how: Measuring, tell: Tell) -> None:
        chat, sets = steered.chat, self._sets()
        if not chat.reply_prefixes:
            set_reply_prefixes(chat, sets, how)
        self._points = {}
        known: list[dict[str, Any]] = []

        def seen(search: Search) -> None:
            numbers = {id(trial): number for number, trial in enumerate(search.trials)}
            front = [numbers[id(trial)] for trial in search.front()]
            points = {}
            for number in front:
                if (point := self._points.get(number)) is None:
                    parameters = search.trials[number].parameters
                    point = outcome.with_edit(steered.direction, search.space, parameters)
                    evaluate(point.selected)
                points[number] = point
            self._points = points
            new = [trial.record() for trial in search.trials[len(known) :]]
            known.extend(new)
            tell({"trials": new, "front": front, "before": search.screen.before})

        prompts = opened(chat, prompt_choice.encoded(chat, sets, how))
        found = loop.improve(
            chat, steered.writers, prompts, steered.direction, how, seen=seen
        ).metadata
        replies = [
            {"number": number, **one}
            for one in found["search"]["front"]
            for number in [_number_of(one, known)]
        ]
        summary = found["summary"]["search"]
        chosen = next(one["number"] for one in replies if one["kl"] == summary["kl"])
        tell({"ended": summary["ended"], "chosen": chosen, "replies": replies})

    def at(self, steered: Steered, body: Mapping[str, Any]) -> Steered:
        """The model with the edit that a request picks from the front by its field ``point``.

        Raises:
            UserError: when there is no such edit.
        """
        if body.get("point") is None:
            return steered
        point = self._points.get(asked.whole(body, "point", 0, 0, 1 << 30))
        if point is None:
            raise UserError("this edit is not on the front of the last search: pick another.")
        return replace(steered, direction=point)


def _number_of(record: Mapping[str, Any], trials: list[dict[str, Any]]) -> int:
    """The number of the trial that a record with more fields is of."""
    return next(n for n, one in enumerate(trials) if one.items() <= record.items())
