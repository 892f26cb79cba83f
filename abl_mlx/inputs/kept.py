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
    if spec.startswith(CATEGORY):
        names = _categories(spec, sets)
        kept = _parts(sets.harmful, lambda one: one.category in names)
        kept = Split(*(replace(part, name=f"{spec}/{part.name}") for part in _each(kept)))
    else:
        kept = split(prompts.load(spec, "--keep"), seed)
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
    if not all(map(len, _each(kept))):
        raise UserError(
            f"--keep {spec} has {len(keys)} different prompts, which is too few to train, validate "
            f"and test on: give at least {prompts.MINIMUM}."
        )
    if not all(map(len, _each(harmful))):
        raise UserError(
            f"--keep {spec} leaves too few harmful prompts to train, validate and test on: keep "
            "fewer."
        )
    return replace(sets, harmful=harmful, borderline=borderline, kept=kept)


def with_off_topic(sets: PromptSets, system: str) -> PromptSets:
    """The sets with ``off_topic`` prompts: the harmless ones, asked with a system message.

    Args:
        system: the message of ``--keep-system``.
    """

    def asked(part: PromptSet) -> PromptSet:
        return replace(part, prompts=tuple(replace(one, system=system) for one in part.prompts))

    return replace(sets, off_topic=Split(*map(asked, _each(sets.harmless))))


def _categories(spec: str, sets: PromptSets) -> set[str]:
    """The categories that ``--keep`` names."""
    names = {name.strip() for name in spec.removeprefix(CATEGORY).split(",") if name.strip()}
    known = {one.category for part in _each(sets.harmful) for one in part.prompts} - {""}
    if not known:
        raise UserError(f"--keep {spec}: the harmful prompts have no categories; give a file.")
    if not names or (unknown := sorted(names - known)):
        missing = f"no category {unknown[0]}" if names else "no category named"
        raise UserError(f"--keep {spec}: {missing}; there are {', '.join(sorted(known))}.")
    return names


def _each(parts: Split) -> tuple[PromptSet, PromptSet, PromptSet]:
    return parts.train, parts.validation, parts.test


def _parts(parts: Split, wanted: Callable[[Prompt], bool]) -> Split:
    return Split(*(_only(part, wanted) for part in _each(parts)))


def _only(part: PromptSet, wanted: Callable[[Prompt], bool]) -> PromptSet:
    return replace(part, prompts=tuple(filter(wanted, part.prompts)))
