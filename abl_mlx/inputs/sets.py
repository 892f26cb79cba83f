"""Prompts, sets of prompts, and splitting a set into train, validation and test parts.

No prompt is in two parts of a split, and the same seed gives the same split.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from abl_mlx.inputs.tools import Tool

Message = Mapping[str, str]
"""One turn of a conversation: its ``role`` (system, user, assistant, tool) and its ``content``."""


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with a user's message, to which a model is to reply.

    Attributes:
        text: the last user message.
        category: its category in the prompt file; "" if it has none.
        answer: a reference reply; only the demo's prompts have one.
        system: the system message; None for none.
        earlier: (role, content) of the turns between the system message and ``text``.
        thinking: how the model is asked to think before it replies, one of the modes of
            `inputs.thinking`; None if it is asked not to think.
        tools: functions that the model may call.
        role: whose message ``text`` is: the user's, or "tool" where it is what a call returned.
    """

    text: str
    category: str = ""
    answer: str | None = None
    system: str | None = None
    earlier: tuple[tuple[str, str], ...] = ()
    thinking: str | None = None
    tools: tuple[Tool, ...] = ()
    role: str = "user"

    def messages(self, *, system_role: bool = True) -> list[Message]:
        """The whole conversation, oldest message first.

        Args:
            system_role: whether the model's chat template has a system role. If not, the system
                message becomes the first line of the first user message, as in llama.cpp.
        """
        turns = [*self.earlier, (self.role, self.text)]
        if self.system is not None and system_role:
            turns.insert(0, ("system", self.system))
        elif self.system is not None:
            first = next(n for n, (role, _) in enumerate(turns) if role == "user")
            turns[first] = ("user", f"{self.system}\n{turns[first][1]}")
        return [{"role": role, "content": content} for role, content in turns]

    @property
    def identity(self) -> str:
        """A text that is the same for prompts with the same messages, thinking and tools only.

        For a prompt that is only a user's message, it is that message.
        """
        if replace(self, category="", answer=None) == Prompt(self.text):
            return self.text
        tools = [[one.text for one in self.tools]] if self.tools else []
        return json.dumps([self.messages(), self.thinking, *tools], ensure_ascii=False)

    @property
    def length(self) -> int:
        """Characters of all messages and tools together."""
        return sum(len(message["content"]) for message in self.messages()) + sum(
            len(one.text) for one in self.tools
        )


#: A prompt, or the text of a user's message.
Question = str | Prompt


def prompt_of(question: Question) -> Prompt:
    """The prompt with this text as its only message; a prompt is returned unchanged."""
    return Prompt(question) if isinstance(question, str) else question


@dataclass(frozen=True)
class PromptSet:
    """Prompts in a fixed order, with the name of their source."""

    name: str
    prompts: tuple[Prompt, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompts' texts, in order."""
        return tuple(prompt.text for prompt in self.prompts)

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the prompts in order, each in UTF-8 and followed by one NUL byte.

        A prompt enters as its text, or as JSON of its messages, its thinking and its tools where it
        has more (`Prompt.identity`). Names, categories and answers do not enter; a loaded text
        never holds a NUL.
        """
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(prompt.identity.encode() + b"\0")
        return digest.hexdigest()

    def asked(self, *, system: str | None = None, thinking: str | None = None) -> PromptSet:
        """The same prompts with a system message and a mode of thinking.

        Args:
            system: the system message for prompts that have none.
            thinking: the mode of thinking, as in `Prompt`.
        """
        return replace(
            self,
            prompts=tuple(
                replace(one, system=system if one.system is None else one.system, thinking=thinking)
                for one in self.prompts
            ),
        )

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, n: int) -> PromptSet:
        """The first ``n`` prompts, or all when there are fewer.

        In a part made by :func:`split`, categories are spread evenly, also over the first ``n``.

        Raises:
            ValueError: when ``n`` is negative.
        """
        if n < 0:
            raise ValueError(f"cannot take {n} prompts")
        return PromptSet(self.name, self.prompts[:n])


@dataclass(frozen=True)
class Split:
    """Three parts of one set without a prompt in common."""

    train: PromptSet
    validation: PromptSet
    test: PromptSet

    def asked(self, *, system: str | None = None, thinking: str | None = None) -> Split:
        """The same prompts, asked in this way: `PromptSet.asked`."""
        return Split(
            *(
                part.asked(system=system, thinking=thinking)
                for part in (self.train, self.validation, self.test)
            )
        )


@dataclass(frozen=True)
class PromptSets:
    """All prompts of a run.

    Attributes:
        harmful, harmless: between which a direction is measured.
        borderline: prompts that measure over-refusal.
        kept: prompts that are to be refused as before (``--keep``); none of them is in ``harmful``.
        off_topic: harmless prompts with a system message whose refusals are to stay
            (``--keep-system``).
    """

    harmful: Split
    harmless: Split
    borderline: PromptSet | None
    kept: Split | None = None
    off_topic: Split | None = None

    @property
    def staying(self) -> dict[str, Split]:
        """Name -> prompts whose refusals are to stay, of the sets that there are."""
        named = {"kept": self.kept, "off_topic": self.off_topic}
        return {name: parts for name, parts in named.items() if parts is not None}

    @property
    def thinking(self) -> str | None:
        """The mode of thinking, which is the same for all prompts of a run."""
        return next((one.thinking for one in self.harmful.train.prompts), None)

    def asked(self, *, system: str | None = None, thinking: str | None = None) -> PromptSets:
        """The same prompts, asked in this way: `PromptSet.asked`."""
        return PromptSets(
            self.harmful.asked(system=system, thinking=thinking),
            self.harmless.asked(system=system, thinking=thinking),
            self.borderline and self.borderline.asked(system=system, thinking=thinking),
            self.kept and self.kept.asked(system=system, thinking=thinking),
            self.off_topic and self.off_topic.asked(system=system, thinking=thinking),
        )


def split(
    prompts: PromptSet, seed: int, fractions: tuple[float, float, float] = (0.5, 0.2, 0.3)
) -> Split:
    """Train, validation and test parts of a set, without duplicates.

    Prompts with the same :func:`normalized` text count once. A hash of the seed and the normalized
    text decides the place of each prompt, so it does not depend on the file's order or the version
    of Python. Categories are spread evenly (systematic sampling): a category of n prompts gives
    each part its fraction of n, up to about one prompt, and so does the beginning of a part.

    Args:
        prompts: the set.
        seed: decides the split.
        fractions: the sizes of train, validation and test parts, which add up to 1; rounded.

    Raises:
        ValueError: when the fractions are negative or do not add up to 1.
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(f"fractions {fractions} must be positive and add up to 1")
    ordered = _spread(unique(prompts.prompts), seed)
    first = round(fractions[0] * len(ordered))
    second = round((fractions[0] + fractions[1]) * len(ordered))
    return Split(
        PromptSet(f"{prompts.name}/train", tuple(ordered[:first])),
        PromptSet(f"{prompts.name}/validation", tuple(ordered[first:second])),
        PromptSet(f"{prompts.name}/test", tuple(ordered[second:])),
    )


def normalized(text: str) -> str:
    """The normal form of a text: prompts with the same normal form count as one.

    It is NFKC, casefolded, without punctuation. Apostrophes and invisible characters are removed,
    other punctuation separates words, and runs of white space become one space. Symbols stay (C++
    is not C). A text of punctuation only stays as it is.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = []
    for char in folded:
        category = unicodedata.category(char)
        if char in "'’" or category == "Cf":
            continue
        kept.append(" " if category[0] in "PC" else char)
    return " ".join("".join(kept).split()) or " ".join(folded.split())


def unique(prompts: Iterable[Prompt]) -> dict[str, Prompt]:
    """Normalized text -> prompt; of several equal ones, the first in the order of texts.

    Prompts with different system messages or earlier turns are different; their keys include these.
    """
    chosen: dict[str, Prompt] = {}
    for prompt in prompts:
        key = key_of(prompt)
        other = chosen.get(key)
        if other is None or (prompt.text, prompt.category) < (other.text, other.category):
            chosen[key] = prompt
    return chosen


def key_of(prompt: Prompt) -> str:
    """A text that is the same for prompts that count as one, such as in `unique`."""
    if prompt.system is None and not prompt.earlier:
        return normalized(prompt.text)
    return "\n".join(
        f"{message['role']}: {normalized(message['content'])}" for message in prompt.messages()
    )


def _fraction_of_hash(seed: int, *parts: str) -> float:
    """A pseudo-random number in [0, 1) that depends only on the arguments."""
    digest = hashlib.sha256("\0".join((str(seed), *parts)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _spread(prompts: Mapping[str, Prompt], seed: int) -> list[Prompt]:
    """Shuffle each category by hash and interleave the categories in proportion to their size."""
    by_category: dict[str, list[tuple[float, str]]] = {}
    for key, prompt in prompts.items():
        place = _fraction_of_hash(seed, "prompt", key)
        by_category.setdefault(prompt.category, []).append((place, key))
    order = []
    for category, members in by_category.items():
        offset = _fraction_of_hash(seed, "category", category)
        for rank, (_, key) in enumerate(sorted(members)):
            order.append(((rank + offset) / len(members), key))
    return [prompts[key] for _, key in sorted(order)]


def prompt_hashes(sets: PromptSets) -> dict[str, str]:
    """SHA-256 of the prompts with which a direction was measured and chosen, by set and part."""
    both = {"harmful": sets.harmful, "harmless": sets.harmless}
    return {
        f"{name} {part}": getattr(split, part).sha256
        for name, split in {**both, **sets.staying}.items()
        for part in ("train", "validation")
    }
