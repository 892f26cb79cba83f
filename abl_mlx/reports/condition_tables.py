"""Conditions of edits at runtime, as lines of tables."""

from __future__ import annotations

from abl_mlx.choices import ADD
from abl_mlx.records.conditions import ConditionFound, SteeredBy


def condition_lines(found: ConditionFound | None) -> list[str]:
    """The line of a table about a condition; nothing without one."""
    if found is None:
        return []
    read = "the last token" if found.tokens == 1 else f"the last {found.tokens} tokens"
    side = "at least" if found.above else "below"
    return [
        f"  condition {found.prompts}: cosine with the {found.kind} vector after layer "
        f"{found.layer}, mean of {read}, {side} {found.threshold:+.3f}; F1 {found.f1:.2f} on "
        f"{found.validation[0]} + {found.validation[1]} validation prompts"
    ]


def asked_line(by: SteeredBy) -> str:
    """With which edit at runtime a model was asked."""
    did = "added" if by.steer == ADD else "removed"
    return f"asked with {by.direction} {did} at runtime, strength {by.strength:g}"


def steered_lines(by: SteeredBy | None) -> list[str]:
    """With which edit at runtime a model was asked, and on how many prompts it was made."""
    if by is None:
        return []
    lines = [asked_line(by), *condition_lines(by.condition)]
    if by.condition is None:
        return lines
    met = {name: one for name, one in (by.met or {}).items() if "/" not in name or one.met}
    made = ", ".join(f"{name} {one.met}/{one.n}" for name, one in met.items())
    return [*lines, f"  made on: {made}"]
