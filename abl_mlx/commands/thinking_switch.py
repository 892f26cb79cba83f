"""Checks that a model's chat template knows the mode of thinking that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from abl_mlx.inputs import thinking
from abl_mlx.inputs.sets import Prompt
from abl_mlx.models import gguf_template, prompt_tokens
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.given_template import GivenTemplate
from convert.base.errors import UserError
from convert.tokenizers.chat_template import TemplateError

#: Amounts of thinking that tell whether a template knows any.
_AMOUNTS = ("low", "medium", "high")


def check(chat: ChatModel, asked: str) -> None:
    """Refuse a value of ``--thinking`` that makes no difference to a model's prompts.

    Raises:
        UserError: naming the model.
    """
    _check(chat.encode_message, chat.folder.name, asked)


def check_gguf(path: Path, given: GivenTemplate | None, asked: str) -> None:
    """Like `check`, for a GGUF that is not loaded.

    Args:
        given: a chat template that replaces the file's own.

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
        return  # llama.cpp may still render it, and has its own words where it does not


def _check(render: Callable[[Prompt], Sequence[object]], name: str, asked: str) -> None:
    """Compare what a model gets in different modes."""
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
