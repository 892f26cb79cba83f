"""Announces, before a long piece of work, its steps and how long they will take."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass

from abl_mlx.choices import Measuring
from abl_mlx.commands import short_replies
from abl_mlx.commands.held_out import HeldOut
from abl_mlx.directions import choice, induction, race
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.encoded_sets import EncodedSets
from abl_mlx.models.logits import first_reply_token
from abl_mlx.support.units import in_bytes

#: The number of prompts in the timed pass.
TIMED = 8

#: The number of prompts in a trial of a search, if the sets are small.
SEARCHED = 96

# Bytes that passes and writing need besides the memory of the process after the model has run once.
_BESIDE = 300_000_000


@dataclass(frozen=True)
class Forecast:
    """The largest numbers of tokens of the coming steps, and the speed.

    Attributes:
        measured: the number of prompts whose states are measured.
        measure, choose: tokens in forward passes for the measurement and for the choice.
        asked, times: the number of held-out prompts, and how often they are asked.
        ask: tokens of these prompts and of the replies, in total.
        searching: the minutes of a search with ``--minutes``; its passes are not in ``choose``.
        rate: tokens per second in forward passes, from a short timed pass.
        reply_rate: tokens (of prompts and replies) per second when replies are generated.
        memory: the peak memory in bytes.
    """

    measured: int
    measure: int
    choose: int
    asked: int
    times: int
    ask: int
    rate: float
    reply_rate: float
    memory: int
    searching: float = 0.0

    @property
    def minutes(self) -> float:
        """The time of all steps in minutes."""
        passes = (self.measure + self.choose) / self.rate
        return (passes + self.ask / self.reply_rate) / 60 + self.searching

    def __str__(self) -> str:
        parts = [f"measure {self.measured} prompts ({self.measure:,} tokens)"] * bool(self.measure)
        parts += [f"choose (at most {self.choose:,})"] * bool(self.choose)
        if self.searching:
            parts.append(f"search (at most {self.searching:g} minutes)")
        if self.ask:
            parts.append(
                f"ask {self.asked} held-out prompts {self.times} times (at most {self.ask:,})"
            )
        return (
            f"  to come: {', '.join(parts) or 'nothing long'}: about {_duration(self.minutes)} at "
            f"{self.rate:,.0f} tokens a second, {in_bytes(self.memory)} of memory. Shorter: "
            f"--quick, --limit N{', --max-tokens N' if self.ask else ''}"
        )


def _duration(minutes: float) -> str:
    return f"{minutes:.0f} minutes" if minutes >= 1.5 else f"{max(1, 60 * minutes):.0f} seconds"


def forecast(
    chat: ChatModel,
    sets: EncodedSets,
    how: Measuring,
    reply_rate: float,
    *,
    held_out: HeldOut | None = None,
    times: int = 0,
    inducing: bool = False,
) -> Forecast:
    """Time a short pass, and count the tokens of the coming steps.

    Args:
        chat: the model.
        sets: the prompts with which the direction will be found.
        how: how it will be found.
        reply_rate: tokens per second of replies that were already generated.
        held_out: the held-out prompts that are asked; None for none.
        times: how often they are asked: once before, and once for each output.
        inducing: whether a constant is chosen (`induction.choose`) instead of a direction.
    """
    timed = sets.train["harmful"].tokens[:TIMED]
    first_reply_token(chat, timed)  # tests the model's shortcuts, and compiles kernels
    start = time.perf_counter()
    first_reply_token(chat, timed)
    rate = sum(map(len, timed)) / max(1e-6, time.perf_counter() - start)
    length = sum(map(len, timed)) / len(timed)
    train, validation = (
        len(part["harmful"]) + len(part["harmless"]) for part in (sets.train, sets.validation)
    )
    given = how.given.direction is not None
    if inducing:
        choose = _constant(length)
    else:
        choose = 0 if given else round(length * _choice(validation, how))
        if not given and how.finding.method is None and how.finding.layer is None:
            replying = choice.GENTLER * len(sets.validation[sets.refused])
            choose += round(replying * (length + short_replies.REPLY_TOKENS))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Forecast(
        train,
        0 if given else round(train * length),
        choose,
        0 if held_out is None else len(held_out),
        times,
        0 if held_out is None else round(times * len(held_out) * (length + held_out.max_tokens)),
        rate,
        reply_rate,
        peak * (1 if sys.platform == "darwin" else 1024) + _BESIDE,
        how.searching.minutes or 0.0,
    )


def _constant(length: float) -> int:
    """The largest number of tokens that run for the choice of a constant.

    Args:
        length: the mean length of a prompt in tokens.
    """
    tried = (
        induction.TRIALS * len(induction.LADDER) * induction.TRIED * (length + induction.OPENING)
    )
    asked = (1 + induction.VERIFIED) * induction.PROMPTS * (length + induction.REPLY)
    return round(2 * induction.PROMPTS * length + tried + asked)


def _choice(validation: int, how: Measuring) -> int:
    """The largest number of prompts that run for the choice.

    They are the validation prompts once, and the prompts of races and of a search that has no limit
    in minutes.
    """
    if how.finding.layer is not None:
        return validation
    trials = 0 if how.searching.minutes is not None else how.searching.search or 0
    before, passes, left = 0, 0, choice.MOST
    for harmful, harmless, kept in race.HEATS:
        passes += left * (harmful + harmless - before)
        before, left = harmful + harmless, kept
    passes += max(0, validation - before) + choice.INDUCED
    # If one direction is not enough, about as many passes run for subspaces.
    passes *= 2 if how.finding.method is None else 1
    return validation + passes + trials * max(validation, SEARCHED)
