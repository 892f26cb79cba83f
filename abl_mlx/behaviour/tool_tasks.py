"""`eval --tool-calls`: forty small tasks that show whether a model still calls functions correctly.

Each task offers two everyday functions. In 26 tasks one or two calls with known arguments are
correct. In 7 tasks no call is needed and the model should answer. In 7 tasks a required argument is
missing and the model should ask for it. Replies are compared with the known calls and words; no
judge is involved. This is a check and not a benchmark: a few points do not rank two models.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from importlib import resources
from typing import Any

from abl_mlx.behaviour import tool_calls
from abl_mlx.behaviour.capability import score
from abl_mlx.behaviour.refusals import Verdict, classify
from abl_mlx.behaviour.target import Target
from abl_mlx.behaviour.tool_calls import Call
from abl_mlx.inputs.sets import Prompt
from abl_mlx.inputs.tools import Tool, tools_of
from abl_mlx.models.thoughts import without_thoughts
from abl_mlx.records.measurements import ToolCalls
from abl_mlx.support.console import in_order

#: The longest reply in tokens. Two calls with all their tags take about 100 tokens.
MAX_TOKENS = 256

_TEXTS = resources.files("abl_mlx.inputs") / "texts"

# What a reply holds that asks for something, in English, the language of the tasks.
_ASKS = re.compile(
    r"\?|\b(?:please|could you|can you|would you|need|provide|specify|tell me|let me know|which)\b",
    re.IGNORECASE,
)


class Outcome(Enum):
    """The outcome of a task; the values are the letters that stand for it in a record."""

    RIGHT = "R"
    ARGUMENTS = "A"  # the correct functions with other arguments
    NAME = "N"  # another function, or more or fewer calls
    MISSED = "M"  # no call where one was correct
    UNCALLED = "C"  # a call where none was right
    WORDS = "W"  # no call, but neither the answer nor a question


@dataclass(frozen=True)
class Task:
    """A request with two functions, and the correct reply to it.

    Attributes:
        kind: "call", "parallel" (two calls), "no call", or "ask" (for a missing argument).
        prompt: the request, with the functions.
        calls: the correct calls; their order does not count.
        says: words of which a correct answer holds one; empty if every answer is correct.
        any_case: whether upper and lower case in the arguments count as equal.
    """

    kind: str
    prompt: Prompt
    calls: tuple[Call, ...] = ()
    says: tuple[str, ...] = ()
    any_case: bool = False

    def outcome(self, reply: str) -> Outcome:
        """The outcome of the task, by the reply."""
        found = tool_calls.calls(reply, self.prompt.tools)
        if self.calls:
            return Outcome.MISSED if not found else self._compared(found)
        if found:
            return Outcome.UNCALLED
        said = without_thoughts(reply) or ""
        broken = found is None or classify(reply, self.prompt.text) is Verdict.BROKEN
        return Outcome.RIGHT if not broken and self._is_said(said) else Outcome.WORDS

    def _compared(self, found: Sequence[Call]) -> Outcome:
        if Counter(one.name for one in found) != Counter(one.name for one in self.calls):
            return Outcome.NAME
        wanted, got = (Counter(map(self._form, calls)) for calls in (self.calls, found))
        return Outcome.RIGHT if wanted == got else Outcome.ARGUMENTS

    def _is_said(self, said: str) -> bool:
        if self.kind == "ask":
            return _ASKS.search(said) is not None
        return any(re.search(rf"\b{word}\b", said, re.IGNORECASE) for word in self.says)

    def _form(self, call: Call) -> str:
        """A text that is the same for calls that count as equal.

        The order of arguments, the difference of 1 and 1.0, and white space around a text do not
        count. An argument that equals its default counts as left out.
        """
        if call.arguments is None:
            return f"{call.name}?"
        schemas = next((one.parameters for one in self.prompt.tools if one.name == call.name), {})
        given = {}
        for name, value in call.arguments.items():
            schema = schemas.get(name, {})
            if "default" not in schema or self._plain(value) != self._plain(schema["default"]):
                given[name] = self._plain(value)
        return json.dumps([call.name, given], sort_keys=True)

    def _plain(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(name): self._plain(one) for name, one in value.items()}
        if isinstance(value, list | tuple):
            return [self._plain(one) for one in value]
        if isinstance(value, str):
            return value.strip().casefold() if self.any_case else value.strip()
        if isinstance(value, bool) or value is None:
            return value
        return float(value) if isinstance(value, int | float) else repr(value)


@cache
def tasks() -> tuple[Task, ...]:
    """All tasks."""
    tools = {
        one.name: one
        for one in tools_of(json.loads(_text("tools.json")), "abl-mlx's own tools.json")
    }
    return tuple(_task(json.loads(line), tools) for line in _text("tool_tasks.jsonl").splitlines())


def _text(name: str) -> str:
    return (_TEXTS / name).read_text(encoding="utf-8")


def _task(row: Mapping[str, Any], tools: Mapping[str, Tool]) -> Task:
    return Task(
        row["kind"],
        Prompt(row["prompt"], tools=tuple(tools[name] for name in row["tools"])),
        tuple(Call(one["name"], one["arguments"]) for one in row.get("calls", ())),
        tuple(row.get("says", ())),
        row.get("any_case", False),
    )


def record(target: Target) -> ToolCalls:
    """Ask all tasks, and count the correct replies in total and by kind of task.

    Raises:
        UserError: when the model's chat template has no place for functions.
    """
    asked = tasks()
    answered = target.ask([task.prompt for task in asked], MAX_TOKENS)
    replies = in_order(answered, len(asked), "function calls", "task")
    return scored([task.outcome(reply) for task, reply in zip(asked, replies, strict=True)])


def scored(outcomes: Sequence[Outcome]) -> ToolCalls:
    """The record of the outcomes of all tasks.

    Args:
        outcomes: the outcomes, in the order of `tasks`.
    """
    pairs = list(zip(tasks(), outcomes, strict=True))
    right = Outcome.RIGHT
    calling = [one for task, one in pairs if task.calls]
    whole = hashlib.sha256((_text("tools.json") + _text("tool_tasks.jsonl")).encode())
    return ToolCalls(
        **score([one is right for one in outcomes]).values_by_field,
        tasks_sha256=whole.hexdigest(),
        checks={
            "name": score([one in (right, Outcome.ARGUMENTS) for one in calling]),
            "arguments": score([one is right for one in calling]),
            "two calls": score([one is right for task, one in pairs if task.kind == "parallel"]),
            "no call": score([one is right for task, one in pairs if task.kind == "no call"]),
            "ask": score([one is right for task, one in pairs if task.kind == "ask"]),
        },
        outcomes="".join(one.value for one in outcomes),
    )
