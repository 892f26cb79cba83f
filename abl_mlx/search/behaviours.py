"""Behaviours other than refusal in a search: what scorers say of replies under an edit.

A scorer is a constraint (``--scorer``): an edit of the front may not raise its figure. Or it is
what the search lowers (``--search-for``), in the place of the refusal score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx
import numpy as np

from abl_mlx.behaviour import evaluate
from abl_mlx.behaviour.refusals import Verdict, classify
from abl_mlx.behaviour.scorers import measured, scorer
from abl_mlx.behaviour.scorers.scorer import Scorer
from abl_mlx.choices import Measuring, Scoring
from abl_mlx.directions import methods
from abl_mlx.edits.edit import Edit
from abl_mlx.edits.steering import ablation
from abl_mlx.inputs import thinking
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.distributions import kl_divergence
from abl_mlx.models.logits import first_reply_token
from abl_mlx.models.writers import Writer
from abl_mlx.search.screening import FIRST_PROMPTS, Screen, Screened, bounded
from abl_mlx.support.flags import first_given, not_together
from convert.base.errors import UsageError, UserError

#: The share of replies by which an edit may break more than the unedited model does.
MORE_BROKEN = 0.05


class Behaviours:
    """The figures of scorers under an edit, and in the unedited model."""

    def __init__(
        self,
        chat: ChatModel,
        writers: Sequence[Writer],
        scoring: Scoring,
        batch_size: int = 32,
    ):
        """Ask the unedited model.

        Args:
            chat: the model.
            writers: its residual writers.
            scoring: the chosen options.
            batch_size: how many replies are generated at the same time.
        """
        self._chat, self._writers, self._batch_size = chat, writers, batch_size
        aim = scoring.search_for and scoring.search_for.partition(":")[0]
        self._scorers = [one for one in scorer.wanted(scoring) if one.name != aim]
        self.most = scoring.max_rise
        self.before, self.generated = self._figures()

    def under(self, edit: Edit) -> tuple[dict[str, float], int]:
        """Name of each scorer -> its figure under an edit; and the number of generated tokens."""
        with ablation(self._writers, edit):
            return self._figures()

    def risen(self, figures: Mapping[str, float]) -> list[str]:
        """The names of the scorers whose figure is higher than it may be."""
        limits = {name: value + self.most + 1e-9 for name, value in self.before.items()}
        return [name for name, value in figures.items() if value > limits[name]]

    def _figures(self) -> tuple[dict[str, float], int]:
        figures, generated = {}, 0
        for one in self._scorers:
            replies, tokens = _replies(self._chat, one, self._batch_size)
            figures[one.name] = measured.figure_of(one, replies)
            generated += tokens
        return figures, generated


class FigureScreen(Screen):
    """Scores edits by a scorer's figure of generated replies, and the KL at the first reply token.

    In `Screened`, ``refusal`` is the figure and ``refused`` its ratio to the unedited model's. An
    edit that breaks replies has the unedited model's figure at least.
    """

    def __init__(
        self,
        chat: ChatModel,
        writers: Sequence[Writer],
        harmless: Sequence[Sequence[int]],
        aim: Scorer,
        *,
        batch_size: int = 32,
    ):
        """Ask the unedited model.

        Raises:
            UserError: when its figure is 0, which cannot be lowered.
        """
        self._chat, self._writers, self._batch_size = chat, writers, batch_size
        self._harmless, self._aim = harmless, aim
        self._base = first_reply_token(chat, harmless)
        mx.eval(self._base)
        self.before, self._broken, self._generated = self._asked()
        if self.before <= 0:
            raise UserError(
                f"--search-for {aim.name}: the figure of this model is {self.before:g} "
                f"({aim.unit}), and no edit can lower that: leave it out."
            )

    @property
    def name(self) -> str:
        """The scorer's name."""
        return self._aim.name

    @property
    def cost(self) -> int:
        """The number of tokens that a trial runs at most, those that it generates included."""
        asked = sum(len(self._chat.encode(prompt)) for prompt in self._aim.prompts)
        return asked + sum(map(len, self._harmless)) + self._generated

    def score(
        self, edit: Edit, hopeless: Callable[[tuple[float, float]], bool] = lambda _: False
    ) -> Screened:
        """Score an edit; all prompts are asked, because a figure of a few of them says little."""
        with ablation(self._writers, edit):
            opened = first_reply_token(self._chat, self._harmless)
            kl = bounded(mx.maximum(kl_divergence(self._base, opened), 0))
            figure, broken, _ = self._asked()
        if broken > self._broken + MORE_BROKEN:
            figure = max(figure, self.before)
        early = figure, float(np.mean(kl[:FIRST_PROMPTS]))
        return Screened(figure, figure / self.before, float(np.mean(kl)), early, True, self.cost)

    def _asked(self) -> tuple[float, float, int]:
        """The figure, the share of broken replies, and the number of generated tokens."""
        replies, tokens = _replies(self._chat, self._aim, self._batch_size)
        verdicts = [
            classify(reply, prompt)
            for reply, prompt in zip(replies, self._aim.prompts, strict=True)
        ]
        broken = verdicts.count(Verdict.BROKEN) / len(verdicts)
        return measured.figure_of(self._aim, replies), broken, tokens


def _replies(chat: ChatModel, one: Scorer, batch_size: int) -> tuple[list[str], int]:
    """Greedy replies to a scorer's prompts, and the number of generated tokens."""
    encoded = [chat.encode(prompt) for prompt in one.prompts]
    replies = evaluate.generate(chat, encoded, one.max_tokens, batch_size=batch_size)
    tokens = sum(min(len(reply) + 1, one.max_tokens) for reply in replies)
    return evaluate.decode(chat, replies, list(one.prompts)), tokens


def check_unused(scoring: Scoring) -> None:
    """Refuse, where there is no search, flags that only a search uses."""
    flag = first_given((
        ("--search-for", scoring.search_for), ("--max-rise", scoring.max_rise > 0),
        ("--target-figure", scoring.target_figure),
    ))  # fmt: skip
    if flag is not None:
        raise UsageError(f"{flag} is used by a search: add --search N or --minutes M.")


def check(how: Measuring) -> None:
    """Check that the flags of scorers go together with each other and with others.

    Raises:
        UsageError: naming a flag that has no use.
        UserError: naming two flags that do not go together, or when a scorer is not known, or its
            file or package cannot be used.
    """
    scoring = how.scoring
    if scoring.target_figure is not None and scoring.search_for is None:
        raise UsageError("--target-figure is the figure of --search-for NAME: add that.")
    if scoring.max_rise and scoring.scorer is None:
        raise UsageError("--max-rise limits the figures of --scorer NAME: add that.")
    scorer.wanted(scoring)
    if scoring.search_for is None:
        return
    flag = first_given((
        ("--keep", how.prompting.keep), ("--keep-system", how.prompting.keep_system),
        (f"--thinking {how.prompting.thinking}", how.prompting.thinking != thinking.OFF),
        ("--learn-strengths", how.searching.learn_strengths),
        (f"--method {how.finding.method}", bool(methods.named(how.finding.method).refine)),
    ))  # fmt: skip
    if flag is not None:
        raise UserError(not_together("--search-for", flag))
