"""Prompts with system messages, prefixes, suffixes and earlier turns: files, hashes, templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from abl_mlx.inputs import prompts, thinking
from abl_mlx.inputs.sets import Prompt, PromptSet, split
from convert.base.errors import UserError


def rows(tmp_path: Path, *lines: dict[str, Any]) -> tuple[Prompt, ...]:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return prompts.load(str(path), "--harmful").prompts


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a river."},
    {"role": "assistant", "content": "The Po."},
    {"role": "user", "content": "Another?"},
]


def test_fields_of_a_row(tmp_path: Path) -> None:
    whole, around, system = rows(
        tmp_path,
        {"messages": TURNS, "category": "water"},
        {"text": "Name a hill.", "prefix": "Please: ", "suffix": " Thanks."},
        {"text": "Name a lake.", "system": "Answer in French."},
    )
    earlier = (("user", "Name a river."), ("assistant", "The Po."))
    assert whole == Prompt("Another?", "water", system="Be brief.", earlier=earlier)
    assert whole.messages() == TURNS
    assert around == Prompt("Please: Name a hill. Thanks.")
    assert system == Prompt("Name a lake.", system="Answer in French.")


def test_columns_of_a_csv(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text("prompt,system,suffix\nName a lake.,Be brief.,!\nName a hill.,,\n")
    assert prompts.load(str(path), "--harmful").prompts == (
        Prompt("Name a lake.!", system="Be brief."),
        Prompt("Name a hill."),
    )


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "line 1: messages is empty"),
        ("Hello", "line 1: messages has to be a list of"),
        ([{"role": "user"}], "line 1: messages has to be a list of"),
        ([{"role": "tool", "content": "3"}], "with one of the roles system, user, assistant"),
        (TURNS[:3], "line 1: the last of its messages has to be the user's"),
        ([TURNS[1], TURNS[0], TURNS[3]], "a system message stands at the beginning"),
    ],
)
def test_messages_that_are_none(tmp_path: Path, messages: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        rows(tmp_path, {"messages": messages})


def test_a_system_message_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 1 holds a value of type int in system"):
        rows(tmp_path, {"text": "Hello", "system": 3})


def test_without_the_role_it_is_the_first_line() -> None:
    prompt = Prompt("Another?", system="Be brief.", earlier=(("user", "One?"), ("assistant", "1")))
    folded = prompt.messages(system_role=False)
    assert [one["content"] for one in folded] == ["Be brief.\nOne?", "1", "Another?"]


def test_what_is_asked_is_hashed() -> None:
    plain = PromptSet("x", (Prompt("Hello"), Prompt("Bye")))
    asked = [
        plain,
        plain.asked(system="Be brief."),
        plain.asked(thinking="on"),
        plain.asked(system="Be brief.", thinking="on"),
        PromptSet("x", (Prompt("Hello", earlier=(("user", "Hi"),)), Prompt("Bye"))),
    ]
    assert len({one.sha256 for one in asked}) == len(asked)
    assert plain.asked().sha256 == plain.sha256
    # A prompt's own system message stays.
    own = PromptSet("x", (Prompt("Hello", system="Mine."),)).asked(system="Yours.")
    assert own.prompts[0].system == "Mine."


def test_the_same_question_under_two_system_messages_is_two_prompts() -> None:
    both = [Prompt(f"Question {n}", system=one) for n in range(20) for one in (None, "Be brief.")]
    parts = split(PromptSet("x", tuple(both)), seed=0)
    assert len(parts.train) + len(parts.validation) + len(parts.test) == 40


def test_a_system_message_is_a_text_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "system.txt"
    path.write_text("Only answer\nabout cooking.\n")
    assert prompts.system_message(str(path)) == "Only answer\nabout cooking."
    assert prompts.system_message("Be brief.") == "Be brief."
    assert prompts.system_message(None) is None
    with pytest.raises(UserError, match="--system is empty"):
        prompts.system_message(" ")


@pytest.mark.parametrize("name", ["missing.txt", "~/nowhere/system", "/no/such/folder/a", "a/b.md"])
def test_the_name_of_a_missing_file_is_no_system_message(name: str) -> None:
    with pytest.raises(UserError, match=f"--system {name} does not exist: give a file with"):
        prompts.system_message(name)


@pytest.mark.parametrize("text", ["/no_think", "You are a/the cook.", "Koch.", "See notes.txt."])
def test_a_text_that_is_no_file_name_is_a_system_message(text: str) -> None:
    assert prompts.system_message(text) == text


def test_a_folder_and_an_empty_file_are_no_system_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder: give a file with the system message"):
        prompts.system_message(str(tmp_path))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="is empty: write the system message into it"):
        prompts.system_message(str(tmp_path / "empty.txt"))


def test_modes_of_thinking() -> None:
    assert thinking.modes("off") == (None,)
    assert thinking.modes("both") == (None, "on")
    assert thinking.modes("high") == ("high",)
    with pytest.raises(UserError, match="--thinking 3: give off, on, both, or an amount"):
        thinking.modes("3")
    assert thinking.template_values(None) == {"enable_thinking": False}
    assert thinking.template_values("low")["reasoning_effort"] == "low"
    assert thinking.request_fields("on")["think"] is True


def test_the_tools_of_a_row(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "get_weather"}}]
    listed, text, none = rows(
        tmp_path,
        {"text": "Is it raining?", "tools": tools},
        {"text": "Is it raining?", "tools": json.dumps(tools)},
        {"text": "Is it raining?", "tools": []},
    )
    assert listed == text
    assert [tool.json for tool in listed.tools] == tools
    assert none == Prompt("Is it raining?")
    with pytest.raises(UserError, match="line 1: tools: number 1 is no tool"):
        rows(tmp_path, {"text": "Is it raining?", "tools": [{"name": ""}]})
    with pytest.raises(UserError, match="line 1: tools cannot be used: it is not valid JSON"):
        rows(tmp_path, {"text": "Is it raining?", "tools": "["})
