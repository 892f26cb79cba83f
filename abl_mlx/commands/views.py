"""Where directions are measured when a model thinks: at the prompt's end, and at its thought's.

With thinking off there is one such view, the end of the prompt. With thinking on, the model's own
thought is put behind the prompt for the other one, so that the last token is the one at which the
thought has closed and the reply begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from abl_mlx.choices import Measuring
from abl_mlx.commands import first_look
from abl_mlx.directions import measuring
from abl_mlx.inputs import thinking
from abl_mlx.models.chat_model import ChatModel, common_prefix
from abl_mlx.models.encoded_sets import EncodedSet, EncodedSets
from abl_mlx.models.generation import generate
from abl_mlx.models.thoughts import has_thought, parted
from abl_mlx.records.directions import ViewOf
from abl_mlx.support.console import say

PROMPT, THOUGHT = "end-of-prompt", "end-of-thought"

#: Prompts of each set whose own thoughts are generated, by part: to measure, and to choose on.
THOUGHT_PROMPTS = {"train": 48, "validation": 24}

#: Prompts of a set that the view of thoughts needs at least, of those whose thoughts end in time.
_FEWEST = 8

#: Token ids of prompts, by set: as of `encoded_sets.EncodedSets`.
Encoded = dict[str, list[list[int]]]


@dataclass(frozen=True)
class View:
    """Encoded prompts whose last tokens are where directions are measured.

    Attributes:
        thinking: the mode, as of `Prompt`.
        place: `PROMPT` or `THOUGHT`.
        train, validation: what is measured, and what a direction is chosen on.
        tail: how many tokens all prompts share at their end, at least 1.
        completes: whether the prompts are texts to complete, which end with the instruction.
    """

    thinking: str | None
    place: str
    train: Encoded
    validation: Encoded
    tail: int
    completes: bool = False

    @property
    def name(self) -> str:
        """For messages, such as "thinking on, end of thought"."""
        return f"thinking {thinking.name(self.thinking)}, {self.place.replace('-', ' ')}"

    def record(self) -> ViewOf:
        """Its part of the record."""
        return ViewOf(thinking=thinking.name(self.thinking), measured_at=self.place)


def at_prompt(chat: ChatModel, sets: EncodedSets) -> View:
    """The end of the prompts, behind what all replies open with.

    Args:
        sets: in the mode of thinking that is looked at.
    """
    train, validation = (
        {name: one.tokens for name, one in part.items()} for part in (sets.train, sets.validation)
    )
    tail = max(1, sets.tail)
    return View(sets.thinking, PROMPT, train, validation, tail, chat.completes)


def at_thought(chat: ChatModel, sets: EncodedSets, how: Measuring) -> View | None:
    """The end of the model's own thoughts about the prompts; None where it is no use.

    That is where the model does not think, and where its thoughts do not end in time. Prompts whose
    thoughts have no end within ``--thought-tokens`` are left out with a note.

    Args:
        sets: in the mode of thinking that is looked at.
    """
    found: dict[str, Encoded] = {}
    every: list[Ended] = []
    missing = asked = 0
    for part, prompts in {"train": sets.train, "validation": sets.validation}.items():
        found[part] = {}
        for name, whole_set in prompts.items():
            some = whole_set[: THOUGHT_PROMPTS[part]]
            ended = _with_thoughts(chat, some, how, f"thoughts, {name}")
            found[part][name] = [one.sequence for one in ended]
            every += ended
            asked += len(some)
            missing += len(some) - len(ended)
    if not any(one.thought for one in every) and not missing:
        return None
    if missing:
        say(
            f"  {missing} of {asked} thoughts do not end within --thought-tokens "
            f"{how.prompting.thought_tokens}, and are left out"
        )
    if any(len(part[name]) < _FEWEST for part in found.values() for name in part):
        say("  too few thoughts end in time: directions are measured at the end of the prompt")
        return None
    shared = list(common_prefix([one.behind[: first_look.OPENING_TOKENS] for one in every]))
    if not all(len(one.behind) > len(shared) for one in every):
        shared = []
    whole = {
        part: {name: [one + shared for one in sequences] for name, sequences in sets_.items()}
        for part, sets_ in found.items()
    }
    turned = [one[::-1] for part in whole.values() for each in part.values() for one in each]
    tail = max(1, len(common_prefix([one[: measuring.MOST_POSITIONS] for one in turned])))
    return View(sets.thinking, THOUGHT, whole["train"], whole["validation"], tail)


@dataclass(frozen=True)
class Ended:
    """A prompt and the model's thought about it, which came to its end.

    Attributes:
        sequence: token ids of both.
        behind: the tokens of the reply behind the thought.
        thought: whether the reply opens with a thought at all.
    """

    sequence: list[int]
    behind: list[int]
    thought: bool


def _with_thoughts(chat: ChatModel, some: EncodedSet, how: Measuring, label: str) -> list[Ended]:
    """The prompts with their thoughts, of the thoughts that end."""
    longest = how.prompting.thought_tokens + first_look.OPENING_TOKENS
    replies = generate(chat, some.tokens, longest, batch_size=how.batch_size, label=label)
    opened = chat.opened_thought(some.prompts[0].thinking) if some.prompts else ""
    found = []
    for sequence, reply in zip(some.tokens, replies, strict=True):
        end = thought_end(lambda tokens: opened + _text(chat, tokens), reply)
        if end is not None:
            found.append(Ended([*sequence, *reply[:end]], reply[end:], end > 0))
    return found


def _text(chat: ChatModel, tokens: Sequence[int]) -> str:
    return str(chat.tokenizer.decode(list(tokens), skip_special_tokens=False))


def thought_end(text: Callable[[Sequence[int]], str], reply: Sequence[int]) -> int | None:
    """How many tokens of a reply there are up to where its thought has closed.

    Args:
        text: tokens of the reply from its beginning, as text behind what opened the thought.

    Returns:
        None where the thought does not close, and 0 where the reply opens with none.
    """

    def closed(count: int) -> bool:
        return parted(text(reply[:count]))[1] is not None

    if not has_thought(text(reply)):
        return 0
    if not closed(len(reply)):
        return None
    # The first tokens may be less than the opening tag, which reads as a reply without a thought.
    low = next(n for n in range(len(reply) + 1) if has_thought(text(reply[:n])))
    high = len(reply)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if closed(middle) else (middle + 1, high)
    return low
