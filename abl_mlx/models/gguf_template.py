"""A GGUF's chat template, tried before llama.cpp is given it.

llama.cpp renders templates without limits: one that loops holds it for ever, one that calls itself
ends it. What the bounded renderer of `convert.tokenizers.chat_template` cannot end in time,
llama.cpp is not asked to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from abl_mlx.models.prompt_tokens import OPTIONS
from convert.base.errors import UserError
from convert.gguf.file import metadata
from convert.tokenizers.chat_template import ChatTemplate, TemplateError, TemplateExcess


def fault(path: Path) -> TemplateError | None:
    """What is wrong with a GGUF's template by our renderer; llama.cpp may still get on with it.

    Raises:
        TemplateExcess: beyond a limit.
    """
    try:
        keys = metadata(path)
    except UserError:
        return None  # llama.cpp has its own words for a file that it does not read
    source = keys.get("tokenizer.chat_template")
    if not isinstance(source, str):
        return None
    values = {f"{role}_token": _token(keys, role) for role in ("bos", "eos")}
    try:
        ChatTemplate(source, path, {**values, **OPTIONS}).check()
    except TemplateExcess:
        raise
    except TemplateError as error:
        return error
    return None


def _token(keys: dict[str, Any], role: str) -> str:
    tokens, number = keys.get("tokenizer.ggml.tokens"), keys.get(f"tokenizer.ggml.{role}_token_id")
    if not isinstance(tokens, list) or not isinstance(number, int):
        return ""
    return str(tokens[number]) if 0 <= number < len(tokens) else ""
