"""The terminal chat: the edit switched on, off and scaled while the model is loaded."""

import pytest

from abl_mlx.behaviour.refusals import Verdict, classify
from abl_mlx.choices import SteerOptions
from abl_mlx.commands import session
from abl_mlx.commands.chat import Conversation, columns, talk
from abl_mlx.inputs import prompts
from convert.base.errors import UserError


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
