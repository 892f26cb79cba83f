"""KL(baseline ‖ model) on harmless prompts for `eval`, in MLX or through llama.cpp's server.

In MLX it is exact. llama.cpp returns only the likeliest tokens, so both distributions are reduced
to the tokens that both sides return, and all others are merged into one. This gives a lower bound
of the KL, which is close if those tokens have nearly all the probability. The record calls it
``top-n``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from abl_mlx.behaviour import evaluate, exact_kl
from abl_mlx.behaviour.target import Target
from abl_mlx.inputs.sets import Question, prompt_of
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.given_template import GivenTemplate
from abl_mlx.models.logits import log_probabilities
from abl_mlx.records.evaluations import Divergence
from abl_mlx.support.arrays import numbers
from abl_mlx.support.console import progress

#: The number of likeliest tokens that llama.cpp is asked for.
TOP_N = 64

#: The number of harmless prompts with llama.cpp, where each token of each reply is a request.
TOP_N_PROMPTS = 16

#: The number of tokens of each of the baseline's replies that are compared.
TOKENS = 32

#: A smaller probability of all other tokens counts as 0, because float32 is not precise enough.
_NOTHING = 1e-6

#: Token id -> natural log-probability over the whole vocabulary.
Top = Mapping[int, float]


@dataclass(frozen=True)
class Reference:
    """The baseline's greedy replies, with its distribution for each of their tokens.

    Attributes:
        prompts: token ids of each prompt in the chat template.
        replies: token ids of each reply.
        tops: for each reply, the likeliest tokens in the place of each of its tokens.
    """

    prompts: list[list[int]]
    replies: list[list[int]]
    tops: list[list[Top]]


@contextmanager
def measured_against(
    baseline: Target, prompts: Sequence[Question], *, exactly: bool, batch_size: int = 32
) -> Iterator[Callable[[Target], Divergence]]:
    """Context manager with a function that measures a model's KL from the baseline.

    The baseline's distributions are computed first, so it may be released before the other model
    is loaded.

    Args:
        baseline: the baseline.
        prompts: harmless prompts.
        exactly: whether the other model will also be in MLX; if not, both distributions are reduced
            to their likeliest tokens.
        batch_size: how many of the baseline's replies are generated at the same time, in MLX.
    """
    with ExitStack() as stack:
        if exactly and baseline.chat is not None:
            chosen = list(prompts[: exact_kl.PROMPTS])
            base = stack.enter_context(
                exact_kl.baseline(baseline.chat, chosen, tokens=TOKENS, batch_size=batch_size)
            )
            del baseline

            def exact(target: Target) -> Divergence:
                assert target.chat is not None  # it is in MLX, because ``exactly`` is true
                groups = None if target.grouped is None else target.grouped(chosen)
                found = exact_kl.kl(target.chat, base, groups)
                return replace(found, kind="exact", n_prompts=len(chosen))

            yield exact
            return
        chosen = list(prompts[:TOP_N_PROMPTS])
        reference = refer(baseline, chosen, batch_size=batch_size)
        del baseline

        def cut(target: Target) -> Divergence:
            found = compare(reference, target)
            return replace(found, kind=f"top-{TOP_N}", n_prompts=len(chosen))

        yield cut


def refer(
    target: Target, prompts: Sequence[Question], tokens: int = TOKENS, *, batch_size: int = 32
) -> Reference:
    """The greedy replies of a model in MLX or llama.cpp, and its distribution for each token."""
    if target.chat is not None:
        chat = target.chat
        asked = [chat.encode(prompt) for prompt in prompts]
        replies = evaluate.generate(
            chat, asked, tokens, batch_size=batch_size, label="KL: base replies"
        )
        # A reply that ends at once also has a distribution for its first token.
        replies = [reply or [chat.tokenizer.eos_token_id] for reply in replies]
        return Reference(asked, replies, _in_mlx(chat, asked, replies, "KL: base"))
    from abl_mlx.behaviour.llamacpp import LlamaCpp

    assert target.gguf is not None
    room = 512 + max((prompt_of(one).length for one in prompts), default=0) + tokens
    with (
        LlamaCpp(target.gguf, n_ctx=room, n_parallel=1, lean=True, given=target.given) as server,
        progress(len(prompts), "KL: base") as bar,
    ):
        asked, replies = [], []
        tops: list[list[Top]] = []
        for prompt in prompts:
            asked.append(server.encode(prompt_of(prompt)))
            replies.append(server.greedy(asked[-1], tokens))
            tops.append([*server.top_logprobs(asked[-1], replies[-1], TOP_N, cached=True)])
            bar.update()
    return Reference(asked, replies, tops)


def compare(reference: Reference, target: Target) -> Divergence:
    """Mean KL(reference ‖ model), with both distributions reduced to their likeliest tokens.

    Returns:
        The mean at the first token of each reply, and the mean over all tokens.
    """
    if target.chat is not None:
        tops = _in_mlx(target.chat, reference.prompts, reference.replies, "KL")
    else:
        assert target.gguf is not None
        tops = _in_llamacpp(target.gguf, target.given, reference.prompts, reference.replies)
    values = [
        [cut_kl(p, q) for p, q in zip(before, after, strict=True)]
        for before, after in zip(reference.tops, tops, strict=True)
    ]
    every = [value for row in values for value in row]
    first = [row[0] for row in values]
    k1, k32 = (math.fsum(values) / len(values) for values in (first, every))
    return Divergence(k1=k1, k32=k32)


def cut_kl(p: Top, q: Top) -> float:
    """A lower bound of KL(p ‖ q) in nats, from two lists of likeliest tokens.

    Tokens that are in both lists are kept, and all others are merged into one token; merging never
    raises a KL.

    Raises:
        ValueError: when the lists have no token in common.
    """
    common = p.keys() & q.keys()
    if not common:
        raise ValueError("no token is in both lists")
    # A token with probability 0 under p adds 0, whatever its probability under q.
    likely = [token for token in common if math.exp(p[token]) > 0]
    total = math.fsum(math.exp(p[token]) * (p[token] - q[token]) for token in likely)
    rest_p, rest_q = (1 - math.fsum(math.exp(one[t]) for t in common) for one in (p, q))
    if rest_p > _NOTHING:
        total += rest_p * math.log(rest_p / max(rest_q, _NOTHING))
    return max(0.0, total)


def _in_mlx(
    chat: ChatModel, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]], label: str
) -> list[list[Top]]:
    sequences = [[*prompt, *reply[:-1]] for prompt, reply in zip(prompts, replies, strict=True)]
    positions = [
        list(range(len(prompt) - 1, len(sequence)))
        for prompt, sequence in zip(prompts, sequences, strict=True)
    ]
    found: list[list[Top]] = [[] for _ in sequences]
    for index, rows in log_probabilities(chat, sequences, positions, label=label):
        for row in rows:
            k = min(TOP_N, row.shape[-1])
            best = mx.argpartition(-row, kth=k - 1)[:k]
            ids = map(int, numbers(best))
            found[index].append(dict(zip(ids, numbers(row[best]), strict=True)))
    return found


def _in_llamacpp(
    path: Path,
    given: GivenTemplate | None,
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Sequence[int]],
) -> list[list[Top]]:
    from abl_mlx.behaviour.llamacpp import LlamaCpp

    room = 16 + max(len(p) + len(r) for p, r in zip(prompts, replies, strict=True))
    found: list[list[Top]] = []
    with (
        LlamaCpp(path, n_ctx=room, n_parallel=1, lean=True, given=given) as server,
        progress(len(prompts), "KL") as bar,
    ):
        for prompt, reply in zip(prompts, replies, strict=True):
            found.append(list(server.top_logprobs(prompt, reply, TOP_N, cached=True)))
            bar.update()
    return found
