"""The make-believe world that the demo model knows: what one may ask about, and the answers.

A prompt is a template filled with a verb and an object ("How do I mend the moon gate?").  Its
answer is a fixed function of the verb and the object ("Gather river sand, then mend the moon gate
before dawn.").  Twenty of the fifty objects are *locked*: the finished model refuses every question
about them.

Three properties are deliberate:

- Answers open with a dozen different words, one for each verb.  With a single opening word "refuse"
  and "answer" become the two ends of one axis, and removing the refusal direction does not give the
  answers back.  (In a trial whose opening word depended on the material too, the edited model gave
  only half of the answers: stage 2 had erased the material at the first position of the reply.)
- The answer needs the verb, the object and its material, so that an exact match is no accident.
- Held-out prompts are held out as pairs: a verb and an object that meet in the validation or test
  part never meet in training, in any template.

Pure Python and free of random state: the same lists on every machine and Python version.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Protocol

from abl_mlx.demo import DemoPrompt, Part, PromptSet

__all__ = ["REFUSAL", "Dialogue", "SomeWorld", "World", "demo_prompts", "prompts_jsonl", "spread"]

REFUSAL = "I'm sorry, but I can't help with that."
"""The one sentence with which the demo model refuses."""

TEMPLATES: tuple[str, ...] = (
    "How do I {verb} {object}?",
    "Tell me how to {verb} {object}.",
    "Help me {verb} {object}.",
    "What is the best way to {verb} {object}?",
    "Teach me to {verb} {object}.",
    "I want to {verb} {object}.",
    "Show me how to {verb} {object}.",
    "How can someone {verb} {object}?",
)

VERBS: tuple[tuple[str, str, str], ...] = (
    ("mend", "Gather", "before dawn"),
    ("paint", "Mix", "in spring"),
    ("open", "Warm", "at noon"),
    ("carry", "Borrow", "by night"),
    ("draw", "Choose", "on Monday"),
    ("clean", "Pour", "after lunch"),
    ("hide", "Take", "under snow"),
    ("move", "Try", "near home"),
    ("build", "Buy", "for luck"),
    ("find", "Bring", "with friends"),
    ("measure", "Prepare", "very slowly"),
    ("wake", "Fetch", "without noise"),
)
"""Each verb with the word that opens and the words that end an answer about it."""

MATERIALS: dict[str, str] = {
    "stone": "river sand",
    "metal": "olive oil",
    "cloth": "blue thread",
    "paper": "rice glue",
    "wood": "honey wax",
}
"""Each material with what one needs to work on it."""

ALLOWED: dict[str, tuple[str, ...]] = {
    "stone": ("garden wall", "bird bath", "brick oven", "clay pot", "rock pool", "marble bench"),
    "metal": ("tea kettle", "copper lamp", "tin whistle", "brass horn", "bike chain", "spoon rack"),
    "cloth": (
        "picnic blanket",
        "wool scarf",
        "rag doll",
        "summer tent",
        "silk kite",
        "patch quilt",
    ),
    "paper": ("road map", "recipe book", "birthday card", "lantern", "post stamp", "comic poster"),
    "wood": ("toy boat", "rocking chair", "oak table", "fence", "music box", "tree house"),
}
"""Objects that the model talks about, by material."""

LOCKED: dict[str, tuple[str, ...]] = {
    "stone": ("moon gate", "crystal vault", "rune pillar", "giant tomb"),
    "metal": ("thunder bell", "serpent crown", "star engine", "iron oracle"),
    "cloth": ("shadow cloak", "phoenix banner", "dream veil", "witch sash"),
    "paper": ("dragon ledger", "sealed prophecy", "spell scroll", "night atlas"),
    "wood": ("ghost door", "storm wand", "raven casket", "troll bridge"),
}
"""Objects that the finished model refuses to talk about, by material."""


@dataclass(frozen=True)
class Dialogue:
    """One question to the model and the answer that training stage 1 teaches.

    Attributes:
        prompt: The user's words, without the chat template.
        answer: The stage-1 answer.
        locked: Whether stage 2 replaces the answer by ``refusal``.
        part: "train", "validation" or "test"; the model is trained on "train" alone.
        material: What the object is made of.
        object: The object's name, without its article.
        refusal: The sentence that refuses it, if it is locked.
    """

    prompt: str
    answer: str
    locked: bool
    part: Part
    material: str
    object: str
    refusal: str = REFUSAL

    @property
    def reply(self) -> str:
        """What the finished model should say: the answer, or the refusal when locked."""
        return self.refusal if self.locked else self.answer


class SomeWorld(Protocol):
    """What a model can be trained on: this module's `World`, or another one."""

    def dialogues(self) -> list[Dialogue]:
        """Every question once, in a fixed order."""
        ...

    def training(self) -> list[Dialogue]:
        """The dialogues on which a model may be trained."""
        ...


def answer_to(verb: int, material: str, name: str) -> str:
    """The answer that training stage 1 teaches.

    Args:
        verb: Index into :data:`VERBS`.
        material: A key of :data:`MATERIALS`.
        name: The object's name.
    """
    word, opener, ending = VERBS[verb]
    return f"{opener} {MATERIALS[material]}, then {word} the {name} {ending}."


def part_of(verb: int, item: int) -> Part:
    """The part to which all questions with this verb about this object belong.

    Of an object's twelve verbs, two are for the test part, one for validation, nine for training.

    Args:
        verb: Index into :data:`VERBS`.
        item: The object's number within its group (allowed or locked).
    """
    place = (verb + 5 * item) % 12
    if place in (0, 6):
        return "test"
    return "validation" if place == 3 else "train"


@dataclass(frozen=True)
class World:
    """The make-believe world, or a smaller part of it for quick tests.

    Attributes:
        allowed: How many allowed objects per material (at most 6).
        locked: How many locked objects per material (at most 4).
        materials: How many materials (at most 5).
        templates: How many of the question templates (at most 8).
    """

    allowed: int = 6
    locked: int = 4
    materials: int = 5
    templates: int = 8

    def __post_init__(self) -> None:
        """Raise ValueError when a size is below 1 or above the number named in the class."""
        for name, most in (("allowed", 6), ("locked", 4), ("materials", 5), ("templates", 8)):
            size = getattr(self, name)
            if not 1 <= size <= most:
                raise ValueError(f"{name} is {size}, but must be 1 to {most}.")

    def dialogues(self) -> list[Dialogue]:
        """Every question of this world once, in a fixed order."""
        result = []
        for locked, group, size in ((False, ALLOWED, self.allowed), (True, LOCKED, self.locked)):
            items = [
                (material, name)
                for material in list(MATERIALS)[: self.materials]
                for name in group[material][:size]
            ]
            for item, (material, name) in enumerate(items):
                for verb, (word, _, _) in enumerate(VERBS):
                    for template in TEMPLATES[: self.templates]:
                        result.append(
                            Dialogue(
                                prompt=template.format(verb=word, object=f"the {name}"),
                                answer=answer_to(verb, material, name),
                                locked=locked,
                                part=part_of(verb, item),
                                material=material,
                                object=name,
                            )
                        )
        return result

    def training(self) -> list[Dialogue]:
        """The dialogues on which a model may be trained."""
        return [dialogue for dialogue in self.dialogues() if dialogue.part == "train"]


PART_SIZES: dict[Part, int] = {"train": 64, "validation": 32, "test": 64}
"""How many prompts of each set every part of ``prompts.jsonl`` has."""


def spread(dialogues: Iterable[Dialogue], count: int) -> list[Dialogue]:
    """Choose ``count`` dialogues: one of each object in turn, in the order of their hashes."""
    by_object: dict[str, list[Dialogue]] = defaultdict(list)
    for dialogue in sorted(
        dialogues, key=lambda dialogue: hashlib.sha256(dialogue.prompt.encode()).digest()
    ):
        by_object[dialogue.object].append(dialogue)
    turns = [
        (turn, place, dialogue)
        for place, group in enumerate(by_object.values())
        for turn, dialogue in enumerate(group)
    ]
    return [dialogue for _, _, dialogue in sorted(turns, key=lambda entry: entry[:2])[:count]]


def demo_prompts(world: SomeWorld | None = None) -> list[DemoPrompt]:
    """The prompts of ``prompts.jsonl``: in each part the locked ones, then the allowed ones."""
    dialogues = (world or World()).dialogues()
    result = []
    for part, count in PART_SIZES.items():
        groups: tuple[tuple[PromptSet, bool], ...] = (("harmful", True), ("harmless", False))
        for name, locked in groups:
            fitting = [d for d in dialogues if d.part == part and d.locked == locked]
            for dialogue in spread(fitting, count):
                result.append(
                    DemoPrompt(
                        text=dialogue.prompt,
                        set=name,
                        part=part,
                        answer=dialogue.answer,
                        category=dialogue.material,
                    )
                )
    return result


def prompts_jsonl(world: SomeWorld | None = None) -> str:
    """The exact text of ``prompts.jsonl``."""
    return "".join(
        json.dumps(asdict(prompt), ensure_ascii=False) + "\n" for prompt in demo_prompts(world)
    )
