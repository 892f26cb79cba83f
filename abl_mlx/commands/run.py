"""`abl-mlx run`: six steps from a model to evaluated outputs.

The steps are the same for every format: load the model, find its refusal direction, ask the
unedited model, write the outputs, judge them, and make the record. With ``--induce`` the second
step chooses a constant instead of a direction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from abl_mlx.behaviour import evaluate, exact_kl, kept_refusals, settling
from abl_mlx.behaviour.evaluate import Behaviour, InLlamaCpp
from abl_mlx.behaviour.scorers import scorer
from abl_mlx.choices import RunOptions
from abl_mlx.commands import constant_choice, edit_choice, prompt_choice, side_figures, streaming
from abl_mlx.commands.edit_choice import edit_of
from abl_mlx.commands.find import find_behind_openings, find_reply_prefix
from abl_mlx.commands.forecast import forecast
from abl_mlx.commands.held_out import HeldOut, Runtime, component_sample
from abl_mlx.commands.same_everywhere import check_same
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.edits import exactness
from abl_mlx.edits.edit import orthonormal
from abl_mlx.edits.weight_edit import WeightEdit
from abl_mlx.inputs.sets import PromptSets
from abl_mlx.models import capture, given_template
from abl_mlx.models.loaded_model import LoadedModel
from abl_mlx.models.readers import with_readers
from abl_mlx.outputs import apps, destinations, induced, reproduction, staging
from abl_mlx.outputs.gguf import GgufFile
from abl_mlx.outputs.model_file import ModelFile, PlannedEdit, find_gguf, find_model
from abl_mlx.outputs.record_parts import hashes, start_record, worst_leak
from abl_mlx.outputs.staging import Output, Written
from abl_mlx.records.edits import Component, Edited, EvaluatedEdit, RunRecord
from abl_mlx.records.evaluations import STAYING, Settled
from abl_mlx.records.measurements import Scored
from abl_mlx.reports.companions import write_companions
from abl_mlx.reports.page_run import staged_run_page, write_run_page
from abl_mlx.support.arrays import let_go
from abl_mlx.support.clock import Clock
from abl_mlx.support.console import say
from abl_mlx.support.notes import joined
from convert.base.cores import beside
from convert.base.errors import UserError

#: How many held-out prompts check that an edit of float weights is exact after every layer.
EXACTNESS_PROMPTS = 4


@dataclass(frozen=True)
class Job:
    """A run whose arguments were checked.

    Attributes:
        model: the model on which the direction is measured.
        base: a GGUF of the same model, which is edited instead of it (``--gguf``).
        paths: one or more outputs, none of which exists yet.
        sets: the prompts.
        clock: times the steps.
        scorers: of behaviours other than refusal.
    """

    model: ModelFile
    base: GgufFile | None
    paths: Sequence[Path]
    sets: PromptSets
    options: RunOptions
    clock: Clock
    scorers: Sequence[scorer.Scorer]

    @property
    def target(self) -> ModelFile:
        """The model that is edited."""
        return self.model if self.base is None else self.base

    @property
    def times(self) -> int:
        """How often the held-out prompts are asked: once before, and once for each output."""
        return 1 + len(self.paths)

    @property
    def held_out(self) -> HeldOut:
        """The held-out prompts, with how they are asked."""
        options, sets = self.options, self.sets
        further = prompt_choice.further_asked(sets, options.prompting, options.finding)
        parts = {"harmful": sets.harmful.test, "harmless": sets.harmless.test, **further}
        aims = {"harmful", *STAYING}
        if options.finding.method == "over-refusal":
            aims.add("borderline")
        return HeldOut(parts, frozenset(aims), options.replying.max_tokens, options.prompting)


@dataclass(frozen=True)
class Found:
    """The result of the second step.

    Attributes:
        direction: the direction file; for a constant, a direction file with the constant.
        plan: the change of the model, ready to be written.
        edit: the removal of the direction; None for a constant.
    """

    direction: DirectionFile
    plan: PlannedEdit
    edit: WeightEdit | None


@dataclass(frozen=True)
class Before:
    """Measurements of the unedited model, for comparison.

    Attributes:
        behaviour: the verdicts on its replies.
        settled: from where on they stay as they are, if replies after the edit may be shorter.
        base: its distributions over the opening of its own replies.
        prefixes: the common opening of its replies (token ids), by the prompts' thinking.
        sample: encoded held-out prompts on which the component is measured.
        component: the largest component of the direction in the stream; None for a constant.
        scored: the figures of scorers.
    """

    behaviour: Behaviour
    settled: Settled | None
    base: exact_kl.Baseline
    prefixes: dict[str | None, tuple[int, ...]]
    sample: Sequence[Sequence[int]]
    component: float | None
    scored: dict[str, Scored] | None


@dataclass(frozen=True)
class Judged:
    """An output with its evaluation, which uses the written bytes only.

    Attributes:
        written: the output.
        record: its entry in the record.
        behaviour: the verdicts on its replies.
    """

    written: Written
    record: EvaluatedEdit
    behaviour: Behaviour


def run(text: str, paths: Sequence[Path], options: RunOptions) -> RunRecord:
    """`abl-mlx run`: measure, edit, write, and evaluate the outputs.

    Args:
        text: the model as the user typed it.
        paths: one or more outputs, none of which exists yet.
        options: the chosen options.

    Raises:
        UserError: when the input is bad; then no file is left behind.
    """
    editing, writing, finding = options.editing, options.writing, options.finding
    edit_choice.check(editing, writing)
    scorers = scorer.wanted(options.scoring)
    template = options.chatting.template
    with ExitStack() as files:
        model = files.enter_context(find_model(text, template))
        base = (
            None if options.gguf is None else files.enter_context(find_gguf(options.gguf, template))
        )
        target = model if base is None else base
        places = apps.placed(paths, target.source, overwrite=writing.overwrite)
        paths, options = places.paths, places.joined(options)
        writing = options.writing
        options = replace(options, searching=options.searching.beside(paths[0]))
        destinations.check(paths, target, editing, writing)
        destinations.check_reports(paths, options.replying)
        if base is not None and model.folder is None:
            raise UserError(
                f"--gguf {options.gguf}: MODEL is a GGUF itself; leave --gguf out, or name the MLX "
                "or Hugging Face model to measure on."
            )
        sets = prompt_choice.load(model, options.prompting, options.finding.borderline)
        side_figures.check(sets, options.recognition)
        options = streaming.chosen(model, options)
        # Report too few borderline prompts before anything is loaded.
        prompt_choice.borderline_part(sets, options.prompting, finding, "test")
        target.check(paths, editing, writing)
        record = _six_steps(Job(model, base, paths, sets, options, Clock(), scorers), _look)
        destinations.hand_over(places, target, writing)
    return record


def run_induced(text: str, paths: Sequence[Path], options: RunOptions) -> RunRecord:
    """`abl-mlx run --induce`: choose a constant, write it, and evaluate the outputs.

    Args:
        text: the model as the user typed it.
        paths: one or more outputs, none of which exists yet.
        options: the chosen options.

    Raises:
        UserError: when the input is bad, an output cannot hold a constant, or no constant works;
            then no file is left behind.
    """
    scorers = scorer.wanted(options.scoring)
    with find_model(text, options.chatting.template) as model:
        places = apps.placed(paths, model.source, overwrite=options.writing.overwrite)
        paths = places.paths
        staging.check(paths, model.source, model.adapter, vectors=True)
        induced.check(paths, options)
        destinations.check_reports(paths, options.replying)
        sets = prompt_choice.load(model, options.prompting, options.finding.borderline)
        side_figures.check(sets, options.recognition)
        options = streaming.chosen(model, options, whole="--induce")
        job = Job(model, None, paths, sets, options, Clock(), scorers)
        record = _six_steps(job, _look_for_constant)
        destinations.hand_over(places, model, options.writing)
    return record


def _six_steps(job: Job, look: Callable[[Job, LoadedModel], Found]) -> RunRecord:
    """Do the six steps, with one model in memory at a time.

    Args:
        job: the run.
        look: the second step, which finds a direction to remove or a constant to add.
    """
    check_same(job.clock, job.sets, job.model, job.base)
    with ExitStack() as stack:
        loaded = _load(job)
        found = look(job, loaded)
        before = _ask_before(job, loaded, found, stack)
        staged = stack.enter_context(staging.staging(job.paths))
        known, written = _write(job, found, staged)
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
    """Load the model on which the direction is measured, and find its residual writers."""
    with job.clock.step("load the model"):
        chat = job.model.load(streamed=job.options.stream)
    if job.base is not None:
        with job.clock.step("compare the two models"):
            job.base.check_same(chat, job.options.writing.tensors)
    with job.clock.step("find the residual writers"):
        capture.check_stream(chat)
        writers = job.model.find_writers(chat, job.options.writing.tensors)
        return LoadedModel(chat, with_readers(chat, writers, job.options.editing.edit))


# --- 2. look -----------------------------------------------------------------------------------


def _look(job: Job, loaded: LoadedModel) -> Found:
    """Find the direction, and plan its removal from the files."""
    chat, options = loaded.chat, job.options
    edit_choice.check_layers_and_parts(chat.width, loaded.writers, options.editing)
    direction = find_behind_openings(
        chat, loaded.writers, job.sets, options.measuring, job.clock,
        held_out=job.held_out, times=job.times,
    )  # fmt: skip
    if job.base is not None:
        prefixes = chat.reply_prefixes
        del chat
        loaded.let_go()
        with job.clock.step("load the GGUF"):
            chat = job.base.load(streamed=options.stream)
        chat.reply_prefixes = prefixes
        loaded.hold(chat, [])
    edit = edit_of(direction, options.editing)
    plan = job.target.plan(edit, direction, job.paths, loaded, options.editing, options.writing)
    return Found(direction, plan, edit)


def _look_for_constant(job: Job, loaded: LoadedModel) -> Found:
    """Choose the constant that makes the model refuse, and find its place in the files."""
    chat, options = loaded.chat, job.options
    held = [path for path in job.paths if staging.format_of(path) != staging.VECTOR]
    job.model.check_constant(held, loaded, options.writing)
    sets = prompt_choice.encoded(chat, job.sets, options.measuring)[job.sets.thinking]
    with job.clock.step("find how replies open"):
        prefix, rate = find_reply_prefix(chat, sets, options.replying.batch_size)
        chat.reply_prefixes[sets.thinking] = prefix
    sets = sets.opened(prefix)
    told = forecast(
        chat, sets, options.measuring, rate, held_out=job.held_out, times=job.times, inducing=True
    )
    say(str(told))
    with job.clock.step("choose a constant"):
        found = constant_choice.choose(chat, sets, options, int(held != list(job.paths)))
    direction = DirectionFile(found.vector[None], None, {"summary": found.summary})
    return Found(
        direction, job.model.plan_constant(found, direction, loaded, options.writing), None
    )


# --- 3. ask the model as it is -----------------------------------------------------------------


def _ask_before(job: Job, loaded: LoadedModel, found: Found, stack: ExitStack) -> Before:
    """Measure the unedited model.

    Args:
        job: the run.
        loaded: the model.
        found: the direction or constant.
        stack: keeps the file with the distributions open.
    """
    chat, batch_size, sets = loaded.chat, job.options.replying.batch_size, job.sets
    in_llamacpp = _in_llamacpp(job, found.plan.original)
    with job.clock.step("evaluate before"):
        base = stack.enter_context(
            exact_kl.baseline(
                chat,
                sets.harmless.test.take(exact_kl.PROMPTS).prompts,
                batch_size=batch_size,
            )
        )
        sample = component_sample(chat, sets)
        present = None
        if found.edit is not None:
            present = evaluate.component(chat, sample, orthonormal(found.direction.selected))["max"]
        knows = side_figures.recognition_of(chat, sets, job.options.recognition)
        if in_llamacpp is None:
            before, settled, scored = _asked_before(job, evaluate.InMlx(chat, batch_size))
    prefixes = chat.reply_prefixes
    del chat
    if job.options.stream or not found.plan.needs_model:
        loaded.let_go()
    if in_llamacpp is not None:
        with job.clock.step("evaluate before"):
            before, settled, scored = _asked_before(job, in_llamacpp)
    if settled is not None:
        say(f"  {settling.sentence(settled)}")
    before = replace(before, recognition=knows)
    return Before(before, settled, base, prefixes, sample, present, scored)


def _asked_before(
    job: Job, runtime: Runtime
) -> tuple[Behaviour, Settled | None, dict[str, Scored] | None]:
    return (*job.held_out.before(runtime), side_figures.scored(runtime, job.scorers))


def _in_llamacpp(job: Job, runtime: InLlamaCpp | None) -> InLlamaCpp | None:
    """llama.cpp with the job's options; None if it is not installed."""
    if runtime is None or not evaluate.llamacpp_is_there():
        return None
    return replace(runtime, given=job.model.given, batch_size=job.options.replying.batch_size)


# --- 4. write ----------------------------------------------------------------------------------


def _write(job: Job, found: Found, staged: Sequence[Output]) -> tuple[Edited, list[Written]]:
    """Write every output to its staged path and measure its leak; with the record's beginning."""
    target, options, direction = job.target, job.options, found.direction
    files = beside(target.hashes)
    written = [found.plan.write(one, job.clock) for one in staged]
    with job.clock.step("hash the source"):
        hashed = hashes(files(), direction, options, given_template.record(job.model.given))
    mtp = found.plan.predicting()
    known = start_record(target.source, job.paths, options, direction, hashes=hashed, mtp=mtp)
    return reproduction.described(known, direction, written, job.clock), written


# --- 5. judge ----------------------------------------------------------------------------------


def _judge(job: Job, found: Found, before: Before, written: Sequence[Written]) -> list[Judged]:
    """Evaluate every output.

    First come the outputs that are judged in the model that is still loaded. Then it is released,
    and the other outputs are loaded one by one.
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
    with one.opened(job.options.stream) as chat:
        chat.write_with(job.model.given)
        chat.reply_prefixes = before.prefixes
        if found.edit is not None and one.limit is not None:
            prompts = before.sample[:EXACTNESS_PROMPTS]
            exactness.check(
                chat, found.edit, prompts, limit=one.limit, writers=one.writers_in(chat)
            )
        kl = exact_kl.kl(chat, before.base)
        if found.edit is not None:
            left = evaluate.component(chat, before.sample, orthonormal(found.direction.selected))[
                "max"
            ]
        knows = side_figures.recognition_of(chat, job.sets, job.options.recognition)
        if in_llamacpp is None:
            after, read, scored = _ask_after(job, before, evaluate.InMlx(chat, batch_size))
    del chat
    let_go()
    if in_llamacpp is not None:
        after, read, scored = _ask_after(job, before, in_llamacpp)
    after = replace(after, recognition=knows)
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
        kept=evaluate.kept_of(before.behaviour, after),
        read_tokens=read,
        scorers=scored,
    )
    for name, kept in (record.kept or {}).items():
        warning = "" if kept.enough else "warning: "
        say(f"  {warning}{one.output.path.name} {kept_refusals.sentence(name, kept)}")
    return Judged(one, record, after)


def _ask_after(
    job: Job, before: Before, runtime: Runtime
) -> tuple[Behaviour, int | None, dict[str, Scored] | None]:
    """What an output does, how far replies to harmless prompts were read, and scorers' figures.

    They are read whole where they are kept, and where refusals are added.
    """
    settled, replying = before.settled, job.options.replying
    kept = replying.save_replies is not None or replying.save_completions
    if settled is not None and (kept or before.component is None):
        settled = replace(settled, tokens=settled.longest)
    scored = side_figures.scored(runtime, job.scorers)
    return (*job.held_out.after(runtime, settled), scored)


# --- 6. put on record --------------------------------------------------------------------------


def _finish(job: Job, known: Edited, before: Before, judged: Sequence[Judged]) -> RunRecord:
    """Make the whole record, and write the companion files of each output."""
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
        settled=before.settled,
        scorers=before.scored,
        evaluations=evaluations,
    )
    target = job.target
    for one, described in zip(judged, record.evaluations, strict=True):
        write_companions(one.written.output, target, record, described)
    return record


def _replies(job: Job, before: Before, judged: Sequence[Judged]) -> Mapping[str, Behaviour]:
    """Who -> their behaviour, for the report; also saves the replies if the user asked for it."""
    replies = {"before": before.behaviour}
    replies |= {str(one.written.output.path): one.behaviour for one in judged}
    if job.options.replying.save_replies is not None:
        evaluate.save_replies(job.options.replying.save_replies, replies, job.sets)
    return replies
