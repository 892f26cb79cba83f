"""Prompts whose refusals are to stay: those of ``--keep``, and those of ``--keep-system``.

Nothing in this module imports MLX.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from abl_mlx.inputs import prompts
from abl_mlx.inputs.sets import Prompt, PromptSet, PromptSets, Split, key_of, split
from convert.base.errors import UserError

#: What the value of ``--keep`` begins with when it names categories of the harmful set.
CATEGORY = "category:"


def with_kept(sets: PromptSets, spec: str, seed: int) -> PromptSets:
    """The sets with ``kept`` prompts, which are taken out of the harmful ones.

    Args:
        spec: the value of ``--keep``: ``category:NAME[,NAME]`` of the harmful set, or what
            `prompts.load` reads.
        seed: of the split of prompts from a file.

    Raises:
        UserError: when there is no such category, a set cannot be read or is too small, or nothing
            is left of the harmful prompts.
    """
    kept = _chosen(sets, spec, seed, "--keep")
    keys = {key_of(one) for part in _each(kept) for one in part.prompts}
    harmless = (one for part in _each(sets.harmless) for one in part.prompts)
    if (shared := next((one for one in harmless if key_of(one) in keys), None)) is not None:
        raise UserError(
            f"--keep {spec} and the harmless prompts both hold {shared.text!r}: remove it from one "
            "of them."
        )

    def other(prompt: Prompt) -> bool:
        return key_of(prompt) not in keys

    harmful = _parts(sets.harmful, other)
    borderline = sets.borderline and _only(sets.borderline, other)
    if not all(map(len, _each(harmful))):
        raise UserError(
            f"--keep {spec} leaves too few harmful prompts to train, validate and test on: keep "
            "fewer."
        )
    return replace(sets, harmful=harmful, borderline=borderline, kept=kept)


def told_apart(sets: PromptSets, spec: str, seed: int) -> tuple[Split, list[Split]]:
    """The prompts of ``--condition``, and all other prompts, set by set.

    Args:
        spec: the value of ``--condition``, in the forms of ``--keep``; other prompts lose what a
            file or dataset shares with them.
        seed: of the split of prompts from a file.

    Raises:
        UserError: when there is no such category, or the prompts are too few.
    """
    inside = _chosen(sets, spec, seed, "--condition")
    keys = {key_of(one) for part in _each(inside) for one in part.prompts}
    every = [sets.harmful, sets.harmless, *([] if sets.kept is None else [sets.kept])]
    others = [_parts(one, lambda prompt: key_of(prompt) not in keys) for one in every]
    if not all(any(len(part) for part in parts) for parts in zip(*map(_each, others), strict=True)):
        raise UserError(
            f"--condition {spec} leaves too few other prompts to train and validate on: give fewer."
        )
    return inside, others


def with_off_topic(sets: PromptSets, system: str) -> PromptSets:
    """The sets with ``off_topic`` prompts: the harmless ones, asked with a system message.

    Args:
        system: the message of ``--keep-system``.
    """

    def asked(part: PromptSet) -> PromptSet:
        return replace(part, prompts=tuple(replace(one, system=system) for one in part.prompts))

    return replace(sets, off_topic=Split(*map(asked, _each(sets.harmless))))


def _chosen(sets: PromptSets, spec: str, seed: int, flag: str) -> Split:
    """The prompts that a flag's value names, in their parts."""
    if spec.startswith(CATEGORY):
        names = _categories(spec, sets, flag)
        found = _parts(sets.harmful, lambda one: one.category in names)
        found = Split(*(replace(part, name=f"{spec}/{part.name}") for part in _each(found)))
    else:
        found = split(prompts.load(spec, flag), seed)
    if not all(map(len, _each(found))):
        count = len({key_of(one) for part in _each(found) for one in part.prompts})
        raise UserError(
            f"{flag} {spec} has {count} different prompts, which is too few to train, validate "
            f"and test on: give at least {prompts.MINIMUM}."
        )
    return found


def _categories(spec: str, sets: PromptSets, flag: str) -> set[str]:
    """The categories that a flag's value names."""
    names = {name.strip() for name in spec.removeprefix(CATEGORY).split(",") if name.strip()}
    known = {one.category for part in _each(sets.harmful) for one in part.prompts} - {""}
    if not known:
        raise UserError(f"{flag} {spec}: the harmful prompts have no categories; give a file.")
    if not names or (unknown := sorted(names - known)):
        missing = f"no category {unknown[0]}" if names else "no category named"
        raise UserError(f"{flag} {spec}: {missing}; there are {', '.join(sorted(known))}.")
    return names


def _each(parts: Split) -> tuple[PromptSet, PromptSet, PromptSet]:
    return parts.train, parts.validation, parts.test


def _parts(parts: Split, wanted: Callable[[Prompt], bool]) -> Split:
    return Split(*(_only(part, wanted) for part in _each(parts)))


def _only(part: PromptSet, wanted: Callable[[Prompt], bool]) -> PromptSet:
    return replace(part, prompts=tuple(filter(wanted, part.prompts)))
