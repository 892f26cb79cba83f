"""What is written of an edited GGUF: GGUFs, MLX folders, and what lies beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from abl_mlx import adapter_outputs, notes, outputs, taken
from abl_mlx.clock import Clock
from abl_mlx.directions import DirectionFile
from abl_mlx.edits import Leak, leak, total_leak
from abl_mlx.gguf_edit import (
    TensorPlan,
    TensorReport,
    compare,
    largest,
    replacement,
)
from abl_mlx.models import progress
from abl_mlx.options import Options
from abl_mlx.provenance import edit_label, gguf_metadata, without_home
from abl_mlx.report import card
from abl_mlx.sources import Source
from abl_mlx.strict_json import to_json
from convert import adapters, gguf_to_mlx
from convert.atomic import check_new, new_files, new_folder
from convert.errors import UserError
from convert.gguf_file import GgufSource, part_paths
from convert.gguf_rewrite import rewrite
from convert.ollama import lost_of_template, modelfile
from convert.safetensors_files import TensorFiles
from convert.suffixes import is_gguf_name

Record = dict[str, Any]


@dataclass(frozen=True)
class Staged:
    """An output that is being written.

    Attributes:
        path: the final name: NAME.gguf, or a folder.
        folder: the temporary folder its files go to: beside NAME.gguf, or the folder to be.
    """

    path: Path
    folder: Path

    @property
    def place(self) -> Path:
        """Where it lies until it gets its name."""
        return self.folder / self.path.name if self.is_gguf else self.folder

    @property
    def is_gguf(self) -> bool:
        """Whether a GGUF is written, a model or a LoRA, rather than an MLX folder."""
        return is_gguf_name(self.path)

    @property
    def is_lora(self) -> bool:
        """Whether it is a LoRA for the source."""
        return adapters.is_lora(self.path)


def check(paths: Sequence[Path], gguf: GgufSource, options: Options) -> None:
    """Refuse, before any long work, outputs that cannot be written from this GGUF.

    Raises:
        UserError: naming the output or the flag.
    """
    if options.quantize != "F16":
        raise UserError(
            "--quantize: a GGUF source keeps the type of every tensor; leave the flag out, or "
            "quantize the float model."
        )
    if options.ollama_create is not None and len(gguf.parts) > 1:
        raise UserError(
            f"--ollama-create: {gguf.parts[0].name} is one of {len(gguf.parts)} parts, and the "
            "output would be as well: join them with llama.cpp's `llama-gguf-split --merge` first."
        )
    for path in paths:
        if adapters.is_lora(path):
            continue
        if is_gguf_name(path):
            for part in part_paths(path, len(gguf.parts)):
                check_new(part)
        else:
            gguf_to_mlx.layout(gguf)
    models = [path for path in paths if not adapters.is_lora(path)]
    outputs.check_space(models, sum(part.stat().st_size for part in gguf.parts))


@contextmanager
def staging(paths: Sequence[Path]) -> Iterator[list[Staged]]:
    """Yield the outputs with their temporary folders; name all of them when the block ends well."""
    with ExitStack() as stack:
        staged = []
        for path in paths:
            manager = new_files(path) if is_gguf_name(path) else new_folder(path)
            staged.append(Staged(path, stack.enter_context(manager)))
        yield staged


def write(
    gguf: GgufSource,
    source: Source,
    staged: Staged,
    plans: Mapping[str, TensorPlan],
    direction: DirectionFile,
    options: Options,
    clock: Clock,
) -> Record:
    """Write one output to its temporary folder and measure its leak in the written bytes.

    Raises:
        UserError: when more than ``--max-leak`` is left.
    """
    embedding = any(one.writer.kind == "embedding" for one in plans.values())
    recipe = direction.metadata.get("recipe")
    label = edit_label(direction.sha256, options, source, recipe, embedding=embedding)
    if staged.is_lora:
        with clock.step("write"):
            return adapter_outputs.write_gguf(
                gguf, source, staged.place, staged.path, plans, label,
                options.max_leak,
            )  # fmt: skip
    write = _write_gguf if staged.is_gguf else _write_folder
    return {**write(gguf, source, staged, plans, label, options, clock), "embedding": embedding}


def _write_gguf(
    gguf: GgufSource,
    source: Source,
    staged: Staged,
    plans: Mapping[str, TensorPlan],
    label: Mapping[str, Any],
    options: Options,
    clock: Clock,
) -> Record:
    with clock.step("write"):
        files = _rewrite(gguf, source, staged.place, plans, label, options)
    with clock.step("measure the leak"), GgufSource(files[0]) as after:
        reports = compare_all(gguf, after, plans)
    one = {
        "output": str(staged.path.with_name(files[0].name)),
        "format": "GGUF",
        "files": [file.name for file in files],
        **leak_record(reports),
    }
    _check_leak(staged.path, reports, one["leak"], options)
    if len(files) == 1 and source.ollama is None:
        one |= notes.noted(notes.modelfile(lost_of_template(files[0])))
    if options.keep_undo:
        place = taken.kept_path(staged.place)
        taken.keep_gguf(place, gguf, plans, label["direction_sha256"])
    return one


def _rewrite(
    gguf: GgufSource,
    source: Source,
    to: Path,
    plans: Mapping[str, TensorPlan],
    label: Mapping[str, Any],
    options: Options,
) -> list[Path]:
    with progress(1, f"write {to.name}", "B") as bar:

        def moved(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return rewrite(
            gguf,
            to,
            tensors={
                name: replacement(gguf, one, grid=options.grid, plain=options.plain_rounding)
                for name, one in plans.items()
            },
            metadata=gguf_metadata(source, label, gguf.metadata),
            progress=moved,
        )


def _write_folder(
    gguf: GgufSource,
    source: Source,
    staged: Staged,
    plans: Mapping[str, TensorPlan],
    label: Mapping[str, Any],
    options: Options,
    clock: Clock,
) -> Record:
    """An MLX folder: the edited GGUF, converted. Its leak is that of the folder's own bytes."""
    with clock.step("write"):
        beside = staged.folder.with_name(f"{staged.path.name}.gguf")
        files = _rewrite(gguf, source, beside, plans, label, options)
        with GgufSource(files[0]) as edited:
            found = gguf_to_mlx.layout(edited)
            size = sum(entry.nbytes for entry in edited.tensors.values())
            with progress(size, f"write {staged.path.name}", "B") as bar:
                report = gguf_to_mlx.fill_folder(
                    edited,
                    found,
                    staged.folder,
                    extra={"abl_mlx": dict(label)},
                    progress=bar.update,
                )
    for file in files:
        file.unlink()
    reports: dict[str, TensorReport] = {}
    with clock.step("measure the leak"), TensorFiles(staged.folder) as written:
        for name, one in plans.items():
            before = mx.array(gguf.values(name))
            gguf.release(name)
            after = gguf_to_mlx.read_back(found, staged.folder, written, name)
            missing: Leak = leak(one.edit, one.writer, one.parameter, before, after)
            reports[name] = TensorReport(missing, None, None, one.old.name)
    one_record = {
        "output": str(staged.path),
        "format": "MLX",
        **leak_record(reports),
        "types": sorted(report.forms),
        **notes.noted(notes.drafting(report.left_out)),
    }
    _check_leak(staged.path, reports, one_record["leak"], options)
    return one_record


def compare_all(
    before: GgufSource, after: GgufSource, plans: Mapping[str, TensorPlan]
) -> dict[str, TensorReport]:
    """Every edited tensor of two files compared."""
    reports = {}
    with progress(len(plans), "read back", "tensor") as bar:
        for name, one in plans.items():
            reports[name] = compare(before, after, one)
            bar.update()
    return reports


def leak_record(reports: Mapping[str, TensorReport]) -> Record:
    """What the comparison of all edited tensors says, as JSON values."""
    leaks = [report.leak for report in reports.values()]
    whole = sum(leaks[1:], start=leaks[0])
    return {
        "types": sorted({report.type for report in reports.values()}),
        "leak": {
            "total": total_leak(leaks),
            "max": largest(reports)[1],
            "tensors": {name: report.record() for name, report in reports.items()},
        },
        "weight_error": whole.error,
    }


def _check_leak(
    path: Path, reports: Mapping[str, TensorReport], leak: Mapping[str, Any], options: Options
) -> None:
    if leak["total"] <= options.max_leak:
        return
    name, value = largest(reports)
    mend = (
        "leave out --plain-rounding" if options.plain_rounding else "choose a file of a finer type"
    )
    raise UserError(
        f"the edit did not survive in {path}: {leak['total']:.1%} of the component is still in the "
        f"weights (most in {name}: {value:.1%}) and --max-leak is {options.max_leak:g}; {mend}, or "
        "raise --max-leak."
    )


def write_companions(staged: Staged, source: Source, record: Record, written: Record) -> None:
    """Write the record, the card and, for a GGUF that is not split, the Modelfile.

    Args:
        written: what the record says of this output.
    """
    place = staged.place if staged.is_gguf else staged.folder
    companions = outputs.companions(place)
    companions["record"].write_text(to_json(without_home(record)) + "\n", encoding="utf-8")
    text = card(record, written, source.title, companions["record"].name, adapter=staged.is_lora)
    companions["card"].write_text(text, encoding="utf-8")
    # A Modelfile names one file; older Ollamas take no more.
    if "modelfile" in companions and place.is_file():
        text = modelfile(place, None, staged.path.name, kept=source.ollama)
        companions["modelfile"].write_text(text, encoding="utf-8")
