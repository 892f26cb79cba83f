"""The work of each view, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

from abl_mlx.choices import SteerOptions
from abl_mlx.commands import prompt_choice, session, targets
from abl_mlx.commands.condition_choice import when
from abl_mlx.commands.session import Steered
from abl_mlx.inputs.sets import PromptSets
from abl_mlx.outputs.model_file import find_model
from abl_mlx.studio import checking, finding, judging, looking, talking, writing
from abl_mlx.studio.app import Reports
from abl_mlx.studio.desk import Event, Loaded, Work
from abl_mlx.studio.dropped import Dropped
from abl_mlx.studio.searching import Searches
from abl_mlx.studio.talking_llamacpp import Talking


def load(
    text: str, options: SteerOptions, runtime: str | None, reports: Reports, dropped: Dropped,
    stack: ExitStack,
) -> Loaded:  # fmt: skip
    """Load a model with its direction, and what can be done with it.

    Args:
        text: the model, as the user typed it.
        options: those of the command line.
        runtime: what a GGUF replies in, as for `eval`; None for the first available one.
        reports: keeps pages that work makes.
        dropped: the files that were dropped on the page.
        stack: ends llama.cpp at its end.
    """
    steered = session.load(text, options)
    sets = lru_cache(None)(lambda: _sets(text, options))
    searches = Searches(options, sets)
    talks_in, reply = _talking(text, options, steered, runtime, stack)
    works = {
        "talk": reply,
        "look": looking.components,
        "token": looking.token,
        "find": finding.found,
        "clouds": _with(finding.clouds, sets),
        "search": searches.run,
        "examples": _with(judging.examples, sets),
        "judge": _with(judging.judged, sets),
        "capability": judging.capable,
        "check": _with(checking.audited, reports.keep, dropped),
        "write": _with(writing.written, options),
    }
    picked = {name: _at(searches, work) for name, work in works.items()}
    return Loaded(steered, picked, talks_in)


def _talking(
    text: str, options: SteerOptions, steered: Steered, runtime: str | None, stack: ExitStack
) -> tuple[str, Work]:
    """In what the model replies, and how. An adapter holds no condition and no template."""
    with find_model(text, options.chatting.template) as file:
        chosen = targets.runtime_of(file, runtime)
        conditional = when(steered.direction, steered.conditioning) is not None
        if chosen == "mlx-lm" or conditional or options.chatting.template is not None:
            return "mlx-lm", talking.reply
        found = Talking(text, file.source.path, chosen, options)
    stack.callback(found.close)
    return chosen, found.reply


def _at(searches: Searches, work: Work) -> Work:
    """Work with the edit that a request picks from the front of a search."""

    def picked(steered: Steered, body: Mapping[str, Any]) -> Iterator[Event]:
        return work(searches.at(steered, body), body)

    return picked


def _with(work: Callable[..., Iterator[Event]], *more: Any) -> Work:
    def given(steered: Steered, body: Mapping[str, Any]) -> Iterator[Event]:
        return work(steered, body, *more)

    return given


def _sets(text: str, options: SteerOptions) -> PromptSets:
    with find_model(text, options.chatting.template) as file:
        return prompt_choice.load(file, options.prompting, options.finding.borderline)
