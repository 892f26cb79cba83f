"""Calls of functions in replies: each family's own form, and what is none."""

from __future__ import annotations

import json
from typing import Any

import pytest

from abl_mlx.behaviour.tool_calls import UNREADABLE, Call, calls, written
from abl_mlx.inputs.tools import Tool, tools_of

TOOLS = tools_of(
    [
        {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "metric": {"type": "boolean"},
                },
            },
        },
        {"name": "clock.now"},
    ],
    "a test",
)
ONE = (Call("get_weather", {"city": "Oslo", "days": 3}),)
TWO = (*ONE, Call("get_weather", {"city": "Porto, old town", "days": 1, "metric": True}))
BARE = (Call("clock.now", {}),)

_A = '{"name": "get_weather", "arguments": {"city": "Oslo", "days": 3}}'
_B = '{"name": "get_weather", "arguments": {"city": "Porto, old town", "days": 1, "metric": true}}'
_A_LLAMA, _B_LLAMA = _A.replace("arguments", "parameters"), _B.replace("arguments", "parameters")
_ARGS = '{"city": "Oslo", "days": 3}'
_PYTHON = 'get_weather(city="Oslo", days=3)'
_PYTHON_B = 'get_weather(city="Porto, old town", days=1, metric=True)'

FORMS: dict[str, tuple[str, tuple[Call, ...]]] = {
    "Hermes, Qwen": (f"<tool_call>\n{_A}\n</tool_call>", ONE),
    "Hermes, two": (f"<tool_call>\n{_A}\n</tool_call>\n<tool_call>\n{_B}\n</tool_call>", TWO),
    "Hermes behind words": (f"I look it up.\n<tool_call>{_A}</tool_call><|im_end|>", ONE),
    "Hermes, left open": (f"<tool_call>\n{_A}", ONE),
    "Hermes behind a thought": (
        f"<think>Maybe <tool_call>{_B}</tool_call>?</think>\n\n<tool_call>\n{_A}\n</tool_call>", ONE
    ),
    "Hermes without arguments": ('<tool_call>{"name": "clock.now"}</tool_call>', BARE),
    "Qwen3-Coder": (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>", ONE
    ),
    "GLM 4.5": (
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>", ONE
    ),
    "Llama 3": (_A_LLAMA, ONE),
    "Llama 3 with its end": (f"{_A_LLAMA}<|eom_id|>", ONE),
    "Qwen2.5-Coder, another token": (f"<|im_start|>\n{_A}\n", ONE),
    "Llama 3, two": (f"{_A_LLAMA}; {_B_LLAMA}", TWO),
    "Llama 3, python tag": (f"<|python_tag|>{_A_LLAMA}<|eom_id|>", ONE),
    "Llama 3, built in": (f"<|python_tag|>get_weather.call{_PYTHON[11:]}", ONE),
    "Llama 3, function tag": (f"<function=get_weather>{_ARGS}</function>", ONE),
    "Llama 4": (f"[{_PYTHON}, {_PYTHON_B}]", TWO),
    "Mistral": (f"[TOOL_CALLS] [{_A}, {_B}]</s>", TWO),
    "Mistral since 2025": (
        f"[TOOL_CALLS]get_weather[ARGS]{_ARGS}[TOOL_CALLS]clock.now[CALL_ID]a1[ARGS]{{}}",
        (*ONE, *BARE),
    ),
    "Functionary 2, Phi 4": (f"functools[{_A}, {_B}]", TWO),
    "Functionary 3.2": (f">>>all\nI look.\n>>>get_weather\n{_ARGS}", ONE),
    "Granite": (f"<|tool_call|>[{_A}, {_B}]", TWO),
    "Granite with an end": (f"<|tool_call|>[{_A}]<|/tool_call|>", ONE),
    "Gemma 3, list": (f"[{_PYTHON}]", ONE),
    "Gemma 3, fence": (f"```tool_code\n{_PYTHON}\n```", ONE),
    "Gemma 3, printed": (f"```tool_code\nprint({_PYTHON})\n```", ONE),
    "FunctionGemma": (
        "<start_function_call>call:get_weather{city:<escape>Porto, old town<escape>,days:1,"
        "metric:true}<end_function_call>", TWO[1:]
    ),
    "LFM2": (f"<|tool_call_start|>[{_PYTHON}]<|tool_call_end|>", ONE),
    "DeepSeek V3": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n"
        f"```json\n{_ARGS}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>", ONE
    ),
    "DeepSeek V3.1": (
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{_ARGS}"
        "<｜tool▁call▁end｜><｜tool▁call▁begin｜>clock.now<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜>", (*ONE, *BARE)
    ),
    "gpt-oss": (
        "<|channel|>analysis<|message|>I need to=nothing.<|end|><|start|>assistant<|channel|>"
        f"commentary to=functions.get_weather <|constrain|>json<|message|>{_ARGS}<|call|>", ONE
    ),
    "gpt-oss, recipient first": (
        f"<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>{_ARGS}",
        ONE,
    ),
    "fenced JSON": (f"Sure:\n```json\n{_A}\n```", ONE),
    "fenced JSON, two": (f"```json\n{_A}\n```\n```json\n{_B}\n```", TWO),
    "arguments in a text": (
        f"<tool_call>{json.dumps({'name': 'get_weather', 'arguments': _ARGS})}</tool_call>", ONE
    ),
    "OpenAI's": (
        f'{{"type": "function", "function": {_A}}}', ONE
    ),
    "Python with JSON's words": ("[get_weather(city='Oslo', metric=true)]", (
        Call("get_weather", {"city": "Oslo", "metric": True}),
    )),
    "of an unknown function": ('<tool_call>{"name": "sing", "arguments": {}}</tool_call>', (
        Call("sing", {}),
    )),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_familys_own_form(form: str) -> None:
    reply, expected = FORMS[form]
    assert calls(reply, TOOLS) == expected


NONE = {
    "words": "The weather in Oslo is fine (as always).",
    "nothing": "",
    "another function": "[sing(loud=True)]",
    "JSON that calls nothing": '{"city": "Oslo"}',
    "JSON of an unknown function": '{"name": "Ada", "arguments": {}}',
    "a program": "```python\nfor day in range(3):\n    print(day)\n```",
    "a list": "[1, 2, 3]",
    "a thought": "<think>get_weather(city='Oslo')</think>It is fine.",
    "a sum": "```\n1 + 2\n```",
}


@pytest.mark.parametrize("text", NONE)
def test_no_call(text: str) -> None:
    assert calls(NONE[text], TOOLS) == ()


def test_a_thought_that_never_ends_has_no_reply() -> None:
    assert calls(f"<think>I call <tool_call>{_A}</tool_call>", TOOLS) is None


UNREAD: dict[str, tuple[str, tuple[Call, ...]]] = {
    "no JSON": ("<tool_call>get the weather</tool_call>", (UNREADABLE,)),
    "cut off": ('<tool_call>{"name": "get_weather", "argum', (UNREADABLE,)),
    "empty": ("[TOOL_CALLS]", (UNREADABLE,)),
    "a number": ("<tool_call>7</tool_call>", (UNREADABLE,)),
    "arguments cut off": (
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Os', (Call("get_weather", None),)
    ),
    "arguments that are none": (
        '<tool_call>{"name": "get_weather", "arguments": "Oslo"}</tool_call>',
        (Call("get_weather", None),),
    ),
    "arguments without names": ("[get_weather('Oslo')]", (Call("get_weather", None),)),
    "no literals": ("[get_weather(city=name)]", (Call("get_weather", None),)),
    "two values under one name": (
        '<tool_call>{"name": "a", "name": "b", "arguments": {}}</tool_call>', (UNREADABLE,)
    ),
    "no call behind the mark": ("<start_function_call>hm<end_function_call>", (UNREADABLE,)),
    "nowhere": ("<|channel|>commentary to=functions.get_weather", (Call("get_weather", None),)),
}  # fmt: skip


@pytest.mark.parametrize("what", UNREAD)
def test_a_call_that_cannot_be_read_counts_as_one(what: str) -> None:
    reply, expected = UNREAD[what]
    assert calls(reply, TOOLS) == expected


@pytest.mark.parametrize(
    "text", ["{" * 9000, "[" * 9000, "(" * 9000, "-" * 9000 + "1",
             "get_weather" + ".a" * 9000 + "()", "[" + "9" * 9000 + "]"]
)  # fmt: skip
def test_nesting_without_end_is_no_call(text: str) -> None:
    for reply in (text, f"<tool_call>{text}</tool_call>", f"<|python_tag|>{text}"):
        found = calls(reply, TOOLS)
        assert found is not None
        assert all(call.arguments is None for call in found)


def test_nothing_is_printed_of_odd_escapes(recwarn: pytest.WarningsRecorder) -> None:
    assert calls(r"[get_weather(city='\d')]", TOOLS) == (Call("get_weather", {"city": r"\d"}),)
    assert not recwarn.list


@pytest.mark.parametrize("arguments", [{"city": "Oslo", "days": 3}, _ARGS])
def test_what_a_server_took_out_is_put_back(arguments: Any) -> None:
    assert calls("Well." + written("get_weather", arguments), TOOLS) == ONE


def test_what_a_server_tells_of_a_damaged_call_stays_damaged() -> None:
    assert calls(written("get_weather", '{"city": '), TOOLS) == (UNREADABLE,)
    assert calls(written("clock.now", ""), TOOLS) == BARE


def test_tools_hash() -> None:
    assert len({*TOOLS, Tool(TOOLS[0].text)}) == 2
