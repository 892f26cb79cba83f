"""`--perplexity`: how well a model expects a bundled English text, in MLX or through llama.cpp.

The text is the opening of *Alice's Adventures in Wonderland* (1865), without a chat template.
In MLX it is exact: float32 log-softmax of the raw logits. Each stretch of `STRIDE` tokens is
predicted from up to `WINDOW` - `STRIDE` tokens before it. llama.cpp tells the likeliest tokens
alone, one token a request: there the first `LLAMACPP_TOKENS` are predicted, and a token that is not
among the likeliest `TOP_N` counts as the last of them, so that the figure is a lower bound; the
record says for how many.
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
from abl_mlx.models.logits import log_probabilities
from abl_mlx.records.evaluations import Perplexity
from abl_mlx.support.arrays import numbers
from abl_mlx.support.console import progress
from convert.base.errors import UserError

NAME = "Alice's Adventures in Wonderland, opening"
TEXT = resources.files("abl_mlx.inputs").joinpath("texts/alice.txt").read_text(encoding="utf-8")

#: Tokens a model sees at most, the predicted ones included, and how many are predicted at once.
WINDOW, STRIDE = 512, 128

#: Tokens that are predicted through llama.cpp, and how many of the likeliest it is asked for.
LLAMACPP_TOKENS, TOP_N = 256, 256


def record(target: Target, *, tokens: int | None = None) -> Perplexity:
    """Perplexity of the bundled text.

    Args:
        tokens: predict only so many; None for all in MLX, `LLAMACPP_TOKENS` in llama.cpp.

    Raises:
        UserError: for a server, whose chat tells no probabilities.
    """
    if target.chat is not None:
        given, ids = encode(target.chat)
        ids = ids[:tokens]
        logs = in_mlx(target.chat, ids, given)
        outside = None
        predicted = target.chat.tokenizer.decode(ids[given:])
    elif target.gguf is not None:
        logs, outside, predicted = in_llamacpp(target.gguf, tokens or LLAMACPP_TOKENS)
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
    """The text's tokens behind the special ones that the tokenizer puts in front, if any.

    Returns:
        How many tokens at the start are given and not predicted (at least one), and all tokens.
    """
    ids = [int(token) for token in chat.tokenizer.encode(TEXT)]
    plain = [int(token) for token in chat.tokenizer.encode(TEXT, add_special_tokens=False)]
    while ids and ids[-1] != plain[-1]:
        ids.pop()  # an end token is not part of the text
    return max(1, len(ids) - len(plain)), ids


def windows(n: int, given: int) -> list[tuple[int, int, int]]:
    """Which tokens are predicted from which: (start, first, end), each token predicted once.

    Tokens ``first`` to ``end`` are predicted, each from ``start`` to the one before it.
    """
    found = []
    for first in range(given, n, STRIDE):
        end = min(first + STRIDE, n)
        found.append((max(0, end - WINDOW), first, end))
    return found


def in_mlx(chat: ChatModel, ids: Sequence[int], given: int) -> list[float]:
    """ln p of each token from ``given`` on, in order; exact."""
    parts = windows(len(ids), given)
    sequences = [list(ids[start : end - 1]) for start, _, end in parts]
    positions = [list(range(first - 1 - start, end - 1 - start)) for start, first, end in parts]
    found: dict[int, list[float]] = {}
    for index, rows in log_probabilities(chat, sequences, positions, label="perplexity"):
        _, first, end = parts[index]
        wanted = mx.array(list(ids[first:end]))
        found[index] = numbers(mx.take_along_axis(rows, wanted[:, None], axis=1)[:, 0])
    return [value for index in range(len(parts)) for value in found[index]]


def in_llamacpp(path: Path, tokens: int) -> tuple[list[float], int, str]:
    """At least ln p of each of the first tokens; how many were not told, and the text they make.

    A token that is not told has at most the probability of the least likely one that is.
    """
    from abl_mlx.behaviour.llamacpp import LlamaCpp

    with (
        LlamaCpp(path, n_ctx=tokens + 16, n_parallel=1, lean=True) as server,
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
