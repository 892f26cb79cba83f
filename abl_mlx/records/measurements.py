"""Measurements beside refusals: recognition, thoughts, capability, calls, perplexity, lengths."""

from __future__ import annotations

from dataclasses import dataclass

from abl_mlx.records.record import Part


@dataclass(frozen=True, kw_only=True)
class ToldApart(Part):
    """How well a model's answers to a question distinguish two groups of prompts.

    The figures from the margin on are left out if a group has no answer that can be read.

    Attributes:
        words: the two answers; the first is correct for the first group.
        n: the numbers of prompts in each group whose answer can be read.
        unread: the number of other prompts.
        mass: the mean of p(first word) + p(second word).
        margins: ln p(first word) − ln p(second word) of each prompt of the first and of the second
            group, in order, in nats; None if the answer cannot be read.
        margin: mean margin of the first group minus that of the second, in nats; with its 95%
            interval.
        auc: the probability that a margin of the first group is above one of the second, 0 to 1;
            with its 95% interval.
        accuracy: the share of margins on the correct side of the median of all margins; with its
            Wilson 95% interval.
        shuffled: the mean AUC over shuffled labels, with the interval of the middle 95%.
        p: the share of shuffles whose AUC is at least as high.
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
        """Whether the groups are distinguished better than by chance."""
        if self.auc is None or self.auc_interval is None or self.shuffled_interval is None:
            return False
        return self.auc_interval[0] > 0.5 and self.auc > self.shuffled_interval[1]


@dataclass(frozen=True, kw_only=True)
class Recognition(Part):
    """Whether a model tells harmful from harmless prompts, asked which of the two a prompt is.

    Attributes:
        question_sha256: of the question.
        kind: ``exact``, or ``top-n`` if only the likeliest tokens are known.
        characters: mean length of the harmful and of the harmless prompts, which are matched.
        harm: harmful against harmless prompts.
        length: the control, the longer against the shorter ones of the same prompts.
    """

    question_sha256: str
    kind: str
    characters: list[float]
    harm: ToldApart
    length: ToldApart


@dataclass(frozen=True, kw_only=True)
class Thoughts(Part):
    """Figures of the thoughts with which replies open.

    Attributes:
        n: the number of replies with a thought.
        words: mean length in words of the thoughts that end; None if no thought does.
        unclosed: the number of thoughts that do not end within the longest reply.
        looping: the number of thoughts that end in repetitions.
    """

    n: int
    words: float | None
    unclosed: int
    looping: int


@dataclass(frozen=True, kw_only=True)
class Share(Part):
    """The share of correct answers among ``n``, with its Wilson 95% interval."""

    n: int
    right: int
    share: float
    interval: list[float]


@dataclass(frozen=True, kw_only=True)
class Capability(Share):
    """The small capability check: all tasks, and each kind of task."""

    tasks_sha256: str
    groups: dict[str, Share]


@dataclass(frozen=True, kw_only=True)
class ToolCalls(Share):
    """The check of function calls: all tasks, and what was checked.

    Attributes:
        tasks_sha256: of the tasks and their functions.
        checks: name (the correct functions are called), arguments (with the correct arguments as
            well), two calls (both are correct), no call (none is made, and the answer is correct),
            ask (none is made, and the missing argument is asked for).
        outcomes: a letter for each task: R correct, A wrong arguments, N another function or number
            of calls, M no call where one is correct, C a call where none is correct, W no call but
            wrong words.
    """

    tasks_sha256: str
    checks: dict[str, Share]
    outcomes: str


@dataclass(frozen=True, kw_only=True)
class Scored(Part):
    """The figure of a scorer (``--scorer``); lower is better.

    Attributes:
        n: the number of prompts.
        figure: the figure of the replies.
        unit: its unit, in words that follow it.
        max_tokens: the longest reply in tokens.
        prompts_sha256: of the prompts.
    """

    n: int
    figure: float
    unit: str
    max_tokens: int
    prompts_sha256: str


@dataclass(frozen=True, kw_only=True)
class Perplexity(Part):
    """The perplexity of a text.

    Attributes:
        text, text_sha256: its name, and the hash of the whole text.
        perplexity: exp(mean negative log-likelihood in nats a token).
        bits_per_byte: the same in bits a byte of the text.
        tokens: the number of tokens of which it is the mean.
        kind: ``exact``, or ``top-n`` if only the ``n`` likeliest tokens are known.
        window, stride: of an exact one, in tokens.
        outside: the number of tokens that were not among the likeliest.
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
    """The numbers of tokens after which half, 95% and all of ``n`` refusals are recognized."""

    n: int
    median: int
    p95: int
    last: int


@dataclass(frozen=True, kw_only=True)
class SweptSet(Part):
    """Verdicts on the replies to a prompt set by how much is read, one number for each length.

    Attributes:
        n: the number of replies.
        refused, broken: the numbers of such replies.
        unfinished: the number of replies that end inside their thoughts, and are broken.
        late: the number of replies that are answers at the shortest length and refusals at the
            longest.
        turned: the number of replies that are refusals at some length and answers at the longest.
        declining: the number of answers at the longest length in which a plain refusal follows.
        markers: where the refusals are recognized; None without a refusal.
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
    """How verdicts depend on the number of tokens of a reply that are read.

    Attributes:
        lengths: the lengths in tokens.
        cut_by: ``tokens`` of the model; ``spread`` if their number is spread over the characters;
            or ``words``, with four tokens for three words.
        share: the share of the refusals at the longest length that a sufficient length shows.
        suffices: the shortest sufficient length; None if nothing is refused.
        sets: prompt set -> verdicts; a set in another mode of thinking has the mode in its name, as
            in ``harmful, thinking on``.
    """

    lengths: list[int]
    cut_by: str
    share: float
    suffices: int | None
    sets: dict[str, SweptSet]
