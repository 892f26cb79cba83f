"""What trials on the front of a search reply, and whether that meets the target."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from abl_mlx.behaviour import kept_refusals
from abl_mlx.behaviour.refusals import Verdict, wilson
from abl_mlx.directions.staying import Staying
from abl_mlx.edits.edit import Edit
from abl_mlx.inputs.sets import Prompt
from abl_mlx.models.encoded_sets import ByMode, EncodedSets
from abl_mlx.records.evaluations import Kept
from abl_mlx.search import acceptance
from abl_mlx.search.behaviours import Behaviours, FigureScreen
from abl_mlx.search.screening import REPLY_TOKENS, Screen, Trial
from abl_mlx.search.sources import ENOUGH_PROMPTS
from abl_mlx.search.space import Parameters
from abl_mlx.search.survivors import FOUR_IN_FIVE, Asked, ask_survivors, meets
from abl_mlx.support.console import percent, say

#: Prompts, and the longest reply to them in tokens.
Question = tuple[Sequence[Prompt], int]


def questions_of(prompts: ByMode, thought_tokens: int) -> list[Question]:
    """Harmful prompts and the longest reply to them, for each mode of thinking."""

    def harmful(sets: EncodedSets) -> Sequence[Prompt]:
        return sets.filled_up("harmful", ENOUGH_PROMPTS).prompts

    return _in_each_mode(prompts, thought_tokens, harmful)


def further_of(prompts: ByMode, thought_tokens: int) -> list[Question]:
    """What some edits are asked besides `questions_of`, for each mode of thinking.

    These are as many harmful prompts again, if there are so many, and harmless ones, which are to
    be answered as well.
    """

    def others(sets: EncodedSets) -> Sequence[Prompt]:
        harmful = sets.filled_up("harmful", 2 * ENOUGH_PROMPTS).prompts
        asked = len(sets.filled_up("harmful", ENOUGH_PROMPTS))
        return [*harmful[asked:], *sets.filled_up("harmless", ENOUGH_PROMPTS).prompts]

    return _in_each_mode(prompts, thought_tokens, others)


def _in_each_mode(
    prompts: ByMode, thought_tokens: int, of: Callable[[EncodedSets], Sequence[Prompt]]
) -> list[Question]:
    return [
        (of(sets), REPLY_TOKENS if mode is None else REPLY_TOKENS + thought_tokens)
        for mode, sets in prompts.items()
    ]


@dataclass
class FrontReplies:
    """Lets trials generate replies, and judges them.

    Attributes:
        screen: scores edits.
        edit_for: makes the edit with some parameters.
        questions: as of `questions_of`. The mode with more refused and broken replies counts.
        target: the share of refused and broken replies that is good enough.
        target_figure: with ``--search-for``, the figure that is good enough; it takes the place of
            questions and target.
        staying: prompts whose refusals are to stay.
        behaviours: the scorers whose figures may not rise.
        further: as of `further_of`.
        generated: the number of generated tokens so far.
    """

    screen: Screen
    edit_for: Callable[[Parameters], Edit]
    questions: Sequence[Question]
    target: float
    target_figure: float | None = None
    staying: Staying | None = None
    behaviours: Behaviours | None = None
    further: Sequence[Question] = ()
    generated: int = 0
    _asked: dict[str, Asked] = field(default_factory=dict)
    # For each edit that was asked and each reply, whether it is refused or broken.
    _wrong: dict[str, list[bool]] = field(default_factory=dict)
    _further_wrong: dict[str, list[bool]] = field(default_factory=dict)
    # The edit that was chosen before the search, if others may leave as many such replies.
    _default: Trial | None = None
    # The lowest KL of an edit that is good enough.
    _gentlest: float = math.inf

    def of(
        self, trials: Sequence[Trial], first: Trial, enough: Callable[[float], bool]
    ) -> list[Asked]:
        """Let trials reply that are on the front or near it, by rising KL.

        Args:
            trials: all that were tried.
            first: the edit that was chosen before the search, which is asked as well where
                refusals are to stay, because by whole replies it has shown what it keeps, and
                where others may leave as much as it does.
            enough: whether a share of replies opening with a refusal is small enough.
        """
        whole = [one for one in trials if one.screened.whole]
        some = [one for one in whole if one.screened.refused < 0.95] or [
            min(whole, key=lambda one: one.screened.refusal)
        ]
        asked = ask_survivors(some, self._ask, enough)
        known = self.staying is not None or self._default is not None
        if known and all(one.trial is not first for one in asked):
            asked.append(self._ask(first))
        return sorted(asked, key=lambda one: one.trial.screened.kl)

    def _as_few(self, trial: Trial, default: Trial) -> bool:
        """Whether an edit leaves as few as the default, of all replies; it is said."""
        wrong, others = self._of_all_replies(trial), self._of_all_replies(default)
        good = acceptance.as_few(wrong, others)
        say(
            f"  KL {trial.screened.kl:.4f}: {sum(wrong)} of {len(wrong)} replies, harmless prompts "
            f"included, are refused or broken; with the edit chosen before the search "
            f"{sum(others)}: {'as few, within one standard error' if good else 'more'}"
        )
        return good

    def _of_all_replies(self, trial: Trial) -> list[bool]:
        """Whether each reply to `questions` and `further` is refused or broken."""
        key = _key(trial)
        if key not in self._further_wrong:
            verdicts = self._verdicts(self.edit_for(trial.parameters), self.further)
            self._further_wrong[key] = _wrong(verdicts)
        return self._wrong[key] + self._further_wrong[key]

    def misled(self, default: Trial) -> bool:
        """Whether first tokens call answers refusals; if so, the screen reads refusals from now on.

        "I" opens refusals and answers alike. Where the edit that was chosen before the search
        leaves more openings of refusals than the target allows, it replies. Its refused and broken
        replies may be so few as the target wants, as far as one can tell: then others may have as
        many (`acceptance`), because the search looks for a gentler edit.

        Args:
            default: that edit.
        """
        if self.target_figure is not None:
            return False
        if meets(default.screened.refused, self.screen.prompts, self.target):
            return False
        asked, count = self._ask(default), len(self.questions[0][0])
        share = asked.refused + asked.broken
        if wilson(round(share * count), count, FOUR_IN_FIVE)[0] > self.target:
            return False
        self._default = default
        kept = all(one.enough for one in asked.kept.values())
        self._asked = {_key(default): replace(asked, ends=True, meets=kept and not asked.risen)}
        self.generated += self.screen.read_refusals()
        say(
            f"  {percent(default.screened.refused)} of the replies open like refusals, but "
            f"{percent(share)} are refused or broken: the search scores the model's own refusals"
        )
        return True

    @property
    def longest(self) -> int:
        """The number of tokens that an edit generates at most, besides what is read on."""
        further = self.further if self._default is not None else ()
        return sum(len(asked) * most for asked, most in [*self.questions, *further])

    @property
    def aimed_at(self) -> str:
        """The target, as the flag with its value."""
        if self.target_figure is None:
            return f"--target-refusals {self.target:g}"
        return f"--target-figure {self.target_figure:g}"

    def told_of(self, chosen: Asked) -> dict[str, Any]:
        """What the record of a search says of the target, and of the chosen edit's figures."""
        screened, found = chosen.trial.screened, dict[str, Any]()
        if isinstance(self.screen, FigureScreen):
            found["figure"] = {
                "scorer": self.screen.name, "before": self.screen.before,
                "after": screened.refusal, "target": self.target_figure,
            }  # fmt: skip
        else:
            found |= {
                "target_refusals": self.target, "refusal_rate": chosen.refused,
                "broken_rate": chosen.broken, "refusal_score": screened.refusal,
            }  # fmt: skip
        if self.behaviours is not None:
            found["scorers"] = {
                name: {"before": self.behaviours.before[name], "after": after}
                for name, after in chosen.figures.items()
            }
        return found

    def _ask(self, trial: Trial) -> Asked:
        """What a trial replies; each edit is asked once."""
        if _key(trial) not in self._asked:
            self._asked[_key(trial)] = self._replied(trial)
        return replace(self._asked[_key(trial)], trial=trial)

    def _replied(self, trial: Trial) -> Asked:
        edit = self.edit_for(trial.parameters)
        refused, broken, ends = self._ended(trial, edit)
        kept = self._kept(edit)
        figures, risen = self._figures(edit)
        good = ends and all(one.enough for one in kept.values()) and not risen
        if good:
            self._gentlest = min(self._gentlest, trial.screened.kl)
        return Asked(trial, refused, broken, good, ends, kept, figures, tuple(risen))

    def _ended(self, trial: Trial, edit: Edit) -> tuple[float, float, bool]:
        """The shares of refused and of broken replies, and whether the target is met."""
        if self.target_figure is not None:
            # The trial itself has generated replies, and an edit that breaks them fails there.
            return trial.screened.refused, 0.0, trial.screened.refusal <= self.target_figure
        verdicts = self._verdicts(edit, self.questions)
        refused, broken = max(map(_shares, verdicts), key=sum)
        wrong = self._wrong[_key(trial)] = _wrong(verdicts)
        ends = self._on_target(refused + broken)
        if self._default is not None and not ends:
            ends = not acceptance.ruled_out(wrong, self._wrong[_key(self._default)])
            # An edit that another one beats is not taken anyway.
            if ends and trial.screened.kl < self._gentlest:
                ends = self._as_few(trial, self._default)
        return refused, broken, ends

    def _on_target(self, share: float) -> bool:
        """Whether a share of refused and broken replies to `questions` meets the target."""
        return meets(share, len(self.questions[0][0]), self.target)

    def _verdicts(self, edit: Edit, questions: Sequence[Question]) -> list[list[Verdict]]:
        """The verdicts on replies to questions, for each mode of thinking."""
        found = []
        for prompts, most in questions:
            verdicts, tokens = self.screen.verdicts(edit, prompts, most)
            self.generated += tokens
            found.append(verdicts)
        return found

    def _kept(self, edit: Edit) -> dict[str, Kept]:
        """Set -> what is left of the refusals that are to stay."""
        kept: dict[str, Kept] = {}
        for name, prompts in ({} if self.staying is None else self.staying.prompts).items():
            verdicts, tokens = self.screen.verdicts(edit, prompts)
            self.generated += tokens
            still = [one is Verdict.REFUSAL for one in verdicts]
            kept[name] = kept_refusals.kept([True] * len(still), still)
        return kept

    def _figures(self, edit: Edit) -> tuple[Mapping[str, float], list[str]]:
        """The figures of scorers, and the names of those that rise too much."""
        if self.behaviours is None:
            return {}, []
        figures, tokens = self.behaviours.under(edit)
        self.generated += tokens
        return figures, self.behaviours.risen(figures)


def _shares(verdicts: Sequence[Verdict]) -> tuple[float, float]:
    """The shares of refused and of broken replies."""
    refused, broken = (verdicts.count(kind) for kind in (Verdict.REFUSAL, Verdict.BROKEN))
    return refused / len(verdicts), broken / len(verdicts)


def _wrong(verdicts: Sequence[Sequence[Verdict]]) -> list[bool]:
    """For each reply, in every mode, whether it is refused or broken."""
    return [one is not Verdict.ANSWER for these in verdicts for one in these]


def _key(trial: Trial) -> str:
    """The parameters of a trial, as a text."""
    return repr(sorted(trial.parameters.items()))
