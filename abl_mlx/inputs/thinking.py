"""How a model is asked to think before it replies: not at all, as its template does, or how much.

Chat templates and servers have different names for it: ``enable_thinking`` (Qwen3 and most others),
``thinking`` (DeepSeek, Granite), ``reasoning_effort`` (gpt-oss). A template that has none of them
renders the same prompt whatever it is told.
"""

from __future__ import annotations

import re
from typing import Any

from convert.base.errors import UserError

OFF, ON, BOTH = "off", "on", "both"

# An amount of thought: "low", "medium", "high", and whatever else a template may know.
_LEVEL = re.compile(r"[a-z]{2,16}")


def modes(asked: str) -> tuple[str | None, ...]:
    """The modes that ``--thinking`` asks for, each as `Prompt.thinking` has it.

    Raises:
        UserError: for what is neither on, off, both nor a word for an amount.
    """
    if asked == OFF:
        return (None,)
    if asked == BOTH:
        return None, ON
    if not _LEVEL.fullmatch(asked):
        raise UserError(
            f"--thinking {asked}: give off, on, both, or an amount that the model's template "
            "knows, such as low, medium or high."
        )
    return (asked,)


def name(mode: str | None) -> str:
    """A mode in a record or a table."""
    return OFF if mode is None else mode


def template_values(mode: str | None) -> dict[str, Any]:
    """What a chat template is told beside the messages."""
    if mode is None:
        return {"enable_thinking": False}
    values: dict[str, Any] = {"enable_thinking": True, "thinking": True}
    return values if mode == ON else values | {"reasoning_effort": mode}


def request_fields(mode: str | None) -> dict[str, Any]:
    """What a chat request to a server says: for llama.cpp, vLLM and mlx-lm, OpenAI's, Ollama's.

    With thinking off nothing but the template's own switch is sent, which all but the strictest
    servers ignore where they do not know it.
    """
    fields: dict[str, Any] = {"chat_template_kwargs": template_values(mode)}
    if mode is None:
        return fields
    if mode == ON:
        return fields | {"think": True}
    return fields | {"think": mode, "reasoning_effort": mode}
