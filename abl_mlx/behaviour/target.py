"""A model that replies to prompts, in MLX, in llama.cpp or on a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from abl_mlx.behaviour.endpoint import Endpoint
from abl_mlx.behaviour.whole_reply import WholeReply, of_words
from abl_mlx.inputs.sets import Question
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.given_template import GivenTemplate

#: Numbers of prompts, and what they are asked inside of.
Group = tuple[list[int], Callable[[], AbstractContextManager[None]]]

#: From prompts to groups of them.
Groups = Callable[[Sequence[Question]], list[Group]]

Wholes = Callable[[Sequence[Question], int], Iterator[tuple[int, WholeReply]]]


@dataclass
class Target:
    """A model that replies to prompts.

    Attributes:
        name: the text that the user typed, without secrets in an address.
        runtime: the name of the runtime, for tables.
        identity: everything on which its replies depend, as JSON values.
        ask: from prompts and a number of tokens to an iterator of (number of the prompt, greedy
            reply), which yields each reply when it is complete and may be left early.
        chat: the model, if it is in MLX.
        gguf: the file, if llama.cpp runs it.
        model: its name on a server.
        note: a note on its figures.
        wholes: like ``ask``, with replies that can be cut; None where nothing is known of their
            tokens.
        given: what prompts are written with, in place of the model's own chat template.
        endpoint: the server, where one is asked.
        opened: context manager with a model that stays loaded for these prompts, of at most so many
            tokens in a reply; None where it is loaded anyway.
        grouped: of a model in MLX that is edited at runtime on some prompts, what each prompt is
            asked inside of; None where all are asked of the model as it is.
    """

    name: str
    runtime: str
    identity: dict[str, Any]
    ask: Callable[[Sequence[Question], int], Iterator[tuple[int, str]]]
    chat: ChatModel | None = None
    gguf: Path | None = None
    model: str | None = None
    note: str | None = None
    wholes: Wholes | None = None
    given: GivenTemplate | None = None
    endpoint: Endpoint | None = None
    opened: Callable[[Sequence[Question], int], AbstractContextManager[Wholes]] | None = None
    grouped: Groups | None = None

    @contextmanager
    def held(self, prompts: Sequence[Question], max_tokens: int) -> Iterator[Target]:
        """Context manager with the same target, loaded once for several calls of ``ask``.

        Args:
            prompts: all that will be asked.
            max_tokens: the longest reply to any of them.
        """
        if self.opened is None:
            yield self
            return
        with self.opened(prompts, max_tokens) as wholes:

            def ask(prompts: Sequence[Question], max_tokens: int) -> Iterator[tuple[int, str]]:
                for number, whole in wholes(prompts, max_tokens):
                    yield number, whole.text

            yield replace(self, ask=ask, wholes=wholes)

    def ask_wholes(
        self, prompts: Sequence[Question], max_tokens: int
    ) -> Iterator[tuple[int, WholeReply]]:
        """Like ``ask``, with replies that can be cut, by words where nothing else is known."""
        if self.wholes is not None:
            yield from self.wholes(prompts, max_tokens)
            return
        for number, reply in self.ask(prompts, max_tokens):
            yield number, of_words(reply)
