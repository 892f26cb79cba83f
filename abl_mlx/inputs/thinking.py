"""Modes of thinking: whether and how much a model is asked to think before it replies.

Chat templates and servers have different names for the mode: ``enable_thinking`` (Qwen3 and most
others), ``thinking`` (DeepSeek, Granite), ``reasoning_effort`` (gpt-oss). A template without any of
these renders the same prompt in every mode.
"""

from __future__ import annotations

import re
from typing import Any

from convert.base.errors import UserError

OFF, ON, BOTH = "off", "on", "both"

# A word for an amount of thinking: "low", "medium", "high", or another one that a template knows.
_LEVEL = re.compile(r"[a-z]{2,16}")


def modes(asked: str) -> tuple[str | None, ...]:
    """The modes of a value of ``--thinking``, as in `Prompt.thinking`.

    Raises:
        UserError: when the value is neither on, off, both nor a word for an amount.
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
    """The name of a mode in records and tables."""
    return OFF if mode is None else mode


def template_values(mode: str | None) -> dict[str, Any]:
    """The variables for a mode that a chat template gets besides the messages."""
    if mode is None:
        return {"enable_thinking": False}
    values: dict[str, Any] = {"enable_thinking": True, "thinking": True}
    return values if mode == ON else values | {"reasoning_effort": mode}


def request_fields(mode: str | None) -> dict[str, Any]:
    """The fields for a mode in a request to llama.cpp, vLLM, mlx-lm, OpenAI or Ollama.

    With thinking off this is only the template's own switch, which nearly all servers ignore if
    they do not know it.
    """
    fields: dict[str, Any] = {"chat_template_kwargs": template_values(mode)}
    if mode is None:
        return fields
    if mode == ON:
        return fields | {"think": True}
    return fields | {"think": mode, "reasoning_effort": mode}
