"""Checks that a model's chat template supports the mode of thinking that the user asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from abl_mlx.behaviour.endpoint import Endpoint
from abl_mlx.behaviour.journal import Answered
from abl_mlx.choices import Finding, Prompting
from abl_mlx.inputs import thinking
from abl_mlx.inputs.sets import Prompt
from abl_mlx.models import gguf_template, prompt_tokens
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.given_template import GivenTemplate
from abl_mlx.support.console import say
from convert.base.errors import UserError
from convert.tokenizers.chat_template import TemplateError

#: Amounts of thinking whose prompts differ if a template supports amounts.
_AMOUNTS = ("low", "medium", "high")


def note_unused(prompting: Prompting, finding: Finding | None = None) -> None:
    """Say which flags about thoughts have no effect, because thinking is off."""
    if prompting.thinking != thinking.OFF:
        return
    unused = []
    if prompting.thought_tokens != Prompting().thought_tokens:
        unused.append(f"--thought-tokens {prompting.thought_tokens}")
    if finding is not None and finding.max_thought_growth != Finding().max_thought_growth:
        unused.append(f"--max-thought-growth {finding.max_thought_growth:g}")
    for flag in unused:
        say(f"note: {flag} has no effect, because thinking is off (--thinking on or both)")


def check(chat: ChatModel, asked: str) -> None:
    """Refuse a value of ``--thinking`` that does not change the model's prompts.

    Raises:
        UserError: naming the model.
    """
    _check(chat.encode_message, chat.folder.name, asked)


def check_gguf(path: Path, given: GivenTemplate | None, asked: str) -> None:
    """Do the same as `check` for a GGUF that is not loaded.

    Args:
        path: the GGUF.
        given: a chat template that replaces the file's own.
        asked: the value of ``--thinking``.

    Raises:
        UserError: naming the file.
    """
    try:
        template = gguf_template.template_of(path)
        if given is not None:
            template = gguf_template.given_template(path, given)
        if template is not None:
            used = template
            _check(lambda prompt: prompt_tokens.rendered(used, prompt), path.name, asked)
    except TemplateError:
        return  # llama.cpp may still render it, and reports its own error if it does not


def check_server(endpoint: Endpoint, asked: str) -> None:
    """Like `check`, for a llama-server, which tells what its chat template writes.

    Other servers do not tell; what their replies show is noted after they were asked.

    Raises:
        UserError: naming the server.
    """
    asked_for = asked not in (thinking.OFF, thinking.ON)
    if asked_for and endpoint.is_llamacpp and endpoint.rendered(Prompt("Why?")):
        _check(endpoint.rendered, endpoint.name, asked)


def note_alike(name: str, modes: Sequence[Sequence[Answered]]) -> None:
    """Say so where a server replies the same in all modes: it may not take the switch.

    Args:
        name: of the server.
        modes: its answers to the same prompts, mode after mode.
    """
    same = [[(one.verdict, one.same, one.words) for one in answers] for answers in modes]
    if len(same) > 1 and same[0] and all(one == same[0] for one in same):
        say(
            f"warning: {name} gives the same replies with thinking on and off: its model has no "
            "such switch, or the server does not take it"
        )


def _check(render: Callable[[Prompt], Sequence[object]], name: str, asked: str) -> None:
    """Compare the prompts of a model in different modes."""
    if asked in (thinking.OFF, thinking.ON):
        return

    def of(mode: str | None) -> Sequence[object]:
        return render(Prompt("Why?", thinking=mode))

    on = of(thinking.ON)
    if asked == thinking.BOTH:
        if of(None) == on:
            raise UserError(
                f"--thinking both: the chat template of {name} writes the same prompt with "
                "thinking on and off; leave --thinking out, or say on where the model thinks "
                "anyway."
            )
    elif all(of(amount) == on for amount in (asked, *_AMOUNTS)):
        raise UserError(
            f"--thinking {asked}: the chat template of {name} knows no amounts of thinking: say "
            "on, off or both."
        )
