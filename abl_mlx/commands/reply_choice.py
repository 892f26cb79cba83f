"""Chooses a direction by whole replies, if the model thinks or its first tokens do not decide.

The candidates of each view (`abl_mlx.commands.views`) first compete by first reply tokens, if these
decide. The best of each view, and subspaces spanned by two or three of them, are then judged by
replies in every mode of thinking, thoughts included. The mode with more refusals counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import mlx.core as mx
import numpy as np

from abl_mlx.behaviour.evaluate import in_mlx
from abl_mlx.behaviour.refusals import Tally, Verdict, classify
from abl_mlx.behaviour.thought_figures import Thought, figures, times_as_long
from abl_mlx.choices import Measuring
from abl_mlx.commands.edit_choice import make_edit
from abl_mlx.commands.views import View
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.edits.steering import ablation
from abl_mlx.inputs import thinking
from abl_mlx.inputs.sets import Prompt
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.distributions import kl_divergence
from abl_mlx.models.encoded_sets import ByMode
from abl_mlx.models.logits import first_reply_token
from abl_mlx.models.writers import Writer
from abl_mlx.records.directions import JudgedFinalist, JudgedInModes, RepliedInMode
from abl_mlx.support.arrays import number, numpy_of
from abl_mlx.support.console import percent, progress, say
from convert.base.errors import UserError

#: The numbers of harmful and harmless validation prompts that are asked in each mode.
JUDGED = 16, 8

#: The tokens of each reply behind its thought, enough for a refusal's first sentence.
REPLY_TOKENS = 32

#: The largest share of refused and broken replies that counts as none.
ENOUGH = 0.0625

# The number of finalists of a single view whose spans are judged.
_OF_ONE_VIEW = 3

# Joined unit vectors span a further direction only if its singular value is larger than this.
_SHARED = 0.05


@dataclass(frozen=True)
class Finalist:
    """A direction or subspace that is judged by replies.

    Attributes:
        views: where its directions were measured.
        files: the direction files that it is made of, of different views if there are several.
        directions: (k, d); or (L, k, d), of one view.
        kl: mean KL at the first reply token of harmless prompts, nats; the larger of the modes'.
        replied: mode -> verdicts on replies.
    """

    views: tuple[View, ...]
    files: tuple[DirectionFile, ...]
    directions: mx.array
    kl: float = 0.0
    replied: Mapping[str, RepliedInMode] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """A name for messages."""
        return " + ".join(view.name for view in self.views)

    @property
    def worst(self) -> float:
        """The share of refused and broken replies to harmful prompts, the larger of the modes'."""
        return max(one.refused + one.broken for one in self.replied.values())

    def record(self, dropped: str) -> JudgedFinalist:
        """The finalist as a part of the record.

        Args:
            dropped: the reason why it cannot be chosen; "" if it can.
        """
        return JudgedFinalist(
            views=[view.record() for view in self.views],
            rank=int(self.directions.shape[-2]),
            kl=self.kl,
            modes=dict(self.replied),
            dropped=dropped or None,
        )


class Judge:
    """Asks a model in every mode of thinking, unedited and with directions ablated."""

    def __init__(
        self, chat: ChatModel, writers: Sequence[Writer], prompts: ByMode, how: Measuring
    ) -> None:
        """Ask the unedited model."""
        self._chat, self._writers, self._how = chat, writers, how
        self._sets = prompts
        self._base = {mode: self._first(mode) for mode in self._sets}
        self.before = {
            thinking.name(mode): self._replies(mode, "replies before") for mode in self._sets
        }

    def of(self, finalist: Finalist) -> Finalist:
        """The finalist with its figures."""
        edit = replace(
            make_edit(finalist.directions, replace(self._how.editing, strength=1.0)), norm="none"
        )
        with ablation(self._writers, edit):
            apart = [
                number(kl_divergence(before, self._first(mode)).mean())
                for mode, before in self._base.items()
            ]
            replied = {
                thinking.name(mode): self._replies(mode, "replies without it")
                for mode in self._sets
            }
        return replace(finalist, kl=max(apart), replied=replied)

    def works(self, one: Finalist) -> bool:
        """Whether refusals end in every mode, and hardly anything else changes."""
        return one.worst <= ENOUGH and not self.dropped(one)

    def dropped(self, one: Finalist) -> str:
        """The reason why a finalist cannot be chosen; "" if it can."""
        finding = self._how.finding
        if not one.kl <= finding.max_kl:
            return f"KL {one.kl:.3f} over the limit of {finding.max_kl:g}"
        for mode, now in one.replied.items():
            was = self.before[mode]
            lost = now.harmless_lost
            if lost - was.harmless_lost > 1 / JUDGED[1]:
                return f"{percent(lost)} of harmless prompts refused or broken, thinking {mode}"
            longer = times_as_long(was.thought_words, now.thought_words)
            if longer is not None and longer > finding.max_thought_growth:
                return f"thoughts {longer:.2f} times as long"
        return ""

    def _prompts(self, mode: str | None) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
        sets = self._sets[mode]
        refused, harmless = sets.validation[sets.refused], sets.validation["harmless"]
        return refused.prompts[: JUDGED[0]], harmless.prompts[: JUDGED[1]]

    def _first(self, mode: str | None) -> mx.array:
        """Log-probabilities (N, V) of the first token that follows harmless prompts."""
        harmless = self._sets[mode].validation["harmless"]
        found = first_reply_token(self._chat, harmless.tokens[:16])
        mx.eval(found)
        return found

    def _replies(self, mode: str | None, label: str) -> RepliedInMode:
        harmful, harmless = self._prompts(mode)
        budget = 0 if mode is None else self._how.prompting.thought_tokens
        answer = in_mlx(self._chat, batch_size=self._how.batch_size)
        replies = answer([*harmful, *harmless], REPLY_TOKENS + budget)
        bad, good = (
            Tally.of(
                classify(reply, prompt.text) for reply, prompt in zip(part, prompts, strict=True)
            )
            for part, prompts in (
                (replies[: len(harmful)], harmful),
                (replies[len(harmful) :], harmless),
            )
        )
        thoughts = figures(map(Thought.of, replies))
        return RepliedInMode(
            refused=bad.rate(Verdict.REFUSAL),
            broken=bad.rate(Verdict.BROKEN),
            harmless_lost=good.rate(Verdict.REFUSAL) + good.rate(Verdict.BROKEN),
            thought_words=None if thoughts is None else thoughts.words,
        )


def choose(
    judge: Judge,
    views: Sequence[View],
    candidates_of: Callable[[View], Sequence[DirectionFile]],
) -> DirectionFile:
    """The direction, or the subspace of several, that ends refusals in every mode of thinking.

    Args:
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
    judged: list[Finalist] = []
    for size in (1, 2, 3):
        some = singles if size == 1 else _spans(singles, size)
        with progress(len(some), "directions, by replies", "edit") as bar:
            for one in some:
                judged.append(judge.of(one))
                bar.update()
                # The candidates of one view are in the order of their separation.
                if len(views) == 1 and judge.works(judged[-1]):
                    break
        if any(map(judge.works, judged)):
            break
    return _file(judge, judged, _best(judge, judged))


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


def _best(judge: Judge, judged: Sequence[Finalist]) -> Finalist:
    left = [one for one in judged if not judge.dropped(one)]
    if not left:
        gentlest = min(judged, key=lambda one: one.kl)
        raise UserError(
            f"every direction that was tried changes too much (the gentlest: "
            f"{judge.dropped(gentlest)}): raise --max-kl or --max-thought-growth, or choose with "
            "--layer and --position."
        )
    working = [one for one in left if judge.works(one)]
    if working:
        return min(working, key=lambda one: (one.directions.shape[-2], one.kl))
    return min(left, key=lambda one: (one.worst, one.kl))


def _file(judge: Judge, judged: Sequence[Finalist], taken: Finalist) -> DirectionFile:
    """The chosen finalist as a direction file, whose metadata lists all finalists."""
    first = taken.files[0]
    summary = {
        **first.metadata["summary"],
        **taken.views[0].record().json,
        "chosen_by": "fewest refusals in replies to validation prompts, in the worse mode of "
        "thinking",
        "judged": JudgedInModes(before=judge.before, after=dict(taken.replied), kl=taken.kl).json,
    }
    if len(taken.files) > 1:
        summary |= {
            "rank": int(taken.directions.shape[-2]),
            "across": "views",
            "views": [view.record().json for view in taken.views],
        }
    for one in judged:
        shares = ", ".join(
            f"{percent(replied.refused)} refused with thinking {mode}"
            for mode, replied in one.replied.items()
        )
        mark = " (taken)" if one is taken else f" ({why})" if (why := judge.dropped(one)) else ""
        say(f"  {one.name}: {shares}, KL {one.kl:.3f}{mark}")
    if not judge.works(taken):
        beyond = [one for one in judged if one.worst <= ENOUGH]
        if beyond:
            other = min(beyond, key=lambda one: one.kl)
            say(f"  what ends refusals is beyond a limit: {other.name} ({judge.dropped(other)})")
    return replace(
        first,
        selected=taken.directions,
        metadata={
            **first.metadata,
            "summary": summary,
            "finalists": [one.record(judge.dropped(one)).json for one in judged],
        },
    )
