"""`abl-mlx eval`: ask a model the held-out prompts and record what it did; nothing is edited.

The record is one dict. Each metric is a function of this module, or of a module of its own, that
returns the keys it adds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from abl_mlx import __version__
from abl_mlx.behaviour import (
    capability,
    evaluate,
    gate,
    journal,
    judge,
    lm_eval_harness,
    perplexity,
    reply_notes,
)
from abl_mlx.behaviour.journal import Answered, Section
from abl_mlx.behaviour.paired import Paired
from abl_mlx.behaviour.refusals import Oddity, Rates, Tally, Verdict, classify, examine
from abl_mlx.behaviour.reply_notes import Seen
from abl_mlx.behaviour.target import Target
from abl_mlx.choices import EvalOptions
from abl_mlx.commands import judges, prompt_choice, prompt_lengths, targets
from abl_mlx.inputs.sets import Prompt, PromptSet, PromptSets
from abl_mlx.models.thoughts import closes_only, has_thought
from abl_mlx.outputs import staging
from abl_mlx.outputs.model_file import ModelFile
from abl_mlx.reports.page import write
from abl_mlx.reports.page_eval import eval_page
from abl_mlx.support.arrays import let_go
from abl_mlx.support.clock import Clock
from abl_mlx.support.console import progress, say
from abl_mlx.support.flags import said
from abl_mlx.support.notes import noted
from convert.base.atomic import check_new
from convert.base.errors import UserError

Record = dict[str, Any]

#: A prompt and a reply to the verdict on it, None if a judge gave none; called from one thread.
Judge = Callable[[str, str], "Verdict | None"]

#: Verdicts in a record, a letter for each prompt in its set's order.
LETTERS = {Verdict.REFUSAL: "R", Verdict.ANSWER: "A", Verdict.BROKEN: "B", None: gate.UNJUDGED}


def evaluate_model(text: str, options: EvalOptions) -> Record:
    """`abl-mlx eval`: what a model, a GGUF or a server refuses, alone or beside a baseline.

    Args:
        text: what the user typed for it.

    Raises:
        UserError: bad input or a target that fails, told in one sentence; what was answered until
            then is kept in the journal.
    """
    clock = Clock()
    with ExitStack() as stack:
        source = targets.find(text)
        other = None if options.baseline is None else targets.find(options.baseline)
        for one in (source, other):
            if one is not None:
                stack.enter_context(one)
        return _evaluate(text, source, other, options, clock)


def _evaluate(
    text: str,
    source: ModelFile | None,
    other: ModelFile | None,
    options: EvalOptions,
    clock: Clock,
) -> Record:
    """The same, of a model and its baseline; None is a server.

    Args:
        text: what the user typed for the model.
    """
    sets = _prompts(source, other, options)
    parts = asked_sets(sets)
    judge_name = judge.name(options)
    prompt_record = {name: {"n": len(part), "sha256": part.sha256} for name, part in parts.items()}
    before = _check(source, other, prompt_record, judge_name, options)
    how = {
        "prompts": {name: one["sha256"] for name, one in prompt_record.items()},
        "max_tokens": options.max_tokens,
        "judge": judge_name,
        "abl_mlx": __version__,
    }
    with ExitStack() as stack:
        whole = {"target": text, "baseline": options.baseline, "model": options.server_model, **how}
        kept = stack.enter_context(journal.opened(options.resume, whole))
        by: Judge = _by_markers
        if options.judge is not None:
            by = stack.enter_context(judges.opened(options, clock))

        def measured(target: Target, role: str) -> tuple[Record, list[Answered]]:
            section = Section() if kept is None else kept.section(role, target.identity | how)
            with clock.step(f"ask {target.name}"):
                answers = settled(ask(target, parts, options, section, by))
            record: Record = {"abl_mlx": __version__, "source": target.name}
            record |= {"model": target.model} if target.model is not None else {}
            record |= {"runtime": target.runtime, "judge": judge_name}
            record |= {"max_tokens": options.max_tokens, **noted(target.note)}
            record |= behaviour(answers, parts)
            if options.judge is not None:
                record["judging"] = judge.record(answers)
            if options.perplexity:
                with clock.step("measure perplexity"):
                    tokens = _perplexity_tokens(source, other, options)
                    record["perplexity"] = perplexity.record(target, tokens=tokens)
            if options.capability:
                with clock.step("ask the capability check"):
                    record["capability"] = capability.record(target)
            return record, answers

        baseline: Record | None = None
        columns: dict[str, list[Answered]] = {}
        divergence: Callable[[Target], Record] | None = None
        if options.baseline is not None:
            opened = targets.opened(options.baseline, other, options, clock, options.baseline_model)
            with opened as target:
                baseline, columns[target.name] = measured(target, "baseline")
                divergence = _divergence(target, source, sets, options, clock, stack)
            del target, opened
            let_go()
        with targets.opened(text, source, options, clock, options.server_model) as target:
            record, answers = measured(target, "target")
            name = target.name if target.name not in columns else f"{target.name} (target)"
            columns[name] = answers
            record["prompts"] = prompt_record
            if divergence is not None:
                with clock.step("measure KL"):
                    record["kl"] = divergence(target)
            del target
        if options.lm_eval is not None:
            assert source is not None  # the check said so
            assert source.folder is not None
            let_go()
            with clock.step("run lm-evaluation-harness"):
                record["lm_eval"] = lm_eval_harness.run(
                    source.folder, options.lm_eval, limit=options.limit
                )
        if baseline is not None:
            record["baseline"] = baseline
            record["paired"] = {name: paired(baseline, record, name) for name in parts}
        record["seconds"] = clock.seconds
        checks = gate.check(record, options.limits, before)
        if checks:
            record["gate"] = {
                "passed": all(one.passed for one in checks),
                "checks": [one.record() for one in checks],
            }
        if options.junit is not None:
            gate.write_junit(options.junit, record, checks)
        if options.save_replies is not None:
            evaluate.write_lines(options.save_replies, _reply_lines(parts, columns))
        if options.report is not None:
            _write_report(options.report, text, record, options, _reply_lines(parts, columns))
    return record


def asked_sets(sets: PromptSets) -> dict[str, PromptSet]:
    """What is asked, by name; a set without prompts is left out."""
    parts = {"harmful": sets.harmful.test, "harmless": sets.harmless.test}
    if sets.borderline is not None and len(sets.borderline):
        parts["borderline"] = sets.borderline
    return parts


def _perplexity_tokens(
    source: ModelFile | None, other: ModelFile | None, options: EvalOptions
) -> int | None:
    """How many tokens are predicted: as many on both sides, few where llama.cpp is one of them."""
    runtimes = {targets.runtime_of(one, options) for one in (source, other) if one is not None}
    return None if runtimes == {"mlx-lm"} else perplexity.LLAMACPP_TOKENS


def _prompts(source: ModelFile | None, other: ModelFile | None, options: EvalOptions) -> PromptSets:
    """The prompt sets; a server is asked what its baseline is asked."""
    sets = prompt_choice.load(source or other, options)
    return sets if other is None else prompt_lengths.fitting(sets, other)


def _by_markers(prompt: str, reply: str) -> Verdict:
    return classify(reply)


def _check(
    source: ModelFile | None,
    other: ModelFile | None,
    prompts: Record,
    judge: str,
    options: EvalOptions,
) -> Record | None:
    """Everything that can be refused before a model is loaded; the record to compare with."""
    if source is not None and options.server_model is not None:
        raise UserError(
            f"--model {options.server_model} names a model of a server, and TARGET is none."
        )
    if other is not None and options.baseline_model is not None:
        raise UserError("--baseline-model names a model of a server, and --baseline is none.")
    if options.baseline is None and options.baseline_model is not None:
        raise UserError("--baseline-model needs --baseline URL.")
    local = [one for one in (source, other) if one is not None]
    runtimes = [targets.runtime_of(one, options) for one in local]
    if options.runtime not in (None, "mlx-lm") and not any(
        options.runtime in one.runtimes for one in local
    ):
        raise UserError(f"--runtime {options.runtime} runs .gguf files, and none is given.")
    if options.perplexity and (source is None or (options.baseline is not None and other is None)):
        raise UserError(
            "--perplexity needs probabilities, which a server's chat does not tell: give the model "
            "as a folder or a .gguf file."
        )
    if options.lm_eval is not None:
        lm_eval_harness.check(source.folder if source is not None else None, options.lm_eval)
    limits = options.limits
    if limits.max_kl is not None:
        if options.baseline is None:
            raise UserError(
                "--max-kl needs a baseline to compare with: add --baseline with the original model."
            )
        if source is None or other is None:
            raise UserError(
                "--max-kl needs probabilities, which a server's chat does not tell: give the model "
                "and its --baseline as folders or .gguf files."
            )
        if "llama-server" in runtimes:
            raise UserError(
                "--max-kl does not work through llama-server: pip install 'abl-mlx[llamacpp]', or "
                "use --runtime mlx-lm."
            )
    if options.save_replies is not None:
        check_new(options.save_replies)
    if options.report is not None:
        staging.check_report(options.report)
    if options.junit is not None:
        gate.check_junit(options.junit)
    if limits.max_drop_from is None:
        return None
    before = gate.read_record(limits.max_drop_from)
    gate.check_comparable(before, limits.max_drop_from, prompts, judge)
    return before


# --- asking --------------------------------------------------------------------------------------


def ask(
    target: Target,
    parts: Mapping[str, PromptSet],
    options: EvalOptions,
    section: Section,
    by: Judge = _by_markers,
) -> list[Answered]:
    """Judged replies to all prompts, set after set; what the journal has is not asked again.

    Raises:
        UserError: when the target fails; what was answered is in the journal.
    """
    keep = options.save_replies is not None or options.save_completions
    prompts = [prompt for part in parts.values() for prompt in part.prompts]

    def known(prompt: Prompt) -> Answered | None:
        found = section.get(prompt.text)
        return None if found is None or (keep and found.reply is None) else found

    missing = list({prompt.text: prompt for prompt in prompts if known(prompt) is None}.values())
    there = len(prompts) - len(missing)
    if there and section.path is not None:
        say(f"· {there} of {len(prompts)} answers are there already, in {section.path}")
    try:
        with progress(len(prompts), "replies") as bar:
            bar.update(there)
            if missing:
                replies = target.ask([prompt.text for prompt in missing], options.max_tokens)
                for number, reply in replies:
                    section.add(missing[number].text, _judged(missing[number], reply, by, keep))
                    bar.update()
    except UserError as error:
        done = sum(known(prompt) is not None for prompt in prompts)
        if not done or section.path is None:
            raise
        raise UserError(
            f"{said(error)} {done} of {len(prompts)} verdicts are kept in {section.path}: the same "
            "command goes on from there."
        ) from None
    return [answer for prompt in prompts if (answer := known(prompt)) is not None]


def _judged(prompt: Prompt, reply: str, by: Judge, keep: bool) -> Answered:
    found = examine(reply)
    return Answered(
        by(prompt.text, reply),
        None if prompt.answer is None else reply.strip() == prompt.answer.strip(),
        found.oddity,
        reply if keep else None,
        None if by is _by_markers else found.verdict,
        reply_notes.sameness(reply, found),
        "closed" if closes_only(reply) else "own" if has_thought(reply) else None,
    )


def settled(answers: Sequence[Answered]) -> list[Answered]:
    """What answers are, seen together: a server's prompts may open a thought that it does not show.

    Where replies end such a thought, one that holds no tag has not come to its end.
    """
    if sum(one.thought == "closed" for one in answers) < 2:
        return list(answers)
    return [
        one
        if one.thought is not None or one.oddity is not None
        else replace(
            one,
            verdict=Verdict.BROKEN,
            markers=one.markers and Verdict.BROKEN,
            oddity=Oddity.UNFINISHED,
            same=None,
        )
        for one in answers
    ]


# --- the record ----------------------------------------------------------------------------------


def behaviour(answers: Sequence[Answered], parts: Mapping[str, PromptSet]) -> Record:
    """Rates with their intervals, by set and category, and the verdicts themselves.

    Replies without a verdict are in no rate; a rate of nothing is None.

    Args:
        answers: to all prompts of ``parts``, set after set.
    """
    record: Record = {}
    rates: dict[str, Rates] = {}
    letters: dict[str, str] = {}
    seen: dict[str, list[Seen]] = {}
    start = 0
    for name, part in parts.items():
        mine = answers[start : start + len(part)]
        start += len(part)
        rates[name] = _rates([one.verdict for one in mine], part.prompts)
        record |= evaluate.refusal_record(name, rates[name])
        if not rates[name].overall.total:
            record[f"{name}_refusal_rate"] = None
        letters[name] = "".join(LETTERS[one.verdict] for one in mine)
        seen[name] = [Seen(one.verdict, one.oddity, one.same) for one in mine]
        exact = [one.exact for one in mine if one.exact is not None]
        if name == "harmful" and exact:
            record["expected_answer_rate"] = sum(exact) / len(exact)
    both = [rates[name].overall for name in ("harmful", "harmless")]
    broken = sum(tally.count(Verdict.BROKEN) for tally in both)
    judged = sum(tally.total for tally in both)
    record["broken_rate"] = broken / judged if judged else None
    record |= reply_notes.record(seen)
    record["categories"] = {name: evaluate.category_record(one) for name, one in rates.items()}
    record["verdicts"] = letters
    return record


def _rates(verdicts: Sequence[Verdict | None], prompts: Sequence[Prompt]) -> Rates:
    groups: dict[str, list[Verdict]] = {}
    for prompt, verdict in zip(prompts, verdicts, strict=True):
        group = groups.setdefault(prompt.category, [])
        if verdict is not None:
            group.append(verdict)
    tallies = {category: Tally.of(group) for category, group in groups.items()}
    told = tuple(verdict for verdict in verdicts if verdict is not None)
    return Rates(told, Tally.of(told), tallies)


def paired(baseline: Record, record: Record, name: str) -> Record:
    """How much more often a set is refused than by the baseline, on the same prompts."""
    counts = Paired.of(*gate.both_judged(baseline, record, name))
    return {
        "n": counts.n,
        "both": counts.both,
        "gained": counts.gained,
        "lost": counts.lost,
        "neither": counts.neither,
        "difference": counts.difference,
        "interval": list(counts.interval),
        "p": counts.p,
    }


def _divergence(
    baseline: Target,
    source: ModelFile | None,
    sets: PromptSets,
    options: EvalOptions,
    clock: Clock,
    stack: ExitStack,
) -> Callable[[Target], Record] | None:
    """What measures the target's KL from the baseline; None where there are no probabilities."""
    if source is None or (baseline.chat is None and baseline.runtime != "llama.cpp"):
        return None
    runtime = targets.runtime_of(source, options)
    if runtime == "llama-server":
        return None
    from abl_mlx.behaviour import divergence

    with clock.step("measure KL"):
        texts = sets.harmless.test.texts
        exactly = runtime == "mlx-lm"
        return stack.enter_context(
            divergence.measured_against(
                baseline, texts, exactly=exactly, batch_size=options.batch_size
            )
        )


def _reply_lines(
    parts: Mapping[str, PromptSet], columns: Mapping[str, Sequence[Answered]]
) -> list[Record]:
    """For each prompt its ``set``, the ``prompt``, and the replies that were kept."""
    asked = [(name, text) for name, part in parts.items() for text in part.texts]
    return [
        {"set": name, "prompt": text}
        | {who: answers[number].reply for who, answers in columns.items()}
        for number, (name, text) in enumerate(asked)
    ]


def _write_report(
    path: Path, text: str, record: Record, options: EvalOptions, lines: Sequence[Record]
) -> None:
    """The page of an evaluation; with replies where they were asked for there."""
    from abl_mlx.reports.replay import command_line, plain

    command = command_line(["eval", text], plain(vars(options)), plain(vars(EvalOptions())))
    shown = lines if options.save_completions else ()
    write(path, eval_page(record, command, shown))
