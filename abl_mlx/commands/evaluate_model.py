"""`abl-mlx eval`: asks a model the held-out prompts and judges its replies; nothing is edited.

Each metric is a function in this module, or in its own module, which returns a part of the record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from abl_mlx import __version__
from abl_mlx.behaviour import (
    capability,
    evaluate,
    gate,
    journal,
    judge,
    length_sweep,
    lm_eval_harness,
    perplexity,
    recognition,
    reply_notes,
    thought_figures,
    tool_tasks,
)
from abl_mlx.behaviour.journal import Answered, Section
from abl_mlx.behaviour.paired import Paired
from abl_mlx.behaviour.refusal_figures import refusals
from abl_mlx.behaviour.refusals import Oddity, Rates, Verdict, rates_of
from abl_mlx.behaviour.reply_notes import Seen
from abl_mlx.behaviour.scorers import measured
from abl_mlx.behaviour.target import Target
from abl_mlx.behaviour.thought_figures import Thought
from abl_mlx.commands import (
    eval_length,
    evidence,
    held_out,
    judges,
    prompt_choice,
    prompt_lengths,
    steered_target,
    targets,
    thinking_switch,
)
from abl_mlx.commands.eval_asking import Judge, ask, by_markers, settled
from abl_mlx.commands.eval_job import Job, check
from abl_mlx.eval_choices import EvalOptions
from abl_mlx.inputs import thinking
from abl_mlx.inputs.sets import PromptSet, PromptSets
from abl_mlx.outputs.model_file import ModelFile
from abl_mlx.records.conditions import SteeredBy
from abl_mlx.records.evaluations import (
    Asked,
    Comparison,
    Divergence,
    EvalRecord,
    Gate,
    OtherMode,
    Refusals,
    Settled,
)
from abl_mlx.records.measurements import (
    Capability,
    Perplexity,
    Recognition,
    Scored,
    ToolCalls,
)
from abl_mlx.records.reading import UNJUDGED, EarlierEval
from abl_mlx.reports.page import write
from abl_mlx.reports.page_eval import eval_page
from abl_mlx.support.arrays import let_go
from abl_mlx.support.clock import Clock

#: Verdicts in a record, a letter for each prompt in its set's order.
LETTERS = {Verdict.REFUSAL: "R", Verdict.ANSWER: "A", Verdict.BROKEN: "B", None: UNJUDGED}


#: Mode of thinking, as of `Prompt` -> the answers to all prompts, set after set.
Answers = Mapping[str | None, Sequence[Answered]]


def evaluate_model(text: str, options: EvalOptions) -> EvalRecord:
    """`abl-mlx eval`: evaluate a model, a GGUF or a server, alone or with a baseline.

    Args:
        text: the target as the user typed it.
        options: the chosen options.

    Raises:
        UserError: when the input is bad or a target fails; earlier verdicts stay in the journal.
    """
    targeting = options.targeting
    with ExitStack() as stack:
        template = options.chatting.template
        source = targets.find(text, template)
        other = None if targeting.baseline is None else targets.find(targeting.baseline, template)
        for one in (source, other):
            if one is not None:
                stack.enter_context(one)
        job = Job(text, source, other, options, _prompts(source, other, options), Clock())
        before = check(job)
        published = evidence.check(job)
        with journal.opened(targeting.resume, job.identity) as kept:
            record, columns = _measure(job, kept)
            return _finish(job, record, columns, before, published)


def _measure(job: Job, kept: journal.Journal | None) -> tuple[EvalRecord, dict[str, Answers]]:
    """Measure the baseline and then the model, with one of them in memory at a time.

    Returns:
        The record without its limits, and the answers by the model's name.
    """
    options, targeting, clock = job.options, job.options.targeting, job.clock
    with ExitStack() as stack:
        by: Judge = by_markers
        if options.judging.judge is not None:
            by = stack.enter_context(judges.opened(options, clock))
        baseline: Asked | None = None
        columns: dict[str, Answers] = {}
        measure_kl: Callable[[Target], Divergence] | None = None
        if targeting.baseline is not None:
            opened = targets.opened(
                targeting.baseline, job.other, options, clock, targeting.baseline_model
            )
            with opened as target:
                baseline, columns[target.name] = _measured(job, target, "baseline", kept, by)
                measure_kl = _divergence(job, target, stack)
            del target, opened
            let_go()
        kl: Divergence | None = None
        steered_by: SteeredBy | None = None
        with targets.opened(job.text, job.source, options, clock, targeting.model) as target:
            if (model := steered_target.steered(target, job.source, options)) is not None:
                target = model.target(target)
                steered_by = model.record(job.parts)
            asked, answers = _measured(job, target, "target", kept, by)
            name = target.name if target.name not in columns else f"{target.name} (target)"
            columns[name] = answers
            if measure_kl is not None:
                with clock.step("measure KL"):
                    kl = measure_kl(target)
            del target, model
        if job.lengths:
            baseline, asked = _at_enough_tokens(job, baseline, asked, columns)
        tasks = options.metrics.lm_eval
        record = EvalRecord(
            **asked.values_by_field,
            prompts=job.prompts,
            kl=kl,
            lm_eval=None if tasks is None else _lm_eval(job, tasks),
            baseline=baseline,
            paired=None if baseline is None else _paired(baseline, asked),
            paired_tool_calls=_paired_calls(baseline, asked),
            steered=steered_by,
            seconds=clock.seconds,
        )
    return record, columns


def _measured(
    job: Job, target: Target, role: str, kept: journal.Journal | None, by: Judge
) -> tuple[Asked, Answers]:
    """Evaluate one model.

    Args:
        job: the evaluation.
        target: the model.
        role: ``target`` or ``baseline``, under which the journal keeps the answers.
        kept: the journal; None to keep answers in memory only.
        by: the judge.

    Returns:
        The model's part of the record, and its answers.
    """
    options, clock = job.options, job.clock
    section = Section() if kept is None else kept.section(role, target.identity | job.how)
    found_calls: ToolCalls | None = None
    if options.metrics.tool_calls:
        # First, since a model may have no place for tools.
        with clock.step("ask the check of function calls"):
            found_calls = tool_tasks.record(target)
    found_recognition: Recognition | None = None
    if options.metrics.recognition:  # first, because not every server can
        with clock.step("ask what is harmful"):
            harmful, harmless = job.sets.harmful.test, job.sets.harmless.test
            found_recognition = recognition.record(target, harmful, harmless)
    with clock.step(f"ask {target.name}"):
        modes, read = _in_modes(job, target, section, by)
    answers = modes[job.modes[0]]
    found_perplexity: Perplexity | None = None
    if options.metrics.perplexity:
        with clock.step("measure perplexity"):
            found_perplexity = perplexity.record(target, tokens=_perplexity_tokens(job))
    found_capability: Capability | None = None
    if options.metrics.capability:
        with clock.step("ask the capability check"):
            found_capability = capability.record(target)
    scored: dict[str, Scored] | None = None
    if job.scorers:
        with clock.step("ask the prompts of scorers"):
            scored = measured.record(target.ask, job.scorers)
    asked = Asked(
        **replace(_rates_by_mode(job, modes), recognition=found_recognition).values_by_field,
        abl_mlx=__version__,
        source=target.name,
        model=target.model,
        runtime=target.runtime,
        judge=job.judge,
        max_tokens=options.replying.max_tokens,
        settled=read,
        thinking=job.modes[0],
        thought_tokens=options.prompting.thought_tokens if any(job.modes) else None,
        note=target.note,
        template=job.template,
        verdicts=letters(answers, job.parts),
        judging=None if options.judging.judge is None else judge.record(answers),
        perplexity=found_perplexity,
        capability=found_capability,
        tool_calls=found_calls,
        scorers=scored,
    )
    return asked, modes


def _in_modes(
    job: Job, target: Target, section: Section, by: Judge
) -> tuple[Answers, Settled | None]:
    """The judged replies to all prompts in every mode of thinking, the model loaded once.

    Returns:
        The answers, and how far replies behind the first were read; None where all were read whole.
    """
    parts = {
        mode: {name: part.asked(thinking=mode) for name, part in job.parts.items()}
        for mode in job.modes
    }
    prompts = [one for mine in parts.values() for part in mine.values() for one in part.prompts]
    longest = max(_longest(job, mode) for mode in job.modes)
    with target.held(prompts, longest) as held:
        if job.shortens and target.endpoint is None:
            told, read = eval_length.asked(held, parts[None], job.options.replying, section)
            return {None: settled(told)}, read
        found = {mode: _in_mode(job, held, mode, mine, section, by) for mode, mine in parts.items()}
    if target.runtime == "server":
        thinking_switch.note_alike(target.name, list(found.values()))
    return found, None


def _longest(job: Job, mode: str | None) -> int:
    return held_out.longest(job.options.replying.max_tokens, mode, job.options.prompting)


def _in_mode(
    job: Job,
    target: Target,
    mode: str | None,
    parts: Mapping[str, PromptSet],
    section: Section,
    by: Judge,
) -> list[Answered]:
    """The judged replies to all prompts in one mode of thinking."""
    asked = job.options.replying.but(max_tokens=_longest(job, mode))
    return settled(ask(target, parts, asked, section, by, job.lengths))


def _rates_by_mode(job: Job, modes: Mapping[str | None, Sequence[Answered]]) -> Refusals:
    """The rates of the first mode of thinking, with those of the others."""
    first, *others = modes
    found = {
        thinking.name(mode): replace(
            OtherMode.of_mode(behaviour(modes[mode], job.parts)),
            verdicts=letters(modes[mode], job.parts),
        )
        for mode in others
    }
    return replace(behaviour(modes[first], job.parts), modes=found or None)


def _at_enough_tokens(
    job: Job, baseline: Asked | None, asked: Asked, columns: Mapping[str, Answers]
) -> tuple[Asked | None, Asked]:
    """The two models with rates of replies that are cut where that suffices for both."""
    every = [[one for mine in modes.values() for one in mine] for modes in columns.values()]
    number = length_sweep.judged_at(every, job.lengths)
    models = [*([] if baseline is None else [baseline]), asked]
    cut = []
    for one, wholes in zip(models, columns.values(), strict=True):
        modes = {mode: [one.cut(number) for one in mine] for mode, mine in wholes.items()}
        sets = {
            name if mode == job.modes[0] else f"{name}, thinking {thinking.name(mode)}": answers
            for mode, mine in wholes.items()
            for name, answers in _by_set(mine, job.parts)
        }
        first = modes[job.modes[0]]
        rates = replace(_rates_by_mode(job, modes), recognition=one.recognition)
        cut.append(
            replace(
                one,
                **rates.values_by_field,
                max_tokens=job.lengths[number],
                thought_tokens=None,
                verdicts=letters(first, job.parts),
                judging=None if one.judging is None else judge.record(first),
                length_sweep=length_sweep.record(sets, job.lengths),
            )
        )
    return (None if baseline is None else cut[0]), cut[-1]


def _lm_eval(job: Job, tasks: str) -> dict[str, dict[str, Any]]:
    """The results of lm-evaluation-harness."""
    assert job.source is not None  # `eval_job.check` has checked it
    assert job.source.folder is not None
    let_go()
    with job.clock.step("run lm-evaluation-harness"):
        return lm_eval_harness.run(job.source.folder, tasks, limit=job.options.prompting.limit)


def _finish(
    job: Job,
    record: EvalRecord,
    columns: Mapping[str, Answers],
    before: EarlierEval | None,
    published: EvalRecord | None,
) -> EvalRecord:
    """The whole record, with the limits; also writes the files for which the user asked."""
    options, replying = job.options, job.options.replying
    if checks := gate.check(record, options.limits, before, published):
        passed = all(one.passed for one in checks)
        record = replace(record, gate=Gate(passed=passed, checks=checks))
    if options.junit is not None:
        gate.write_junit(options.junit, record)
    lines = _reply_lines(job, columns)
    if replying.save_replies is not None:
        evaluate.write_lines(replying.save_replies, lines)
    if replying.report is not None:
        _write_report(job, record, lines)
    evidence.sign_evaluation(job, record)
    return record


def _perplexity_tokens(job: Job) -> int | None:
    """How many tokens are predicted for both models; fewer if one of them runs in llama.cpp."""
    local = [one for one in (job.source, job.other) if one is not None]
    runtimes = {targets.runtime_of(one, job.options.targeting.runtime) for one in local}
    return None if runtimes == {"mlx-lm"} else perplexity.LLAMACPP_TOKENS


def _prompts(source: ModelFile | None, other: ModelFile | None, options: EvalOptions) -> PromptSets:
    """The prompt sets; those for a server are chosen by its baseline."""
    sets = prompt_choice.load(source or other, options.prompting)
    return sets if other is None else prompt_lengths.fitting(sets, other)


# --- the record ----------------------------------------------------------------------------------


def behaviour(answers: Sequence[Answered], parts: Mapping[str, PromptSet]) -> Refusals:
    """Rates with their intervals, by set and category.

    Args:
        answers: to all prompts of ``parts``, set after set.
    """
    rates: dict[str, Rates] = {}
    seen: dict[str, list[Seen]] = {}
    expected: float | None = None
    for name, mine in _by_set(answers, parts):
        rates[name] = rates_of([one.verdict for one in mine], parts[name].prompts)
        seen[name] = [Seen(one.verdict, one.oddity, one.same) for one in mine]
        exact = [one.exact for one in mine if one.exact is not None]
        if name == "harmful" and exact:
            expected = sum(exact) / len(exact)
    thoughts = thought_figures.figures(
        Thought(one.words, one.oddity is not Oddity.UNFINISHED, one.thought_loops)
        for one in answers
    )
    return refusals(rates, reply_notes.notes_on(seen), expected, thoughts)


def letters(answers: Sequence[Answered], parts: Mapping[str, PromptSet]) -> dict[str, str]:
    """Name of each set -> its verdicts, a letter for each prompt."""
    return {
        name: "".join(LETTERS[one.verdict] for one in mine)
        for name, mine in _by_set(answers, parts)
    }


def _by_set(
    answers: Sequence[Answered], parts: Mapping[str, PromptSet]
) -> Iterator[tuple[str, Sequence[Answered]]]:
    start = 0
    for name, part in parts.items():
        yield name, answers[start : start + len(part)]
        start += len(part)


def _paired(baseline: Asked, asked: Asked) -> dict[str, Comparison]:
    """Name of each set -> the comparison of its refusals with the baseline's."""
    return {name: paired(baseline.verdicts[name], told) for name, told in asked.verdicts.items()}


def _paired_calls(baseline: Asked | None, asked: Asked) -> Comparison | None:
    """How many more tasks with functions are right than of the baseline."""
    if baseline is None or baseline.tool_calls is None or asked.tool_calls is None:
        return None
    return paired(baseline.tool_calls.outcomes, asked.tool_calls.outcomes)


def paired(first: str, second: str) -> Comparison:
    """Compare two models on the same prompts by the letter R, given a letter for each."""
    counts = Paired.of(*gate.both_judged(first, second))
    return Comparison(
        n=counts.n,
        both=counts.both,
        gained=counts.gained,
        lost=counts.lost,
        neither=counts.neither,
        difference=counts.difference,
        interval=list(counts.interval),
        p=counts.p,
    )


def _divergence(
    job: Job, baseline: Target, stack: ExitStack
) -> Callable[[Target], Divergence] | None:
    """A function that measures the target's KL from the baseline; None without probabilities.

    Args:
        job: the evaluation.
        baseline: the baseline.
        stack: keeps the file with the baseline's probabilities open.
    """
    if job.options.steering.direction is not None and baseline.chat is None:
        return None
    if job.source is None or (baseline.chat is None and baseline.runtime != "llama.cpp"):
        return None
    runtime = targets.runtime_of(job.source, job.options.targeting.runtime)
    if runtime == "llama-server":
        return None
    from abl_mlx.behaviour import divergence

    with job.clock.step("measure KL"):
        prompts = job.sets.harmless.test.prompts
        exactly = runtime == "mlx-lm"
        return stack.enter_context(
            divergence.measured_against(
                baseline, prompts, exactly=exactly, batch_size=job.options.replying.batch_size
            )
        )


def _reply_lines(job: Job, columns: Mapping[str, Answers]) -> list[dict[str, Any]]:
    """For each prompt its ``set``, the ``prompt``, and the replies that were kept.

    Where there are several modes of thinking, a line has its own, and each prompt a line of each.
    """
    asked = [(name, text) for name, part in job.parts.items() for text in part.texts]
    return [
        {"set": name, "prompt": text}
        | ({"thinking": thinking.name(mode)} if len(job.modes) > 1 else {})
        | {who: answers[mode][number].reply for who, answers in columns.items()}
        for mode in job.modes
        for number, (name, text) in enumerate(asked)
    ]


def _write_report(job: Job, record: EvalRecord, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write the report of an evaluation, with replies if the user asked for them."""
    from abl_mlx.reports.replay import command_line

    replying = job.options.replying
    assert replying.report is not None
    command = command_line(["eval", job.text], job.options.record(), EvalOptions().record())
    shown = lines if replying.save_completions else ()
    write(replying.report, eval_page(record, command, shown))
