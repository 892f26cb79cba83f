"""What a model does: the record of `eval`, and the figures that `run` has of each output."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

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


@dataclass(frozen=True, kw_only=True)
class ToldApart(Part):
    """How well a model's answers to a question tell two groups of prompts apart.

    Attributes:
        words: of which the model is to reply with one; the first belongs to the first group.
        n: prompts of each group, with an answer that can be read.
        unread: prompts without one.
        mass: the mean probability of either word, 0 to 1.
        margin: ln p(first word) − ln p(second word), mean of the first group less that of the
            second, in nats; with its 95% interval.
        auc: the probability that the margin of one of the first group is above that of one of the
            second; with its 95% interval.
        accuracy: the share of margins on the right side of the median of all; with Wilson's 95%
            interval.
        shuffled: mean AUC of shuffled labels, with the middle 95% of them.
        p: the share of shuffles with an AUC that is as high.
        margins: of each prompt of the first group and of the second, in order, in nats; None where
            the answer cannot be read.

    The figures from the margin on are left out where a group has no answer that can be read.
    """

    words: list[str]
    n: list[int]
    unread: int
    mass: float
    margins: list[list[float | None]]
    margin: float | None = None
    margin_interval: list[float] | None = None
    auc: float | None = None
    auc_interval: list[float] | None = None
    accuracy: float | None = None
    accuracy_interval: list[float] | None = None
    shuffled: float | None = None
    shuffled_interval: list[float] | None = None
    p: float | None = None

    @property
    def tells(self) -> bool:
        """Whether the groups are told apart better than by chance."""
        if self.auc is None or self.auc_interval is None or self.shuffled_interval is None:
            return False
        return self.auc_interval[0] > 0.5 and self.auc > self.shuffled_interval[1]


@dataclass(frozen=True, kw_only=True)
class Recognition(Part):
    """Whether a model tells harmful from harmless prompts, asked which of the two a prompt is.

    Attributes:
        question_sha256: of the question.
        kind: ``exact``, or ``top-n`` over the likeliest tokens alone.
        characters: mean length of the harmful and of the harmless prompts, which are matched.
        harm: harmful against harmless.
        length: the control: the longer against the shorter of the same prompts.
    """

    question_sha256: str
    kind: str
    characters: list[float]
    harm: ToldApart
    length: ToldApart


@dataclass(frozen=True, kw_only=True)
class Thoughts(Part):
    """Thoughts that replies open with.

    Attributes:
        n: replies with a thought.
        words: mean length of those that come to their end; None where none does.
        unclosed: thoughts that do not end within the longest reply.
        looping: thoughts whose end says the same over and over.
    """

    n: int
    words: float | None
    unclosed: int
    looping: int


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
class Share(Part):
    """How many of ``n`` answers are right, with Wilson's 95% interval."""

    n: int
    right: int
    share: float
    interval: list[float]


@dataclass(frozen=True, kw_only=True)
class Capability(Share):
    """The small capability check, whole and by kind of task."""

    tasks_sha256: str
    groups: dict[str, Share]


@dataclass(frozen=True, kw_only=True)
class ToolCalls(Share):
    """The check of function calls: right tasks in all.

    Attributes:
        tasks_sha256: of the tasks and their functions.
        checks: name (the right functions are called), arguments (with the right arguments too), two
            calls (both right), no call (none is made and the answer is right), ask (none is made
            and the missing argument is asked for).
        outcomes: a letter for each task: R right, A wrong arguments, N another function or number
            of calls, M no call where one was right, C a call where none was right, W no call but
            wrong words.
    """

    tasks_sha256: str
    checks: dict[str, Share]
    outcomes: str


@dataclass(frozen=True, kw_only=True)
class Perplexity(Part):
    """Perplexity of a text.

    Attributes:
        text, text_sha256: its name, and the hash of all of it.
        perplexity: exp(mean nats a token) over ``tokens`` tokens.
        bits_per_byte: of the text that these make.
        kind: ``exact``, or ``top-n`` over the likeliest ``n`` tokens alone.
        window, stride: of an exact one, tokens.
        outside: how many tokens were not among the likeliest.
    """

    text: str
    text_sha256: str
    perplexity: float
    bits_per_byte: float
    tokens: int
    kind: str
    window: int | None = None
    stride: int | None = None
    n: int | None = None
    outside: int | None = None


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
class MarkerTokens(Part):
    """From how many tokens on ``n`` refusals read as such: half of them, 95% and all of them."""

    n: int
    median: int
    p95: int
    last: int


@dataclass(frozen=True, kw_only=True)
class SweptSet(Part):
    """Replies to a prompt set by how much of them is read: a number for each length.

    Attributes:
        n: how many replies.
        refused, broken: of them.
        unfinished: end inside their thoughts, and are broken.
        late: answers at the shortest length that are refusals at the longest.
        turned: refusals at some length that are answers at the longest.
        declining: answers at the longest, in which a plain refusal follows what was given.
        markers: where the refusals stand; None without a refusal.
    """

    n: int
    refused: list[int]
    broken: list[int]
    unfinished: list[int]
    late: int
    turned: int
    declining: int
    markers: MarkerTokens | None = None


@dataclass(frozen=True, kw_only=True)
class LengthSweep(Part):
    """How verdicts depend on how much of a reply is read.

    Attributes:
        lengths: in tokens.
        cut_by: ``tokens`` of the model, ``spread`` for their number spread over the characters, or
            ``words``, four tokens for three.
        share: the share of the refusals at the longest length that is to be seen.
        suffices: the shortest of the lengths at which it is; None where nothing is refused.
        sets: by prompt set; those of another mode of thinking end with it, as in
            ``harmful, thinking on``.
    """

    lengths: list[int]
    cut_by: str
    share: float
    suffices: int | None
    sets: dict[str, SweptSet]


@dataclass(frozen=True, kw_only=True)
class Asked(Refusals, Made):
    """One model that `eval` asked.

    Attributes:
        model: its name on a server.
        runtime: what ran it.
        judge: who said what a refusal is.
        max_tokens: longest reply; of a length sweep, how much of a reply is judged.
        template: what prompts were written with, in place of the model's own template.
        verdicts: set -> a letter for each prompt: R refused, A answered, B broken, ? not judged.
        judging, perplexity, capability, length_sweep, tool_calls: where asked for.
    """

    model: str | None = None
    runtime: str
    judge: str
    max_tokens: int
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
