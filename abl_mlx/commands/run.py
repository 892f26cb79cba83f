"""`abl-mlx run`: six steps from a model to what was written of it, and how that behaves.

The same steps for every format: load the model, look for its direction, ask it as it is, write,
judge what was written, and put it on record. With ``--induce`` a constant is looked for instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from abl_mlx.behaviour import evaluate
from abl_mlx.behaviour.evaluate import Behaviour, InLlamaCpp
from abl_mlx.choices import Replying, RunOptions
from abl_mlx.commands import prompt_choice
from abl_mlx.commands.edit_choice import edit_of, make_edit, warn_of_strength
from abl_mlx.commands.find import find_behind_openings, find_reply_prefix
from abl_mlx.commands.forecast import forecast
from abl_mlx.commands.held_out import ask, component_sample
from abl_mlx.directions import induction
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.edits import exactness
from abl_mlx.edits.edit import Edit, orthonormal
from abl_mlx.inputs.sets import PromptSets
from abl_mlx.models import capture, given_template, memory
from abl_mlx.models.loaded_model import LoadedModel
from abl_mlx.outputs import destinations, induced, staging
from abl_mlx.outputs.gguf import GgufFile
from abl_mlx.outputs.model_file import ModelFile, PlannedEdit, find_gguf, find_model
from abl_mlx.outputs.record_parts import hashes, start_record, worst_leak
from abl_mlx.outputs.staging import Output, Written
from abl_mlx.records.edits import Component, Edited, EvaluatedEdit, RunRecord
from abl_mlx.reports.companions import write_companions
from abl_mlx.reports.page_run import staged_run_page, write_run_page
from abl_mlx.support.arrays import let_go
from abl_mlx.support.clock import Clock
from abl_mlx.support.console import say
from abl_mlx.support.notes import joined
from convert.base.atomic import check_new
from convert.base.errors import UserError

#: Of the held-out prompts, how many are run to see that an edit of float weights is exact after
#: every layer.
EXACTNESS_PROMPTS = 4


@dataclass(frozen=True)
class Job:
    """What a run was asked for, once it is known that it can be done.

    Attributes:
        model: what the direction is measured on.
        base: the GGUF of the same model that is edited in its stead (``--gguf``).
        paths: one or more outputs, none of which exists yet.
        sets: what the model is asked.
        clock: the time of each step.
    """

    model: ModelFile
    base: GgufFile | None
    paths: Sequence[Path]
    sets: PromptSets
    options: RunOptions
    clock: Clock

    @property
    def target(self) -> ModelFile:
        """What is edited."""
        return self.model if self.base is None else self.base

    def ask(self, answer: evaluate.Chat) -> Behaviour:
        """What a runtime does on the held-out prompts."""
        options = self.options
        borderline = prompt_choice.borderline_asked(self.sets, options.prompting, options.finding)
        return ask(answer, self.sets, borderline, options.replying.max_tokens)


@dataclass(frozen=True)
class Found:
    """What was looked for.

    Attributes:
        direction: the direction, or the constant as one.
        plan: what is done with it, ready to be written.
        edit: its removal; None where a constant is added.
    """

    direction: DirectionFile
    plan: PlannedEdit
    edit: Edit | None


@dataclass(frozen=True)
class Before:
    """The model as it is, to compare with.

    Attributes:
        behaviour: what it does.
        base: its distributions over the opening of its own replies.
        prefixes: the tokens with which all of its replies open, by the prompts' thinking.
        sample: held-out prompts, encoded, in which the component is looked for.
        component: the largest share of the direction in the stream; None for a constant.
    """

    behaviour: Behaviour
    base: evaluate.Baseline
    prefixes: dict[str | None, tuple[int, ...]]
    sample: Sequence[Sequence[int]]
    component: float | None


@dataclass(frozen=True)
class Judged:
    """An output as it was found to be, all of it from what was written.

    Attributes:
        written: which.
        record: what is said of it.
        behaviour: what it does.
    """

    written: Written
    record: EvaluatedEdit
    behaviour: Behaviour


def run(text: str, paths: Sequence[Path], options: RunOptions) -> RunRecord:
    """`abl-mlx run`: measure, edit, write, and evaluate what was written.

    Args:
        text: what the user typed for the model.
        paths: one or more outputs, none of which exists yet.

    Raises:
        UserError: bad input, told in one sentence; nothing is left behind.
    """
    options = replace(options, searching=options.searching.beside(paths[0]))
    editing, writing, finding = options.editing, options.writing, options.finding
    warn_of_strength(editing.strength)
    template = options.chatting.template
    with ExitStack() as files:
        model = files.enter_context(find_model(text, template))
        base = (
            None if options.gguf is None else files.enter_context(find_gguf(options.gguf, template))
        )
        target = model if base is None else base
        destinations.check(paths, target, editing, writing)
        _check_places(paths, options.replying)
        if base is not None and model.folder is None:
            raise UserError(
                f"--gguf {options.gguf}: MODEL is a GGUF itself; leave --gguf out, or name the MLX "
                "or Hugging Face model to measure on."
            )
        sets = prompt_choice.load(model, options.prompting, options.finding.borderline)
        memory.check(model.source.title, model.size, asked=options.memory_check)
        # Report too few borderline prompts before anything is loaded.
        prompt_choice.borderline_part(sets, options.prompting, finding, "test")
        target.check(paths, editing, writing)
        record = _six_steps(Job(model, base, paths, sets, options, Clock()), _look)
    destinations.hand_to_ollama(paths, writing)
    return record


def run_induced(text: str, paths: Sequence[Path], options: RunOptions) -> RunRecord:
    """`abl-mlx run --induce`: choose a constant, write it, and ask what was written.

    Args:
        text: what the user typed for the model.
        paths: one or more outputs, none of which exists yet.

    Raises:
        UserError: bad input, an output that cannot hold a constant, no constant that works;
            nothing is left behind.
    """
    with find_model(text, options.chatting.template) as model:
        staging.check(paths, model.source, model.adapter, vectors=True)
        induced.check(paths, options)
        _check_places(paths, options.replying)
        sets = prompt_choice.load(model, options.prompting, options.finding.borderline)
        memory.check(model.source.title, model.size, asked=options.memory_check)
        return _six_steps(Job(model, None, paths, sets, options, Clock()), _look_for_constant)


def _check_places(paths: Sequence[Path], replying: Replying) -> None:
    """Refuse replies and pages that exist or cannot be written."""
    if replying.save_replies is not None:
        check_new(replying.save_replies)
    staging.check_reports(paths, replying.report)


def _six_steps(job: Job, look: Callable[[Job, LoadedModel], Found]) -> RunRecord:
    """The run itself. One model is in memory at a time.

    Args:
        look: finds what is written: a direction to remove, or a constant to add.
    """
    with ExitStack() as stack:
        loaded = _load(job)
        found = look(job, loaded)
        before = _ask_before(job, loaded, found, stack)
        staged = stack.enter_context(staging.staging(job.paths))
        known = _start(job, found)
        written = _write(job, found, staged)
        judged = _judge(job, found, before, written)
        record = _finish(job, known, before, judged)
        replies = _replies(job, before, judged)
        paged = staged_run_page(
            record, [one.staged for one in staged], job.options.replying, replies, job.sets
        )
    if not paged:
        write_run_page(record, job.paths, job.options.replying, replies, job.sets)
    return record


# --- 1. load -----------------------------------------------------------------------------------


def _load(job: Job) -> LoadedModel:
    """The model that is measured, with its residual writers."""
    with job.clock.step("load the model"):
        chat = job.model.load()
    if job.base is not None:
        with job.clock.step("compare the two models"):
            job.base.check_same(chat, job.options.writing.tensors)
    with job.clock.step("find the residual writers"):
        capture.check_stream(chat)
        return LoadedModel(chat, job.model.find_writers(chat, job.options.writing.tensors))


# --- 2. look -----------------------------------------------------------------------------------


def _look(job: Job, loaded: LoadedModel) -> Found:
    """The direction, and its removal from the files."""
    chat, options = loaded.chat, job.options
    # An edit that would touch nothing is better told now than after the measurement.
    make_edit(mx.ones((1, chat.width)), options.editing).chosen(loaded.writers)
    direction = find_behind_openings(
        chat, loaded.writers, job.sets, options.measuring, job.clock, 1 + len(job.paths),
        options.replying.max_tokens,
    )  # fmt: skip
    if job.base is not None:
        prefixes = chat.reply_prefixes
        del chat
        loaded.let_go()
        with job.clock.step("load the GGUF"):
            chat = job.base.load()
        chat.reply_prefixes = prefixes
        loaded.hold(chat, [])
    edit = edit_of(direction, options.editing)
    plan = job.target.plan(edit, direction, job.paths, loaded, options.editing, options.writing)
    return Found(direction, plan, edit)


def _look_for_constant(job: Job, loaded: LoadedModel) -> Found:
    """The constant that makes the model refuse, and its place in the files."""
    chat, options = loaded.chat, job.options
    with job.clock.step("find how replies open"):
        prefix, rate = find_reply_prefix(chat, job.sets, options.replying.batch_size)
        chat.reply_prefixes[job.sets.thinking] = prefix
    told = forecast(
        chat, job.sets, options.measuring, 1 + len(job.paths), rate,
        max_tokens=options.replying.max_tokens, inducing=True,
    )  # fmt: skip
    say(str(told))
    vectors = [path for path in job.paths if staging.format_of(path) == staging.VECTOR]
    job.model.check_constant([path for path in job.paths if path not in vectors], loaded)
    with job.clock.step("choose a constant"):
        found = induction.choose(
            chat, job.sets, options.finding, strength=options.editing.strength,
            batch_size=options.replying.batch_size, first_layer=1 if vectors else 0,
        )  # fmt: skip
    direction = DirectionFile(found.vector[None], None, {"summary": found.summary})
    return Found(
        direction, job.model.plan_constant(found, direction, loaded, options.writing), None
    )


# --- 3. ask the model as it is -----------------------------------------------------------------


def _ask_before(job: Job, loaded: LoadedModel, found: Found, stack: ExitStack) -> Before:
    """What the model does before anything is changed.

    Args:
        stack: keeps what the distributions are kept in.
    """
    chat, batch_size, sets = loaded.chat, job.options.replying.batch_size, job.sets
    in_llamacpp = _in_llamacpp(job, found.plan.original)
    with job.clock.step("evaluate before"):
        base = stack.enter_context(
            evaluate.baseline(
                chat,
                sets.harmless.test.take(evaluate.KL_PROMPTS).prompts,
                batch_size=batch_size,
            )
        )
        sample = component_sample(chat, sets)
        present = None
        if found.edit is not None:
            present = evaluate.component(chat, sample, _unit(found))["max"]
        if in_llamacpp is None:
            before = job.ask(evaluate.in_mlx(chat, batch_size=batch_size))
    prefixes = chat.reply_prefixes
    del chat
    if not found.plan.needs_model:
        loaded.let_go()
    if in_llamacpp is not None:
        with job.clock.step("evaluate before"):
            before = job.ask(in_llamacpp)
    return Before(before, base, prefixes, sample, present)


def _in_llamacpp(job: Job, runtime: InLlamaCpp | None) -> InLlamaCpp | None:
    """The real llama.cpp as the job talks to a model; None where it is not there."""
    if runtime is None or not evaluate.llamacpp_is_there():
        return None
    return replace(runtime, given=job.model.given)


def _unit(found: Found) -> mx.array:
    """The direction, orthonormal."""
    return orthonormal(found.direction.selected)


# --- 4. write ----------------------------------------------------------------------------------


def _start(job: Job, found: Found) -> Edited:
    """What is known before anything is written."""
    target, options = job.target, job.options
    template = given_template.record(job.model.given)
    with job.clock.step("hash the source"):
        hashed = hashes(target.hashes(), found.direction, options, template)
    return start_record(
        target.source, job.paths, options, found.direction,
        hashes=hashed, mtp=found.plan.predicting(),
    )  # fmt: skip


def _write(job: Job, found: Found, staged: Sequence[Output]) -> list[Written]:
    """Every output under its temporary name, its leak measured."""
    return [found.plan.write(one, job.clock) for one in staged]


# --- 5. judge ----------------------------------------------------------------------------------


def _judge(job: Job, found: Found, before: Before, written: Sequence[Written]) -> list[Judged]:
    """Every output as it was written.

    First those that are judged in the model that is still loaded; then it is let go, and the others
    are loaded one by one.
    """
    judged: dict[Path, Judged] = {}
    for on_loaded in (True, False):
        for one in written:
            if one.on_loaded == on_loaded:
                with job.clock.step(f"evaluate {one.output.path.name}"):
                    judged[one.output.path] = _judge_one(job, found, before, one)
        found.plan.let_go()
    return [judged[path] for path in job.paths]


def _judge_one(job: Job, found: Found, before: Before, one: Written) -> Judged:
    batch_size = job.options.replying.batch_size
    in_llamacpp = _in_llamacpp(job, one.llamacpp)
    left: float | None = None
    with one.opened() as chat:
        chat.given_template = job.model.given
        chat.reply_prefixes = before.prefixes
        if found.edit is not None and one.limit is not None:
            prompts = before.sample[:EXACTNESS_PROMPTS]
            exactness.check(
                chat, found.edit, prompts, limit=one.limit, writers=one.writers_in(chat)
            )
        kl = evaluate.kl(chat, before.base)
        if found.edit is not None:
            left = evaluate.component(chat, before.sample, _unit(found))["max"]
        if in_llamacpp is None:
            after = job.ask(evaluate.in_mlx(chat, batch_size=batch_size))
    del chat
    let_go()
    if in_llamacpp is not None:
        after = job.ask(in_llamacpp)
    note = one.notes[in_llamacpp is not None]
    facts = replace(
        one.facts, note=joined(one.facts.note, note, given_template.note(job.model.given))
    )
    record = EvaluatedEdit(
        **facts.values_by_field,
        kl=kl,
        component=left,
        runtime="mlx-lm" if in_llamacpp is None else "llama.cpp",
        after=after.record(),
    )
    return Judged(one, record, after)


# --- 6. put on record --------------------------------------------------------------------------


def _finish(job: Job, known: Edited, before: Before, judged: Sequence[Judged]) -> RunRecord:
    """The whole record; what lies beside each output is written."""
    evaluations = [one.record for one in judged]
    first, component = evaluations[0], None
    if before.component is not None and first.component is not None:
        component = Component(before=before.component, after=first.component)
    record = RunRecord(
        **replace(known, seconds=job.clock.seconds).values_by_field,
        measured_on=None if job.base is None else job.model.source.name,
        induced=True if component is None else None,
        template=given_template.record(job.model.given),
        before=before.behaviour.record(),
        after=first.after,
        kl=first.kl,
        component=component,
        leak=None if component is None else worst_leak(evaluations),
        evaluations=evaluations,
    )
    target = job.target
    for one, described in zip(judged, record.evaluations, strict=True):
        write_companions(one.written.output, target.source, target.folder, record, described)
    return record


def _replies(job: Job, before: Before, judged: Sequence[Judged]) -> Mapping[str, Behaviour]:
    """Who -> what they did, for the page; saved where that was asked for."""
    replies = {"before": before.behaviour}
    replies |= {str(one.written.output.path): one.behaviour for one in judged}
    if job.options.replying.save_replies is not None:
        evaluate.save_replies(job.options.replying.save_replies, replies, job.sets)
    return replies
