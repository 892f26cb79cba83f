"""Detects texts that end in repetition.

Nothing in this module imports MLX.
"""

from __future__ import annotations

import re
from collections import Counter

from abl_mlx.behaviour.plain_text import SENTENCE_END, plain


def without_loop(body: str) -> str:
    """The text without a repetition at its end: up to the end of the repeated phrase's first time.

    A phrase of p characters repeats if text[i] == text[i - p] holds up to the text's end; numbers
    and bullets of lists are ignored. It is a loop if it occurs five times over at least 60
    characters, seven times over 40, three times over half of a longer text, or five times over
    nearly all of a short one; a phrase without letters (a rule, zeros, a row of a table) may fill
    200 characters. Also loops are a line three times at the end, outside of code, a sentence that
    makes up most of the text's sentences, and an end that mostly says in another order what was
    said twice before. A text without a loop is returned unchanged.
    """
    lines = re.sub(r" ?\n[ \n]*", "\n", re.sub(r"[^\S\n]+", " ", body.strip()))
    lines = _LIST_MARK.sub("", lines)
    text = lines.replace("\n", " ")
    for period in range(1, len(text[-4000:]) // 2 + 1):
        at = len(text) - 1
        while at >= period and text[at] == text[at - period]:
            at -= 1
        start = at - period + 1
        length = len(text) - start
        if _too_often(period, length, text):
            once = lines[: start + period].rstrip()
            if once.endswith(_ENDS):
                return once
            rest = re.match(r"[^.!?。！？\n]*[.!?。！？]", lines[len(once) : len(once) + period])
            return once if rest is None else once + rest[0]
    return _one_line(lines) or _one_sentence(body) or _shuffled(lines) or body


_LIST_MARK = re.compile(r"^(?:\d+[.)]|[-*•+]) (?=\S)", re.MULTILINE)
_ENDS = tuple(".!?。！？")


def _too_often(period: int, length: int, text: str) -> bool:
    """Whether a phrase of ``period`` characters that fills the last ``length`` is a loop."""
    times = length / period
    if times >= 5 and not any(char.isalpha() for char in text[-period:]):
        return length >= 200
    return (
        (times >= 5 and (length >= 60 or (length >= 12 and length >= 0.8 * len(text))))
        or (times >= 7 and length >= 40)
        or (times >= 3 and length >= 100 and length >= 0.5 * len(text))
        or (times >= 2.3 and length >= 150 and length >= 0.6 * len(text))
    )


def _one_line(lines: str) -> str | None:
    """The text up to the first of three or more equal lines at its end; None if there are none.

    The last line may be an unfinished copy.
    """
    every = [line.strip() for line in lines.split("\n")]
    while (
        len(every) > 3 and every[-2].startswith(every[-1].rstrip("*-• ")) and every[-1] != every[-2]
    ):
        every.pop()
    if lines.count("```") % 2:
        return None
    last = every[-1]
    same = next((n for n, line in enumerate(reversed(every)) if line != last), len(every))
    if same < 3 or sum(char.isalpha() for char in last) < 6 or last.startswith(("|", "}", ")")):
        return None
    return "\n".join(every[: len(every) - same + 1])


def _one_sentence(body: str) -> str | None:
    """A sentence that occurs three times or more and is most of the rest of the text; or None."""
    told = [s for s in map(plain, SENTENCE_END.split(body)) if len(s.split()) > 3]
    # The last sentence may be an unfinished copy.
    sentence = told[-2] if len(told) > 1 and told[-2].startswith(told[-1]) else (told or [""])[-1]
    times = told.count(sentence)
    return sentence if times >= 3 and times >= 0.6 * len(told) else None


def _shuffled(lines: str) -> str | None:
    """The text up to where phrases come back for the third time, if most of its last third does.

    A phrase is four words in a row. None outside of prose, and if there is no such loop.
    """
    if "```" in lines or "|" in lines:
        return None
    found = list(_WORD.finditer(lines.casefold()))
    said: Counter[tuple[str, ...]] = Counter()
    returns = []
    for at in range(len(found) - 3):
        phrase = tuple(word[0] for word in found[at : at + 4])
        returns.append(said[phrase] >= 2)
        said[phrase] += 1
    last = returns[-max(12, len(returns) // 3) :]
    if len(found) < 24 or sum(last) < len(last) / 2:
        return None
    return lines[: found[returns.index(True)].start()].rstrip()


_WORD = re.compile(r"\w+")
