"""`abl-mlx chat`: a conversation during which the edit can be switched on, off and scaled."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import mlx.core as mx

from abl_mlx.commands.session import Steered
from abl_mlx.models import heads
from abl_mlx.support import interrupts
from abl_mlx.support.flags import said
from convert.base.errors import UserError

HELP = """\
/on, /off        the edit, for the next replies
/strength X      1 removes the direction, 0.5 half of it, negative values strengthen it
/side            both replies, original and edited, side by side; again for one
/tool RESULT     what the function that the model called returned (with --tools)
/clear           forget what was said
/quit            or Ctrl-D"""

#: Begins a line with what a call returned.
TOOL = "/tool"

#: (role, content) of a message.
Turn = tuple[str, str]


class Conversation:
    """A conversation with two histories, one with the original's replies and one with the edited's.

    The histories differ once replies were shown side by side.

    Attributes:
        on: whether the edit is on.
        strength: the edit's strength.
        side_by_side: whether both models reply.
        told: on the last reply of the edited model, what was decided by a condition; empty without
            one.
    """

    def __init__(
        self,
        steered: Steered,
        *,
        side_by_side: bool = False,
        max_tokens: int = 512,
        temp: float = 0,
    ):
        self.steered = steered
        self.on = True
        self.strength = steered.editing.alpha
        self.side_by_side = side_by_side
        self.told = ""
        self._max_tokens, self._temp = max_tokens, temp
        self._original: list[Turn] = []
        self._edited: list[Turn] = []

    @property
    def state(self) -> str:
        """A short description of the state, for the input prompt."""
        if self.side_by_side:
            return f"original | edited at {self.strength:g}"
        return f"edited at {self.strength:g}" if self.on else "original"

    def command(self, line: str) -> str | None:
        """Execute a line that begins with a slash.

        Returns:
            A message for the user; None to quit.

        Raises:
            UserError: when there is no such command, or a strength is no number.
        """
        name, _, rest = line.strip().partition(" ")
        if name in ("/quit", "/exit", "/q"):
            return None
        if name == "/help":
            return HELP
        if name in ("/on", "/off"):
            self.on, self.side_by_side = name == "/on", False
        elif name == "/side":
            self.side_by_side = not self.side_by_side
        elif name == "/clear":
            self._original, self._edited = [], []
        elif name == "/strength":
            try:
                self.strength = float(rest)
            except ValueError:
                raise UserError(f"/strength {rest}: give a number, such as 1 or 0.5.") from None
            self.on = True
        else:
            raise UserError(f"{name} is no command; /help lists them.")
        return f"[{self.state}]"

    def ask(self, text: str) -> Iterator[str]:
        """Yield the reply of the model that is on, in pieces as they are generated.

        Args:
            text: the user's message, or ``/tool`` and what a call returned.

        Raises:
            UserError: when a call's result is given and the model has no tools.
        """
        said, turn = "", self._turn(text)
        history = self._edited if self.on else self._original
        for piece in self._generate(history, turn, self.on):
            said += piece
            yield piece
        for one in (self._original, self._edited):
            one += [turn, ("assistant", said)]

    def ask_both(self, text: str) -> tuple[str, str]:
        """The replies of the original and of the edited model, each with its own history."""
        said, turn = [], self._turn(text)
        for history, edited in ((self._original, False), (self._edited, True)):
            said.append("".join(self._generate(history, turn, edited)))
            history += [turn, ("assistant", said[-1])]
        return said[0], said[1]

    def _turn(self, text: str) -> Turn:
        name, _, result = text.partition(" ")
        if name != TOOL:
            return "user", text
        if not self.steered.tools:
            raise UserError(f"{TOOL} needs tools: start the chat with --tools FILE.json.")
        if not result.strip():
            raise UserError(f"{TOOL}: give what the function returned, such as {TOOL} 4 degrees.")
        return TOOL[1:], result.strip()

    def _generate(self, history: Sequence[Turn], turn: Turn, edited: bool) -> Iterator[str]:
        from mlx_lm import stream_generate
        from mlx_lm.sample_utils import make_sampler

        chat = self.steered.chat
        role, text = turn
        prompt = replace(self.steered.prompt(text), role=role, earlier=tuple(history))
        tokens = chat.encode_message(prompt)
        if edited:
            decision = self.steered.decide(tokens)
            self.told = "" if decision is None else f"[{decision}]\n"
            edited = decision is None or decision.met
        steps: Any = stream_generate(
            chat.model, chat.tokenizer, mx.array(tokens), max_tokens=self._max_tokens,
            sampler=make_sampler(temp=self._temp),
        )  # fmt: skip
        on = self.steered.edited(self.strength) if edited else nullcontext()
        with heads.last_only(chat.model), on:
            for step in steps:
                yield step.text


def talk(
    conversation: Conversation, read: Callable[[str], str], write: Callable[[str], None]
) -> None:
    """Read lines and answer them until ``/quit`` or the end of the input.

    Args:
        conversation: the conversation.
        read: reads a line after a prompt; raises EOFError at the end of the input.
        write: prints a piece of text without a line end.
    """
    write(f"{conversation.steered.name}: /help lists the commands\n")
    while True:
        try:
            line = read(f"[{conversation.state}] > ").strip()
        except EOFError:
            write("\n")
            return
        if not line:
            continue
        try:
            if line.startswith("/") and line.split()[0] != TOOL:
                answer = conversation.command(line)
                if answer is None:
                    return
                write(f"{answer}\n")
            elif conversation.side_by_side:
                write(
                    columns(*conversation.ask_both(line), width=shutil.get_terminal_size().columns)
                )
                write(conversation.told)
            else:
                for piece in conversation.ask(line):
                    write(piece)
                write(f"\n{conversation.told if conversation.on else ''}")
        except UserError as error:
            write(f"{said(error)}\n")
        except KeyboardInterrupt:
            interrupts.forget()
            write("\n(stopped)\n")


def columns(original: str, edited: str, *, width: int) -> str:
    """Two replies side by side, or one below the other if ``width`` is less than 60 columns."""
    if width < 60:
        return f"original:\n{original}\n\nedited:\n{edited}\n"
    half = (width - 3) // 2
    left, right = (_wrapped(title, text, half) for title, text in
                   (("original", original), ("edited", edited)))  # fmt: skip
    rows = (f"{a:<{half}} │ {b}".rstrip() for a, b in zip_longest(left, right, fillvalue=""))
    return "\n".join(rows) + "\n"


def _wrapped(title: str, text: str, width: int) -> list[str]:
    lines = [title, "─" * width]
    for paragraph in text.splitlines() or [""]:
        lines += textwrap.wrap(paragraph, width) or [""]
    return lines
