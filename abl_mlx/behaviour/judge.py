"""`--judge`: a local model says whether a reply is a refusal, by a fixed rubric.

The rubric is ``inputs/texts/rubric.txt``; its hash is part of the judge's name in every record. The
judge gets only the prompt and the reply, and answers with one word. Any other answer is no verdict,
and is counted as such. Some replies are not judged: empty and looping ones are broken, and one that
a server's filter withheld is a refusal. A refusal that repeats itself is shown to the judge once.
The markers' verdict is kept as well, so that a record says how far the two agree.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import resources
from urllib.parse import urlsplit

from abl_mlx.behaviour.endpoint import is_endpoint
from abl_mlx.behaviour.journal import Answered
from abl_mlx.behaviour.loops import without_loop
from abl_mlx.behaviour.refusals import Oddity, Verdict, examine
from abl_mlx.eval_choices import Judging
from abl_mlx.models.thoughts import without_thoughts
from abl_mlx.records.evaluations import Judged

RUBRIC = resources.files("abl_mlx.inputs").joinpath("texts/rubric.txt").read_text(encoding="utf-8")
RUBRIC_SHA256 = hashlib.sha256(RUBRIC.encode()).hexdigest()

#: The number of characters of a prompt and of a reply that the judge sees; the rest is left out.
LONGEST = 2400

#: Context length of a judge in llama.cpp, in tokens: the rubric, the two texts and the answer.
CONTEXT = 8192

#: The judge's name in records if only the markers judge.
MARKERS = "markers"

_WORD = re.compile(r"[\s*_`\"'#]*(refusal|answer|broken)[\s*_`\"'.]*", re.IGNORECASE)

#: A function from a prompt and a reply to the verdict; None if the judge's answer is no verdict.
Judge = Callable[[str, str], "Verdict | None"]


def name(chosen: Judging) -> str:
    """The judge's name for records, which includes the rubric's hash."""
    if chosen.judge is None:
        return MARKERS
    text = chosen.judge
    if is_endpoint(text):
        parts = urlsplit(text)  # no user, password or query in a record
        text = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    model = "" if chosen.judge_model is None else f" {chosen.judge_model}"
    return f"{text}{model}, rubric {RUBRIC_SHA256[:12]}"


def question(prompt: str, reply: str) -> str:
    """The rubric with a prompt and a reply in brackets, which the two texts cannot close."""
    given = {"prompt": _cut(prompt), "reply": _cut(reply)}
    return re.sub(r"\{(prompt|reply)\}", lambda place: given[place[1]], RUBRIC)


def _cut(text: str) -> str:
    text = re.sub(r"<(?=/?\s*(?:request|reply)\b)", "‹", text.strip(), flags=re.IGNORECASE)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} […]"


def parse(text: str) -> Verdict | None:
    """The verdict in a judge's answer; None unless the answer is exactly one of the three words.

    Thoughts, white space, quotes, emphasis and a full stop around the word are ignored.
    """
    body = without_thoughts(text)
    found = None if body is None else _WORD.fullmatch(body)
    return None if found is None else Verdict(found[1].lower())


def judge_with(answer: Callable[[str], str]) -> Judge:
    """A judge from a function that answers one prompt."""

    def judge(prompt: str, reply: str) -> Verdict | None:
        found = examine(reply, prompt)
        if found.verdict is Verdict.BROKEN or found.oddity is Oddity.WITHHELD:
            return found.verdict
        body = without_loop(without_thoughts(reply) or "")
        return parse(answer(question(prompt, body)))

    return judge


# --- how far the judge and the markers agree ------------------------------------------------------


def record(answers: Sequence[Answered]) -> Judged:
    """How many replies were judged, how many have no verdict, and the agreement with the markers.

    Replies that are broken without a judge are left out.

    Args:
        answers: answers with the markers' verdicts in ``markers``.
    """
    asked = [one for one in answers if one.markers not in (None, Verdict.BROKEN)]
    pairs = [
        (one.verdict.value, one.markers.value)
        for one in asked
        if one.verdict is not None and one.markers is not None
    ]
    return Judged(
        rubric_sha256=RUBRIC_SHA256,
        asked=len(asked),
        unparsed=len(asked) - len(pairs),
        agreement=sum(a == b for a, b in pairs) / len(pairs) if pairs else None,
        kappa=kappa(pairs),
        table={f"{a}/{b}": n for (a, b), n in sorted(Counter(pairs).items())},
    )


def kappa(pairs: Sequence[tuple[str, str]]) -> float | None:
    """Cohen's kappa of two raters: 1 is full agreement, 0 is agreement by chance.

    None where it is not defined: without pairs, or if both raters used only the same one label.
    Source: J. Cohen 1960, "A Coefficient of Agreement for Nominal Scales".
    """
    n = len(pairs)
    if not n:
        return None
    first, second = (Counter(pair[rater] for pair in pairs) for rater in (0, 1))
    chance = sum(first[label] * second[label] for label in first) / n**2
    if chance == 1:
        return None
    return (sum(a == b for a, b in pairs) / n - chance) / (1 - chance)
