"""`--capability`: sixty small tasks with one right answer each, to see that an edit broke nothing.

There are twenty tasks each of arithmetic, following an instruction, and finding something in a
short text. A generator with a fixed seed makes them, so they are always the same. A reply is right
if it is the answer and nothing else; thoughts, white space, emphasis, quotes, a full stop and, in
arithmetic, thousands separators are ignored. This is a check and not a benchmark: a difference of a
few points between two models means nothing.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from abl_mlx.behaviour.refusals import wilson
from abl_mlx.behaviour.target import Target
from abl_mlx.models.thoughts import without_thoughts
from abl_mlx.records.measurements import Capability, Share
from abl_mlx.support.console import in_order

#: Longest reply, in tokens; right replies are shorter.
MAX_TOKENS = 48

GROUPS = ("arithmetic", "instructions", "extraction")

#: The number of tasks in each group.
EACH = 20


@dataclass(frozen=True)
class Task:
    """A prompt with its one right reply.

    Attributes:
        group: one of `GROUPS`.
        prompt: the user's message.
        answer: the right reply.
    """

    group: str
    prompt: str
    answer: str


def tasks(seed: int = 0) -> list[Task]:
    """All tasks, group after group."""
    chance = random.Random(seed)
    made = {"arithmetic": _arithmetic, "instructions": _instruction, "extraction": _extraction}
    found = []
    for group in GROUPS:
        seen: set[str] = set()
        while len(seen) < EACH:
            prompt, answer = made[group](chance, len(seen))
            if prompt not in seen:
                seen.add(prompt)
                found.append(Task(group, prompt, answer))
    return found


def right(task: Task, reply: str) -> bool:
    """Whether a reply is the answer and nothing else."""
    body = without_thoughts(reply)
    if body is None:
        return False
    said, wanted = (_bare(text) for text in (body, task.answer))
    if task.group == "arithmetic":
        said = re.sub(r"(?<=\d),(?=\d{3}\b)", "", said).replace("−", "-")
    return said == wanted


def _bare(text: str) -> str:
    text = " ".join(re.sub(r"[*_`]", "", text).split())
    return text.strip("\"'“”‘’ ").removesuffix(".").strip("\"'“”‘’ ")


def record(target: Target, *, seed: int = 0) -> Capability:
    """Ask all tasks and count the right replies, in total and in each group."""
    asked = tasks(seed)
    answered = target.ask([task.prompt for task in asked], MAX_TOKENS)
    replies = in_order(answered, len(asked), "capability", "task")
    scored = [(task.group, right(task, reply)) for task, reply in zip(asked, replies, strict=True)]
    whole = json.dumps([vars(task) for task in asked], ensure_ascii=False)
    return Capability(
        **score([ok for _, ok in scored]).values_by_field,
        tasks_sha256=hashlib.sha256(whole.encode()).hexdigest(),
        groups={name: score([ok for g, ok in scored if g == name]) for name in GROUPS},
    )


def score(scored: Sequence[bool]) -> Share:
    """How many are right, with the interval."""
    count, n = sum(scored), len(scored)
    return Share(n=n, right=count, share=count / n, interval=list(wilson(count, n)))


# --- the tasks -----------------------------------------------------------------------------------

_ONLY = "Reply with the number only."
_NAMES = ("Ada", "Boris", "Chiara", "Deniz", "Elif", "Femi", "Greta", "Hugo", "Ines", "Jonas")
_CITIES = ("Lisbon", "Oslo", "Krakow", "Ghent", "Porto", "Turin", "Malmo", "Graz", "Cork", "Nantes")
_THINGS = ("lamp", "kettle", "ladder", "violin", "basket", "compass", "pillow", "bicycle", "clock")
_WORDS = (
    "apple", "bridge", "candle", "desert", "engine", "forest", "garden", "harbor", "island",
    "jacket", "kitten", "lemon", "marble", "needle", "orange", "pencil", "quartz", "ribbon",
    "saddle", "temple", "velvet", "window", "yellow", "zipper",
)  # fmt: skip
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")


def _arithmetic(chance: random.Random, number: int) -> tuple[str, str]:
    a, b, c = (chance.randint(2, 9), chance.randint(11, 89), chance.randint(11, 89))
    kinds = [
        (f"What is {b} + {c}? {_ONLY}", b + c),
        (f"What is {b + c} - {b}? {_ONLY}", c),
        (f"What is {a} times {b}? {_ONLY}", a * b),
        (f"What is {a * b} divided by {a}? {_ONLY}", b),
        (f"What is {a} * {b} + {c}? {_ONLY}", a * b + c),
        (
            f"A shop sells {a} boxes with {b} eggs each, and {c} single eggs. How many eggs is "
            f"that? {_ONLY}",
            a * b + c,
        ),
    ]
    prompt, answer = kinds[number % len(kinds)]
    return prompt, str(answer)


def _instruction(chance: random.Random, number: int) -> tuple[str, str]:
    words = chance.sample(_WORDS, 4)
    listed = ", ".join(words)
    one, times = words[0], chance.randint(2, 4)
    kinds = [
        (f"Write the word {one} in capital letters. Reply with that word only.", one.upper()),
        (
            f"Repeat the word {one} {times} times, with one space between. Reply with nothing "
            "else.",
            " ".join([one] * times),
        ),
        (
            f"Put these words in alphabetical order: {listed}. Reply with the words only, "
            "separated by a comma and a space.",
            ", ".join(sorted(words)),
        ),
        (
            f"Which of these words comes third: {listed}? Reply with that word only.",
            words[2],
        ),
        (
            f"Replace every letter e in the phrase “the {one} and the {words[1]}” by the digit 3. "
            "Reply with the changed phrase only.",
            f"the {one} and the {words[1]}".replace("e", "3"),
        ),
        (f"Reply with exactly this and nothing else: {one}-{words[1]}", f"{one}-{words[1]}"),
    ]
    return kinds[number % len(kinds)]


def _extraction(chance: random.Random, number: int) -> tuple[str, str]:
    first, second = chance.sample(_NAMES, 2)
    city, thing, day = chance.choice(_CITIES), chance.choice(_THINGS), chance.choice(_DAYS)
    price, room = chance.randint(12, 98), chance.randint(101, 480)
    text = (
        f"On {day} {first} went to {city} to buy a {thing} for {second}. It cost {price} euros, "
        f"and the shop was in room {room}."
    )
    kinds = [
        ("To which city did they go? Reply with the city only.", city),
        ("Who is to get it? Reply with the name only.", second),
        ("How many euros did it cost? Reply with the number only.", str(price)),
        ("On which day was it? Reply with the day only.", day),
        ("What was bought? Reply with one word only.", thing),
        ("In which room was the shop? Reply with the number only.", str(room)),
    ]
    question, answer = kinds[number % len(kinds)]
    return f"{text}\n\n{question}", answer
