"""Strengths of each layer for the chosen edit: a few steps by default, or learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from abl_mlx.choices import Measuring
from abl_mlx.commands import short_replies
from abl_mlx.directions import methods
from abl_mlx.directions.learning import Learned, learned
from abl_mlx.directions.selection import LEFT
from abl_mlx.directions.slopes import COMPONENTS
from abl_mlx.directions.trial import Trial
from abl_mlx.directions.trimming import Trimmed, trimmed, with_strengths
from abl_mlx.directions.variants import Tried, Variant
from abl_mlx.edits.edit import Edit
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.writers import Writer
from abl_mlx.support.console import percent, say
from abl_mlx.support.flags import first_given, not_together
from convert.base.errors import UsageError

#: Where one direction leaves at most this share of refusals, strengths of each layer are looked
#: for before subspaces: they cost less, but they hardly end more refusals than that.
NEAR = 0.15

#: The strength, the same in every layer, that is tried where whole replies choose the direction.
WEAKER = 0.9

#: Why the strengths are what they are, for the record.
BY_TRIMMING = "strengths of each layer by gradients of both"
BY_LEARNING = "strengths of each layer learned by gradients"
BY_REPLIES = f"strength {WEAKER:g}, at which short replies still are answers"


def check(how: Measuring) -> None:
    """Check that strengths can be learned with the chosen flags.

    Raises:
        UsageError: naming a flag that does not go with ``--learn-strengths``.
    """
    if how.searching.learn_strengths is None:
        return
    prompting, editing, method = how.prompting, how.editing, how.finding.method
    own = methods.named(method).strengths(1)
    flag = first_given((
        ("--direction", how.given.direction),
        (f"--method {method}", method == "over-refusal" or own is not None),
        ("--thinking", prompting.thinking != "off"), ("--keep", prompting.keep),
        ("--keep-system", prompting.keep_system),
        (f"--kind {editing.kind}", editing.kind != "project"),
        ("--heads or --experts", editing.by_parts),
    ))  # fmt: skip
    if flag is not None:
        raise UsageError(not_together("--learn-strengths", flag))


class LayerStrengths:
    """Looks for strengths of each layer that are better than 1 everywhere.

    Attributes:
        wanted: whether they are looked for.
        by_replies: whether whole replies chose the edit.
    """

    def __init__(self, chat: ChatModel, writers: Sequence[Writer], how: Measuring) -> None:
        """Keep what is needed."""
        self.wanted = self.by_replies = False
        self._chat, self._writers, self._how = chat, writers, how
        # What a few steps found for each variant for which they were made.
        self._found: list[tuple[Variant, Trimmed | None]] = []

    def better(
        self, trial: Trial, edit: Edit, variant: Variant, notes: Mapping[str, Any]
    ) -> tuple[Trimmed | Learned, str, float] | None:
        """Other strengths, if they are better.

        Without ``--learn-strengths`` they are looked for only where first tokens or short replies
        chose the edit, and no flag says what is edited.

        Args:
            trial: tries edits.
            edit: the chosen edit.
            variant: what it removes.
            notes: what the record says of the choice so far.

        Returns:
            The edit with its effect, how it was found, and the KL at strength 1.
        """
        if (steps := self._how.searching.learn_strengths) is not None:
            before = trial.of_edit(edit)
            found = learned(trial, edit, len(self._chat.layers), steps, before)
            return None if found is None else (found, BY_LEARNING, before.kl)
        if "validation_kl" not in notes:
            return None
        score, kl = notes["refusal_score"]["harmful_ablated"], notes["validation_kl"]
        if self.by_replies:
            weaker = self._weaker(trial, edit)
            return None if weaker is None else (weaker, BY_REPLIES, kl)
        quick = self._trimmed(trial, edit, Tried(variant, score, notes["refused"], kl))
        return None if quick is None else (quick, BY_TRIMMING, kl)

    def _weaker(self, trial: Trial, edit: Edit) -> Trimmed | None:
        """The edit at strength `WEAKER`, if short replies under it are answers.

        The KL grows with about the square of the strength. `trimming` would keep the score of
        first tokens, which did not choose the edit, and raises the KL of later tokens.
        """
        if self._by_hand:
            return None
        strengths = np.full((len(COMPONENTS), len(self._chat.layers)), WEAKER)
        weaker = with_strengths(edit, strengths)
        answers = short_replies.answers(
            self._chat, self._writers, trial, weaker, self._how.batch_size, f"strength {WEAKER:g}"
        )
        return Trimmed(weaker, trial.of_edit(weaker)) if answers else None

    @property
    def _by_hand(self) -> bool:
        """Whether a flag says what is edited."""
        editing = self._how.editing
        by_hand = editing.layers is not None or editing.pin is not None or editing.norm == "rows"
        by_hand = by_hand or editing.kind != "project" or editing.by_parts
        return by_hand or self._how.finding.method == "over-refusal"

    def _trimmed(self, trial: Trial, edit: Edit, before: Tried) -> Trimmed | None:
        """A few steps, made once for each variant, unless a flag says what is edited."""
        if self._by_hand:
            return None
        for known, found in self._found:
            if known is before.variant:
                return found
        layers, limit = len(self._chat.layers), self._how.finding.max_kl
        found = trimmed(trial, edit, layers, before, limit)
        self._found.append((before.variant, found))
        return found

    def end_refusals(
        self, trial: Trial, edit: Edit, before: Tried, harmful: Sequence[Sequence[int]]
    ) -> bool:
        """Whether a few steps end the few refusals that an edit leaves.

        First reply tokens tell it, or whole replies where these do not: an answer may open in the
        words of a refusal.

        Args:
            trial: tries edits.
            edit: the edit, whose strength is 1 everywhere.
            before: what it removes, and its effect on all validation prompts.
            harmful: encoded validation prompts.
        """
        learning = self._how.searching.learn_strengths is not None
        if not self.wanted or learning or before.refused > NEAR:
            return False
        found = self._trimmed(trial, edit, before)
        if found is None:
            return False
        if found.effect.refused <= trial.left:
            return True
        batch_size = self._how.batch_size
        told = short_replies.ask(self._chat, self._writers, found.edit, harmful, batch_size)
        say(f"  of whole replies with these strengths {percent(told.share)} are refusals or broken")
        return told.wrong <= LEFT * told.asked + 1  # one more is chance among a few dozen
