"""Refusals before and after an edit, prompt by prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

from abl_mlx.behaviour.refusals import examine
from abl_mlx.commands.session import Steered
from abl_mlx.inputs.sets import Prompt, PromptSets
from abl_mlx.models import generation
from abl_mlx.studio import asked
from abl_mlx.studio.desk import Event

#: How many replies are generated between two events.
_BATCH = 4


def judged(
    steered: Steered, body: Mapping[str, Any], sets: Callable[[], PromptSets]
) -> Iterator[Event]:
    """Yield a row for each prompt: its set and category, both replies and both verdicts.

    Args:
        body: a request, with ``limit``, the number of prompts of each set, ``max_tokens``, and the
            fields of `asked.edited`.
        sets: gives the prompts.
    """
    chosen = asked.edited(steered, body)
    limit = asked.whole(body, "limit", 8, 1, 512)
    longest = asked.whole(body, "max_tokens", 64, 1, 4096)
    prompts = _chosen(sets(), limit)
    yield {"total": len(prompts)}
    for start in range(0, len(prompts), _BATCH):
        some = prompts[start : start + _BATCH]
        before = _replies(steered, some, longest)
        yield {}
        with chosen.steered.turned(chosen.strength) if chosen.strength else nullcontext():
            after = _replies(steered, some, longest)
        for (name, prompt), first, second in zip(some, before, after, strict=True):
            yield {
                "set": name,
                "category": prompt.category,
                "prompt": prompt.text,
                "before": {"text": first, "verdict": examine(first, prompt.text).verdict.value},
                "after": {"text": second, "verdict": examine(second, prompt.text).verdict.value},
            }


def examples(
    _: Steered, body: Mapping[str, Any], sets: Callable[[], PromptSets]
) -> Iterator[Event]:
    """Yield some held-out prompts of each set, which a page offers."""
    limit = asked.whole(body, "limit", 6, 1, 100)
    found: dict[str, list[str]] = {}
    for name, prompt in _chosen(sets(), limit):
        found.setdefault(name, []).append(prompt.text)
    yield {"examples": found}


def _chosen(sets: PromptSets, limit: int) -> list[tuple[str, Prompt]]:
    """Held-out prompts of each set, the sets in turn."""
    groups = {"harmful": sets.harmful.test, "harmless": sets.harmless.test}
    if sets.borderline is not None:
        groups["borderline"] = sets.borderline
    return [(name, one) for name, group in groups.items() for one in group.prompts[:limit]]


def _replies(steered: Steered, some: list[tuple[str, Prompt]], longest: int) -> list[str]:
    chat = steered.chat
    tokens = [chat.encode(prompt) for _, prompt in some]
    replies = generation.generate(chat, tokens, longest, batch_size=_BATCH)
    return [chat.tokenizer.decode(reply) for reply in replies]
