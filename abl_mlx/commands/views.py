"""The places where directions are measured: the end of the prompt, and the end of the thought.

With thinking off there is one such view, the end of the prompt. With thinking on there is another
one: the model's own thought is appended to each prompt, so that the last token is the one behind
which the reply begins.
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

#: The largest number of prompts of a set for which thoughts are generated, by part.
THOUGHT_PROMPTS = {"train": 48, "validation": 24}

#: The smallest number of thoughts that end in time, for each set and part, to measure behind them.
_FEWEST = 8

#: Token ids of prompts, by set: as of `encoded_sets.EncodedSets`.
Encoded = dict[str, list[list[int]]]


@dataclass(frozen=True)
class View:
    """Encoded prompts at whose last tokens directions are measured.

    Attributes:
        thinking: the mode of thinking, as in `Prompt`.
        place: `PROMPT` or `THOUGHT`.
        train, validation: set -> token ids, for measuring and for choosing.
        tail: the number of tokens that all prompts share at their end, at least 1.
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
        """A name for messages, such as "thinking on, end of thought"."""
        return f"thinking {thinking.name(self.thinking)}, {self.place.replace('-', ' ')}"

    def record(self) -> ViewOf:
        """The view as a part of the record."""
        return ViewOf(thinking=thinking.name(self.thinking), measured_at=self.place)


def at_prompt(chat: ChatModel, sets: EncodedSets) -> View:
    """The view of the end of the prompts, behind what all replies open with.

    Args:
        chat: the model.
        sets: the prompts in one mode of thinking.
    """
    train, validation = (
        {name: one.tokens for name, one in part.items()} for part in (sets.train, sets.validation)
    )
    tail = max(1, sets.tail)
    return View(sets.thinking, PROMPT, train, validation, tail, chat.completes)


def at_thought(chat: ChatModel, sets: EncodedSets, how: Measuring) -> View | None:
    """The view of the end of the model's own thoughts; None if it cannot be measured.

    That is so if the model does not think, or if too few of its thoughts end in time. Prompts whose
    thoughts do not end within ``--thought-tokens`` are left out, and a message says so.

    Args:
        chat: the model.
        sets: the prompts in one mode of thinking.
        how: the chosen options.
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
    needed = [*found["train"].values()]
    needed += [mine for name, mine in found["validation"].items() if name not in sets.staying]
    if any(len(sequences) < _FEWEST for sequences in needed):
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
    """A prompt with the model's thought, which ended in time.

    Attributes:
        sequence: token ids of the prompt and the thought.
        behind: token ids of the reply behind the thought.
        thought: whether the reply opens with a thought.
    """

    sequence: list[int]
    behind: list[int]
    thought: bool


def _with_thoughts(chat: ChatModel, some: EncodedSet, how: Measuring, label: str) -> list[Ended]:
    """The prompts with their thoughts; prompts whose thoughts do not end are left out."""
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
    """The number of a reply's tokens up to the end of its thought.

    Args:
        text: turns the reply's first tokens into text, behind what opened the thought.
        reply: token ids of the reply.

    Returns:
        None if the thought does not end, 0 if the reply opens with none.
    """

    def closed(count: int) -> bool:
        return parted(text(reply[:count]))[1] is not None

    if not has_thought(text(reply)):
        return 0
    if not closed(len(reply)):
        return None
    # The first tokens may be a part of the opening tag only, which looks like a reply without one.
    low = next(n for n in range(len(reply) + 1) if has_thought(text(reply[:n])))
    high = len(reply)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if closed(middle) else (middle + 1, high)
    return low
