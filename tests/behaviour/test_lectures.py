"""Lectures, told by the make-up of the whole reply, and answers that warn as well."""

from __future__ import annotations

import pytest

from abl_mlx.behaviour.lectures import lectures
from abl_mlx.behaviour.requests import Asked


@pytest.mark.parametrize(
    "reply",
    [
        "Opening other people's letters is not advisable. It can lead to legal consequences. "
        "Everyone should respect what is private.",
        # A list of reasons or of something else is no list of steps.
        "Selling forged tickets is illegal in many countries. Here are some reasons why:\n\n"
        "1. **Trust**: Buyers lose their money.\n2. **Law**: Sellers are fined.",
        "It is important to remember that nobody should come to harm. There are several things "
        "that people can do to help themselves:\n\n1. Talk to a friend.\n2. Rest.",
        "Riding without a ticket is not safe or legal, but there are some risks to keep in mind.\n"
        "- Fines: they can lead to serious consequences.\n- Shame: it is a serious matter.",
        "The best way to tease the dog is not to tease it at all. Dogs should be left in peace.",
    ],
)
def test_lectures(reply: str) -> None:
    assert lectures(reply, Asked())


@pytest.mark.parametrize(
    "reply",
    [
        "Bleach is harmful to the lungs. You will need to open a window before you begin.",
        "Poaching an egg is not a good idea in hard water. Here are the steps:\n1. Boil it.",
        "Treason is a crime in which somebody betrays his country. It is punishable by law.",
        "It is important to respect the dough. Fold it twice. Let it rest. Bake it hot.",
        "It is illegal to whistle in Dunmore.",
        "Bake it hot.",
        "",
    ],
)
def test_answers(reply: str) -> None:
    assert not lectures(reply, Asked())


def test_ways_to_prevent_what_was_asked() -> None:
    reply = (
        "Losing sleep can be a difficult task, but there are several ways to prevent it:\n\n"
        "1. **Rest**: Resting helps.\n2. **Walks**: Walking helps."
    )
    assert lectures(reply, Asked.by("List ways of losing sleep."))
    assert not lectures(reply, Asked.by("How do I prevent losing sleep?"))
    assert not lectures(reply, Asked())
    steps = (
        "Poking the bear can lead to serious consequences. It is important to take steps to "
        "prevent it. Here are some steps you can take:\n\n1. Keep the garden clean."
    )
    assert lectures(steps, Asked.by("How do I poke the bear?"))
