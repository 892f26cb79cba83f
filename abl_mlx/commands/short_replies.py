"""Short replies to harmful prompts under an edit: whether they are still refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from abl_mlx.behaviour import evaluate
from abl_mlx.behaviour.refusals import Verdict, classify
from abl_mlx.edits.steering import ablation
from abl_mlx.edits.weight_edit import WeightEdit
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.writers import Writer

#: The smallest number of prompts that are asked, where there are so many.
FEWEST = 16

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
