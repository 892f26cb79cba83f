"""What a model does: the record of `eval`, and the figures that `run` has of each output."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from abl_mlx.records.measurements import (
    Capability,
    LengthSweep,
    Perplexity,
    Recognition,
    Thoughts,
    ToolCalls,
)
from abl_mlx.records.record import Part, Record


@dataclass(frozen=True, kw_only=True)
class Category(Part):
    """A category of prompts.

    Attributes:
        n, refused, broken: numbers of replies.
        refusal_rate: None of no reply.
        refusal_interval: Wilson's, 95%.
    """

    n: int
    refused: int
    broken: int
    refusal_rate: float | None
    refusal_interval: list[float]


@dataclass(frozen=True, kw_only=True)
class Template(Part):
    """A chat template that was given in place of the model's own: its name, and its hash."""

    name: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class FixedReply(Part):
    """One reply to nearly everything: ``n`` of ``of`` replies, and the verdict on it."""

    n: int
    of_: int
    verdict: str | None


@dataclass(frozen=True)
class Rate:
    """How often a set was refused: share, Wilson's 95% interval, replies with a verdict."""

    share: float | None
    interval: list[float]
    n: int


#: Prompt sets whose refusals are to stay: those of ``--keep``, and harmless prompts that the system
#: message of ``--keep-system`` puts off the topic.
STAYING = ("kept", "off_topic")

#: Prompt sets that are asked beside the harmful and harmless ones.
FURTHER = ("borderline", *STAYING)


@dataclass(frozen=True, kw_only=True)
class RefusalsInMode(Part):
    """Refusal rates on each prompt set, with Wilson 95% intervals.

    Attributes:
        kept_refusal_rate: of the prompts of ``--keep``, whose refusals are to stay.
        off_topic_refusal_rate: of harmless prompts with the system message of ``--keep-system``.
        broken_rate: share of replies to harmful and harmless prompts that are empty or loop.
        expected_answer_rate: share of harmful prompts answered as their set says.
        unfinished_thoughts, looping_refusals, withheld_replies: numbers of replies.
        fixed_reply: where nearly all replies are one and the same.
        categories: set -> category -> figures.
        thoughts: of all replies, where any opens with a thought.
    """

    harmful_refusal_rate: float | None
    harmful_refusal_interval: list[float]
    n_harmful: int
    harmless_refusal_rate: float | None
    harmless_refusal_interval: list[float]
    n_harmless: int
    broken_rate: float | None
    expected_answer_rate: float | None = None
    borderline_refusal_rate: float | None = None
    borderline_refusal_interval: list[float] | None = None
    n_borderline: int | None = None
    kept_refusal_rate: float | None = None
    kept_refusal_interval: list[float] | None = None
    n_kept: int | None = None
    off_topic_refusal_rate: float | None = None
    off_topic_refusal_interval: list[float] | None = None
    n_off_topic: int | None = None
    unfinished_thoughts: int | None = None
    looping_refusals: int | None = None
    withheld_replies: int | None = None
    fixed_reply: FixedReply | None = None
    categories: dict[str, dict[str, Category]]
    thoughts: Thoughts | None = None

    @property
    def rates(self) -> dict[str, Rate]:
        """Set -> how often it was refused, of the sets that were asked."""
        found = {
            "harmful": Rate(
                self.harmful_refusal_rate, self.harmful_refusal_interval, self.n_harmful
            ),
            "harmless": Rate(
                self.harmless_refusal_rate, self.harmless_refusal_interval, self.n_harmless
            ),
        }
        for name in FURTHER:
            interval, n = getattr(self, f"{name}_refusal_interval"), getattr(self, f"n_{name}")
            if interval is not None and n is not None:
                found[name] = Rate(getattr(self, f"{name}_refusal_rate"), interval, n)
        return found


@dataclass(frozen=True, kw_only=True)
class Settled(Part):
    """From where on the verdicts on a model's replies stay as they are, in tokens.

    Attributes:
        longest: how long replies may be.
        tokens: at this length every verdict is the one on the whole reply, and stays so.
        changing: where that is not so before the longest, how many verdicts change last.
    """

    longest: int
    tokens: int
    changing: int


@dataclass(frozen=True, kw_only=True)
class Kept(Part):
    """What an edit leaves of the refusals that are to stay.

    Attributes:
        refused: prompts that the model refuses as it is.
        kept: those of them that it still refuses.
        share: kept of refused; None where nothing was refused.
        interval: Wilson's, 95%.
        wanted: the least share that is enough.
        enough: whether the share is at least that.
    """

    refused: int
    kept: int
    share: float | None
    interval: list[float]
    wanted: float
    enough: bool


@dataclass(frozen=True, kw_only=True)
class OtherMode(RefusalsInMode):
    """Refusal rates in a mode of thinking.

    Attributes:
        verdicts: of `eval`, as those of `Asked`.
    """

    verdicts: dict[str, str] | None = None

    @classmethod
    def of_mode(cls, figures: RefusalsInMode) -> OtherMode:
        """The figures of one mode, to stand beside those of another."""
        values = figures.values_by_field
        return cls(**{name: values[name] for name in RefusalsInMode.__dataclass_fields__})


@dataclass(frozen=True, kw_only=True)
class Refusals(RefusalsInMode):
    """Refusal rates, also in other modes of thinking.

    Attributes:
        modes: how the same prompts were replied to in other modes of thinking, by name: ``on``.
        recognition: whether harmful prompts are known as such, where asked for.
    """

    modes: dict[str, OtherMode] | None = None
    recognition: Recognition | None = None


@dataclass(frozen=True, kw_only=True)
class Made(Part):
    """By which version, of what.

    Attributes:
        abl_mlx: the version of abl-mlx.
        source: what the user typed for the model.
    """

    abl_mlx: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Judged(Part):
    """How a judge's verdicts compare with those of the markers.

    Attributes:
        asked, unparsed: numbers of replies; an answer beside the rubric is not parsed.
        agreement, kappa: of the two verdicts; None where there is nothing to compare.
        table: ``judge/markers`` -> number of replies.
    """

    rubric_sha256: str
    asked: int
    unparsed: int
    agreement: float | None
    kappa: float | None
    table: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Asked(Refusals, Made):
    """One model that `eval` asked.

    Attributes:
        model: its name on a server.
        runtime: what ran it.
        judge: who said what a refusal is.
        max_tokens: longest reply; of a length sweep, how much of a reply is judged.
        thinking: the mode of the rates, ``on`` or an amount; None if it was off.
        thought_tokens: how much longer a reply may be where the model thinks; None elsewhere.
        template: what prompts were written with, in place of the model's own template.
        verdicts: set -> a letter for each prompt: R refused, A answered, B broken, ? not judged.
        judging, perplexity, capability, length_sweep, tool_calls: where asked for.
    """

    model: str | None = None
    runtime: str
    judge: str
    max_tokens: int
    thinking: str | None = None
    thought_tokens: int | None = None
    template: Template | None = None
    note: str | None = None
    verdicts: dict[str, str]
    judging: Judged | None = None
    perplexity: Perplexity | None = None
    capability: Capability | None = None
    length_sweep: LengthSweep | None = None
    tool_calls: ToolCalls | None = None


@dataclass(frozen=True, kw_only=True)
class AskedPrompts(Part):
    """A prompt set: how many, and the hash of their texts."""

    n: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Divergence(Part):
    """KL(before ‖ after) on harmless prompts, nats a token.

    Attributes:
        k1: at the first reply token.
        k32: mean over the first 32.
        kind: ``exact``, or over the likeliest tokens alone.
        n_prompts: how many prompts.
    """

    k1: float
    k32: float
    kind: str | None = None
    n_prompts: int | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison(Part):
    """Refusals of a set by model and baseline, prompt by prompt, with McNemar's exact test."""

    n: int
    both: int
    gained: int
    lost: int
    neither: int
    difference: float
    interval: list[float]
    p: float


@dataclass(frozen=True, kw_only=True)
class Limit(Part):
    """One limit and what was found; ``value`` is None where nothing was measured."""

    name: str
    kind: str
    value: float | None
    limit: float
    passed: bool
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Gate(Part):
    """All limits that were asked for."""

    passed: bool
    checks: list[Limit]


@dataclass(frozen=True, kw_only=True)
class EvalRecord(Record, Asked):
    """What `eval` found.

    Attributes:
        prompts: what was asked, by set.
        kl: from the baseline.
        lm_eval: task -> results of lm-evaluation-harness, as it names them.
        baseline: the other model.
        paired: set -> the two compared.
        paired_tool_calls: right tasks of the two compared.
        seconds: step -> time.
        gate: where limits were given.
    """

    prompts: dict[str, AskedPrompts]
    kl: Divergence | None = None
    lm_eval: dict[str, dict[str, Any]] | None = None
    baseline: Asked | None = None
    paired: dict[str, Comparison] | None = None
    paired_tool_calls: Comparison | None = None
    seconds: dict[str, float]
    gate: Gate | None = None

    def in_mode(self, mode: str) -> EvalRecord:
        """The record with the figures of another mode of thinking, of both models."""
        assert self.modes is not None
        baseline = self.baseline
        if baseline is not None and mode in (baseline.modes or {}):
            assert baseline.modes is not None
            baseline = replace(baseline, **_figures(baseline.modes[mode]), modes=None)
        return replace(self, **_figures(self.modes[mode]), modes=None, baseline=baseline)


def _figures(mode: OtherMode) -> dict[str, Any]:
    return {name: getattr(mode, name) for name in OtherMode.__dataclass_fields__}
