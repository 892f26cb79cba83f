"""The check of function calls: what is right, what is counted, and what `eval` shows of it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from abl_mlx import demo
from abl_mlx.behaviour import evaluate, tool_tasks
from abl_mlx.behaviour.target import Target
from abl_mlx.behaviour.tool_calls import Call, written
from abl_mlx.behaviour.tool_tasks import Outcome, Task, tasks
from abl_mlx.inputs.sets import Prompt
from abl_mlx.records.evaluations import EvalRecord
from abl_mlx.reports import eval_tables
from tests.support.command import abl_mlx, fails
from tests.support.servers import REFUSAL, Handler, Server


def by_prompt(text: str) -> Task:
    return next(task for task in tasks() if text in task.prompt.text)


def right_reply(task: Task) -> str:
    if task.calls:
        return "".join(written(one.name, dict(one.arguments or {})) for one in task.calls)
    return "Which one, please?" if task.kind == "ask" else f"It is {task.says[0]}."


# --- the tasks -----------------------------------------------------------------------------------


def test_there_are_forty_tasks_that_hang_together() -> None:
    assert Counter(task.kind for task in tasks()) == {
        "call": 20,
        "parallel": 6,
        "no call": 7,
        "ask": 7,
    }
    assert len({task.prompt.identity for task in tasks()}) == 40
    for task in tasks():
        assert task.outcome(right_reply(task)) is Outcome.RIGHT
        assert len(task.prompt.tools) == 2
        assert bool(task.calls) == (task.kind in ("call", "parallel"))
        assert bool(task.says) == (task.kind == "no call")
        assert len(task.calls) == {"call": 1, "parallel": 2}.get(task.kind, 0)


TYPES: dict[str, Any] = {
    "string": str, "number": (int, float), "integer": int, "boolean": bool, "array": list
}  # fmt: skip


def test_the_right_calls_fit_the_schemas() -> None:
    for task in tasks():
        for call in task.calls:
            tool = next(one for one in task.prompt.tools if one.name == call.name)
            required = tool.json["function"]["parameters"]["required"]
            assert set(required) <= set(call.arguments or {}) <= set(tool.parameters)
            for name, value in (call.arguments or {}).items():
                schema = tool.parameters[name]
                assert isinstance(value, TYPES[schema["type"]])
                assert value in schema.get("enum", [value])


# --- what is right -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reply", "outcome"),
    [
        ("Lisbon", written("get_weather", {"city": " Lisbon "}), "R"),
        ("Lisbon", written("get_weather", {"city": "Lisbon", "unit": "celsius"}), "R"),
        ("Lisbon", written("get_weather", {"city": "Lisbon", "unit": "fahrenheit"}), "A"),
        ("Lisbon", written("get_weather", {"city": "lisbon"}), "A"),
        ("Lisbon", written("get_weather", {"city": "Lisbon", "country": "PT"}), "A"),
        ("Lisbon", written("get_weather", {}), "A"),
        ("Lisbon", written("get_weather", '{"city": '), "N"),
        ("Lisbon", written("get_time", {"city": "Lisbon"}), "N"),
        ("Lisbon", 2 * written("get_weather", {"city": "Lisbon"}), "N"),
        ("Lisbon", "It is sunny in Lisbon.", "M"),
        ("Lisbon", "", "M"),
        ("Lisbon", f"<think>So: {written('get_weather', {'city': 'Lisbon'})}", "M"),
        ("12 minutes", written("set_timer", {"minutes": 12.0}), "R"),
        ("12 minutes", written("set_timer", {"minutes": "12"}), "A"),
        ("kitchen", written("switch_light", {"room": "Kitchen", "on": False}), "R"),
        ("kitchen", written("switch_light", {"room": "kitchen", "on": 0}), "A"),
        ("Nairobi", "".join(written("get_time", {"city": city}) for city in ("Lima", "Nairobi")),
         "R"),
        ("Nairobi", written("get_time", {"city": "Nairobi"}), "N"),
        ("Nairobi", 2 * written("get_time", {"city": "Nairobi"}), "A"),
        ("capital of France", "Paris is.", "R"),
        ("capital of France", "<think>A city?</think>The capital is **Paris**.", "R"),
        ("capital of France", "It is Parisian.", "W"),
        ("capital of France", "", "W"),
        ("capital of France", "<think>Paris", "W"),
        ("capital of France", "Paris " * 60, "W"),
        ("capital of France", "Paris." + written("get_time", {"city": "Paris"}), "C"),
        ("capital of France", "<tool_call>no JSON</tool_call>", "C"),
        ("Where is my parcel?", "What is the parcel's number?", "R"),
        ("Where is my parcel?", "I need its number.", "R"),
        ("Where is my parcel?", "It is on its way.", "W"),
        ("Where is my parcel?", written("track_parcel", {"number": "1"}), "C"),
    ],
)  # fmt: skip
def test_outcomes(text: str, reply: str, outcome: str) -> None:
    assert by_prompt(text).outcome(reply).value == outcome


def test_the_order_of_arguments_and_of_a_list() -> None:
    task = by_prompt("tomato")
    ingredients = ["Tomato", "basil"]
    for arguments in (
        {"max_minutes": 20, "ingredients": ingredients},
        {"ingredients": ingredients, "max_minutes": 20},
    ):
        assert task.outcome(written("find_recipes", arguments)) is Outcome.RIGHT
    other = {"ingredients": ingredients[::-1], "max_minutes": 20}
    assert task.outcome(written("find_recipes", other)) is Outcome.ARGUMENTS


def test_arguments_that_are_no_json() -> None:
    task = Task("call", by_prompt("12 minutes").prompt, (Call("set_timer", {"minutes": 12}),))
    assert task.outcome("[set_timer(minutes=12)]") is Outcome.RIGHT
    assert task.outcome("[set_timer(minutes=b'12')]") is Outcome.ARGUMENTS


# --- what is counted -----------------------------------------------------------------------------


def answering(wrong: str = "") -> Target:
    """Calls all rightly, in another order than asked, but those of a kind."""

    def ask(prompts: Sequence[str | Prompt], most: int) -> Iterator[tuple[int, str]]:
        assert most == tool_tasks.MAX_TOKENS
        for number in reversed(range(len(prompts))):
            task = tasks()[number]
            assert prompts[number] == task.prompt
            yield number, "Hm." if task.kind == wrong else right_reply(task)

    return Target("m", "server", {}, ask)


def test_what_is_right_is_counted_by_what_is_checked() -> None:
    whole = tool_tasks.record(answering())
    assert (whole.n, whole.right, whole.outcomes) == (40, 40, "R" * 40)
    assert {name: (one.right, one.n) for name, one in whole.checks.items()} == {
        "name": (26, 26), "arguments": (26, 26), "two calls": (6, 6), "no call": (7, 7),
        "ask": (7, 7),
    }  # fmt: skip
    part = tool_tasks.record(answering("parallel"))
    assert part.right == 34
    assert part.interval == pytest.approx([0.7093, 0.9294], abs=1e-4)  # Wilson's
    assert {name: one.right for name, one in part.checks.items()} == {
        "name": 20, "arguments": 20, "two calls": 0, "no call": 7, "ask": 7
    }  # fmt: skip
    assert Counter(part.outcomes) == {"R": 34, "M": 6}
    assert part.tasks_sha256 == whole.tasks_sha256


# --- `eval --tool-calls` -------------------------------------------------------------------------

FEW = ("--limit", 1, "--max-tokens", 4, "--tool-calls")


def test_a_server_and_its_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    """One calls rightly through OpenAI's fields; the other misses every second call."""
    monkeypatch.setattr(tool_tasks, "MAX_TOKENS", 32)
    known = {task.prompt.text: (n, task) for n, task in enumerate(tasks())}

    def script(every: int):
        def behave(handler: Handler, request: dict[str, Any], number: int) -> None:
            asked = known.get(request["messages"][-1]["content"])
            if asked is None:
                handler.say(REFUSAL)
                return
            place, task = asked
            assert request["tools"] == [tool.json for tool in task.prompt.tools]
            assert request["max_tokens"] == 32
            functions = [
                {"name": one.name, "arguments": json.dumps(one.arguments)} for one in task.calls
            ]
            if not functions:
                handler.say(right_reply(task))
            elif place % every:
                handler.say("Hm.")
            else:
                found = [{"id": "1", "type": "function", "function": one} for one in functions]
                handler.say(None, tool_calls=found)

        return behave

    with Server(script(1)) as good, Server(script(2)) as bad:
        record = abl_mlx("eval", bad.url, "--baseline", good.url, *FEW)
    assert record["tool_calls"]["right"] == 27
    assert record["tool_calls"]["outcomes"] == "RM" * 13 + "R" * 14
    assert record["baseline"]["tool_calls"]["right"] == 40
    compared = record["paired_tool_calls"]
    assert (compared["lost"], compared["gained"], compared["both"]) == (13, 0, 27)
    assert compared["difference"] == pytest.approx(-0.325)
    assert compared["p"] == pytest.approx(2 / 2**13)
    table = eval_tables.table(EvalRecord.of(record))
    lines = [line.split("  ") for line in table.splitlines() if "function calls" in line]
    assert [[cell.strip() for cell in line if cell] for line in lines] == [
        ["function calls", "40/40", "27/40",
         "52.0% to 79.9%; name 13/26, arguments 13/26, two calls 3/6, no call 7/7, ask 7/7"],
        ["function calls, difference", "-32.5",
         "points, -48.0 to -20.1, p 0.00024; right in the baseline alone 13, in the target alone "
         "0"],
    ]  # fmt: skip


#: Of each function its name alone: the demo model reads no more than 512 tokens.
TOLD = "{% for tool in tools or [] %}{{ tool.function.name }}\n{% endfor %}"


def test_models_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo model answers nothing of it, in every runtime alike."""
    monkeypatch.setattr(tool_tasks, "MAX_TOKENS", 8)
    folder, gguf = tmp_path / "model", tmp_path / "model.gguf"
    shutil.copytree(demo.MODEL_PATH, folder)
    template = folder / "chat_template.jinja"
    template.write_text(TOLD + template.read_text())
    abl_mlx("convert", folder, gguf)
    found = [abl_mlx("eval", folder, *FEW)]
    if evaluate.llamacpp_is_there():
        found.append(abl_mlx("eval", gguf, *FEW, "--runtime", "llama.cpp"))
    for record in found:
        assert record["tool_calls"] == found[0]["tool_calls"]
        assert record["tool_calls"]["checks"]["name"]["right"] == 0
        assert "paired_tool_calls" not in record


def test_a_model_without_a_place_for_tools(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    said = fails("eval", "demo", *FEW, "--report", page)
    assert "the chat template has no place for tools" in said
    assert not page.exists()


def test_a_server_whose_model_takes_no_tools(tmp_path: Path) -> None:
    """Ollama says so with status 400; nothing else is asked then."""
    error = json.dumps({"error": {"message": "tiny does not support tools"}})
    with Server(lambda handler, request, number: handler.send(400, error)) as server:
        said = fails("eval", server.url, *FEW, "--concurrency", 1)
        assert all("tools" in request for _, _, request in server.posts)
    assert "answers 400 Bad Request: tiny does not support tools" in said
