"""Encodes messages as the token ids of a prompt, with the chat template and the tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from abl_mlx.inputs.sets import Prompt, prompt_of
from abl_mlx.inputs.thinking import template_values
from abl_mlx.models.given_template import GivenTemplate
from convert.base.errors import UserError
from convert.tokenizers import template_files
from convert.tokenizers.chat_template import ChatTemplate, TemplateError

#: The number of tokens of a prompt in the chat template.
Count = Callable[[Prompt], int]


def encode(
    tokenizer: Any,
    template: ChatTemplate | None,
    question: str | Prompt,
    place: Path,
    *,
    given: bool = False,
) -> list[int]:
    """Token ids of a conversation, up to where the reply begins.

    Where the template has no role for it, the system message stands at the beginning of the first
    user message.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.
        template: as `template_of` gives it.
        place: the model's folder or GGUF, for messages.
        given: whether the template is not the model's own, so that the tokenizer's bos token goes
            in front where it adds one and the text does not begin with it.

    Raises:
        UserError: when the chat template does not render, or nothing is left to give the model.
    """
    prompt = prompt_of(question)
    if template is None:
        values = template_values(prompt.thinking)
        ids = _by_itself(tokenizer, prompt, values, place)
    else:
        text = rendered(template, prompt)
        try:
            # A model's own template writes the bos token itself, if there is one.
            ids = list(tokenizer.encode(text, add_special_tokens=False))
            if given:
                ids = [*_opening(tokenizer, ids), *ids]
        except Exception as error:  # transformers takes what its files say as it comes
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"{place}: its tokenizer does not encode a prompt ({reason[:200]}): fetch "
                "tokenizer.json and tokenizer_config.json again."
            ) from None
    if not ids:
        raise TemplateError(
            f"{place}: no token is left of a prompt in the chat template: choose another template, "
            "or fetch the tokenizer again."
        )
    return ids


def rendered(template: ChatTemplate, prompt: Prompt) -> str:
    """The text of a conversation, up to where the reply begins.

    Raises:
        TemplateError: when the template does not render it, or has no place for its tools.
    """
    if prompt.tools and not template.takes_tools:
        raise without_tools(template.file)
    system_role = prompt.system is None or template.takes_system
    return template.render(
        prompt.messages(system_role=system_role),
        template_values(prompt.thinking),
        tools=[tool.json for tool in prompt.tools],
    )


def without_tools(place: object, how: str = "with --template FILE") -> TemplateError:
    """What to say of a model that cannot be told of tools.

    Args:
        place: the chat template's file, the model's folder or GGUF, or a server's address.
        how: how a template is given there.
    """
    return TemplateError(
        f"{place}: the chat template has no place for tools, so the model cannot be told of "
        "functions to call: choose a model that was trained to call functions, or give its "
        f"template {how}."
    )


def without_system_role(name: str) -> str:
    """What to say of a template that has no place for a system message.

    Args:
        name: the model's.
    """
    return (
        f"· the chat template of {name} has no system role: the system message stands at the "
        "beginning of the first user message"
    )


def _opening(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """The bos token, if the tokenizer puts it in front of a text and ``ids`` does not have it."""
    added = list(tokenizer.encode("", add_special_tokens=True))[:1]
    return added if added == [tokenizer.bos_token_id] and list(ids[:1]) != added else []


def counter(tokenizer: Any, place: Path, given: GivenTemplate | None = None) -> Count:
    """What counts the tokens of prompts, by a model's tokenizer and chat template.

    Args:
        place: the model's folder or GGUF.
        given: the template that is used instead of its own.
    """
    plain, other = template_of(tokenizer, place, given), given is not None

    def count(prompt: Prompt) -> int:
        template = template_of(tokenizer, place, given, tools=True) if prompt.tools else plain
        return len(encode(tokenizer, template, prompt, place, given=other))

    return count


def template_of(
    tokenizer: Any, place: Path, given: GivenTemplate | None = None, *, tools: bool = False
) -> ChatTemplate | None:
    """The template that prompts are rendered with; None where the tokenizer has code instead.

    Args:
        given: the template that is used instead of the model's own.
        tools: the one for prompts with tools, of a model that has several.

    Raises:
        TemplateError: when there is none to choose.
    """
    if given is not None:
        return given.ready(_special_tokens(tokenizer))
    if _has_code(tokenizer):
        return None
    templates = _templates(tokenizer, place)
    if not templates:
        raise without_template(place)
    name = template_files.for_tools(templates) if tools else template_files.plain(templates)
    if name is None:
        raise without_plain_template(templates, place)
    return ChatTemplate(
        templates[name],
        template_files.file_of(place, name) if place.is_dir() else place,
        _special_tokens(tokenizer),
    )


def without_template(place: Path) -> TemplateError:
    """The error for a model without a chat template.

    Args:
        place: the model's folder or GGUF.
    """
    mend = "add chat_template.jinja, " if place.is_dir() else ""
    return TemplateError(
        f"{place} has no chat template, so it is no chat model: {mend}choose the instruction-tuned "
        "variant, or say how prompts are written with --template FILE, --template chatml or "
        "--template plain."
    )


def _has_code(tokenizer: Any) -> bool:
    """Whether prompts are written by code of mlx-lm or of the tokenizer, not by a template."""
    from transformers import PreTrainedTokenizerBase

    if vars(tokenizer).get("_chat_template") is not None:
        return True
    kind = type(vars(tokenizer).get("_tokenizer", tokenizer))
    own = getattr(kind, "apply_chat_template", None)
    return own is not None and own is not PreTrainedTokenizerBase.apply_chat_template


def _by_itself(tokenizer: Any, prompt: Prompt, values: Mapping[str, Any], place: Path) -> list[int]:
    """Token ids of a conversation, by the tokenizer's own code."""
    raised: Exception | None = None
    tools = {"tools": [tool.json for tool in prompt.tools]} if prompt.tools else {}
    for system_role in (True, False) if prompt.system is not None else (True,):
        messages = [dict(one) for one in prompt.messages(system_role=system_role)]
        write = partial(
            tokenizer.apply_chat_template, messages, add_generation_prompt=True, **values
        )
        try:
            ids = list(write(**tools))
            told = not tools or ids != list(write())
        except Exception as error:  # code of others, which raises what it likes
            raised = raised or error
            continue
        if not told:
            raise without_tools(place)
        return ids
    reason = " ".join(f"{type(raised).__name__}: {raised}".split())
    raise UserError(
        f"{place}: its tokenizer cannot write a prompt ({reason[:200]}): update mlx-lm and "
        "transformers, or choose another model."
    )


def _templates(tokenizer: Any, place: Path) -> dict[str, str]:
    """All templates of a model by name: of its folder, or else those that its tokenizer has."""
    found = template_files.of_folder(place) if place.is_dir() else {}
    stored = tokenizer.chat_template
    if found or stored is None:
        return found
    named = stored if isinstance(stored, Mapping) else {"default": stored}
    return template_files.said({str(name): str(source) for name, source in named.items()})


def without_plain_template(templates: Iterable[str], place: Path) -> TemplateError:
    """What to say of a model with templates of which none is known to be for plain conversations.

    Args:
        templates: their names.
        place: the model's folder or GGUF.
    """
    names = ", ".join(sorted(repr(name[:40]) for name in templates)[:6])
    mend = "save the one for plain conversations as chat_template.jinja, or " * place.is_dir()
    return TemplateError(
        f"{place} has the chat templates {names} and none named default: {mend}give one with "
        "--template FILE."
    )


def _special_tokens(tokenizer: Any) -> dict[str, Any]:
    """bos_token and so on, by name, as transformers hands them to a template."""
    known = getattr(tokenizer, "special_tokens_map", {})
    # A template may join the first two to other text without asking whether they are there.
    return {"bos_token": "", "eos_token": ""} | {
        str(name): [str(one) for one in value] if isinstance(value, list | tuple) else str(value)
        for name, value in known.items()
    }
