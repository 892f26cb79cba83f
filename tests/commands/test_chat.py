"""The terminal chat: the edit switched on, off and scaled while the model is loaded."""

import shutil

import pytest

from abl_mlx.behaviour.refusals import Verdict, classify
from abl_mlx.choices import SteerOptions
from abl_mlx.commands import session
from abl_mlx.commands.chat import Conversation, columns, talk
from abl_mlx.demo import MODEL_PATH
from abl_mlx.inputs import prompts
from abl_mlx.inputs.tools import tools_of
from convert.base.errors import UserError
from tests.support.command import abl_mlx, fails


@pytest.fixture(scope="module")
def demo():
    return session.load("demo", SteerOptions())


@pytest.fixture(scope="module")
def locked():
    return prompts.load_demo().harmful.test.prompts[0]


def verdict(reply):
    return classify(reply)


def test_the_edit_is_switched_and_scaled(demo, locked):
    said = {}
    for name, commands in {
        "on": [], "off": ["/off"], "nothing": ["/strength 0"], "on again": ["/off", "/on"],
        "stronger": ["/strength -1"],
    }.items():  # fmt: skip
        conversation = Conversation(demo, max_tokens=24)
        for command in commands:
            conversation.command(command)
        said[name] = "".join(conversation.ask(locked.text))
    assert verdict(said["off"]) is Verdict.REFUSAL
    assert said["nothing"] == said["off"]
    assert verdict(said["stronger"]) is Verdict.REFUSAL
    assert verdict(said["on"]) is Verdict.ANSWER
    assert said["on again"] == said["on"] == locked.answer


def test_side_by_side_each_keeps_its_own_history(demo, locked):
    conversation = Conversation(demo, side_by_side=True, max_tokens=24)
    original, edited = conversation.ask_both(locked.text)
    assert verdict(original) is Verdict.REFUSAL
    assert edited == locked.answer
    contents = [
        [content for _, content in one] for one in (conversation._original, conversation._edited)
    ]
    assert contents == [[locked.text, original], [locked.text, edited]]
    conversation.command("/clear")
    assert conversation._original == conversation._edited == []
    conversation.command("/off")
    "".join(conversation.ask("Hi"))
    assert conversation._original == conversation._edited


def test_a_session(demo, locked):
    lines = iter(
        [locked.text, "", "/off", "/side", locked.text, "/help", "/strength high", "/?", "/q"]
    )
    asked, written = [], []

    def read(prompt):
        asked.append(prompt)
        return next(lines)

    talk(Conversation(demo, max_tokens=24), read, written.append)
    text = "".join(written)
    assert locked.answer in text
    assert "original" in text and "│" in text  # noqa: PT018
    assert "give a number" in text and "/? is no command" in text and "/clear" in text  # noqa: PT018
    assert asked[0] == "[edited at 1] > " and asked[3] == "[original] > "  # noqa: PT018
    assert next(lines, None) is None

    def end(_):
        raise EOFError

    talk(Conversation(demo), end, written.append)
    assert written[-1] == "\n"


def test_commands_that_are_none():
    conversation = Conversation.__new__(Conversation)
    with pytest.raises(UserError, match="/help"):
        conversation.command("/nonsense")
    assert conversation.command("/quit") is None


def test_columns():
    text = columns("one two three " * 6, "short", width=80)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert text.splitlines()[2].startswith("one two three")
    assert text.splitlines()[2].endswith("│ short")
    assert columns("a", "b", width=40) == "original:\na\n\nedited:\nb\n"


# --- tools ---------------------------------------------------------------------------------------


TOOLS = tools_of([{"name": "get_weather"}, {"name": "get_time"}], "a test")

#: The names of functions, before the conversation.
TOLD = "{% for tool in tools or [] %}{{ tool.function.name }}\n{% endfor %}"


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The demo model with a place for tools in its template."""
    folder = tmp_path_factory.mktemp("demo") / "model"
    shutil.copytree(MODEL_PATH, folder)
    template = folder / "chat_template.jinja"
    template.write_text(TOLD + template.read_text())
    options = SteerOptions.of(direction=direction_file(tmp_path_factory))
    return session.load(str(folder), options, TOOLS)


def direction_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("direction") / "direction.safetensors"
    abl_mlx("measure", "demo", "--layer", 2, "-o", path, "--limit", 4)
    return path


def test_tools_are_told_and_a_calls_result_is_a_turn(told, monkeypatch):
    conversation = Conversation(told, max_tokens=4)
    asked = []
    encode = told.chat.encode_message
    monkeypatch.setattr(
        told.chat, "encode_message", lambda prompt: asked.append(prompt) or encode(prompt)
    )
    said = "".join(conversation.ask("What is the weather?"))
    lines = iter(["/tool  4 degrees", "/side", "/tool 5 degrees", "/tool", "/quit"])
    written = []
    talk(conversation, lambda _: next(lines), written.append)
    first, second, *both = asked
    assert first.tools == TOOLS
    assert (first.role, second.role, second.text) == ("user", "tool", "4 degrees")
    assert second.earlier == (("user", "What is the weather?"), ("assistant", said))
    assert [(one.role, one.text) for one in both] == [("tool", "5 degrees")] * 2
    text = told.chat.tokenizer.decode(encode(second))
    assert text.startswith("get_weather\nget_time\n<|im_start|>user")
    assert "<|im_start|>tool\n4 degrees<|im_end|>" in text
    assert "such as /tool 4 degrees" in "".join(written)


def test_a_result_without_tools(demo):
    with pytest.raises(UserError, match=r"start the chat with --tools FILE\.json"):
        list(Conversation(demo).ask("/tool 4 degrees"))


def test_a_model_without_a_place_for_tools(tmp_path):
    path = tmp_path / "tools.json"
    path.write_text('[{"name": "get_weather"}]')
    assert "the chat template has no place for tools" in fails("chat", "demo", "--tools", path)
    path.write_text("{")
    assert f"{path} cannot be used: it is not valid JSON" in fails("chat", "demo", "--tools", path)


def test_a_bad_file_of_tools_is_named_with_its_flag(tmp_path):
    path = tmp_path / "tools.json"
    path.write_text("{")
    said = fails("chat", "demo", "--tools", path)
    assert f"--tools {path}" in said
    path.write_text("[1]")
    assert f"--tools {path}" in fails("chat", "demo", "--tools", path)
