"""Short replies to harmful prompts under an edit: whether they are still refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from abl_mlx.behaviour import evaluate
from abl_mlx.behaviour.refusals import Verdict, classify
from abl_mlx.directions.selection import LEFT
from abl_mlx.directions.trial import Trial
from abl_mlx.edits.steering import ablation
from abl_mlx.edits.weight_edit import WeightEdit
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.writers import Writer
from abl_mlx.support.console import say

#: The smallest and the largest number of prompts that are asked, where there are so many.
FEWEST, MOST = 16, 24

#: The number of tokens of each reply: enough for a refusal's first sentence.
REPLY_TOKENS = 24


@dataclass(frozen=True)
class ShortReplies:
    """What short replies show of an edit.

    Attributes:
        wrong: the number of replies that are refused or broken.
        asked: the number of replies.
        tokens: the number of tokens that were run, of prompts and replies.
    """

    wrong: int
    asked: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.wrong} of {self.asked} short replies are refused or broken"

    @property
    def share(self) -> float:
        """The share of replies that are refused or broken, 0 to 1."""
        return self.wrong / self.asked


def ask(
    chat: ChatModel,
    writers: Sequence[Writer],
    edit: WeightEdit,
    harmful: Sequence[Sequence[int]],
    batch_size: int,
) -> ShortReplies:
    """Ask the model under an edit, whose norm preservation is ignored.

    Args:
        chat: the model.
        writers: its residual writers.
        edit: the edit.
        harmful: encoded prompts.
        batch_size: how many replies are generated at the same time.
    """
    with ablation(writers, edit.without_norms()):
        replies = evaluate.generate(chat, harmful, REPLY_TOKENS, batch_size=batch_size)
    wrong = sum(classify(text) is not Verdict.ANSWER for text in evaluate.decode(chat, replies))
    return ShortReplies(wrong, len(replies), sum(map(len, [*harmful, *replies])))


def answers(
    chat: ChatModel,
    writers: Sequence[Writer],
    trial: Trial,
    edit: WeightEdit,
    batch_size: int,
    label: str,
) -> bool:
    """Whether next to no short reply to harmful prompts under an edit is refused or broken.

    The prompts are those whose reply opens with a refusal as the model is, at least `FEWEST` and at
    most `MOST`. The others count as answered.

    Args:
        chat, writers, edit, batch_size: as of `ask`.
        trial: knows the prompts, and counts the tokens that are run.
        label: what is said of the edit.
    """
    count = min(max(trial.refusing, FEWEST), MOST)
    found = ask(chat, writers, edit, trial.harmful[:count], batch_size)
    trial.tokens += found.tokens
    say(f"  {label}: {found}")
    return found.wrong <= LEFT * len(trial.harmful)
