"""Chooses a direction by whole replies, if the model thinks or its first tokens do not decide.

The candidates of each view (`abl_mlx.commands.views`) first compete by first reply tokens, if these
decide. The best of each view, and subspaces spanned by two or three of them, are then judged by
replies in every mode of thinking, thoughts included. The mode with more refusals counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import mlx.core as mx
import numpy as np

from abl_mlx.choices import Editing
from abl_mlx.commands.edit_choice import make_edit
from abl_mlx.commands.reply_judge import ENOUGH, Judge, Replied
from abl_mlx.commands.views import View
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.records.directions import JudgedFinalist, JudgedInModes
from abl_mlx.support.arrays import numpy_of
from abl_mlx.support.console import percent, progress, say
from convert.base.errors import UserError

# The number of finalists of a single view whose spans are judged.
_OF_ONE_VIEW = 3

# Joined unit vectors span a further direction only if its singular value is larger than this.
_SHARED = 0.05

#: What is said where nothing that was tried keeps the refusals that are to stay.
NONE_KEEPS = (
    "warning: no edit that was tried ends refusals and leaves those that are to stay: the one that "
    "loses fewest is taken"
)


@dataclass(frozen=True)
class Finalist:
    """A direction or subspace that is judged by replies.

    Attributes:
        files: what it is made of, one or more of different views.
        directions: (k, d), or (L, k, d) of one view.
    """

    views: tuple[View, ...]
    files: tuple[DirectionFile, ...]
    directions: mx.array

    @property
    def kind(self) -> str | None:
        """To what its directions were made orthogonal, as of `Variant.orthogonal_to`."""
        found: str | None = self.files[0].metadata["summary"].get("orthogonal_to")
        return found

    @property
    def name(self) -> str:
        """A name for messages."""
        kept = "" if self.kind is None else f", orthogonal to what is kept ({self.kind})"
        return " + ".join(view.name for view in self.views) + kept


@dataclass(frozen=True)
class Judged:
    """A finalist with what it replies.

    Attributes:
        dropped: why it cannot be taken; "" where it can.
        works: whether refusals are gone in every mode, and little else.
    """

    finalist: Finalist
    replied: Replied
    dropped: str
    works: bool

    @property
    def merit(self) -> tuple[float, float, float]:
        """Sort key where none works: refusals ended, then refusals kept, then the KL."""
        replied = self.replied
        left = max(replied.worst, ENOUGH) if replied.kept else replied.worst
        return left, replied.lost, replied.kl

    def record(self) -> JudgedFinalist:
        """Its part of the record."""
        one = self.finalist
        return JudgedFinalist(
            views=[view.record() for view in one.views],
            rank=int(one.directions.shape[-2]),
            orthogonal_to=one.kind,
            kl=self.replied.kl,
            modes=dict(self.replied.modes),
            dropped=self.dropped or None,
        )


def choose(
    judge: Judge,
    editing: Editing,
    views: Sequence[View],
    candidates_of: Callable[[View], Sequence[DirectionFile]],
) -> DirectionFile:
    """The direction, or the subspace of several, that ends refusals in every mode of thinking.

    Args:
        editing: the edit with which they are tried, always at full strength.
        judge: asks the model.
        views: the places where directions are measured.
        candidates_of: the candidates of a view that are worth judging, the best first.

    Raises:
        UserError: when no view has a candidate, or all candidates change the model too much.
    """
    singles = [
        Finalist((view,), (file,), file.selected) for view in views for file in candidates_of(view)
    ]
    if not singles:
        raise UserError(
            "in no mode of thinking does the model tell harmful from harmless prompts, so there is "
            "no direction to measure: check with `abl-mlx eval --thinking both`."
        )
    full = replace(editing, strength=1.0)
    judged: list[Judged] = []
    for size in (1, 2, 3):
        some = singles if size == 1 else _spans(singles, size)
        with progress(len(some), "directions, by replies", "edit") as bar:
            for one in some:
                # A method may have strengths of its own, which are written as well.
                recipe = one.files[0].metadata.get("recipe")
                replied = judge.of(make_edit(one.directions, full, recipe=recipe))
                judged.append(Judged(one, replied, judge.dropped(replied), judge.works(replied)))
                bar.update()
                # The candidates of one view are in the order of their separation.
                if len(views) == 1 and judged[-1].works:
                    break
        if any(one.works for one in judged):
            break
    return _file(judge, judged, _best(judged))


def _spans(singles: Sequence[Finalist], size: int) -> list[Finalist]:
    """The subspaces that ``size`` finalists span, each of another view if there are several.

    If there is one view, its first few finalists span them, which are of different layers.
    """
    flat = [one for one in singles if one.directions.ndim == 2]
    names = {view.name for one in flat for view in one.views}
    if len(names) == 1:
        flat = flat[:_OF_ONE_VIEW]
    found = []
    for group in combinations(flat, size):
        if len({one.kind for one in group}) > 1:
            continue
        views = tuple(view for one in group for view in one.views)
        if len({view.name for view in views}) < min(size, len(names)):
            continue
        span = _span([one.directions for one in group])
        found.append(Finalist(views, tuple(one.files[0] for one in group), span))
    return found


def _span(directions: Sequence[mx.array]) -> mx.array:
    """An orthonormal basis (k, d) of the span of several bases (·, d).

    Directions that are nearly the same in two bases (up to a twentieth) count once.
    """
    rows = np.concatenate([numpy_of(one) for one in directions]).astype(np.float64)
    _, sizes, basis = np.linalg.svd(rows, full_matrices=False)
    return mx.array(basis[sizes > _SHARED].astype(np.float32))


def _best(judged: Sequence[Judged]) -> Judged:
    left = [one for one in judged if not one.dropped]
    if not left:
        gentlest = min(judged, key=lambda one: one.replied.kl)
        raise UserError(
            f"every direction that was tried changes too much (the gentlest: "
            f"{gentlest.dropped}): raise --max-kl or --max-thought-growth, or choose with "
            "--layer and --position."
        )
    working = [one for one in left if one.works]
    if working:
        return min(working, key=lambda one: (one.finalist.directions.shape[-2], one.replied.kl))
    return min(left, key=lambda one: one.merit)


def _file(judge: Judge, judged: Sequence[Judged], taken: Judged) -> DirectionFile:
    """The chosen finalist as a direction file, whose metadata lists all finalists."""
    one, replied = taken.finalist, taken.replied
    first = one.files[0]
    summary = {
        **first.metadata["summary"],
        **one.views[0].record().json,
        "chosen_by": "fewest refusals in replies to validation prompts, in the worse mode of "
        "thinking",
        "judged": JudgedInModes(before=judge.before, after=dict(replied.modes), kl=replied.kl).json,
    }
    if replied.kept:
        summary["kept"] = {name: kept.json for name, kept in replied.kept.items()}
    if len(one.files) > 1:
        summary |= {
            "rank": int(one.directions.shape[-2]),
            "across": "views",
            "views": [view.record().json for view in one.views],
        }
    _tell(judged, taken)
    return replace(
        first,
        selected=one.directions,
        metadata={
            **first.metadata,
            "summary": summary,
            "finalists": [each.record().json for each in judged],
        },
    )


def _tell(judged: Sequence[Judged], taken: Judged) -> None:
    """Say what each finalist replies, and what could not be reached."""
    for one in judged:
        shares = ", ".join(
            f"{percent(replied.refused)} refused with thinking {mode}"
            for mode, replied in one.replied.modes.items()
        )
        mark = " (taken)" if one is taken else f" ({one.dropped})" if one.dropped else ""
        say(
            f"  {one.finalist.name}: {shares}, KL {one.replied.kl:.3f}"
            f"{one.replied.kept_words}{mark}"
        )
    if taken.works:
        return
    beyond = [one for one in judged if one.dropped and one.replied.worst <= ENOUGH]
    if beyond:
        other = min(beyond, key=lambda one: one.replied.kl)
        say(f"  what ends refusals is beyond a limit: {other.finalist.name} ({other.dropped})")
    if not taken.replied.enough:
        say(NONE_KEEPS)
