"""A reply that was generated once, at its longest, and can be cut to fewer tokens afterwards.

Greedy decoding does not look ahead, so a reply of fewer tokens is the beginning of a longer one. If
the model's own tokens are known, they give the place of a cut. If a server sends only the number of
tokens, they are spread evenly over the characters. If it sends nothing, four tokens are assumed for
three words.

Nothing in this module imports MLX.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

TOKENS, SPREAD, WORDS = "tokens", "spread", "words"
"""The units by which a reply is cut: tokens, their number spread over characters, or words."""

#: The assumed number of tokens in a word, if nothing is known about the tokens.
TOKENS_PER_WORD = 4 / 3

#: A word, or one character of a script that is written without spaces.
_WORD = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]|[^\s\u0e00-\u0e7f\u3040-\u9fff]+")


@dataclass(frozen=True)
class WholeReply:
    """A reply that can be cut.

    Attributes:
        text: the whole reply, as the runtime returned it.
        tokens: the number of its tokens.
        unit: the unit by which it is cut: `TOKENS`, `SPREAD` or `WORDS`.
        beginning: from a number n to the text of the first n tokens.
    """

    text: str
    tokens: int
    unit: str
    beginning: Callable[[int], str]

    def cut(self, tokens: int) -> str:
        """The reply with at most ``tokens`` tokens."""
        return self.text if tokens >= self.tokens else self.beginning(tokens)


def of_pieces(text: str, pieces: Sequence[bytes]) -> WholeReply:
    """A reply with the bytes of each of its tokens.

    The pieces may lack an opening that came from the prompt, and may have white space at the ends
    that the text lacks. If they do not belong to this text, only their number is used.
    """
    ends = list(accumulate(map(len, pieces)))
    joined, wanted = b"".join(pieces), text.encode()
    core = joined.strip()
    before, start = wanted.find(core), len(joined) - len(joined.lstrip())
    if not core or before < 0:
        core = wanted.strip()
        before, start = wanted.find(core), joined.find(core)
    if not core or start < 0:
        return spread(text, len(pieces))
    opened = wanted[:before].decode()

    def beginning(tokens: int) -> str:
        end = ends[tokens - 1] if tokens else 0
        return opened + joined[start:end].decode(errors="ignore")

    return WholeReply(text, len(pieces), TOKENS, beginning)


def spread(text: str, tokens: int) -> WholeReply:
    """A reply with this number of tokens, which are assumed to have equal lengths."""

    def beginning(n: int) -> str:
        return text[: round(len(text) * n / max(1, tokens))]

    return WholeReply(text, tokens, SPREAD, beginning)


def of_words(text: str) -> WholeReply:
    """A reply whose tokens are not known."""
    ends = [found.end() for found in _WORD.finditer(text)]

    def beginning(n: int) -> str:
        words = int(n / TOKENS_PER_WORD)
        return text[: ends[words - 1]] if 0 < words <= len(ends) else text if words else ""

    return WholeReply(text, round(len(ends) * TOKENS_PER_WORD), WORDS, beginning)


def of_answer(text: str, answer: Any) -> WholeReply:
    """A reply from a server's chat API, cut by what the answer says about its tokens.

    Args:
        text: the reply.
        answer: the answer's JSON: ``logprobs`` names each token, ``usage`` counts them.
    """
    told = answer if isinstance(answer, Mapping) else {}
    choices = told.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    logprobs = choice.get("logprobs") if isinstance(choice, Mapping) else None
    content = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    if isinstance(content, list) and content:
        pieces = [_piece(one) for one in content]
        known = [piece for piece in pieces if piece is not None]
        return of_pieces(text, known) if known == pieces else spread(text, len(content))
    usage = told.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, Mapping) else None
    if isinstance(count, int) and count > 0:
        return spread(text, count)
    return of_words(text)


def tokenizing(text: str) -> dict[str, Any]:
    """The request to llama.cpp's ``/tokenize`` for the text of each token of a text."""
    return {"content": text, "add_special": False, "parse_special": True, "with_pieces": True}


def pieces_of(answer: Any) -> list[bytes] | None:
    """The bytes of each token, from the answer to `tokenizing`; None if it is no such answer."""
    tokens = answer.get("tokens") if isinstance(answer, Mapping) else None
    if not isinstance(tokens, list):
        return None
    pieces = [_bytes(one.get("piece")) if isinstance(one, Mapping) else None for one in tokens]
    return [piece or b"" for piece in pieces]


def _bytes(value: Any) -> bytes | None:
    """The bytes of a token, which is sent as text or as the numbers of its bytes."""
    if isinstance(value, str):
        return value.encode()
    try:
        return bytes(value) if isinstance(value, list) else None
    except (TypeError, ValueError):
        return None


def _piece(token: Any) -> bytes | None:
    if not isinstance(token, Mapping):
        return None
    found = _bytes(token.get("bytes"))
    return _bytes(token.get("token")) if found is None else found
