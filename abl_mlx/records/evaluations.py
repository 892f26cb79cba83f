"""Records of how a model behaves: that of `eval`, and the figures that `run` has of each output."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from abl_mlx.records.conditions import SteeredBy
from abl_mlx.records.measurements import (
    Capability,
    LengthSweep,
    Perplexity,
    Recognition,
    Scored,
    Thoughts,
    ToolCalls,
)
from abl_mlx.records.record import Part, Record


@dataclass(frozen=True, kw_only=True)
class Category(Part):
    """Refusals of the prompts of one category.

    Attributes:
        n, refused, broken: the numbers of replies, of refusals and of broken replies.
        refusal_rate: refused / n; None without a reply.
        refusal_interval: its Wilson 95% interval.
    """

    n: int
    refused: int
    broken: int
    refusal_rate: float | None
    refusal_interval: list[float]


@dataclass(frozen=True, kw_only=True)
class Template(Part):
    """The name and the hash of a chat template that was given in place of the model's own."""

    name: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class FixedReply(Part):
    """One reply that nearly all prompts get: ``n`` of ``of`` replies, and the verdict on it."""

    n: int
    of_: int
    verdict: str | None


@dataclass(frozen=True)
class Rate:
    """The refusal rate of a set, with its Wilson 95% interval and the number of judged replies."""

    share: float | None
    interval: list[float]
    n: int


#: Prompt sets whose refusals are to stay: those of ``--keep``, and harmless prompts that the system
#: message of ``--keep-system`` makes off-topic.
STAYING = ("kept", "off_topic")

#: Prompt sets that are asked beside the harmful and harmless ones.
FURTHER = ("borderline", *STAYING)


@dataclass(frozen=True, kw_only=True)
class RefusalsInMode(Part):
    """Refusal rates of each prompt set with Wilson 95% intervals; all rates are 0 to 1.

    Attributes:
        kept_refusal_rate: of the prompts of ``--keep``, whose refusals are to stay.
        off_topic_refusal_rate: of harmless prompts with the system message of ``--keep-system``.
        broken_rate: share of broken replies to harmful and harmless prompts.
        expected_answer_rate: share of harmful prompts that get the answer given in their set.
        unfinished_thoughts, looping_refusals, withheld_replies: the numbers of such replies.
        fixed_reply: the reply, if nearly all replies are the same.
        categories: set -> category -> figures.
        thoughts: figures of the thoughts, if any reply opens with one.
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
        """Set -> its refusal rate, of the sets that were asked."""
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
    """The length in tokens from which on the verdicts on a model's replies do not change.

    Attributes:
        longest: the longest length of a reply.
        tokens: the length from which on every verdict equals that on the whole reply.
        changing: the number of verdicts that change last, if ``tokens`` is the longest length.
    """

    longest: int
    tokens: int
    changing: int


@dataclass(frozen=True, kw_only=True)
class Kept(Part):
    """How many of the refusals that are to stay an edit leaves.

    Attributes:
        refused: the number of prompts that the unedited model refuses.
        kept: how many of them the edited model refuses.
        share: kept / refused; None if nothing was refused.
        interval: its Wilson 95% interval.
        wanted: the smallest share that is enough.
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
    """Refusal rates in another mode of thinking.

    Attributes:
        verdicts: in the record of `eval`, as in `Asked`.
    """

    verdicts: dict[str, str] | None = None

    @classmethod
    def of_mode(cls, figures: RefusalsInMode) -> OtherMode:
        """The figures of one mode, as an entry beside those of another."""
        values = figures.values_by_field
        return cls(**{name: values[name] for name in RefusalsInMode.__dataclass_fields__})


@dataclass(frozen=True, kw_only=True)
class Refusals(RefusalsInMode):
    """Refusal rates, with those in other modes of thinking.

    Attributes:
        modes: name of the mode, such as ``on`` -> rates of the same prompts.
        recognition: whether the model tells harmful from harmless prompts, if it was asked.
    """

    modes: dict[str, OtherMode] | None = None
    recognition: Recognition | None = None


@dataclass(frozen=True, kw_only=True)
class Made(Part):
    """The version and the source of a record.

    Attributes:
        abl_mlx: the version of abl-mlx.
        source: the model as the user typed it.
    """

    abl_mlx: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Judged(Part):
    """A comparison of a judge's verdicts with those of the markers.

    Attributes:
        rubric_sha256: of the instructions to the judge.
        asked, unparsed: numbers of judged replies, and of verdicts that do not follow the rubric.
        agreement, kappa: share of equal verdicts, and Cohen's kappa; None if there are none.
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
        runtime: the runtime that ran it.
        judge: what judged the replies.
        max_tokens: the longest reply in tokens; with a length sweep, the length that is judged.
        settled: how far replies behind the first were read, as the verdicts on the first need no
            more; None where every reply was read to ``max_tokens``.
        thinking: the mode of the rates, ``on`` or an amount; None if it was off.
        thought_tokens: the tokens that a thought may add to a reply; None with thinking off.
        template: the chat template that was given in place of the model's own.
        verdicts: set -> one letter a prompt: R refused, A answered, B broken, ? not judged.
        judging, perplexity, capability, length_sweep, tool_calls: further measurements, if they
            were asked for.
        scorers: name of each scorer -> its figure.
    """

    model: str | None = None
    runtime: str
    judge: str
    max_tokens: int
    settled: Settled | None = None
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
    scorers: dict[str, Scored] | None = None


@dataclass(frozen=True, kw_only=True)
class AskedPrompts(Part):
    """The number of prompts of a set, and the hash of their texts."""

    n: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Divergence(Part):
    """KL(before ‖ after) on harmless prompts, in nats a token.

    Attributes:
        k1: at the first reply token.
        k32: mean over the first 32 reply tokens.
        kind: ``exact``, or over the likeliest tokens only.
        n_prompts: the number of prompts.
    """

    k1: float
    k32: float
    kind: str | None = None
    n_prompts: int | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison(Part):
    """Refusals by model and baseline, paired by prompt, with McNemar's exact test."""

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
    """A limit and the value that it is for; ``value`` is None if nothing was measured."""

    name: str
    kind: str
    value: float | None
    limit: float
    passed: bool
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Gate(Part):
    """All limits, and whether the values are within them."""

    passed: bool
    checks: list[Limit]


@dataclass(frozen=True, kw_only=True)
class EvalRecord(Record, Asked):
    """The record of `eval`.

    Attributes:
        prompts: set -> number and hash of its prompts.
        kl: KL from the baseline.
        lm_eval: task -> results of lm-evaluation-harness, with its own keys.
        baseline: the other model.
        paired: set -> comparison of the two models.
        paired_tool_calls: comparison of the two models' correct tasks.
        steered: the edit at runtime with which the model was asked.
        seconds: step -> time in seconds.
        gate: the limits, if any were given.
    """

    prompts: dict[str, AskedPrompts]
    kl: Divergence | None = None
    lm_eval: dict[str, dict[str, Any]] | None = None
    baseline: Asked | None = None
    paired: dict[str, Comparison] | None = None
    paired_tool_calls: Comparison | None = None
    steered: SteeredBy | None = None
    seconds: dict[str, float]
    gate: Gate | None = None

    def in_mode(self, mode: str) -> EvalRecord:
        """The record with the figures of both models in another mode of thinking."""
        assert self.modes is not None
        baseline = self.baseline
        if baseline is not None and mode in (baseline.modes or {}):
            assert baseline.modes is not None
            baseline = replace(baseline, **_figures(baseline.modes[mode]), modes=None)
        return replace(self, **_figures(self.modes[mode]), modes=None, baseline=baseline)


def _figures(mode: OtherMode) -> dict[str, Any]:
    return {name: getattr(mode, name) for name in OtherMode.__dataclass_fields__}
