"""How each architecture of mlx-lm replies to many prompts, and whether as to each alone."""

from __future__ import annotations

import dataclasses
import functools

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from abl_mlx.models import generation, shortcuts
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.logits import first_reply_token, log_probabilities
from abl_mlx.models.plain import needs_cache
from convert.base.errors import UserError
from tests.support import zoo

#: Prompts of 2 to 98 tokens, far apart in length, more than one of some lengths.
PROMPTS = [
    "o?",
    "bed?",
    "u:paint?",
    "u:fence?",
    "u:paint the fence?",
    "u:old town by night, tea and kettle?",
    "u:stone, wood, cloth, paper, metal and the bread of the old oven; seed and river?",
    "u:" + "river and garden, " * 5 + "bread?",
    "u:bread and kettle?",
]
REPLY = 4

#: Log-probabilities this close are a tie, which rounding may decide either way.
TIE = 5e-3


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a random model of an architecture.

    Attributes:
        way: how it generates; None where it cannot be run.
        left_out: the shortcuts of its forward passes that are not taken.
        same: replies of a batch of 32 that are greedy by the plain pass of their prompt alone.
        alone: the same of replies that were asked for one by one.
        apart: the largest difference of a log-probability above −20 from the plain pass, at the
            ends of all prompts and inside of them.
        reason: why it cannot be run.
    """

    way: generation.Way | None
    left_out: tuple[str, ...] = ()
    same: int = 0
    alone: int = 0
    apart: float = 0.0
    reason: str = ""


def truth(chat: ChatModel, tokens: list[int]) -> np.ndarray:
    """Log-probabilities after every token, by one forward pass of one prompt: float64 (T, V)."""
    cache = {"cache": make_prompt_cache(chat.model)} if needs_cache(chat) else {}
    raw = np.array(chat.model(mx.array([tokens]), **cache)[0].astype(mx.float32), np.float64)
    return raw - np.logaddexp.reduce(raw, axis=1, keepdims=True)


def greedy(chat: ChatModel, prompt: list[int], reply: list[int]) -> bool:
    """Whether every token of a reply is the likeliest but for ties, and it ends where it should."""
    ends = set(chat.tokenizer.eos_token_ids)
    rows = truth(chat, [*prompt, *reply])[len(prompt) - 1 :]
    if len(reply) < REPLY:  # then the end token was next
        reply = [*reply, *ends]
    return all(
        row.max() - row[token] < TIE for row, token in zip(rows[: len(reply)], reply, strict=True)
    )


@functools.cache
def outcome(name: str) -> Outcome:
    """Ask a tiny model of the architecture, in a batch and alone, and compare with `truth`."""
    chat = zoo.chat(name)
    prompts = [chat.encode(text) for text in PROMPTS]
    try:
        together = generation.generate(chat, prompts, REPLY, batch_size=32)
    except UserError as error:
        return Outcome(None, reason=str(error))
    alone = [generation.generate(chat, [one], REPLY, batch_size=1)[0] for one in prompts]
    places = [[1, len(one) - 1] for one in prompts]
    found = dict(log_probabilities(chat, prompts, places))
    first = first_reply_token(chat, prompts)
    apart = 0.0
    for index, prompt in enumerate(prompts):
        right = truth(chat, prompt)[places[index]]
        seen = right > -20
        rows = np.array(found[index])
        assert (np.isfinite(rows) == np.isfinite(right)).all()
        apart = max(apart, float(np.abs(rows[seen] - right[seen]).max()))
        apart = max(
            apart, float(np.abs(np.array(first[index])[seen[-1]] - right[-1][seen[-1]]).max())
        )
    taken = vars(shortcuts.trusted(chat, prompts))
    return Outcome(
        generation.way(chat, prompts, 32),
        tuple(key for key in ("together", "padded", "prefix", "cut") if not taken[key]),
        sum(greedy(chat, *pair) for pair in zip(prompts, together, strict=True)),
        sum(greedy(chat, *pair) for pair in zip(prompts, alone, strict=True)),
        apart,
    )
