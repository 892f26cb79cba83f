"""The commands' steps in order; each returns the record that is printed and kept."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from abl_mlx import (
    __version__,
    adapter_outputs,
    capture,
    demo,
    directions,
    evaluate,
    exactness,
    memory,
    models,
    mtp,
    outputs,
    plot,
    prompt_lengths,
    prompts,
    sources,
    taken,
)
from abl_mlx.apply import Plan, plan
from abl_mlx.clock import Clock
from abl_mlx.edits import Edit, orthonormal
from abl_mlx.measurement import (
    ask,
    borderline_part,
    component_sample,
    edit_of,
    find_behind_openings,
    make_edit,
    warn_of_strength,
)
from abl_mlx.model_file import ModelFile, find_model, open_model
from abl_mlx.models import ChatModel
from abl_mlx.notes import joined, noted
from abl_mlx.options import Options
from abl_mlx.outputs import Output, Written
from abl_mlx.prompts import PromptSets, Split
from abl_mlx.provenance import edit_label
from abl_mlx.records import (
    combined_hash,
    file_hashes,
    hashes,
    measured,
    prompt_hashes,
    start_record,
    worst_leak,
)
from abl_mlx.run_page import staged_run_page, write_run_page
from abl_mlx.sources import Source
from abl_mlx.writers import Writer, find_writers
from convert import adapters
from convert.atomic import check_new, claim
from convert.errors import UserError
from convert.hf_config import read_config
from convert.other_quantization import refuse_foreign
from convert.safetensors_files import TensorFiles
from convert.suffixes import ends_in, is_gguf_name

Record = dict[str, Any]

#: Of these, how many are run to see that an edit of float weights is exact after every layer.
EXACTNESS_PROMPTS = 4


#: Prompts of each set to measure, to choose on and to ask, with ``--quick``.
QUICK = (48, 16, 24)

ROWS_WARNING = (
    "warning: keeping the lengths of rows puts part of the direction back; the leak says how much"
)


# --- the commands ------------------------------------------------------------------------------


def run(text: str, paths: Sequence[Path], options: Options) -> Record:
    """`abl-mlx run`: measure, edit, write, and evaluate what was written.

    Args:
        text: what the user typed for the model.
        paths: one or more outputs, none of which exists yet.

    Raises:
        UserError: bad input, told in one sentence; nothing is left behind.
    """
    options = with_journal(options, paths[0])
    warn_of_strength(options.strength)
    source = sources.resolve(text)
    target = source if options.gguf is None else sources.resolve_gguf(options.gguf)
    outputs.check(paths, target)
    if options.keep_undo:
        taken.check_keep(paths, target, options.norm)
    if options.save_replies is not None:
        check_new(options.save_replies)
    outputs.check_reports(paths, options.report)
    if options.ollama_create is not None:
        ollama_first(paths, options.ollama_create)
    with open_model(source) as model:
        sets = load_prompts(model, options)
        memory.check(model, asked=options.memory_check)
    if target.is_gguf:
        from abl_mlx import gguf_pipeline

        if target is not source and source.is_gguf:
            raise UserError(
                f"--gguf {options.gguf}: MODEL is a GGUF itself; leave --gguf out, or name the MLX "
                "or Hugging Face model to measure on."
            )
        measured = None if target is source else source
        record = gguf_pipeline.run(target, paths, sets, options, measured)
    else:
        record = _run(source, paths, sets, options)
    if options.ollama_create is not None:
        from convert import ollama

        ollama.ollama_create(
            options.ollama_create, outputs.companions(ollama_first(paths, None))["modelfile"]
        )
    return record


def ollama_first(paths: Sequence[Path], name: str | None) -> Path:
    """The GGUF among the outputs that Ollama is given.

    Args:
        name: what the model will be called; checked before any long work unless None.

    Raises:
        UserError: when no output is a GGUF, or `ollama` is not there.
    """
    found = [path for path in paths if is_gguf_name(path) and not adapters.is_lora(path)]
    if not found:
        raise UserError("--ollama-create needs a GGUF: add -o NAME.gguf.")
    if name is not None:
        from convert import ollama

        ollama.check_create(name)
    return found[0]


def _run(source: Source, paths: Sequence[Path], sets: PromptSets, options: Options) -> Record:
    """`run` on an MLX or Hugging Face folder."""
    clock = Clock()
    borderline_part(sets, options, "test")  # too few of them are better told now
    with clock.step("load the model"):
        files = open_files(source, paths, options)
        chat = models.load(source.path)
    with clock.step("find the residual writers"):
        capture.check_stream(chat)
        writers = find_writers(chat)
        # An edit that would touch nothing is better told now than after the measurement.
        make_edit(mx.ones((1, chat.width)), options).chosen(writers)
    direction = find_behind_openings(chat, writers, sets, options, clock, 1 + len(paths))
    prefix = chat.reply_prefix
    sample = component_sample(chat, sets)
    unit = orthonormal(direction.selected)
    with ExitStack() as stack:
        with clock.step("evaluate before"):
            before = ask(evaluate.in_mlx(chat, batch_size=options.batch_size), sets, options)
            base = stack.enter_context(
                evaluate.baseline(
                    chat,
                    sets.harmless.test.take(evaluate.KL_PROMPTS).texts,
                    batch_size=options.batch_size,
                )
            )
            present = evaluate.component(chat, sample, unit)["max"]
        record = start_record(source, paths, options, direction)
        staged = stack.enter_context(outputs.staging(paths))
        edit = edit_of(direction, options)
        with clock.step("write"):
            written, the_plan = write_all(
                source, chat, files, edit, writers, staged, record, options
            )
            record["hashes"] = hashes(file_hashes(files.files), direction, options)

        def judge(one: Written, model: ChatModel) -> Record:
            known = exactness.moved(outlines, model) if one.output.is_adapter else None
            # An adapter keeps the biases, and says so.
            keeps = known is not None and any(writer.has_bias for writer in known)
            limit = exactness.limit_for(one.types if known is None else base_types)
            if limit is not None and not keeps:
                exactness.check(model, edit, sample[:EXACTNESS_PROMPTS], limit=limit, writers=known)
            answer, runtime, note = _runtime(one, model, options)
            after = ask(answer, sets, options)
            replies[str(one.output.path)] = after
            return {
                **written_record(one),
                "runtime": runtime,
                **noted(one.note, note),
                "after": after.record(),
                "kl": evaluate.kl(model, base),
                "component": evaluate.component(model, sample, unit)["max"],
            }

        infos = [files.info(name) for name in files.names]
        base_types = exactness.matrix_types((info.dtype, info.shape) for info in infos)
        outlines = [replace(writer, module=nn.Module()) for writer in writers]
        replies: dict[str, evaluate.Behaviour] = {"before": before}
        judged: dict[Path, Record] = {}
        # GGUFs are judged beside the model that is still loaded, with what they hold of the edit;
        # then it is let go, and each folder is loaded as written. Two models are never held.
        for one in written:
            if one.output.is_gguf:
                assert the_plan is not None  # of every output but adapters
                with clock.step(f"evaluate {one.output.path.name}"):
                    the_plan.load_into_model(one.read_back)
                    judged[one.output.path] = judge(one, chat)
        del chat, writers, the_plan
        for one in written:
            if not one.output.is_gguf:
                with clock.step(f"evaluate {one.output.path.name}"):
                    edited = (
                        models.load(source.path, check=False, adapter=one.output.staged)
                        if one.output.is_adapter
                        else models.load(one.output.staged, check=False)
                    )
                    edited.reply_prefix = prefix
                    judged[one.output.path] = judge(one, edited)
                    del edited
        evaluations = [judged[path] for path in paths]
        record.update(
            before=before.record(),
            after=evaluations[0]["after"],
            kl=evaluations[0]["kl"],
            component={"before": present, "after": evaluations[0]["component"]},
            leak=worst_leak(evaluations),
            evaluations=evaluations,
            seconds=clock.seconds,
        )
        for one in written:
            outputs.write_companions(one, source, record, judged[one.output.path])
        if options.save_replies is not None:
            evaluate.save_replies(options.save_replies, replies, sets)
        there = staged_run_page(
            record, [one.output.staged for one in written], options, replies, sets
        )
    if not there:
        write_run_page(record, paths, options, replies, sets)
    return record


def apply(direction_path: Path, text: str, paths: Sequence[Path], options: Options) -> Record:
    """`abl-mlx apply`: write the edit that a direction file describes, without evaluating it."""
    warn_of_strength(options.strength)
    direction = directions.read(direction_path)
    source = sources.resolve(text)
    outputs.check(paths, source)
    if options.keep_undo:
        taken.check_keep(paths, source, options.norm)
    if options.ollama_create is not None:
        ollama_first(paths, options.ollama_create)
    if source.is_gguf:
        from abl_mlx import gguf_pipeline

        record = gguf_pipeline.apply(direction, source, paths, options)
    else:
        record = _apply(direction_path, direction, source, paths, options)
    if options.ollama_create is not None:
        from convert import ollama

        ollama.ollama_create(
            options.ollama_create, outputs.companions(ollama_first(paths, None))["modelfile"]
        )
    return record


def _apply(
    direction_path: Path,
    direction: directions.DirectionFile,
    source: Source,
    paths: Sequence[Path],
    options: Options,
) -> Record:
    """`apply` on an MLX or Hugging Face folder."""
    clock = Clock()
    with clock.step("load the model"):
        files = open_files(source, paths, options)
        if options.lazy or not memory.fits(open_model(source)):
            chat = models.load_lazily(source.path)
        else:
            memory.check(open_model(source), asked=options.memory_check)
            chat = models.load(source.path, encodes=False)
        directions.check_width(direction, direction_path, chat)
    with clock.step("find the residual writers"):
        writers = find_writers(chat)
    record = start_record(source, paths, options, direction)
    with outputs.staging(paths) as staged:
        edit = edit_of(direction, options)
        with clock.step("write"):
            written, _ = write_all(source, chat, files, edit, writers, staged, record, options)
            record["hashes"] = hashes(file_hashes(files.files), direction, options)
        details = [written_record(one) for one in written]
        record.update(leak=worst_leak(details), written=details, seconds=clock.seconds)
        for one, described in zip(written, details, strict=True):
            outputs.write_companions(one, source, record, described)
    return record


def measure(text: str, out: Path, options: Options, picture: Path | None = None) -> Record:
    """`abl-mlx measure`: write the direction file.

    Args:
        picture: where its charts go, if they are wanted.
    """
    if not ends_in(out, ".safetensors"):
        raise UserError(f"{out}: the name of a direction file ends in .safetensors.")
    claim(out)
    if picture is not None:
        plot.check(picture)
    options = with_journal(options, out.with_suffix(""))
    clock = Clock()
    with find_model(text) as model:
        source = model.source
        sets = load_prompts(model, options)
        memory.check(model, asked=options.memory_check)
        with clock.step("load the model"):
            chat = model.load()
        with clock.step("find the residual writers"):
            capture.check_stream(chat)
            writers = model.find_writers(chat, options.tensors)
        found = find_behind_openings(chat, writers, sets, options, clock)
        with clock.step("hash the source"):
            sha256 = combined_hash(model.hashes())
    found = replace(
        found,
        metadata={
            **found.metadata,
            **{
                key: found.metadata["summary"][key]
                for key in ("layer", "position")
                if key in found.metadata["summary"]
            },
            "model": source.public_name,
            "model_type": chat.model_type,
            "model_sha256": sha256,
            "prompt_hashes": prompt_hashes(sets),
            "seed": options.seed,
        },
    )
    directions.save(out, found)
    record: Record = {
        "abl_mlx": __version__,
        "source": source.name,
        "outputs": [str(out)],
        "direction": {**found.metadata["summary"], "sha256": found.sha256},
        **measured(found),
        "seconds": clock.seconds,
    }
    if picture is not None:
        plot.draw(picture, record)
        record["plot"] = str(picture)
    return record


def inspect(text: str) -> Record:
    """`abl-mlx inspect`: what the model is and what an edit would touch."""
    with find_model(text) as model:
        return model.inspect()


# --- the steps ---------------------------------------------------------------------------------


def with_journal(options: Options, output: Path) -> Options:
    """The options with a place for the journal of a search: beside the output, if not given."""
    if options.search is None or options.search_journal is not None:
        return options
    return replace(options, search_journal=output.with_name(f"{output.name}.search.journal"))


def load_prompts(model: ModelFile | None, options: Options) -> PromptSets:
    """The prompt sets of this run: the demo's own, the user's, or the bundled ones.

    A file made from the demo is asked what the demo is asked: it has heard of nothing else.

    Args:
        model: what is asked; None for a server.
    """
    source = None if model is None else model.source
    speaks_demo = source is not None and (source.is_demo or demo.speaks(source.path))
    if speaks_demo and options.harmful is None and options.harmless is None:
        sets = prompts.load_demo()
    else:
        sets = prompts.load_sets(options.harmful, options.harmless, options.seed)
    if options.borderline is not None:
        sets = replace(sets, borderline=prompts.load(options.borderline, "--borderline"))
    if options.quick:
        sets = cut(sets, *QUICK)
    sets = cut(sets, options.limit)
    return sets if model is None else prompt_lengths.fitting(sets, model)


def cut(
    sets: PromptSets, train: int | None, validation: int | None = None, test: int | None = None
) -> PromptSets:
    """At most so many prompts in each part of each set; ``train`` of all where it is alone."""
    if train is None:
        return sets
    validation, test = validation or train, test or train
    harmful, harmless = (
        Split(split.train.take(train), split.validation.take(validation), split.test.take(test))
        for split in (sets.harmful, sets.harmless)
    )
    borderline = sets.borderline and sets.borderline.take(train)
    return replace(sets, harmful=harmful, harmless=harmless, borderline=borderline)


def open_files(source: Source, paths: Sequence[Path], options: Options) -> TensorFiles:
    """The source's tensors, once it is sure that the outputs can be written from them."""
    files = TensorFiles(source.path)
    paths = [path for path in paths if not adapters.is_mlx(path)]
    if not paths:
        return files  # an adapter is small, and sits on weights of any type
    refuse_foreign(source.path, read_config(source.path), files)
    outputs.check_space(paths, sum(file.stat().st_size for file in files.files))
    if any(is_gguf_name(path) for path in paths):
        from convert.mlx_to_gguf import check_convertible

        check_convertible(source.path, options.quantize)
    return files


def write_all(
    source: Source,
    chat: ChatModel,
    files: TensorFiles,
    edit: Edit,
    writers: Sequence[Writer],
    staged: Sequence[Output],
    record: Record,
    options: Options,
) -> tuple[list[Written], Plan | None]:
    """Write every output to its staged name and measure its leak.

    Returns:
        What was written, and the plan of the edited models; None where there are adapters alone.
    """
    embedding = any(writer.kind == "embedding" for writer in edit.chosen(writers))
    label = edit_label(
        record["direction"]["sha256"], options, source, record["direction"].get("recipe"),
        embedding=embedding,
    )  # fmt: skip
    max_leak = options.max_leak
    if edit.norm == "rows":
        # What keeping rows puts back is what one asked for; it is reported, not refused.
        print(ROWS_WARNING, file=sys.stderr)
        max_leak = math.inf
    only_adapters = all(output.is_adapter for output in staged)
    if options.mtp and any(output.is_adapter for output in staged):
        raise UserError(
            "--mtp: mlx-lm applies no adapter to blocks of multi-token prediction; write a model, "
            "or leave the flag out."
        )
    the_plan = (
        None
        if only_adapters
        else plan(chat, files, edit, writers, writer_bits=options.writer_bits, mtp=options.mtp)
    )
    edited = [*the_plan.edits, *the_plan.matrices] if the_plan else []
    if predicting := mtp.record(mtp.tensors(files, len(chat.layers)), edited):
        record["mtp"] = predicting

    def write(output: Output) -> Written:
        if output.is_adapter:
            return adapter_outputs.write_mlx(chat, edit, writers, output, label, max_leak)
        assert the_plan is not None
        if output.is_gguf:
            return outputs.write_gguf_file(
                source,
                files,
                the_plan,
                output,
                label,
                options.quantize,
                max_leak,
                options.plain_rounding,
            )
        written = outputs.write_folder(
            source,
            chat,
            files,
            the_plan,
            output,
            label,
            max_leak,
            grid=options.grid,
            plain=options.plain_rounding,
        )
        if options.keep_undo:
            taken.keep_folder(
                taken.kept_path(output.staged), files, the_plan, record["direction"]["sha256"]
            )
        return written

    warning = ROWS_WARNING if edit.norm == "rows" else None
    written = [
        replace(one, note=joined(one.note, warning), embedding=embedding)
        for one in map(write, staged)
    ]
    return written, the_plan


def _runtime(
    one: Written, model: ChatModel, options: Options
) -> tuple[evaluate.Chat, str, str | None]:
    """Who answers for an output, under which name, and what there is to say about it."""
    if not one.output.is_gguf:
        return evaluate.in_mlx(model, batch_size=options.batch_size), "mlx-lm", None
    if evaluate.llamacpp_is_there():
        return (
            evaluate.in_llamacpp(one.output.staged),
            "llama.cpp",
            ("KL and component are of the edited tensors read back from the file, in MLX"),
        )
    return (
        evaluate.in_mlx(model, batch_size=options.batch_size),
        "mlx-lm",
        "the GGUF itself was not asked: pip install 'abl-mlx[llamacpp]' to have llama.cpp do it; "
        "the figures are of its edited tensors, read back into the MLX model",
    )


# --- the record --------------------------------------------------------------------------------


def written_record(one: Written) -> Record:
    """What is known of an output from writing it."""
    return {
        "output": str(one.output.path),
        "format": one.output.format,
        "types": list(one.types),
        "leak": one.leak.record(),
        "embedding": one.embedding,
        "left_out": list(one.left_out),
        **noted(one.note),
    }
