"""Reads what an OpenAI-compatible server sends: its list of models, and the message of a chat.

Servers differ, so every field is checked before it is used. `request_tools` makes the fields of a
request that describe a prompt's tools.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from abl_mlx.behaviour import tool_calls
from abl_mlx.behaviour.http_call import Answer
from abl_mlx.inputs.sets import Prompt
from convert.base.errors import UserError

#: The error codes with which servers say that their content filter refused a request.
_FILTERED = {
    "content_filter",
    "content_policy_violation",
    "data_inspection_failed",
    "ResponsibleAIPolicyViolation",
}


def listed_models(answer: Answer) -> list[dict[str, Any]] | None:
    """The entries of a server's list of models; None if the answer is not such a list."""
    found = answer.json() if answer.status == 200 else None
    if not isinstance(found, dict) or not isinstance(found.get("data", 0), list | type(None)):
        return None
    return [one for one in found.get("data") or [] if isinstance(one, dict)]


def chosen_model(server: str, wanted: str | None, listed: Sequence[Mapping[str, Any]]) -> str:
    """The name of the model to which the prompts are sent.

    Args:
        server: The server's address, for error messages.
        wanted: The value of ``--model``; None for the only model that the server lists.
        listed: The entries that `listed_models` returned.

    Raises:
        UserError: When the server lists models without ``wanted``; or, where ``wanted`` is None,
            when it lists no model or several.
    """
    names = [str(one["id"]) for one in listed if one.get("id")]
    if wanted is not None:
        # A server that lists no model may still serve this one; Ollama lists NAME as NAME:latest.
        if not names or wanted in names or f"{wanted}:latest" in names:
            return wanted
        raise UserError(f"{server} has no model {wanted}: --model takes {_some(names)}.")
    if len(names) == 1:
        return names[0]
    if not names:
        raise UserError(f"{server} lists no model: load one there, or name it with --model.")
    raise UserError(f"{server} has several models: add --model with {_some(names)}.")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:12])
    return shown + (f" or one of {len(names) - 12} more" if len(names) > 12 else "")


def _joined(content: Any, kind: str) -> str:
    """The text of a message's content, which is a string or a list of parts.

    Args:
        content: The content.
        kind: The field of a part to read: "text", or "thinking" for the model's thoughts.
    """
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict)]
        return "".join(_joined(part.get(kind), "text") for part in parts)
    return content if isinstance(content, str) else ""


def said_and_thought(message: Mapping[str, Any]) -> tuple[str, str | None]:
    """The text of the reply, and the model's thoughts (None if the server sends none separately).

    Tool calls that the server moved out of the text into a field of their own are written after
    the text, by `tool_calls.written`.
    """
    content = message.get("content")
    text = _joined(content, "text")
    if not text and isinstance(message.get("refusal"), str):
        text = message["refusal"]
    text += _calls(message.get("tool_calls"))
    apart = [message.get(name) for name in ("reasoning_content", "reasoning", "thinking")]
    apart += [_joined(content, "thinking")] if isinstance(content, list) else []
    thoughts = (one for one in apart if isinstance(one, str) and one.strip())
    return text, next(thoughts, None)


def _calls(found: Any) -> str:
    functions = [
        one.get("function") if isinstance(one, dict) else None
        for one in (found if isinstance(found, list) else [])
    ]
    return "".join(
        tool_calls.written(one.get("name"), one.get("arguments"))
        for one in functions
        if isinstance(one, dict)
    )


def request_tools(prompt: Prompt) -> dict[str, Any]:
    """The fields of a request that describe a prompt's tools; empty if the prompt has none."""
    if not prompt.tools:
        return {}
    return {"tools": [tool.json for tool in prompt.tools], "parallel_tool_calls": True}


#: What llama.cpp and Ollama report about a call that they cannot read.
_UNREAD = re.compile(
    r"error parsing tool call|failed to parse (?:input|tool call)|does not match the expected",
    re.IGNORECASE,
)


def has_unread_call(answer: Answer) -> bool:
    """Whether an answer is the error of a server that cannot read a call that the model wrote."""
    return answer.status == 500 and _UNREAD.search(answer.said) is not None


def is_withheld(answer: Answer) -> bool:
    """Whether the answer is an error of the server's content filter, as Azure sends it."""
    found = answer.json() if 400 <= answer.status < 500 else None
    error = found.get("error") if isinstance(found, dict) else None
    if not isinstance(error, dict):
        return False
    inner = error.get("innererror")
    codes = [error.get("code"), error.get("type")]
    codes += [inner.get("code")] if isinstance(inner, dict) else []
    return any(code in _FILTERED for code in codes if isinstance(code, str))


#: A token of a reply: its text, and the likeliest texts at its position with their natural
#: log-probabilities.
Step = tuple[str, dict[str, float]]


def told_tokens(found: Any) -> list[Step] | None:
    """The tokens of a reply with the likeliest ones at their positions; None if none are sent."""
    choices = found.get("choices") if isinstance(found, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    logprobs = choice.get("logprobs") if isinstance(choice, dict) else None
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(content, list) or not content:
        return None
    steps: list[Step] = []
    for one in content:
        top = one.get("top_logprobs") if isinstance(one, dict) else None
        told = {
            _text_of(each["token"]): float(each["logprob"])
            for each in (top if isinstance(top, list) else [])
            if isinstance(each, dict)
            and isinstance(each.get("token"), str)
            and isinstance(each.get("logprob"), int | float)
        }
        if not told:
            break
        # Decoding is greedy, so the likeliest is the chosen one; mlx_lm.server may name another.
        steps.append((max(told, key=told.__getitem__), told))
    return steps or None


def _text_of(token: str) -> str:
    """A token's text; mlx_lm.server sends the vocabulary's form of it, which marks spaces."""
    return token.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n")
