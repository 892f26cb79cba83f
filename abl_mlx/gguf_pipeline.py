"""The commands on a GGUF source: the edit in the file's own types, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from abl_mlx import (
    adapter_outputs,
    directions,
    evaluate,
    exactness,
    gguf_model,
    gguf_outputs,
    models,
    mtp,
    records,
)
from abl_mlx.arrays import let_go
from abl_mlx.clock import Clock
from abl_mlx.edits import orthonormal
from abl_mlx.gguf_edit import TensorPlan, bytes_changed, plan
from abl_mlx.gguf_outputs import Staged
from abl_mlx.measurement import (
    ask,
    component_sample,
    edit_of,
    find_behind_openings,
    make_edit,
)
from abl_mlx.models import ChatModel, progress
from abl_mlx.notes import noted
from abl_mlx.options import Options
from abl_mlx.pipeline import EXACTNESS_PROMPTS
from abl_mlx.prompts import PromptSets
from abl_mlx.records import start_record, worst_leak
from abl_mlx.run_page import staged_run_page, write_run_page
from abl_mlx.same_model import check_same
from abl_mlx.sources import Source
from abl_mlx.writers import Writer
from abl_mlx.writers import find_writers as find_by_probing
from convert import adapters, gguf_mtp, gguf_to_mlx, gguf_writers
from convert.errors import UserError
from convert.gguf_file import GgufSource
from convert.suffixes import is_gguf_name

Record = dict[str, Any]


def find_writers(gguf: GgufSource, options: Options) -> list[gguf_writers.GgufWriter]:
    """The residual writers of a GGUF, by its architecture or by ``--tensors``."""
    shapes = {name: entry.shape for name, entry in gguf.tensors.items()}
    return gguf_writers.find(gguf.architecture, shapes, gguf.metadata, options.tensors)


def load(gguf: GgufSource, options: Options) -> tuple[ChatModel, list[Writer]]:
    """A GGUF as a model in MLX, with the residual writers that an edit of the file changes."""
    chat, layout = gguf_model.load(gguf)
    return chat, gguf_model.find_writers(chat, layout, gguf, find_writers(gguf, options))


def _drafting(
    gguf: GgufSource, paths: Sequence[Path], options: Options
) -> list[gguf_writers.GgufWriter]:
    """With ``--mtp``, what writes to the stream in blocks of multi-token prediction.

    Raises:
        UserError: where there is none, it is not known, or an output has no place for it.
    """
    if not options.mtp:
        return []
    if options.tensors is not None:
        raise UserError("--mtp: with --tensors, exactly what it names is edited; name them there.")
    for path in paths:
        if not is_gguf_name(path) or adapters.is_lora(path):
            raise UserError(
                f"--mtp: {path} has no blocks of multi-token prediction, as a GGUF has: write "
                "-o NAME.gguf, or leave the flag out."
            )
    shapes = {name: entry.shape for name, entry in gguf.tensors.items()}
    found = gguf_mtp.find(gguf.architecture, shapes, gguf.metadata)
    last = max(one.layer for one in found)
    if options.layers is not None and last not in options.layers:
        raise UserError(
            "--mtp: blocks of multi-token prediction are edited as the last layer is, "
            f"{last}, which this edit leaves alone; leave the flag out."
        )
    return found


def _predicting(gguf: GgufSource, edited: Iterable[str]) -> Record:
    """What a record says of tensors of multi-token prediction, if there are any."""
    names = gguf_mtp.tensors(gguf.architecture, gguf.tensors, gguf.metadata)
    found = mtp.record(names, edited)
    return {"mtp": found} if found else {}


# --- run ---------------------------------------------------------------------------------------


def run(
    source: Source,
    paths: Sequence[Path],
    sets: PromptSets,
    options: Options,
    measured: Source | None = None,
) -> Record:
    """`abl-mlx run` on a GGUF: everything from the file alone, unless ``measured`` is given.

    One model is in memory at a time: the GGUF in MLX to measure, then llama.cpp with what was
    written, then that in MLX for KL and component.

    Args:
        source: the GGUF that is edited.
        measured: the MLX or Hugging Face folder of the same model that the direction is measured
            on instead (``--gguf``).

    Raises:
        UserError: bad input, told in one sentence; nothing is left behind.
    """
    clock = Clock()
    harmless = sets.harmless.test
    in_llamacpp = evaluate.llamacpp_is_there()
    with GgufSource(source.path) as gguf, ExitStack() as stack:
        gguf_outputs.check(paths, gguf, options)
        own = find_writers(gguf, options)
        named = [*own, *_drafting(gguf, paths, options)]
        if any(map(adapters.is_lora, paths)):
            adapter_outputs.check_gguf(gguf, named)
        # An edit that would touch nothing is better told now than after the measurement.
        plan(gguf, make_edit(mx.ones((1, _width(gguf))), options), named,
             strict_types=options.strict_types)  # fmt: skip
        if measured is not None:
            with clock.step("load the model"):
                chat = models.load(measured.path)
            with clock.step("compare the two models"):
                check_same(chat, gguf, own)
            with clock.step("find the residual writers"):
                writers = find_by_probing(chat)
            direction = find_behind_openings(chat, writers, sets, options, clock, 1 + len(paths))
            prefix = chat.reply_prefix
            del chat, writers
            let_go()
            with clock.step("load the GGUF"):
                chat, _ = gguf_model.load(gguf)
            chat.reply_prefix = prefix
        else:
            with clock.step("load the model"):
                chat, layout = gguf_model.load(gguf)
                writers = gguf_model.find_writers(chat, layout, gguf, own)
            direction = find_behind_openings(chat, writers, sets, options, clock, 1 + len(paths))
            del writers, layout
        prefix = chat.reply_prefix
        unit = orthonormal(direction.selected)
        sample = component_sample(chat, sets)
        with clock.step("evaluate before"):
            base = stack.enter_context(
                evaluate.baseline(
                    chat,
                    harmless.take(evaluate.KL_PROMPTS).texts,
                    batch_size=options.batch_size,
                )
            )
            present = evaluate.component(chat, sample, unit)["max"]
            if not in_llamacpp:
                before = ask(evaluate.in_mlx(chat, batch_size=options.batch_size), sets, options)
        del chat
        let_go()
        if in_llamacpp:
            with clock.step("evaluate before"):
                before = ask(evaluate.in_llamacpp(source.path), sets, options)
        record = start_record(source, paths, options, direction)
        if measured is not None:
            record["measured_on"] = measured.name
        plans = plan(gguf, edit_of(direction, options), named)
        with clock.step("hash the source"):
            record["hashes"] = hashes(gguf, direction, options)
        staged = stack.enter_context(gguf_outputs.staging(paths))
        replies = {"before": before}
        evaluations = []
        for one in staged:
            written = gguf_outputs.write(gguf, source, one, plans, direction, options, clock)
            with clock.step(f"evaluate {one.path.name}"):
                figures, after = _judge(
                    gguf, one, written, prefix, base, sample, unit, sets, options, plans, own
                )
            replies[str(one.path)] = after
            evaluations.append({**written, **figures})
        record.update(
            before=before.record(),
            after=evaluations[0]["after"],
            kl=evaluations[0]["kl"],
            component={"before": present, "after": evaluations[0]["component"]},
            leak=worst_leak(evaluations),
            evaluations=evaluations,
            seconds=clock.seconds,
            **_predicting(gguf, plans),
        )
        for one, judged in zip(staged, evaluations, strict=True):
            gguf_outputs.write_companions(one, source, record, judged)
        if options.save_replies is not None:
            evaluate.save_replies(options.save_replies, replies, sets)
        there = staged_run_page(record, [one.place for one in staged], options, replies, sets)
    if not there:
        write_run_page(record, paths, options, replies, sets)
    return record


def _judge(
    gguf: GgufSource,
    one: Staged,
    written: Record,
    prefix: tuple[int, ...],
    base: evaluate.Baseline,
    sample: Sequence[Sequence[int]],
    unit: mx.array,
    sets: PromptSets,
    options: Options,
    plans: Mapping[str, TensorPlan],
    named: Sequence[gguf_writers.GgufWriter],
) -> tuple[Record, evaluate.Behaviour]:
    """An output's figures, all of them from the file as written."""
    with _as_written(gguf, one, written) as chat:
        chat.reply_prefix = prefix
        _check_exact(chat, gguf, one, written, sample, options, plans, named)
        kl = evaluate.kl(chat, base)
        left = evaluate.component(chat, sample, unit)["max"]
        figures: Record = {"kl": kl, "component": left, "runtime": "mlx-lm"}
        ask_llamacpp = one.is_gguf and evaluate.llamacpp_is_there()
        if not ask_llamacpp:
            after = ask(evaluate.in_mlx(chat, batch_size=options.batch_size), sets, options)
            if one.is_gguf:
                figures["note"] = (
                    "the file was asked in MLX: pip install 'abl-mlx[llamacpp]' to have llama.cpp "
                    "do it"
                )
    del chat
    let_go()
    if ask_llamacpp:
        file = one.folder / written["files"][0]
        answer = (
            evaluate.in_llamacpp(gguf.parts[0], file) if one.is_lora else evaluate.in_llamacpp(file)
        )
        after = ask(answer, sets, options)
        figures |= {"runtime": "llama.cpp", "note": "KL and component are of the file, in MLX"}
    figures |= noted(written.get("note"), figures.get("note"))
    return figures | {"after": after.record()}, after


def _check_exact(
    chat: ChatModel,
    gguf: GgufSource,
    one: Staged,
    written: Record,
    sample: Sequence[Sequence[int]],
    options: Options,
    plans: Mapping[str, TensorPlan],
    named: Sequence[gguf_writers.GgufWriter],
) -> None:
    """Refuse a complete edit of float weights that left something after a layer."""
    if options.tensors is not None or (one.is_lora and any(writer.bias for writer in named)):
        return  # what --tensors leaves alone, and biases beside an adapter, still write
    types = {plan.old.name for plan in plans.values()} if one.is_lora else set(written["types"])
    as_gguf = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # how MLX calls them
    limit = exactness.limit_for(as_gguf.get(kind, kind) for kind in types)
    if limit is None:
        return
    writers = None
    if one.is_gguf:
        writers = gguf_model.find_writers(chat, gguf_to_mlx.layout(gguf), gguf, named)
    edit = next(iter(plans.values())).edit
    exactness.check(chat, edit, sample[:EXACTNESS_PROMPTS], limit=limit, writers=writers)


@contextmanager
def _as_written(gguf: GgufSource, one: Staged, written: Record) -> Iterator[ChatModel]:
    """The output as a model in MLX; an adapter on its base, the source."""
    if one.is_lora:
        with adapter_outputs.in_mlx(gguf, one.folder / written["files"][0]) as chat:
            yield chat
        return
    if not one.is_gguf:
        yield models.load(one.folder, check=False)
        return
    with GgufSource(one.folder / written["files"][0]) as edited:
        yield gguf_model.load(edited)[0]


def _width(gguf: GgufSource) -> int:
    return int(gguf.tensor("token_embd.weight").shape[-1])


# --- apply -------------------------------------------------------------------------------------


def apply(
    direction: directions.DirectionFile,
    source: Source,
    paths: Sequence[Path],
    options: Options,
) -> Record:
    """Edit a GGUF of any type into new GGUFs, and measure in the written bytes what is left.

    Raises:
        UserError: an architecture or a tensor that cannot be edited, a leak above the limit;
            nothing is left behind.
    """
    clock = Clock()
    with GgufSource(source.path) as gguf:
        gguf_outputs.check(paths, gguf, options)
        with clock.step("find the residual writers"):
            named = [*find_writers(gguf, options), *_drafting(gguf, paths, options)]
            if any(map(adapters.is_lora, paths)):
                adapter_outputs.check_gguf(gguf, named)
            plans = plan(gguf, edit_of(direction, options), named,
                         strict_types=options.strict_types)  # fmt: skip
        record = start_record(source, paths, options, direction)
        with clock.step("hash the source"):
            record["hashes"] = hashes(gguf, direction, options)
        with gguf_outputs.staging(paths) as staged:
            written = [
                gguf_outputs.write(gguf, source, one, plans, direction, options, clock)
                for one in staged
            ]
            record.update(leak=worst_leak(written), written=written, seconds=clock.seconds)
            record.update(_predicting(gguf, plans))
            for one, described in zip(staged, written, strict=True):
                gguf_outputs.write_companions(one, source, record, described)
    return record


def hashes(gguf: GgufSource, direction: directions.DirectionFile, options: Options) -> Record:
    """Hashes of the GGUF's parts, of the direction and of the options."""
    return records.hashes(records.file_hashes(gguf.parts), direction, options)


# --- diff --------------------------------------------------------------------------------------


def diff(first: Path, second: Path, direction_path: Path | None, options: Options) -> Record:
    """`abl-mlx diff`: what differs between two GGUFs, and what is left of a direction.

    Args:
        direction_path: with it, the leak of its full removal from ``first`` in ``second``.
    """
    with GgufSource(first) as before, GgufSource(second) as after:
        missing = sorted(set(before.tensors) ^ set(after.tensors))
        if missing:
            raise UserError(
                f"{first} and {second} do not hold the same tensors ({missing[0]} is in one of "
                "them alone): these are not the same model."
            )
        changed: dict[str, Record] = {}
        with progress(len(before.tensors), "compare", "tensor") as bar:
            for name, entry in before.tensors.items():
                other = after.tensors[name]
                if other.shape != entry.shape:
                    raise UserError(
                        f"{name} has the shape {entry.shape} in {first} and {other.shape} in "
                        f"{second}: these are not the same model."
                    )
                if other.type != entry.type:
                    changed[name] = {"type": f"{entry.type.name} -> {other.type.name}"}
                else:
                    count = bytes_changed(before.raw(name), after.raw(name))
                    before.release(name)
                    after.release(name)
                    if count:
                        changed[name] = {"type": entry.type.name, "bytes_changed": count}
                bar.update()
        record: Record = {
            "first": str(first),
            "second": str(second),
            "tensors": len(before.tensors),
            "changed": changed,
        }
        if direction_path is not None:
            direction = directions.read(direction_path)
            plans = plan(before, edit_of(direction, options), find_writers(before, options))
            record |= gguf_outputs.leak_record(gguf_outputs.compare_all(before, after, plans))
            record["direction"] = direction.sha256
    return record
