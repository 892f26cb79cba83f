"""Trials of a search: the effect of an edit on the first reply token, and on replies."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx.behaviour import evaluate
from abl_mlx.behaviour.kept_refusals import WANTED
from abl_mlx.behaviour.refusals import Verdict, classify
from abl_mlx.directions import selection
from abl_mlx.directions.staying import Staying
from abl_mlx.edits.edit import Edit
from abl_mlx.edits.steering import ablation
from abl_mlx.inputs.sets import Prompt
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.distributions import kl_divergence, known
from abl_mlx.models.logits import first_reply_token, log_probabilities
from abl_mlx.models.writers import Writer
from abl_mlx.support.arrays import number, numbers
from convert.base.errors import UserError

#: The number of tokens in each reply.
REPLY_TOKENS = 24

#: The number of tokens by which a reply is read on that was cut and counts as refused: together as
#: many as an evaluation reads. "I'm sorry to hear that" may go on to an answer.
READ_ON = 40

#: The number of first tokens by which a refusal is known: "I'm sorry, but I can't assist".
SAID = 8

#: A larger probability of a refusal counts as this one, because float32 is not precise enough.
CERTAIN = 1 - 1e-6

#: The number of prompts of each set with which a trial begins; a hopeless trial ends after them.
FIRST_PROMPTS = 8

#: An edit with a smaller KL (nats) counts as having no effect, one with a larger KL as breaking the
#: model.
LEAST_KL, LARGEST_KL = 1e-6, 1.0

#: The largest KL and refusal score of a prompt, in nats. Edits whose logits are not finite get this
#: value, so that they are never among the best and do not disturb the regression.
MOST_NATS = 1e3


@dataclass(frozen=True)
class Screened:
    """The effect of an edit on the first reply token.

    Attributes:
        refusal: mean over harmful prompts of −log(1 − p) in nats, where p is the probability that
            the reply opens with a refusal opening: near 0 if no refusals are left, near the
            log-odds if all are. Where refusals are to stay, what they lose is added: the mean rise
            of −log(p) on these prompts.
        refused: share of harmful prompts where the likeliest token is a refusal opening, or the
            refusal openings together are likelier than all other tokens. If more than a tenth of
            the refusals that are to stay open as such no more, it is their share where that is
            larger.
        kl: mean KL(model ‖ edited) on harmless prompts, in nats.
        early: (refusal, kl) on the first few prompts only.
        whole: whether all prompts were run; a hopeless trial ends after the first few.
        tokens: the number of tokens that were run through the model.
    """

    refusal: float
    refused: float
    kl: float
    early: tuple[float, float]
    whole: bool
    tokens: int


class Screen:
    """Scores edits of a loaded model by the first reply token, without generating replies.

    Where first tokens mislead, `read_refusals` lets refusals be scored by more tokens.

    Attributes:
        tokens: the tokens that open refusals.
        before: the refusal score of the unedited model.
        said: for each harmful prompt the first tokens of the unedited model's refusal, none where
            it answers; None before `read_refusals`.
    """

    def __init__(
        self,
        chat: ChatModel,
        writers: Sequence[Writer],
        harmful: Sequence[Sequence[int]],
        harmless: Sequence[Sequence[int]],
        *,
        batch_size: int = 32,
        staying: Staying | None = None,
        told: selection.Told | None = None,
    ):
        self._chat, self._writers = chat, writers
        self._harmful, self._harmless = harmful, harmless
        self._batch_size = batch_size
        before = first_reply_token(chat, harmful)
        self._base = first_reply_token(chat, harmless)
        mx.eval(before, self._base)
        self.tokens = selection.refusal_tokens(before, self._base)
        if not self.tokens and told is not None:
            self.tokens = list(told.tokens)
        if not self.tokens:
            raise UserError(
                "this model opens its replies to harmful and harmless prompts in the same way, so "
                "there is nothing for --search to score: check with `abl-mlx eval`."
            )
        self.before = number(_surprisal(before, self.tokens).mean())
        self.said: list[list[int]] | None = None
        self._keep(staying)

    def read_refusals(self) -> int:
        """From now on score the model's own refusals, token by token, and not how replies open.

        The unedited model replies to the harmful prompts. Of each that it refuses p is then the
        probability of the refusal's first `SAID` tokens, and a prompt counts as refused if each of
        them is the likeliest one after those before it. Other prompts count as answered.

        Returns:
            The number of generated tokens.
        """
        replies = self._generate(self._harmful, REPLY_TOKENS)
        texts = evaluate.decode(self._chat, replies)
        self.said = [
            reply[:SAID] if classify(text) is Verdict.REFUSAL else []
            for reply, text in zip(replies, texts, strict=True)
        ]
        self.before = float(np.mean(self._repeated(slice(None))[1]))
        return _generated(replies, REPLY_TOKENS)

    def _keep(self, staying: Staying | None) -> None:
        """Look at the refusals that are to stay, of which those count that open as such."""
        self._kept: list[list[int]] = []
        self._kept_tokens = list(self.tokens)
        self._kept_nats: list[float] = []
        if staying is None:
            return
        self._kept_tokens = sorted({*self.tokens, *staying.openings})
        opened = first_reply_token(self._chat, staying.mixed)
        refuse = selection.openings(opened, self._kept_tokens)
        nats = bounded(_missing(opened, self._kept_tokens))
        self._kept = [one for one, does in zip(staying.mixed, refuse, strict=True) if does]
        self._kept_nats = [one for one, does in zip(nats, refuse, strict=True) if does]

    @property
    def cost(self) -> int:
        """The number of tokens of all prompts, which a trial runs at most."""
        return sum(map(len, [*self._sequences(slice(None)), *self._harmless, *self._kept]))

    @property
    def prompts(self) -> int:
        """The number of harmful prompts."""
        return len(self._harmful)

    def score(
        self, edit: Edit, hopeless: Callable[[tuple[float, float]], bool] = lambda _: False
    ) -> Screened:
        """Score an edit; if ``hopeless(refusal, kl)`` for the first few prompts, on those only."""
        first, rest = slice(0, FIRST_PROMPTS), slice(FIRST_PROMPTS, None)
        with ablation(self._writers, edit):
            refused, refusal, kl, tokens = self._run(first)
            lost, nats = self._run_kept(first)
            early = float(np.mean(refusal)) + _mean(nats), float(np.mean(kl))
            whole = not hopeless(early)
            longest = max(len(self._harmful), len(self._harmless), len(self._kept))
            if whole and longest > FIRST_PROMPTS:
                more, of_kept = self._run(rest), self._run_kept(rest)
                refused, refusal, kl = refused + more[0], refusal + more[1], kl + more[2]
                lost, nats = lost + of_kept[0], nats + of_kept[1]
            if whole:
                tokens = self.cost
        share = _mean(lost)
        return Screened(
            float(np.mean(refusal)) + _mean(nats),
            max(float(np.mean(refused)), 0.0 if share <= 1 - WANTED + 1e-9 else share),
            float(np.mean(kl)),
            early,
            whole,
            tokens,
        )

    def _run(self, part: slice) -> tuple[list[float], list[float], list[float], int]:
        """Run some prompts of each set under the present edit.

        Returns:
            For each harmful prompt whether it was refused (1 or 0) and −log(1 − p); for each
            harmless prompt the KL; and the number of tokens that were run.
        """
        refused, refusal, kl, tokens = list[float](), list[float](), list[float](), 0
        if self._harmful[part]:
            refused, refusal = (self._opened if self.said is None else self._repeated)(part)
            tokens += sum(map(len, self._sequences(part)))
        if harmless := self._harmless[part]:
            opened = first_reply_token(self._chat, harmless)
            kl = bounded(mx.maximum(kl_divergence(self._base[part], opened), 0))
            tokens += sum(map(len, harmless))
        return refused, refusal, kl, tokens

    def _sequences(self, part: slice) -> list[list[int]]:
        """What is run of some harmful prompts: with refusals to read, those that are refused."""
        if self.said is None:
            return list(map(list, self._harmful[part]))
        both = zip(self._harmful[part], self.said[part], strict=True)
        return [[*prompt, *said[:-1]] for prompt, said in both if said]

    def _opened(self, part: slice) -> tuple[list[float], list[float]]:
        """For some harmful prompts whether each is refused, and −log(1 − p), by the first token."""
        opened = first_reply_token(self._chat, self._harmful[part])
        likeliest = numbers(opened.argmax(axis=-1))
        scores = numbers(selection.refusal_scores(opened, self.tokens))
        # A reply with logits that are NaN does not count as an answer.
        refused = [
            float(not score <= 0 or token in self.tokens)
            for score, token in zip(scores, likeliest, strict=True)
        ]
        return refused, bounded(_surprisal(opened, self.tokens))

    def _repeated(self, part: slice) -> tuple[list[float], list[float]]:
        """The same by the tokens of the model's own refusals, as of `read_refusals`."""
        assert self.said is not None
        said, sequences = self.said[part], self._sequences(part)
        refused, refusal = [0.0] * len(said), [0.0] * len(said)
        places = [place for place, one in enumerate(said) if one]
        ends = [
            list(range(len(one) - len(said[place]), len(one)))
            for place, one in zip(places, sequences, strict=True)
        ]
        for index, rows in log_probabilities(self._chat, sequences, ends) if places else ():
            place = places[index]
            wanted = mx.array(said[place])
            p = mx.exp(mx.take_along_axis(rows, wanted[:, None], axis=-1).sum())
            likeliest = numbers(rows.argmax(axis=-1))
            refused[place] = float(not known(rows) or likeliest == said[place])
            (refusal[place],) = bounded(-mx.log1p(-mx.minimum(p, CERTAIN))[None])
        return refused, refusal

    def _run_kept(self, part: slice) -> tuple[list[float], list[float]]:
        """For refusals that are to stay, whether each is lost (1 or 0), and the rise of −log(p)."""
        if not (kept := self._kept[part]):
            return [], []
        opened = first_reply_token(self._chat, kept)
        lost = [float(not one) for one in selection.openings(opened, self._kept_tokens)]
        nats = bounded(_missing(opened, self._kept_tokens))
        before = self._kept_nats[part]
        return lost, [max(0.0, now - was) for now, was in zip(nats, before, strict=True)]

    def verdicts(
        self, edit: Edit, prompts: Sequence[Prompt], max_tokens: int = REPLY_TOKENS
    ) -> tuple[list[Verdict], int]:
        """The verdicts on greedy replies under an edit, and the number of generated tokens.

        Replies that are refused so far and have not ended are read on by `READ_ON` tokens.
        """
        encoded = [self._chat.encode(prompt) for prompt in prompts]
        with ablation(self._writers, edit):
            replies = self._generate(encoded, max_tokens)
            verdicts = self._judged(replies, prompts)
            cut = [
                place
                for place, (reply, verdict) in enumerate(zip(replies, verdicts, strict=True))
                if verdict is Verdict.REFUSAL and len(reply) >= max_tokens
            ]
            begun = [[*encoded[place], *replies[place]] for place in cut]
            rest = self._generate(begun, READ_ON) if cut else []
        read = [[*replies[place], *more] for place, more in zip(cut, rest, strict=True)]
        for place, verdict in zip(
            cut, self._judged(read, [prompts[place] for place in cut]), strict=True
        ):
            verdicts[place] = verdict
        return verdicts, _generated(replies, max_tokens) + _generated(rest, READ_ON)

    def _generate(self, encoded: Sequence[Sequence[int]], most: int) -> list[list[int]]:
        """Greedy replies to encoded prompts, of at most so many tokens."""
        return evaluate.generate(self._chat, encoded, most, batch_size=self._batch_size)

    def _judged(self, replies: Sequence[Sequence[int]], prompts: Sequence[Prompt]) -> list[Verdict]:
        """The verdicts on replies to prompts."""
        texts = evaluate.decode(self._chat, replies, prompts) if prompts else []
        return [classify(text, prompt.text) for text, prompt in zip(texts, prompts, strict=True)]


def _generated(replies: Sequence[Sequence[int]], most: int) -> int:
    """The number of generated tokens, end tokens included."""
    return sum(min(len(one) + 1, most) for one in replies)


def _mean(values: Sequence[float]) -> float:
    """The mean; 0 of nothing."""
    return float(np.mean(values)) if values else 0.0


def bounded(nats: mx.array) -> list[float]:
    """The values, with `MOST_NATS` in place of NaN and infinity."""
    return [min(value, MOST_NATS) if value == value else MOST_NATS for value in numbers(nats)]


def _missing(log_probabilities: mx.array, tokens: Sequence[int]) -> mx.array:
    """−log(p) in nats, p being the probability of the refusal openings: (N, V) -> (N,)."""
    return mx.logaddexp(-selection.refusal_scores(log_probabilities, tokens), mx.array(0.0))


def _surprisal(log_probabilities: mx.array, tokens: Sequence[int]) -> mx.array:
    """−log(1 − p) in nats, p being the probability of the refusal openings: (N, V) -> (N,)."""
    return mx.logaddexp(selection.refusal_scores(log_probabilities, tokens), mx.array(0.0))


# --- trials and their journal --------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One edit that was tried: its parameters and scores."""

    parameters: dict[str, Any]
    screened: Screened

    def point(self, before: float) -> tuple[float, float]:
        """The two objectives, each scaled to 0 to 1: refusal score and KL.

        The refusal score is divided by that of the unedited model, ``before``; the KL is on a
        logarithmic scale from `LEAST_KL` to `LARGEST_KL`.
        """
        return min(self.screened.refusal / max(before, 1e-9), 1.0), self.shares[0]

    @property
    def shares(self) -> tuple[float, float]:
        """The KL on the same scale, and the share of refused first tokens."""
        kl = min(max(self.screened.kl, LEAST_KL), LARGEST_KL)
        return math.log(kl / LEAST_KL) / math.log(LARGEST_KL / LEAST_KL), self.screened.refused

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            **self.parameters,
            "refusal_score": self.screened.refusal,
            "refused_first_token": self.screened.refused,
            "kl": self.screened.kl,
            **({} if self.screened.whole else {"rejected_early": True}),
        }
