"""Refusals and small tasks before and after an edit, prompt by prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

from abl_mlx.behaviour import capability
from abl_mlx.behaviour.refusals import Verdict, examine, marker_of
from abl_mlx.commands.session import Steered
from abl_mlx.inputs.sets import Prompt, PromptSets
from abl_mlx.models import generation
from abl_mlx.studio import asked
from abl_mlx.studio.desk import Event

T = TypeVar("T")

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
    prompts = held_out(sets(), limit)
    yield {"total": len(prompts)}
    for found in _both(chosen, prompts, longest):
        yield {}  # other work takes its turn
        for name, prompt, first, second in found:
            yield {
                "set": name,
                "category": prompt.category,
                "prompt": prompt.text,
                "before": _verdict(first, prompt),
                "after": _verdict(second, prompt),
            }


def _verdict(reply: str, prompt: Prompt) -> dict[str, Any]:
    verdict = examine(reply, prompt.text).verdict
    marker = marker_of(reply) if verdict is Verdict.REFUSAL else None
    return {"text": reply, "verdict": verdict.value, "marker": marker}


def capable(steered: Steered, body: Mapping[str, Any]) -> Iterator[Event]:
    """Yield how many tasks of `eval --capability` were done, and the right ones of each group.

    ``capability`` has, for each group, how many replies were right before and after the edit, and
    how many tasks there are.
    """
    chosen = asked.edited(steered, body)
    prompts = [(task, steered.prompt(task.prompt)) for task in capability.tasks()]
    right = {name: [0, 0, 0] for name in capability.GROUPS}
    yield {"total": len(prompts)}
    for found in _both(chosen, prompts, capability.MAX_TOKENS):
        for task, _, *replies in found:
            for side, reply in enumerate(replies):
                right[task.group][side] += capability.right(task, reply)
            right[task.group][2] += 1
        yield {"capability": right}


def examples(
    _: Steered, body: Mapping[str, Any], sets: Callable[[], PromptSets]
) -> Iterator[Event]:
    """Yield some held-out prompts of each set, which a page offers."""
    limit = asked.whole(body, "limit", 6, 1, 100)
    found: dict[str, list[str]] = {}
    for name, prompt in held_out(sets(), limit):
        found.setdefault(name, []).append(prompt.text)
    yield {"examples": found}


def held_out(sets: PromptSets, limit: int) -> list[tuple[str, Prompt]]:
    """Held-out prompts of each set, the sets in turn."""
    groups = {"harmful": sets.harmful.test, "harmless": sets.harmless.test}
    if sets.borderline is not None:
        groups["borderline"] = sets.borderline
    return [(name, one) for name, group in groups.items() for one in group.prompts[:limit]]


def _both(
    chosen: asked.Edited, prompts: Sequence[tuple[T, Prompt]], longest: int
) -> Iterator[list[tuple[T, Prompt, str, str]]]:
    """Yield prompts with their replies before and after the edit, a batch at a time.

    Args:
        chosen: the edit.
        prompts: pairs of what a prompt is of, which is yielded with it, and the prompt.
        longest: reply, in tokens.
    """
    for start in range(0, len(prompts), _BATCH):
        of, some = zip(*prompts[start : start + _BATCH], strict=True)
        before = _replies(chosen.steered, some, longest)
        with chosen.steered.turned(chosen.strength) if chosen.strength else nullcontext():
            after = _replies(chosen.steered, some, longest)
        yield list(zip(of, some, before, after, strict=True))


def _replies(steered: Steered, some: Sequence[Prompt], longest: int) -> list[str]:
    chat = steered.chat
    tokens = [chat.encode(prompt) for prompt in some]
    replies = generation.generate(chat, tokens, longest, batch_size=_BATCH)
    return [chat.tokenizer.decode(reply) for reply in replies]
