"""Greedy replies to many prompts, in batches where that does not change the replies.

mlx-lm pads the prompts of a batch. In some of its architectures the padding changes the replies to
all prompts but the longest, without any error; some cannot be batched at all. So each model is
compared once with the plain forward pass of single prompts, and batched only where the two agree.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from enum import Enum

import mlx.core as mx

from abl_mlx.models import heads
from abl_mlx.models.batch_masks import batch_masks
from abl_mlx.models.cache_steps import small_steps
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.plain import Plain, reach, sample
from abl_mlx.support.arrays import number
from abl_mlx.support.console import progress, say

#: A token, and the log-probabilities (V,) of the distribution from which it was chosen.
Step = tuple[int, mx.array]


class Way(Enum):
    """How replies are generated, fastest first; the values appear in messages."""

    BATCH = "in batches"
    EQUAL = "in batches of prompts of one length"
    SINGLE = "one by one"
    PLAIN = "one by one and without a cache"


def generate(
    chat: ChatModel,
    sequences: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    batch_size: int = 32,
    label: str = "replies",
) -> list[list[int]]:
    """Greedy replies, in order, as token ids without the end token.

    Args:
        sequences: encoded prompts.
        max_tokens: the largest number of tokens in a reply.
        batch_size: how many replies are generated at the same time.

    Raises:
        UserError: when mlx-lm cannot run the model.
    """
    replies: list[list[int]] = [[] for _ in sequences]
    with progress(len(sequences), label) as bar:
        for index, reply in stream(chat, sequences, max_tokens, batch_size=batch_size):
            replies[index] = reply
            bar.update()
    return replies


def timed(
    chat: ChatModel,
    sequences: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    batch_size: int = 32,
    label: str = "replies",
) -> tuple[list[list[int]], float]:
    """The result of `generate`, and the speed in tokens (prompts and replies) per second."""
    start = time.perf_counter()
    replies = generate(chat, sequences, max_tokens, batch_size=batch_size, label=label)
    tokens = sum(map(len, [*sequences, *replies]))
    return replies, tokens / max(1e-6, time.perf_counter() - start)


def stream(
    chat: ChatModel,
    sequences: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    batch_size: int = 32,
) -> Iterator[tuple[int, list[int]]]:
    """Yield the replies of `generate` as soon as each is finished: (index, token ids)."""
    if not sequences:
        return
    ends = frozenset(chat.tokenizer.eos_token_ids)
    lengths = [max_tokens] * len(sequences)
    replies: list[list[int]] = [[] for _ in sequences]
    steps = _STEPS[way(chat, sequences, batch_size)]
    with closing(steps(chat, sequences, lengths, batch_size, ends)) as running:
        for index, step in running:
            if step is None:
                yield index, replies[index]
            elif step[0] not in ends:
                replies[index].append(step[0])


# --- the ways ------------------------------------------------------------------------------------

# Each way yields (index, step) for every token, the end token included, and (index, None) after the
# last token of a reply.
_Running = Generator[tuple[int, Step | None], None, None]


def _batch(
    chat: ChatModel,
    sequences: Sequence[Sequence[int]],
    max_tokens: Sequence[int],
    batch_size: int,
    ends: frozenset[int],
) -> _Running:
    """Generate in batches of prompts of unequal length, the shortest first.

    Finished replies are replaced by new prompts, several at a time, because every pass over new
    prompts reads the whole model (and unpacks it, on a CPU).
    """
    from mlx_lm.generate import BatchGenerator

    several = max(1, batch_size // 4)
    # Prompts of one length can begin together. With other lengths half a batch needs less padding.
    unequal = len({len(sequence) for sequence in sequences}) > 1
    generator = BatchGenerator(
        chat.model,
        max_tokens=max(max_tokens),
        stop_tokens=[[token] for token in ends],
        completion_batch_size=batch_size,
        prefill_batch_size=2 * several if unequal else batch_size,
    )
    waiting = deque(sorted(range(len(sequences)), key=lambda index: len(sequences[index])))
    running: dict[int, int] = {}
    try:
        with batch_masks(chat.model), heads.last_only(chat.model), small_steps():
            while waiting or running:
                free = batch_size - len(running)
                if waiting and (free >= several or not running):
                    chosen = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                    keys = generator.insert(
                        [list(sequences[index]) for index in chosen],
                        [max_tokens[index] for index in chosen],
                    )
                    running.update(zip(keys, chosen, strict=True))
                for response in generator.next_generated():
                    yield running[response.uid], (response.token, response.logprobs)
                    if response.finish_reason is not None:
                        yield running.pop(response.uid), None
    finally:
        generator.close()


def _equal(
    chat: ChatModel,
    sequences: Sequence[Sequence[int]],
    max_tokens: Sequence[int],
    batch_size: int,
    ends: frozenset[int],
) -> _Running:
    """Generate in batches of prompts of equal length, so that nothing is padded."""
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    while order:
        length = len(sequences[order[0]])
        chosen = [index for index in order[:batch_size] if len(sequences[index]) == length]
        order = order[len(chosen) :]
        rows, longest = [sequences[i] for i in chosen], [max_tokens[i] for i in chosen]
        for row, step in _batch(chat, rows, longest, len(rows), ends):
            yield chosen[row], step


def _single(
    chat: ChatModel,
    sequences: Sequence[Sequence[int]],
    max_tokens: Sequence[int],
    batch_size: int,
    ends: frozenset[int],
) -> _Running:
    from mlx_lm.generate import generate_step

    for index, sequence in enumerate(sequences):
        prompt, longest = mx.array(list(sequence)), max_tokens[index]
        with heads.last_only(chat.model), small_steps():
            for token, logs in generate_step(prompt, chat.model, max_tokens=longest):
                yield index, (int(token), logs)
                if int(token) in ends:
                    break
        yield index, None


def _plain(
    chat: ChatModel,
    sequences: Sequence[Sequence[int]],
    max_tokens: Sequence[int],
    batch_size: int,
    ends: frozenset[int],
) -> _Running:
    plain = Plain(chat)
    for index, sequence in enumerate(sequences):
        tokens = list(sequence)
        for _ in range(max_tokens[index]):
            logs = plain(tokens)[0]
            token = int(number(mx.argmax(logs)))
            yield index, (token, logs)
            if token in ends:
                break
            tokens.append(token)
        yield index, None


_Steps = Callable[
    [ChatModel, Sequence[Sequence[int]], Sequence[int], int, frozenset[int]], _Running
]
_STEPS: dict[Way, _Steps] = {
    Way.BATCH: _batch,
    Way.EQUAL: _equal,
    Way.SINGLE: _single,
    Way.PLAIN: _plain,
}


# --- which of them -------------------------------------------------------------------------------


def way(chat: ChatModel, sequences: Sequence[Sequence[int]], batch_size: int) -> Way:
    """The fastest way whose replies are those of the plain pass of single prompts.

    The comparison is made once for each model, and again if prompts are far longer than those that
    were compared.

    Args:
        chat: the model.
        sequences: the prompts to be answered, from which those of the comparison are made.
        batch_size: how many replies are generated at the same time.

    Raises:
        UserError: when mlx-lm cannot run the model at all.
    """
    known: dict[tuple[Way, int], bool] = vars(chat).setdefault("_ways", {})
    length, alone = reach(sequences), batch_size == 1 or len(sequences) == 1
    for one in (Way.SINGLE,) if alone else (Way.BATCH, Way.EQUAL, Way.SINGLE):
        if (one, length) not in known:
            known[one, length] = _agrees(chat, one, sample(sequences))
        if known[one, length]:
            return _told(chat, one, one is (Way.SINGLE if alone else Way.BATCH))
    Plain(chat)(sample(sequences)[:2])  # raises an error with the reason if even this cannot run
    return _told(chat, Way.PLAIN, False)


def _told(chat: ChatModel, one: Way, fastest: bool) -> Way:
    told: set[Way] = vars(chat).setdefault("_ways_told", set())
    if not fastest and one not in told:
        told.add(one)
        say(
            f"· {chat.model_type} is asked {one.value}: mlx-lm's faster ways give other replies "
            "or fail"
        )
    return one


def _agrees(chat: ChatModel, one: Way, tokens: list[int]) -> bool:
    """Whether a few tokens of a few replies agree with the distributions of the plain pass."""
    n = len(tokens)
    third = n // 3
    # Three prompts of very different lengths run in one batch; the first reply ends early, and the
    # fourth prompt takes its place beside replies that have begun. An influence of padding shows
    # most in the shortest prompts, which have few other tokens to attend to.
    prompts = [tokens, tokens[-2:], tokens[-4:], tokens[: n // 2]]
    lengths = [1, 3, 3, 2]
    if one is Way.EQUAL:
        prompts, lengths = [tokens[:third], tokens[third : 2 * third], tokens[-third:]], [2, 4, 3]
    elif one is Way.SINGLE:
        prompts, lengths = [tokens[third:]], [3]
    plain = Plain(chat)
    found: list[list[Step]] = [[] for _ in prompts]
    try:
        for index, step in _STEPS[one](chat, prompts, lengths, 3, frozenset()):
            if step is not None:
                found[index].append(step)
        for prompt, steps, length in zip(prompts, found, lengths, strict=True):
            said = [token for token, _ in steps]
            logs = mx.stack([row for _, row in steps])
            if len(said) != length or not plain.agrees([*prompt, *said[:-1]], logs):
                return False
    except Exception:  # mlx-lm's code may raise anything for a batch that it does not support
        return False
    return True
