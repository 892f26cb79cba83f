"""What a set of prompts is, and how two sets are split into train, validation and test parts.

A direction is a difference between two sets of prompts, so everything that makes the result
trustworthy starts here: no prompt in two parts, none in both sets, the same split for the same
seed.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """One user message. ``answer`` is a reference reply; only the demo's prompts have one."""

    text: str
    category: str = ""
    answer: str | None = None


@dataclass(frozen=True)
class PromptSet:
    """Prompts in a fixed order, and where they came from."""

    name: str
    prompts: tuple[Prompt, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompts' texts, in order."""
        return tuple(prompt.text for prompt in self.prompts)

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the texts in order, each in UTF-8 and followed by one NUL byte.

        Names, categories and answers do not enter; a loaded text never holds a NUL.
        """
        digest = hashlib.sha256()
        for text in self.texts:
            digest.update(text.encode() + b"\0")
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, n: int) -> PromptSet:
        """The first ``n`` prompts, or all when there are fewer.

        A part made by :func:`split` spreads its categories evenly, so its first ``n`` do too.

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


@dataclass(frozen=True)
class PromptSets:
    """All prompts of a run. ``borderline`` is for over-refusal only, never for a direction."""

    harmful: Split
    harmless: Split
    borderline: PromptSet | None


def split(
    prompts: PromptSet, seed: int, fractions: tuple[float, float, float] = (0.5, 0.2, 0.3)
) -> Split:
    """Train, validation and test parts of a set, without duplicates.

    Prompts that are :func:`normalized` alike count once. Each prompt's place follows from a hash of
    the seed and its normalized text, so it depends on neither the file's order nor the Python
    version. Categories are spread evenly (systematic sampling): a category of n prompts gives each
    part its fraction of n, give or take about one, and any leading stretch of a part is spread
    likewise.

    Args:
        fractions: of train, validation and test; they add up to 1. Sizes are rounded.

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
    """The form under which two prompts count as one: NFKC, casefolded, without punctuation.

    Apostrophes and invisible characters vanish, other punctuation separates words, white space
    collapses. Symbols stay (C++ is not C). A text of punctuation only is kept as it is.
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
    """Normalized text -> prompt; of several alike the least by text, whatever their order."""
    chosen: dict[str, Prompt] = {}
    for prompt in prompts:
        key = normalized(prompt.text)
        other = chosen.get(key)
        if other is None or (prompt.text, prompt.category) < (other.text, other.category):
            chosen[key] = prompt
    return chosen


def _fraction_of_hash(seed: int, *parts: str) -> float:
    """A number in [0, 1) that depends on nothing but the arguments."""
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
    """SHA-256 of the prompts that a direction was made from and chosen on."""
    return {
        f"{name} {part}": getattr(split, part).sha256
        for name, split in (("harmful", sets.harmful), ("harmless", sets.harmless))
        for part in ("train", "validation")
    }
