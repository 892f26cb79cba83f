"""What is measured beside refusals: recognition, thoughts, answers, calls, perplexity, lengths."""

from __future__ import annotations

from dataclasses import dataclass

from abl_mlx.records.record import Part


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
