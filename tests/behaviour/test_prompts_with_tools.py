"""Prompts with tools: what the model is told, alike in MLX, in llama.cpp and over HTTP."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from abl_mlx import demo
from abl_mlx.behaviour import evaluate
from abl_mlx.behaviour.endpoint import Endpoint
from abl_mlx.behaviour.tool_calls import UNREADABLE, Call, calls
from abl_mlx.inputs import tools
from abl_mlx.inputs.sets import Prompt
from abl_mlx.models.prompt_tokens import rendered
from abl_mlx.outputs.model_file import find_model
from convert.base.errors import UserError
from convert.tokenizers.chat_template import ChatTemplate, TemplateError
from convert.tokenizers.template_files import for_tools
from tests.support.command import abl_mlx
from tests.support.servers import ANSWER, Handler, Server

OWN = (demo.MODEL_PATH / "chat_template.jinja").read_text()
TOLD = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
)
TOOLS = tools.tools_of(
    [
        {
            "name": "get_weather",
            "description": "The weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
        {"type": "function", "function": {"name": "now"}},
    ],
    "a test",
)
ASK = Prompt("What is the weather in Oslo?", tools=TOOLS)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """The demo model by its templates, as a folder and as a GGUF."""
    made = {}
    for name, own, extra in (
        ("one template", TOLD + OWN, None),
        ("one of its own", OWN, TOLD + OWN),
        ("no place", OWN, None),
    ):
        place = tmp_path_factory.mktemp("model")
        folder, gguf = place / "model", place / "model.gguf"
        shutil.copytree(demo.MODEL_PATH, folder)
        (folder / "chat_template.jinja").write_text(own)
        if extra is not None:
            (folder / "additional_chat_templates").mkdir()
            (folder / "additional_chat_templates" / "tool_use.jinja").write_text(extra)
        abl_mlx("convert", folder, gguf)
        made[name] = folder, gguf
    return made


@pytest.mark.parametrize("name", ["one template", "one of its own"])
def test_every_runtime_tells_the_model_the_same(
    name: str, models: dict[str, tuple[Path, Path]]
) -> None:
    folder, gguf = models[name]
    chat = find_model(str(folder)).load()
    text = chat.tokenizer.decode(chat.encode(ASK))
    assert text == (
        "<|im_start|>system\n"
        + "".join(json.dumps(tool.json, ensure_ascii=False) for tool in TOOLS)
        + f"<|im_end|>\n<|im_start|>user\n{ASK.text}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert find_model(str(gguf)).load().encode(ASK) == chat.encode(ASK)
    without = chat.encode(ASK.text)
    assert len(without) < len(chat.encode(ASK))
    if not evaluate.llamacpp_is_there():
        return
    from abl_mlx.behaviour.llamacpp import LlamaCpp

    wanted = [evaluate.in_mlx(chat)([one], 12)[0] for one in (ASK, ASK.text)]
    with LlamaCpp(gguf, n_ctx=1024, n_parallel=1, n_threads=1) as runtime:
        assert runtime.encode(ASK) == chat.encode(ASK)
        assert runtime.chat([ASK, ASK.text], 12) == wanted
        endpoint = Endpoint(f"{runtime.address}/v1")
        assert [endpoint.reply(one, 12) for one in (ASK, ASK.text)] == wanted


def test_a_template_without_a_place_for_tools(models: dict[str, tuple[Path, Path]]) -> None:
    folder, gguf = models["no place"]
    for path in (folder, gguf):
        with pytest.raises(TemplateError, match="no place for tools") as caught:
            find_model(str(path)).load().encode(ASK)
        assert str(path) in str(caught.value)
    if not evaluate.llamacpp_is_there():
        return
    from abl_mlx.behaviour.llamacpp import LlamaCpp

    with LlamaCpp(gguf, n_ctx=256, n_parallel=1, n_threads=1) as runtime:
        with pytest.raises(TemplateError, match="no place for tools"):
            runtime.chat([ASK], 4)
        with pytest.raises(UserError, match=r"no place for tools.* its template to the server"):
            Endpoint(f"{runtime.address}/v1").reply(ASK, 4)


def test_what_a_call_returned_is_a_turn() -> None:
    template = ChatTemplate(TOLD + OWN, Path("t.jinja"))
    asked = Prompt(
        "4 degrees", role="tool", earlier=(("user", ASK.text), ("assistant", "{}")), tools=TOOLS[1:]
    )
    assert rendered(template, asked).split("<|im_start|>")[2:] == [
        f"user\n{ASK.text}<|im_end|>\n",
        "assistant\n{}<|im_end|>\n",
        "tool\n4 degrees<|im_end|>\n",
        "assistant\n",
    ]


def test_which_template_is_for_tools() -> None:
    assert for_tools({"default": "", "tool_use": ""}) == "tool_use"
    assert for_tools({"default": "", "rag": ""}) == "default"
    assert for_tools({"one": "", "two": ""}) is None


def test_tools_tell_prompts_apart() -> None:
    bare = Prompt(ASK.text)
    assert bare.identity == ASK.text
    tells = [bare, ASK, replace(ASK, tools=TOOLS[:1]), replace(bare, role="tool")]
    assert len({one.identity for one in tells}) == len(tells)
    assert replace(ASK, category="weather").identity == ASK.identity
    assert ASK.length > len(ASK.text) + len(TOOLS[0].text)


# --- over HTTP -----------------------------------------------------------------------------------


def calling(handler: Handler, request: dict, number: int) -> None:
    """A server that takes the calls out of a reply."""
    assert [one["function"]["name"] for one in request["tools"]] == ["get_weather", "now"]
    function = {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
    handler.say(None, tool_calls=[{"id": "1", "type": "function", "function": function}])


def test_calls_that_a_server_took_out_are_part_of_the_reply() -> None:
    with Server(calling) as server:
        reply = Endpoint(server.url).reply(ASK, 16)
    assert calls(reply, TOOLS) == (Call("get_weather", {"city": "Oslo"}),)


@pytest.mark.parametrize("damaged", [None, "x", [None], [{"function": "f"}], {}])
def test_what_is_no_list_of_calls_is_none(damaged: object) -> None:
    with Server(lambda handler, request, n: handler.say(ANSWER, tool_calls=damaged)) as server:
        assert Endpoint(server.url).reply(ASK, 16) == ANSWER


@pytest.mark.parametrize(
    "words",
    [
        "error parsing tool call: raw='{\"name\"', err=unexpected end of JSON input",
        "Failed to parse input at pos 12: <tool_call>",
        "The model produced output that does not match the expected format",
    ],
)
def test_a_call_that_a_server_cannot_read_ends_nothing(words: str) -> None:
    """llama-server and Ollama answer with an error of their own, again and again."""
    error = json.dumps({"error": {"message": words, "code": 500}})
    with Server(lambda handler, request, number: handler.send(500, error)) as server:
        reply = Endpoint(server.url).reply(ASK, 16)
        assert len(server.posts) == 1
    assert calls(reply, TOOLS) == (UNREADABLE,)


def test_without_tools_none_are_sent() -> None:
    with Server() as server:
        Endpoint(server.url).reply("Hello", 4)
        assert "tools" not in server.posts[0][2]


# --- files ---------------------------------------------------------------------------------------


def test_a_file_of_tools(tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([tool.json for tool in TOOLS]))
    assert tools.read(path) == TOOLS


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("{}", "is no list of tools"),
        ("[]", "has no tools"),
        ("[1]", "is no list of tools"),
        ('[{"name": "a b"}]', "number 1 is no tool: its function.name must be a name"),
        ('[{"description": "x"}]', "its function.name is missing"),
        ('[{"name": "a", "parameters": []}]', "its function.parameters must be an object"),
        ('[{"type": "web_search", "function": {"name": "a"}}]', "its type must be"),
        ('[{"name": "a"}, {"name": "a"}]', "two tools with the name a"),
    ],
)
def test_what_is_no_file_of_tools(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        tools.read(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        tools.read(tmp_path / "other.json")
