"""Checks a GGUF's chat template before llama.cpp renders it.

llama.cpp renders templates without limits: an endless loop never returns, and endless recursion
ends the process. A template that the bounded renderer of `convert.tokenizers.chat_template` cannot
render in time is therefore never given to llama.cpp.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from abl_mlx.models.given_template import GivenTemplate
from convert.base.errors import UserError
from convert.gguf.file import metadata
from convert.tokenizers import template_files
from convert.tokenizers.chat_template import ChatTemplate, TemplateError, TemplateExcess
from convert.tokenizers.from_gguf import chat_templates


def fault(path: Path) -> TemplateError | None:
    """The error of our own renderer with a GGUF's template, which llama.cpp may still accept.

    Raises:
        TemplateExcess: when rendering exceeds a limit.
    """
    template = template_of(path)
    if template is None:
        return None
    try:
        template.check()
    except TemplateExcess:
        raise
    except TemplateError as error:
        return error
    return None


def template_of(path: Path) -> ChatTemplate | None:
    """A GGUF's template; None where it has none, or cannot be read."""
    try:
        keys = metadata(path)
    except UserError:
        return None  # llama.cpp has its own words for a file that it does not read
    source = keys.get("tokenizer.chat_template")
    if not isinstance(source, str):
        return None
    return ChatTemplate(source, path, _tokens(keys))


def given_template(path: Path, given: GivenTemplate) -> ChatTemplate:
    """A template that is used instead of a GGUF's own, told of the file's tokens.

    Raises:
        UserError: a file that is no GGUF, or a template that does not render.
    """
    keys = metadata(path)
    template = given.ready(_tokens(keys))
    template.check()
    return template


def named_template(path: Path) -> GivenTemplate | None:
    """The template for plain conversations of a GGUF that has only named ones.

    llama.cpp looks at the default one alone, and asks through ChatML where there is none.
    """
    try:
        templates = chat_templates(metadata(path))
    except UserError:
        return None  # llama.cpp has its own words for a file that it does not read
    name = template_files.plain(templates)
    return None if name in (None, "default") else GivenTemplate(str(path), templates[name])


def tool_template(path: Path) -> ChatTemplate | None:
    """A GGUF's own template for prompts with tools; None where none is known to be it.

    Raises:
        UserError: a file that is no GGUF.
    """
    keys = metadata(path)
    templates = chat_templates(keys)
    name = template_files.for_tools(templates)
    return None if name is None else ChatTemplate(templates[name], path, _tokens(keys))


def _tokens(keys: dict[str, Any]) -> dict[str, str]:
    return {f"{role}_token": _token(keys, role) for role in ("bos", "eos")}


def _token(keys: dict[str, Any], role: str) -> str:
    tokens, number = keys.get("tokenizer.ggml.tokens"), keys.get(f"tokenizer.ggml.{role}_token_id")
    if not isinstance(tokens, list) or not isinstance(number, int):
        return ""
    return str(tokens[number]) if 0 <= number < len(tokens) else ""
