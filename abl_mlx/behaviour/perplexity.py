"""`--perplexity`: a model's perplexity on a bundled English text, in MLX or through llama.cpp.

The text is the opening of *Alice's Adventures in Wonderland* (1865), without a chat template. In
MLX the perplexity is exact: float32 log-softmax of the raw logits. Each run of `STRIDE` tokens is
predicted from up to `WINDOW` - `STRIDE` tokens before it. llama.cpp returns only the likeliest
tokens, for one token per request. So there only the first `LLAMACPP_TOKENS` are predicted, and a
token that is not among the `TOP_N` likeliest gets the probability of the last of them. The result
is then a lower bound; the record says for how many tokens this was done.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import mlx.core as mx

from abl_mlx.behaviour.target import Target
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.given_template import GivenTemplate
from abl_mlx.models.logits import log_probabilities
from abl_mlx.records.measurements import Perplexity
from abl_mlx.support.arrays import numbers
from abl_mlx.support.console import progress
from convert.base.errors import UserError

NAME = "Alice's Adventures in Wonderland, opening"
TEXT = resources.files("abl_mlx.inputs").joinpath("texts/alice.txt").read_text(encoding="utf-8")

#: The most tokens in a forward pass, predicted ones included, and how many of them are predicted.
WINDOW, STRIDE = 512, 128

#: How many tokens are predicted through llama.cpp, and how many likeliest tokens it is asked for.
LLAMACPP_TOKENS, TOP_N = 256, 256


def record(target: Target, *, tokens: int | None = None) -> Perplexity:
    """Perplexity of the bundled text.

    Args:
        target: the model.
        tokens: how many tokens to predict; None for all in MLX, `LLAMACPP_TOKENS` in llama.cpp.

    Raises:
        UserError: when the model is on a server, whose chat API gives no probabilities.
    """
    if target.chat is not None:
        given, ids = encode(target.chat)
        ids = ids[:tokens]
        logs = in_mlx(target.chat, ids, given)
        outside = None
        predicted = target.chat.tokenizer.decode(ids[given:])
    elif target.gguf is not None:
        logs, outside, predicted = in_llamacpp(target.gguf, tokens or LLAMACPP_TOKENS, target.given)
    else:
        raise UserError("--perplexity needs probabilities, which a server's chat does not tell.")
    nats = -math.fsum(logs)
    exact = outside is None
    return Perplexity(
        text=NAME,
        text_sha256=hashlib.sha256(TEXT.encode()).hexdigest(),
        perplexity=math.exp(nats / len(logs)),
        bits_per_byte=nats / math.log(2) / len(predicted.encode()),
        tokens=len(logs),
        kind="exact" if exact else "top-n",
        window=WINDOW if exact else None,
        stride=STRIDE if exact else None,
        n=None if exact else TOP_N,
        outside=outside,
    )


def encode(chat: ChatModel) -> tuple[int, list[int]]:
    """The text's token ids, after the special tokens that the tokenizer puts in front.

    Returns:
        The number of tokens at the start that are not predicted (at least one), and all token ids.
    """
    ids = [int(token) for token in chat.tokenizer.encode(TEXT)]
    plain = [int(token) for token in chat.tokenizer.encode(TEXT, add_special_tokens=False)]
    while ids and ids[-1] != plain[-1]:
        ids.pop()  # an end token is not part of the text
    return max(1, len(ids) - len(plain)), ids


def windows(n: int, given: int) -> list[tuple[int, int, int]]:
    """Windows (start, first, end) in which each token is predicted once.

    Tokens ``first`` to ``end`` - 1 are predicted, each from the tokens from ``start`` on before it.

    Args:
        n: the number of tokens.
        given: how many tokens at the start are not predicted.
    """
    found = []
    for first in range(given, n, STRIDE):
        end = min(first + STRIDE, n)
        found.append((max(0, end - WINDOW), first, end))
    return found


def in_mlx(chat: ChatModel, ids: Sequence[int], given: int) -> list[float]:
    """The exact ln p of each token from ``given`` on, in order."""
    parts = windows(len(ids), given)
    sequences = [list(ids[start : end - 1]) for start, _, end in parts]
    positions = [list(range(first - 1 - start, end - 1 - start)) for start, first, end in parts]
    found: dict[int, list[float]] = {}
    for index, rows in log_probabilities(chat, sequences, positions, label="perplexity"):
        _, first, end = parts[index]
        wanted = mx.array(list(ids[first:end]))
        found[index] = numbers(mx.take_along_axis(rows, wanted[:, None], axis=1)[:, 0])
    return [value for index in range(len(parts)) for value in found[index]]


def in_llamacpp(
    path: Path, tokens: int, template: GivenTemplate | None = None
) -> tuple[list[float], int, str]:
    """An upper bound of ln p for each of the first tokens of the text.

    A token that llama.cpp does not return has at most the probability of the least likely token
    that it returns.

    Returns:
        The bounds; how many tokens were not returned; and the text of the tokens.
    """
    from abl_mlx.behaviour.llamacpp import LlamaCpp

    with (
        LlamaCpp(path, n_ctx=tokens + 16, n_parallel=1, lean=True, given=template) as server,
        progress(tokens, "perplexity", "token") as bar,
    ):
        plain = server.tokenize(TEXT, add_special=False, parse_special=False)
        special = server.tokenize("", add_special=True)
        given = [*special, *plain][: max(1, len(special))]
        wanted = [*special, *plain][len(given) : tokens]
        logs, outside = [], 0
        for at in range(0, len(wanted), 16):
            part = wanted[at : at + 16]
            told = server.top_logprobs([*given, *wanted[:at]], part, TOP_N, cached=True)
            for token, likeliest in zip(part, told, strict=True):
                outside += token not in likeliest
                logs.append(likeliest.get(token, min(likeliest.values())))
            bar.update(len(part))
        return logs, outside, server.detokenize(wanted)
