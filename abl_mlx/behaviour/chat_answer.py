"""What an OpenAI-compatible server sends, read with care: its models, and a chat's message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from abl_mlx.behaviour.http_call import Answer

#: How servers call a request that their filter refuses.
_FILTERED = {
    "content_filter",
    "content_policy_violation",
    "data_inspection_failed",
    "ResponsibleAIPolicyViolation",
}


def listed_models(answer: Answer) -> list[dict[str, Any]] | None:
    """The models of a list of models; None when it is none."""
    found = answer.json() if answer.status == 200 else None
    if not isinstance(found, dict) or not isinstance(found.get("data", 0), list | type(None)):
        return None
    return [one for one in found.get("data") or [] if isinstance(one, dict)]


def some_names(names: Sequence[str]) -> str:
    """Names for a sentence, the first dozen of many."""
    shown = ", ".join(names[:12])
    return shown + (f" or one of {len(names) - 12} more" if len(names) > 12 else "")


def _joined(content: Any, kind: str) -> str:
    """The text of a message's content, or its thoughts, which may come in parts."""
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict)]
        return "".join(_joined(part.get(kind), "text") for part in parts)
    return content if isinstance(content, str) else ""


def said_and_thought(message: Mapping[str, Any]) -> tuple[str, str | None]:
    """What the model said, and its thoughts, where the server keeps them apart."""
    content = message.get("content")
    text = _joined(content, "text")
    if not text and isinstance(message.get("refusal"), str):
        text = message["refusal"]
    apart = [message.get(name) for name in ("reasoning_content", "reasoning", "thinking")]
    apart += [_joined(content, "thinking")] if isinstance(content, list) else []
    thoughts = (one for one in apart if isinstance(one, str) and one.strip())
    return text, next(thoughts, None)


def is_withheld(answer: Answer) -> bool:
    """Whether a server refuses a request because of what it asks, as Azure does."""
    found = answer.json() if 400 <= answer.status < 500 else None
    error = found.get("error") if isinstance(found, dict) else None
    if not isinstance(error, dict):
        return False
    inner = error.get("innererror")
    codes = [error.get("code"), error.get("type")]
    codes += [inner.get("code")] if isinstance(inner, dict) else []
    return any(code in _FILTERED for code in codes if isinstance(code, str))
