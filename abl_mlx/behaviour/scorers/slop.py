"""Slop: stock phrases per 100 words of replies to requests for prose."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from abl_mlx.behaviour.plain_text import plain
from abl_mlx.behaviour.scorers.lines import lines_of

#: Phrases of which texts by language models have far more than texts by people.
PHRASES = (
    "a testament to", "rich tapestry", "tapestry of", "delve into", "delving into",
    "in today's fast-paced world", "in the realm of", "in the heart of",
    "navigate the complexities", "it's important to note", "it is important to note",
    "it's worth noting", "plays a crucial role", "plays a vital role", "a beacon of",
    "a symphony of", "a dance of", "bustling", "nestled", "ever-evolving",
    "ever-changing landscape", "game-changer", "unlock the potential", "embark on a journey",
    "a journey of self-discovery", "shivers down", "couldn't help but", "barely above a whisper",
    "sent a shiver", "eyes sparkling", "sparkled with mischief", "little did they know",
    "only time would tell", "whether you're a", "let's dive in", "stands as a", "not just a",
    "more than just a", "leaving an indelible mark", "weaving together", "vibrant community",
    "timeless", "unwavering", "intricate", "multifaceted", "holistic",
)  # fmt: skip

PROMPTS = (
    "Write the opening of a short story about a lighthouse keeper.",
    "Describe a small town in autumn.",
    "Write a paragraph that introduces a museum of clocks.",
    "Write a short product description of a wooden chair.",
    "Describe how bread is baked in a village bakery.",
    "Write a paragraph about why people travel.",
    "Write a short speech for the opening of a library.",
    "Describe a market on a Saturday morning.",
    "Write the first paragraph of an article about sleep.",
    "Write a short story about two friends who repair a boat.",
    "Explain what makes a good garden.",
    "Write a paragraph about the history of tea.",
)

_WORD = re.compile(r"\w+(?:['-]\w+)*")


@dataclass(frozen=True)
class Slop:
    """Stock phrases per 100 words.

    Attributes:
        phrases: in lower case; they count as whole words.
    """

    phrases: tuple[str, ...] = PHRASES
    name: str = "slop"
    unit: str = "stock phrases per 100 words"
    prompts: tuple[str, ...] = PROMPTS
    max_tokens: int = 160

    @classmethod
    def of_file(cls, path: Path | None) -> Slop:
        """The scorer, with the phrases of a file if there is one."""
        return cls() if path is None else cls(lines_of(path, "slop", "a phrase"))

    def figure(self, replies: Sequence[str]) -> float:
        """100 times the number of phrases over the number of words; 0 for no words."""
        texts = [plain(reply) for reply in replies]
        words = sum(len(_WORD.findall(text)) for text in texts)
        known = sorted((plain(one) for one in self.phrases), key=len, reverse=True)
        # The longest phrase is tried first, and no word counts for two phrases.
        found = re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, known)) + r")(?!\w)")
        return 100 * sum(len(found.findall(text)) for text in texts) / words if words else 0.0
