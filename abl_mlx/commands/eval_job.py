"""The arguments of an evaluation, and checks of them before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from abl_mlx import __version__
from abl_mlx.behaviour import gate, judge, lm_eval_harness, recognition
from abl_mlx.behaviour.scorers import scorer
from abl_mlx.behaviour.scorers.scorer import Scorer
from abl_mlx.commands import steered_target, targets, thinking_switch
from abl_mlx.eval_choices import EvalOptions
from abl_mlx.inputs import thinking
from abl_mlx.inputs.sets import PromptSet, PromptSets
from abl_mlx.models import given_template
from abl_mlx.models.given_template import GivenTemplate
from abl_mlx.outputs import staging
from abl_mlx.outputs.model_file import ModelFile
from abl_mlx.records.evaluations import AskedPrompts, Template
from abl_mlx.records.reading import EarlierEval
from abl_mlx.support.clock import Clock
from convert.base.atomic import check_new
from convert.base.errors import UserError


@dataclass(frozen=True)
class Job:
    """The arguments of an evaluation.

    Attributes:
        text: the model as the user typed it.
        source, other: the files of the model and of its baseline; None for a server, or if there is
            no baseline.
        sets: the prompts.
        clock: times the steps.
    """

    text: str
    source: ModelFile | None
    other: ModelFile | None
    options: EvalOptions
    sets: PromptSets
    clock: Clock

    @cached_property
    def parts(self) -> dict[str, PromptSet]:
        """Name -> set of the prompts that are asked."""
        return asked_sets(self.sets)

    @cached_property
    def given(self) -> GivenTemplate | None:
        """The chat template of ``--template``; None without it."""
        return given_template.read(self.options.chatting.template)

    @cached_property
    def scorers(self) -> list[Scorer]:
        """The scorers of ``--scorer``."""
        wanted = self.options.metrics.scorer
        return [] if wanted is None else scorer.named(wanted)

    @property
    def template(self) -> Template | None:
        """What a record says of it."""
        return given_template.record(self.given)

    @property
    def modes(self) -> tuple[str | None, ...]:
        """The modes of thinking in which everything is asked, as of `Prompt`."""
        return thinking.modes(self.options.prompting.thinking)

    @cached_property
    def judge(self) -> str:
        """The judge's name for the record."""
        return judge.name(self.options.judging)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """How much of each reply is read, in tokens, shortest first; nothing without a sweep."""
        return tuple(sorted(self.options.metrics.length_sweep or ()))

    @property
    def shortens(self) -> bool:
        """Whether replies may be read no further than the verdicts on the first of them need.

        With thinking on thoughts differ in length; two models are read alike; what is kept, and
        what a model judges, is kept and judged whole.
        """
        options = self.options
        keeps = options.replying.save_replies is not None or options.replying.save_completions
        whole = keeps or options.targeting.baseline is not None or options.judging.judge is not None
        return not whole and not self.lengths and self.modes == (None,)

    @property
    def prompts(self) -> dict[str, AskedPrompts]:
        """Name of each set -> the number of its prompts, and their hash."""
        return {
            name: AskedPrompts(n=len(part), sha256=part.sha256) for name, part in self.parts.items()
        }

    @property
    def how(self) -> dict[str, Any]:
        """Everything besides the model on which a reply and its verdict depend."""
        return {
            "prompts": {name: part.sha256 for name, part in self.parts.items()},
            "max_tokens": self.options.replying.max_tokens,
            "thought_tokens": self.options.prompting.thought_tokens,
            "judge": self.judge,
            **({"length_sweep": self.lengths} if self.lengths else {}),
            **given_template.entry(self.given),
            "abl_mlx": __version__,
        }

    @property
    def identity(self) -> dict[str, Any]:
        """The identity of this evaluation in a journal."""
        targeting = self.options.targeting
        names = {"target": self.text, "baseline": targeting.baseline, "model": targeting.model}
        return names | self.how


def asked_sets(sets: PromptSets) -> dict[str, PromptSet]:
    """Name -> set of the prompts that are asked; a set without prompts is left out."""
    parts = {"harmful": sets.harmful.test, "harmless": sets.harmless.test}
    if sets.borderline is not None and len(sets.borderline):
        parts["borderline"] = sets.borderline
    return parts | {name: staying.test for name, staying in sets.staying.items()}


def check(job: Job) -> EarlierEval | None:
    """Check everything that can be checked before a model is loaded.

    Returns:
        The earlier record to compare with; None if none was given.
    """
    options, limits = job.options, job.options.limits
    thinking_switch.note_unused(options.prompting)
    _check_targets(job)
    runtime = None if job.source is None else targets.runtime_of(
        job.source, options.targeting.runtime
    )  # fmt: skip
    steered_target.check(options, runtime)
    _check_limits(job)
    _ = job.scorers  # reads their files
    if options.replying.save_replies is not None:
        check_new(options.replying.save_replies)
    if options.replying.report is not None:
        staging.check_report(options.replying.report)
    if options.junit is not None:
        gate.check_junit(options.junit)
    if options.metrics.recognition:
        recognition.matched(job.sets.harmful.test, job.sets.harmless.test)
    if limits.max_drop_from is None:
        return None
    before = gate.read_record(limits.max_drop_from)
    gate.check_comparable(before, limits.max_drop_from, job.prompts, job.judge, job.template)
    return before


def _check_targets(job: Job) -> None:
    """Check that the flags go with the model and its baseline."""
    source, other, targeting = job.source, job.other, job.options.targeting
    if source is not None and targeting.model is not None:
        raise UserError(f"--model {targeting.model} names a model of a server, and TARGET is none.")
    if other is not None and targeting.baseline_model is not None:
        raise UserError("--baseline-model names a model of a server, and --baseline is none.")
    if targeting.baseline is None and targeting.baseline_model is not None:
        raise UserError("--baseline-model needs --baseline URL.")
    local = [one for one in (source, other) if one is not None]
    for one in local:
        targets.runtime_of(one, targeting.runtime)
    if targeting.runtime not in (None, "mlx-lm") and not any(
        targeting.runtime in one.runtimes for one in local
    ):
        raise UserError(f"--runtime {targeting.runtime} runs .gguf files, and none is given.")
    metrics, compares = job.options.metrics, targeting.baseline is not None
    if metrics.perplexity and (source is None or (compares and other is None)):
        raise UserError(
            "--perplexity needs probabilities, which a server's chat does not tell: give the model "
            "as a folder or a .gguf file."
        )
    if metrics.lm_eval is not None:
        lm_eval_harness.check(source.folder if source is not None else None, metrics.lm_eval)


def _check_limits(job: Job) -> None:
    """Check that what has a limit can be measured."""
    growth = job.options.limits.max_thought_growth
    if growth is not None and job.modes == (None,):
        raise UserError(
            f"--max-thought-growth {growth:g} compares thoughts, and thinking is off: add "
            "--thinking on or both."
        )
    if growth is not None and job.options.targeting.baseline is None:
        raise UserError(
            f"--max-thought-growth {growth:g} needs a baseline to compare with: add --baseline "
            "with the original model."
        )
    if job.options.limits.max_kl is None:
        return
    targeting = job.options.targeting
    if targeting.baseline is None:
        raise UserError(
            "--max-kl needs a baseline to compare with: add --baseline with the original model."
        )
    if job.source is None or job.other is None:
        raise UserError(
            "--max-kl needs probabilities, which a server's chat does not tell: give the model "
            "and its --baseline as folders or .gguf files."
        )
    both = (job.source, job.other)
    if "llama-server" in [targets.runtime_of(one, targeting.runtime) for one in both]:
        raise UserError(
            "--max-kl does not work through llama-server: pip install 'abl-mlx[llamacpp]', or "
            "use --runtime mlx-lm."
        )
