"""How well the markers judge the labelled replies beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from abl_mlx.behaviour.refusals import classify, wilson

HERE = Path(__file__).parent

LANGUAGES = {
    "en": "English",
    "de": "German",
    "fr": "French",
    "es": "Spanish",
    "pt": "Portuguese",
    "it": "Italian",
    "zh": "Chinese",
    "ja": "Japanese",
    "ru": "Russian",
    "nl": "Dutch",
    "ko": "Korean",
    "pl": "Polish",
    "ar": "Arabic",
    "hi": "Hindi",
    "tr": "Turkish",
    "vi": "Vietnamese",
    "id": "Indonesian",
    "sv": "Swedish",
    "uk": "Ukrainian",
    "cs": "Czech",
    "none": "none (empty)",
}


@dataclass(frozen=True)
class Labelled:
    """One reply with a person's label, and what the markers say of it.

    Attributes:
        model, prompts: who replied to which kind of prompts; "" of replies that were made up.
        prompt, system, temperature, max_tokens: how a fresh reply was asked for.
        note: why a label could have been another.
    """

    reply: str
    label: str
    kind: str
    language: str
    half: str
    verdict: str
    model: str = ""
    prompts: str = ""
    prompt: str = ""
    system: str = ""
    temperature: float = 0.0
    max_tokens: int = 0
    note: str = ""

    @property
    def source(self) -> str:
        """Who replied to what."""
        return f"{self.model}, {self.prompts}"

    @property
    def right(self) -> bool:
        """Whether the markers agree with the label."""
        return self.verdict == self.label


@cache
def read(name: str) -> tuple[Labelled, ...]:
    """The labelled replies in a file of tests/, judged by the markers."""
    with open(HERE / name, encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    return tuple(
        Labelled(**row, verdict=classify(row["reply"], row.get("prompt")).value) for row in rows
    )


def main_set(half: str) -> tuple[Labelled, ...]:
    """One half of the set that was split before the markers were tuned: "dev" or "held-out"."""
    return tuple(one for one in read("labelled_replies.jsonl") if one.half == half)


def stress_set(half: str) -> tuple[Labelled, ...]:
    """Unusual wordings: "dev" was tuned on, "held-out" was written last and never was."""
    return tuple(one for one in read("labelled_replies_stress.jsonl") if one.half == half)


def language_set(half: str) -> tuple[Labelled, ...]:
    """Eight further languages, split by a hash: of "held-out" only mistakes were counted."""
    return tuple(one for one in read("labelled_replies_languages.jsonl") if one.half == half)


def real_set(half: str) -> tuple[Labelled, ...]:
    """Replies of real models, split by a hash before the markers judged any of them."""
    return tuple(one for one in read("labelled_replies_real.jsonl") if one.half == half)


def fresh_set(half: str) -> tuple[Labelled, ...]:
    """Later replies of real models, labelled unseen and split by a hash before the markers judged
    any: "dev" was tuned on, "held-out" was looked at once after that."""
    return tuple(one for one in read("labelled_replies_fresh.jsonl") if one.half == half)


def later_set(half: str) -> tuple[Labelled, ...]:
    """The latest replies of real models: "dev" was tuned on; "held-out", to other prompts, was
    labelled when the rules were settled, and judged once."""
    return tuple(one for one in read("labelled_replies_later.jsonl") if one.half == half)


@dataclass(frozen=True)
class Quality:
    """Counts over replies; shares are None where nothing was counted."""

    n: int
    right: int
    refusals: int
    called: int
    both: int

    @classmethod
    def of(cls, replies: Iterable[Labelled]) -> Quality:
        """Count; precision and recall are of the label and verdict "refusal"."""
        every = list(replies)
        return cls(
            len(every),
            sum(one.right for one in every),
            sum(one.label == "refusal" for one in every),
            sum(one.verdict == "refusal" for one in every),
            sum(one.label == one.verdict == "refusal" for one in every),
        )

    @property
    def accuracy(self) -> float:
        """Share of verdicts, of three kinds, that are the label."""
        return self.right / self.n

    @property
    def precision(self) -> float | None:
        """Share of what is called a refusal that is one."""
        return self.both / self.called if self.called else None

    @property
    def recall(self) -> float | None:
        """Share of refusals that are called so."""
        return self.both / self.refusals if self.refusals else None

    @property
    def interval(self) -> str:
        """Wilson's 95% interval of the accuracy."""
        low, high = wilson(self.right, self.n)
        return f"{low:.0%} to {high:.0%}"

    def cells(self) -> str:
        """Size, accuracy with its interval, precision and recall as cells of a Markdown table."""
        accuracy, *others = (
            "–" if share is None else f"{share:.1%}"
            for share in (self.accuracy, self.precision, self.recall)
        )
        return " | ".join([str(self.n), accuracy, self.interval, *others])
