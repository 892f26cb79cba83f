"""Compares the log-probabilities of two words as the reply to a prompt.

In MLX they are exact. A word may consist of several tokens, and may be written with a small or a
capital first letter, or behind a space. Its probability is the sum over these spellings, each
teacher-forced. The first token alone is not enough, because many tokenizers begin "harmful" and
"harmless" with the same token.

llama.cpp returns only the `TOP_N` likeliest tokens; any other token gets the log-probability of the
last of these. A server's chat API takes no beginning of a reply and returns few likeliest tokens.
There the model's own reply is followed until it distinguishes the two words.

If the chat template opens a thought in every prompt, the thought is closed at once, so that the
reply begins with the word. On a server this is not possible.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx

from abl_mlx.behaviour.endpoint import Endpoint
from abl_mlx.inputs.sets import Prompt
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.given_template import GivenTemplate
from abl_mlx.models.logits import log_probabilities
from abl_mlx.models.thoughts import closing
from abl_mlx.support.arrays import numpy_of
from abl_mlx.support.console import progress

#: The number of likeliest tokens that llama.cpp is asked for.
TOP_N = 256

#: The number of tokens of a server's reply that are followed, and the number of likeliest tokens
#: that it is asked for; mlx_lm.server allows 11 at most.
FOLLOWED, SERVED = 4, 10

Tokens = tuple[int, ...]

#: The spellings of two words, as token ids.
Spellings = tuple[frozenset[Tokens], frozenset[Tokens]]

#: Known natural log-probabilities of the next token behind a beginning: token -> log-probability.
Known = Callable[[Tokens, int], float]


@dataclass(frozen=True)
class Margin:
    """How much likelier the first of two words is as a reply than the second.

    Attributes:
        nats: ln p(first) − ln p(second); None if it is not known.
        mass: p(first) + p(second).
    """

    nats: float | None
    mass: float


def spellings(words: tuple[str, str], tokenize: Callable[[str], Sequence[int]]) -> Spellings:
    """The token ids of two words in every spelling."""

    def of(word: str) -> frozenset[Tokens]:
        return frozenset(tuple(tokenize(text)) for text in (word, word.capitalize(), f" {word}"))

    first, second = map(of, words)
    return first - second, second - first


def beginnings(spelled: Spellings) -> list[Tokens]:
    """The token sequences that may come before a token of a spelling, shortest first; () is one."""
    found = {one[:at] for words in spelled for one in words for at in range(len(one))}
    return sorted(found, key=lambda tokens: (len(tokens), tokens))


def margin(spelled: Spellings, known: Known) -> Margin:
    """The margin of two words, from log-probabilities of the tokens behind each beginning."""
    first, second = (
        _log_sum(sum(known(one[:at], one[at]) for at in range(len(one))) for one in words)
        for words in spelled
    )
    return Margin(first - second, math.exp(first) + math.exp(second))


def _log_sum(values: Iterable[float]) -> float:
    """ln Σ eˣ."""
    found = list(values)
    top = max(found)
    return top if top == -math.inf else top + math.log(math.fsum(math.exp(x - top) for x in found))


def in_mlx(chat: ChatModel, prompts: Sequence[Prompt], words: tuple[str, str]) -> list[Margin]:
    """Margins of a model in MLX, exact."""
    tokenizer = chat.tokenizer
    spelled = spellings(words, lambda text: tokenizer.encode(text, add_special_tokens=False))
    given = beginnings(spelled)
    # A pass over a longer beginning gives the distributions behind the shorter ones as well.
    longest = [one for one in given if not any(o[: len(one)] == one != o for o in given)]
    ended = tokenizer.encode(closing(chat.opened_thought()), add_special_tokens=False)
    encoded = [[*chat.encode_message(prompt), *ended] for prompt in prompts]
    sequences = [[*ids, *one] for ids in encoded for one in longest]
    positions = [
        list(range(len(ids) - 1, len(ids) + len(one))) for ids in encoded for one in longest
    ]
    wanted = sorted({token for words in spelled for one in words for token in one})
    told: list[dict[Tokens, dict[int, float]]] = [{} for _ in prompts]
    for index, rows in log_probabilities(chat, sequences, positions, label="recognition"):
        prompt, which = divmod(index, len(longest))
        one = longest[which]
        for at, row in enumerate(numpy_of(mx.take(rows, mx.array(wanted), axis=1)).tolist()):
            told[prompt][one[:at]] = dict(zip(wanted, row, strict=True))
    return [margin(spelled, partial(_exactly, one)) for one in told]


def in_llamacpp(
    path: Path, given: GivenTemplate | None, prompts: Sequence[Prompt], words: tuple[str, str]
) -> list[Margin]:
    """Margins of a GGUF in llama.cpp, from its likeliest tokens."""
    from abl_mlx.behaviour.llamacpp import LlamaCpp

    room = 512 + max(prompt.length for prompt in prompts)
    with (
        LlamaCpp(path, n_ctx=room, n_parallel=1, lean=True, given=given) as server,
        progress(len(prompts), "recognition") as bar,
    ):

        def plain(text: str) -> list[int]:
            return server.tokenize(text, add_special=False, parse_special=False)

        spelled = spellings(words, plain)
        ended = server.tokenize(closing(server.opened(None)), add_special=False)
        found = []
        for prompt in prompts:
            ids = server.encode(prompt) if given else server.tokenize(server.render_prompt(prompt))
            ids += ended
            told = {
                one: server.top_logprobs([*ids, *one], [0], TOP_N, cached=True)[0]
                for one in beginnings(spelled)
            }
            found.append(margin(spelled, partial(_at_most, told)))
            bar.update()
    return found


def _exactly(told: Mapping[Tokens, Mapping[int, float]], before: Tokens, token: int) -> float:
    return told[before][token]


def _at_most(told: Mapping[Tokens, Mapping[int, float]], before: Tokens, token: int) -> float:
    """The log-probability of a token, or that of the least likely token that is known."""
    return told[before].get(token, min(told[before].values()))


def on_server(
    endpoint: Endpoint, prompts: Sequence[Prompt], words: tuple[str, str]
) -> list[Margin]:
    """Margins of a server's model, from the likeliest tokens of its own replies.

    Raises:
        UserError: when the server gives no log-probabilities.
    """
    found = [Margin(None, 0.0)] * len(prompts)
    with progress(len(prompts), "recognition") as bar:
        for number, steps in endpoint.likeliest(prompts, FOLLOWED, SERVED):
            found[number] = followed(steps, words)
            bar.update()
    return found


def followed(steps: Sequence[tuple[str, Mapping[str, float]]], words: tuple[str, str]) -> Margin:
    """The margin of two words along one reply.

    Args:
        steps: for each token of the reply its text and the likeliest texts in its place, with their
            natural log-probabilities.
    """
    said, reached = "", 0.0
    for chosen, told in steps:
        logs = []
        for word, other in (words, words[::-1]):
            matching = [log for text, log in told.items() if _is(said + text, word, other)]
            logs.append(_log_sum(matching) if matching else None)
        if any(log is not None for log in logs):
            least = min(told.values())
            first, second = (least if log is None else log for log in logs)
            mass = sum(math.exp(reached + log) for log in logs if log is not None)
            return Margin(first - second, mass)
        said += chosen
        # A reply is followed as long as it may still become either of the words.
        if said.strip() and not all(_begins(said, word) for word in words):
            break
        reached += told.get(chosen, min(told.values(), default=0.0))
    return Margin(None, 0.0)


def _begins(text: str, word: str) -> bool:
    return word.startswith(text.strip().casefold())


def _is(text: str, word: str, other: str) -> bool:
    """Whether a text is a word, or a beginning of it that is no beginning of the other word."""
    bare = text.strip().strip("*_\"'`").casefold()
    return bare != "" and (
        bare.startswith(word) or (word.startswith(bare) and not other.startswith(bare))
    )
