"""The choices of `eval`: what is asked and how, who judges, what else is measured, and limits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from abl_mlx.choices import Chatting, Conditioning, Prompting, Replying
from abl_mlx.flag_values import Choices


@dataclass(frozen=True)
class Targeting(Choices):
    """The model that `eval` asks.

    Attributes:
        model: the model's name on a server.
        baseline: another model, which is asked the same prompts for comparison.
        baseline_model: the baseline's name, if it is on a server.
        runtime: what runs a model on this machine; None for the first available one.
        resume: the journal with earlier verdicts; None for one in the cache.
    """

    model: str | None = None
    baseline: str | None = None
    baseline_model: str | None = None
    runtime: str | None = None
    resume: Path | None = None


@dataclass(frozen=True)
class Asking(Choices):
    """How a server is asked.

    Attributes:
        concurrency: how many requests are made at the same time.
        timeout: seconds from connecting to the last byte of a reply.
        retries: how often a request is repeated that failed for a reason that may be temporary.
        backoff: seconds before the second try; each later try waits twice as long.
    """

    concurrency: int = 4
    timeout: float = 120.0
    retries: int = 4
    backoff: float = 0.5


@dataclass(frozen=True)
class Judging(Choices):
    """How replies are judged.

    Attributes:
        judge: the model or server that judges replies instead of the markers.
        judge_model: its name on a server.
        judge_tokens: the longest answer of the judge, in tokens.
    """

    judge: str | None = None
    judge_model: str | None = None
    judge_tokens: int = 16


@dataclass(frozen=True)
class Metrics(Choices):
    """Further measurements of `eval`.

    Attributes:
        perplexity: measure perplexity on the bundled text.
        capability: ask the small capability check.
        tool_calls: ask the small check of function calls.
        lm_eval: tasks of lm-evaluation-harness, separated by commas.
        length_sweep: numbers of tokens of each reply that are read; the rates are those of the
            shortest that suffices, and `Replying.max_tokens` is not used.
        recognition: ask whether prompts are harmful.
        scorer: the scorers of other behaviours, ``NAME[:FILE]`` each, separated by commas.
    """

    perplexity: bool = False
    capability: bool = False
    tool_calls: bool = False
    lm_eval: str | None = None
    length_sweep: frozenset[int] | None = None
    recognition: bool = False
    scorer: str | None = None


@dataclass(frozen=True)
class Limits(Choices):
    """Limits on an evaluation (the gate); None means no limit.

    Attributes:
        min_refusal: the least share of harmful prompts that the model must refuse.
        max_over_refusal: the largest share of the harmless, and of the borderline prompts, that it
            may refuse.
        max_broken: the largest share of replies that may be empty or loop; it applies with every
            other limit, because a broken model refuses nothing.
        max_kl: the largest mean KL(baseline ‖ model), in nats per token.
        max_drop_from: the record of an earlier `eval --json`.
        max_drop: by how much the refusal rate on harmful prompts may be lower than in that record.
        against: signed evidence of `eval`, which the model's verdicts must not differ from.
        key: the public key of ``against``.
        max_thought_growth: the largest ratio of mean thought lengths, of the model to the baseline.
    """

    min_refusal: float | None = None
    max_over_refusal: float | None = None
    max_broken: float = 0.1
    max_kl: float | None = None
    max_drop_from: Path | None = None
    max_drop: float = 0.05
    max_thought_growth: float | None = None
    against: Path | None = None
    key: Path | None = None

    @property
    def given(self) -> bool:
        """Whether there is any limit."""
        asked = (
            self.min_refusal, self.max_over_refusal, self.max_kl, self.max_drop_from,
            self.max_thought_growth, self.against,
        )  # fmt: skip
        return any(limit is not None for limit in asked)


@dataclass(frozen=True)
class Steering(Choices):
    """The edit at runtime with which `eval` asks a model in MLX.

    Attributes:
        direction: a direction file; None to ask the model as it is.
        strength: α of the edit.
        conditioning: what is done, and whether a condition counts.
    """

    direction: Path | None = None
    strength: float = 1.0
    conditioning: Conditioning = Conditioning()


@dataclass(frozen=True)
class Signing(Choices):
    """What is signed of an evaluation.

    Attributes:
        sign: the private key, PEM; None to sign nothing.
        evidence: the file for the signed statement.
    """

    sign: Path | None = None
    evidence: Path | None = None


@dataclass(frozen=True)
class EvalOptions(Choices):
    """The choices of `eval`.

    Attributes:
        junit: the file for a JUnit report; None to write none.
        memory_check: refuse a model that is larger than the machine's memory.
    """

    targeting: Targeting = Targeting()
    steering: Steering = Steering()
    asking: Asking = Asking()
    judging: Judging = Judging()
    metrics: Metrics = Metrics()
    limits: Limits = Limits()
    signing: Signing = Signing()
    junit: Path | None = None
    prompting: Prompting = Prompting()
    replying: Replying = Replying()
    chatting: Chatting = Chatting()
    memory_check: bool = True
