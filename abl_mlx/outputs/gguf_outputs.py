"""Writes the edit of a GGUF as a GGUF, an MLX folder or an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from abl_mlx.behaviour import evaluate
from abl_mlx.choices import Editing, Writing
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.edits import exactness
from abl_mlx.edits.edit import Leak, leak
from abl_mlx.edits.leak import Details, LeakReport
from abl_mlx.inputs.sources import Source
from abl_mlx.models import chat_model, from_gguf
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.loaded_model import LoadedModel
from abl_mlx.models.writers import Writer
from abl_mlx.outputs import adapter_outputs, further_files, mtp, new_parts, undo_file
from abl_mlx.outputs.gguf_plan import TensorPlan, compare, replacement, stored_values
from abl_mlx.outputs.in_turn import in_turn
from abl_mlx.outputs.provenance import edit_label, gguf_metadata
from abl_mlx.outputs.staging import FOLDER, GGUF, LORA, Output, Written, check_space, format_of
from abl_mlx.records.edits import Drafting, WrittenEdit
from abl_mlx.support import notes, ranks
from abl_mlx.support.clock import Clock
from abl_mlx.support.console import progress, progress_to
from convert import gguf_to_mlx
from convert.architectures import gguf_mtp
from convert.architectures.gguf_writers import GgufWriter
from convert.base.errors import UserError
from convert.base.kept_memory import kept_memory
from convert.gguf.file import GgufSource
from convert.gguf.quantize import Quantization
from convert.gguf.rewrite import rewrite
from convert.mlx.safetensors_files import TensorFiles
from convert.ollama.description import lost_of_template

OF_THE_FILE = "KL and component are of the file, in MLX"
IN_MLX = "the file was asked in MLX: pip install 'abl-mlx[llamacpp]' to have llama.cpp do it"


def check(paths: Sequence[Path], gguf: GgufSource, writing: Writing) -> None:
    """Check, before any long work, that the outputs can be written from this GGUF.

    Raises:
        UserError: naming the output or the flag that does not fit.
    """
    if writing.keep_types and writing.quantize is None:
        raise UserError("--keep-types: every tensor keeps its type, unless --quantize is given.")
    for path in paths:
        if writing.quantize is not None and format_of(path) != GGUF:
            raise UserError(
                f"--quantize: {path} gets its types from the GGUF: leave the flag out, or write "
                "-o NAME.gguf."
            )
    parts = new_parts.of(writing)
    formats = {path: format_of(path) for path in paths}
    for path, form in formats.items():
        if form == GGUF:
            new_parts.check(path, parts, len(gguf.parts))
        elif form == FOLDER:
            gguf_to_mlx.layout(gguf)
    whole = [path for path in paths if formats[path] != LORA]
    check_space(whole, sum(part.stat().st_size for part in gguf.parts))


def drafting(
    gguf: GgufSource, paths: Sequence[Path], editing: Editing, writing: Writing
) -> list[GgufWriter]:
    """With ``--mtp``, the residual writers in blocks for multi-token prediction, else none.

    Raises:
        UserError: when there are no such blocks, their tensors are not known, or an output cannot
            hold them.
    """
    if not writing.mtp:
        return []
    if writing.tensors is not None:
        raise UserError("--mtp: with --tensors, exactly what it names is edited; name them there.")
    for path in paths:
        if format_of(path) != GGUF:
            raise UserError(
                f"--mtp: {path} has no blocks of multi-token prediction, as a GGUF has: write "
                "-o NAME.gguf, or leave the flag out."
            )
    found = gguf_mtp.find(gguf.architecture, gguf.shapes, gguf.metadata)
    last = max(one.layer for one in found)
    if editing.layers is not None and last not in editing.layers:
        raise UserError(
            "--mtp: blocks of multi-token prediction are edited as the last layer is, "
            f"{last}, which this edit leaves alone; leave the flag out."
        )
    return found


def predicting(gguf: GgufSource, edited: Iterable[str]) -> Drafting | None:
    """The record's entry about tensors of multi-token prediction; None if there are none.

    Args:
        gguf: the open source.
        edited: names of all tensors that are edited.
    """
    return mtp.record(gguf_mtp.tensors(gguf.architecture, gguf.tensors, gguf.metadata), edited)


@dataclass
class GgufEdit:
    """An edit of a GGUF, ready to be written; a `abl_mlx.outputs.model_file.PlannedEdit`.

    Attributes:
        source, gguf: where the model is, and the open file.
        plans: tensor name -> its edit.
        named: the residual writers, without those of multi-token prediction.
        direction: the directions that the edit removes.
        editing: the chosen options of the edit, for the written model's label.
        writing: the options of writing.
        loaded: the model in MLX, if it is loaded; writing does not use it.
        quantization: the type of every tensor in GGUF outputs.
    """

    source: Source
    gguf: GgufSource
    plans: Mapping[str, TensorPlan]
    named: Sequence[GgufWriter]
    direction: DirectionFile
    editing: Editing
    writing: Writing
    loaded: LoadedModel | None
    quantization: Quantization

    needs_model = False

    @property
    def original(self) -> evaluate.InLlamaCpp | None:
        return evaluate.InLlamaCpp(self.source.path)

    @property
    def embedding(self) -> bool:
        """Whether an embedding is among what is edited."""
        return any(one.writer.kind == "embedding" for one in self.plans.values())

    def predicting(self) -> Drafting | None:
        return predicting(self.gguf, self.plans)

    def let_go(self) -> None:
        if self.loaded is not None:
            self.loaded.let_go()

    def write(self, output: Output, clock: Clock) -> Written:
        label = edit_label(
            self.direction, self.editing, self.writing, self.source, embedding=self.embedding
        )
        if output.format == LORA:
            return self._write_lora(output, label, clock)
        write = {GGUF: self._write_gguf, FOLDER: self._write_folder}[output.format]
        return write(output, label, clock)

    def _write_lora(self, output: Output, label: Mapping[str, Any], clock: Clock) -> Written:
        gguf, place = self.gguf, output.staged
        with clock.step("write"):
            facts = adapter_outputs.write_gguf(
                gguf, self.source, place, output.path, self.plans, label, self.writing.max_leak
            )
        partly = bool(facts.left_out) or any(writer.bias for writer in self.named)
        types = {one.old.name for one in self.plans.values()}
        return Written(
            output,
            facts,
            partial(adapter_outputs.in_mlx, gguf, place),
            llamacpp=evaluate.InLlamaCpp(gguf.parts[0], place),
            notes=(IN_MLX, OF_THE_FILE),
            limit=None if partly else self._limit(types),
            writers_in=self._writers_in,
        )

    def _write_gguf(self, output: Output, label: Mapping[str, Any], clock: Clock) -> Written:
        with kept_memory():
            with clock.step("write"):
                files = self._rewrite(output.staged, label)
            with clock.step("measure the leak"), GgufSource(files[0]) as after:
                report = compare_all(self.gguf, after, self.plans)
        self._check_leak(output.path, report)
        types, note = written_types(report), None
        if len(files) == 1 and self.source.ollama is None:
            note = notes.modelfile(lost_of_template(files[0]))
        facts = WrittenEdit(
            output=str(output.path.with_name(files[0].name)),
            format=GGUF,
            files=[file.name for file in files],
            types=types,
            leak=report.record(),
            weight_error=report.error,
            embedding=self.embedding,
            note=note,
        )
        if self.writing.keep_undo:
            place = undo_file.kept_path(output.staged)
            undo_file.keep_gguf(place, self.gguf, self.plans, label["direction_sha256"])
        return Written(
            output,
            facts,
            partial(opened, files[0]),
            llamacpp=evaluate.InLlamaCpp(files[0]),
            notes=(IN_MLX, OF_THE_FILE),
            limit=self._limit(types),
            writers_in=self._writers_in,
        )

    def _write_folder(self, output: Output, label: Mapping[str, Any], clock: Clock) -> Written:
        """Convert the edited GGUF to an MLX folder; the leak is measured in the folder's bytes."""
        with clock.step("write"):
            beside = output.staged.with_name(f"{output.path.name}.gguf")
            files = self._rewrite(beside, label)
            with GgufSource(files[0]) as edited:
                found = gguf_to_mlx.layout(edited)
                size = sum(entry.nbytes for entry in edited.tensors.values())
                with progress(size, f"write {output.path.name}", "B") as bar:
                    report = gguf_to_mlx.fill_folder(
                        edited,
                        found,
                        output.staged,
                        extra={"abl_mlx": dict(label)},
                        progress=bar.update,
                    )
        for file in files:
            file.unlink()
        leaks: dict[str, Leak] = {}
        details = {}
        with clock.step("measure the leak"), TensorFiles(output.staged) as written:
            for name, one in self.plans.items():
                before = stored_values(self.gguf, name)
                after = gguf_to_mlx.read_back(found, output.staged, written, name, self.gguf.shapes)
                leaks[name] = leak(one.edit, one.writer, one.parameter, before, after)
                details[name] = Details(None, None, one.old.name)
        found_leak = LeakReport(leaks, details)
        self._check_leak(output.path, found_leak)
        types = sorted(report.forms)
        facts = WrittenEdit(
            output=str(output.path),
            format=FOLDER,
            types=types,
            leak=found_leak.record(),
            weight_error=found_leak.error,
            embedding=self.embedding,
            note=notes.joined(
                notes.drafting(report.left_out),
                notes.window(report.config),
                notes.no_projector(further_files.projector_names(self.source)),
            ),
        )
        return Written(
            output,
            facts,
            lambda streamed: nullcontext(
                chat_model.load(output.staged, check=False, streamed=streamed)
            ),
            limit=self._limit(types),
        )

    def _rewrite(self, to: Path, label: Mapping[str, Any]) -> list[Path]:
        gguf, writing = self.gguf, self.writing
        plain = self.quantization.replacements(gguf)
        edited = {
            name: replacement(gguf, one, grid=writing.grid, plain=writing.plain_rounding)
            for name, one in self.plans.items()
        }
        with progress_to(f"write {to.name}", "B") as moved:
            return rewrite(
                gguf,
                to,
                tensors=in_turn(gguf, plain | edited),
                metadata={
                    **gguf_metadata(self.source, label, gguf.metadata),
                    **self.quantization.metadata(),
                },
                parts=new_parts.of(writing),
                progress=moved,
            )

    def _check_leak(self, path: Path, report: LeakReport) -> None:
        plain = self.writing.plain_rounding
        mend = "leave out --plain-rounding" if plain else "choose a file of a finer type"
        report.check(str(path), self.writing.max_leak, mend)

    def _limit(self, types: Iterable[str]) -> float | None:
        """The largest component that an edit of these types may leave; None with ``--tensors``."""
        if self.writing.tensors is not None:
            return None  # writers that --tensors does not name still write along the direction
        as_gguf = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # from MLX's names
        return exactness.limit_for(as_gguf.get(kind, kind) for kind in types)

    def _writers_in(self, chat: ChatModel) -> list[Writer]:
        return from_gguf.find_writers(chat, gguf_to_mlx.layout(self.gguf), self.gguf, self.named)


@contextmanager
def opened(path: Path, streamed: bool = False) -> Iterator[ChatModel]:
    """Context manager with a written GGUF as a model in MLX."""
    with GgufSource(path) as edited:
        yield from_gguf.load(edited, streamed=streamed)[0]


def compare_all(
    before: GgufSource, after: GgufSource, plans: Mapping[str, TensorPlan]
) -> LeakReport:
    """Compare every edited tensor of two files."""
    leaks, details = {}, {}
    with progress(len(plans), "read back", "tensor") as bar:

        def compared(one: TensorPlan) -> list[list[Any]]:
            bar.update()
            return [list(vars(part).values()) for part in compare(before, after, one)]

        found = ranks.each("leaks", list(plans.values()), compared)
    for name, (of_leak, of_details) in zip(plans, found, strict=True):
        leaks[name], details[name] = Leak(*of_leak), Details(*of_details)
    return LeakReport(leaks, details)


def written_types(report: LeakReport) -> list[str]:
    """The types of all compared tensors of a GGUF."""
    return sorted({one.type for one in report.details.values()})
