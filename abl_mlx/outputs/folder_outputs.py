"""Writes the edit of an MLX or Hugging Face folder as a folder, a GGUF or an adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from abl_mlx.behaviour import evaluate
from abl_mlx.choices import Editing, Writing
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.edits import exactness
from abl_mlx.edits.leak import LeakReport
from abl_mlx.edits.weight_edit import WeightEdit
from abl_mlx.inputs.sources import Source
from abl_mlx.models import chat_model
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.loaded_model import LoadedModel
from abl_mlx.models.writers import Writer
from abl_mlx.outputs import (
    adapter_outputs,
    folder_quantized,
    further_files,
    mtp,
    new_parts,
    undo_file,
)
from abl_mlx.outputs.folder_plan import Plan, TensorEdit, measure_leak
from abl_mlx.outputs.gguf_outputs import IN_MLX, OF_THE_FILE, opened
from abl_mlx.outputs.gguf_plan import edit_blocks, quantize, rounded_to_float
from abl_mlx.outputs.provenance import edit_label, gguf_metadata
from abl_mlx.outputs.staging import (
    ADAPTER,
    COMPANIONS,
    FOLDER,
    GGUF,
    Output,
    Written,
    check_space,
    format_of,
)
from abl_mlx.records.edits import Drafting, WrittenEdit
from abl_mlx.support import notes, ranks
from abl_mlx.support.clock import Clock
from abl_mlx.support.console import progress, progress_to
from convert.base.errors import UserError
from convert.base.hf_config import read_config, stored_config
from convert.gguf import imatrix
from convert.gguf.rewrite import split
from convert.mlx.folder import FLOAT_DTYPES, float_dtype, rewrite_folder
from convert.mlx.folder_weights import FolderWeights
from convert.mlx.other_quantization import refuse_foreign
from convert.mlx.safetensors_files import TensorFiles, TensorInfo
from convert.mlx_to_gguf import (
    GgufReport,
    Quantizer,
    check_convertible,
    encode,
    write_gguf,
)
from convert.ollama.description import lost_of_template

ROWS_WARNING = (
    "warning: keeping the norms of rows puts part of the direction back; the leak says how much"
)

_READ_BACK = "KL and component are of the edited tensors read back from the file, in MLX"
_NOT_ASKED = (
    "the GGUF itself was not asked: pip install 'abl-mlx[llamacpp]' to have llama.cpp do it; the "
    "figures are of its edited tensors, read back into the MLX model"
)


def check(source: Source, files: TensorFiles, paths: Sequence[Path], writing: Writing) -> None:
    """Check, before any long work, that the outputs can be written from this folder.

    Raises:
        UserError: naming the output or the flag that does not fit.
    """
    formats = {path: format_of(path) for path in paths}
    if writing.mtp and ADAPTER in formats.values():
        raise UserError(
            "--mtp: mlx-lm applies no adapter to blocks of multi-token prediction; write a model, "
            "or leave the flag out."
        )
    if ranks.lockstep() and set(formats.values()) != {FOLDER}:
        raise UserError(
            "--split-model: of outputs only folders are run in parts and so judged; write a "
            "folder, and convert that."
        )
    if writing.quantize is not None and GGUF not in formats.values():
        raise UserError(
            f"--quantize {writing.quantize} is the type of a GGUF, and {paths[0]} is none: write "
            "-o NAME.gguf, or leave the flag out."
        )
    whole = [path for path in paths if formats[path] != ADAPTER]
    if not whole:
        return  # an adapter is small, and its base may have weights of any type
    refuse_foreign(source.path, read_config(source.path), files)
    check_space(whole, sum(file.stat().st_size for file in files.files))
    if writing.imatrix is not None and writing.quantize is None:
        raise UserError("--imatrix weights the errors of quantizing: say the type by --quantize.")
    if writing.keep_types and writing.quantize is None:
        raise UserError(
            "--keep-types: quantized matrices keep their weights, unless --quantize is given."
        )
    parts = new_parts.of(writing)
    for path in paths:
        if formats[path] == GGUF:
            new_parts.check(path, parts, 1)
            if writing.writer_bits is not None:
                raise UserError(
                    f"--writer-bits: {path} gets its types by --quantize; leave the flag out."
                )
    if GGUF in formats.values():
        check_convertible(
            source.path,
            writing.quantize,
            keep_types=writing.keep_types,
            imatrix=imatrix.given(writing.imatrix),
        )


@dataclass
class FolderEdit:
    """An edit of a folder's model, ready to be written; a `abl_mlx.outputs.model_file.PlannedEdit`.

    Attributes:
        source, files: where the model is, and its tensors.
        loaded: the model, with its weights in memory or still in the files.
        edit: the edit.
        direction: the directions that it removes.
        editing: the chosen options of the edit, for the written model's label.
        writing: the options of writing.
        plan: the edit of each tensor of the files; None if only adapters are written.
        streamed: whether the model is measured and judged layer by layer.
    """

    source: Source
    files: TensorFiles
    loaded: LoadedModel
    edit: WeightEdit
    direction: DirectionFile
    editing: Editing
    writing: Writing
    plan: Plan | None
    streamed: bool
    outlines: list[Writer] = field(init=False)

    needs_model = True

    def __post_init__(self) -> None:
        self.outlines = [replace(one, module=nn.Module()) for one in self.loaded.writers]
        self._layers = len(self.loaded.chat.layers)

    @property
    def embedding(self) -> bool:
        """Whether the edit changes an embedding."""
        return any(one.kind == "embedding" for one in self.edit.chosen(self.outlines))

    @property
    def original(self) -> evaluate.InLlamaCpp | None:
        return None

    def predicting(self) -> Drafting | None:
        edited = [*self.plan.edits, *self.plan.matrices] if self.plan else []
        return mtp.record(mtp.tensors(self.files, self._layers), edited)

    def let_go(self) -> None:
        self.plan = None
        self.loaded.let_go()

    def write(self, output: Output, clock: Clock) -> Written:
        label = edit_label(
            self.direction, self.editing, self.writing, self.source, embedding=self.embedding
        )
        write = {ADAPTER: self._write_adapter, GGUF: self._write_gguf, FOLDER: self._write_folder}
        with clock.step("write"):
            return write[output.format](output, label)

    @property
    def _max_leak(self) -> float:
        # The user asked for the norms of rows to be kept, so the leak that this causes is reported
        # but not refused.
        return math.inf if self.edit.norm == "rows" else self.writing.max_leak

    def _facts(
        self,
        output: Output,
        leak: LeakReport,
        types: Sequence[str],
        note: str | None,
        left_out: Sequence[str] = (),
    ) -> WrittenEdit:
        return WrittenEdit(
            output=str(output.path),
            format=output.format,
            types=list(types),
            leak=leak.record(),
            embedding=self.embedding,
            left_out=list(left_out),
            note=notes.joined(note, ROWS_WARNING if self.edit.norm == "rows" else None),
        )

    def _write_adapter(self, output: Output, label: Mapping[str, Any]) -> Written:
        chat, writers = self.loaded.chat, self.loaded.writers
        leak, types, note = adapter_outputs.write_mlx(
            chat, self.edit, writers, output, label, self._max_leak
        )
        # Biases stay unedited with an adapter, which its note says.
        keeps = any(writer.has_bias for writer in writers)
        infos = map(self.files.info, self.files.names)
        limit = exactness.limit_for(
            exactness.matrix_types((info.dtype, info.shape) for info in infos)
        )
        folder, outlines = self.source.path, self.outlines
        return Written(
            output,
            self._facts(output, leak, types, note),
            lambda streamed: nullcontext(
                chat_model.load(folder, check=False, adapter=output.staged, streamed=streamed)
            ),
            limit=None if keeps else limit,
            writers_in=lambda chat: exactness.moved(outlines, chat),
        )

    def _write_folder(self, output: Output, label: Mapping[str, Any]) -> Written:
        assert self.plan is not None  # of every output but adapters
        files, edits, matrices = self.files, self.plan.edits, self.plan.matrices
        writing, folder = self.writing, self.source.path
        config = edited_config(
            folder, self.loaded.chat.config, label, folder_quantized.quantization_changes(matrices)
        )
        total = sum(file.stat().st_size for file in files.files)
        total += sum(files.info(name).nbytes for name in [*edits, *matrices])
        with progress(total, f"write {output.path.name}", "B") as bar:
            left_out = rewrite_folder(
                folder,
                files,
                output.staged,
                {name: _in_dtype(edit, files.info(name)) for name, edit in edits.items()},
                config=config,
                rewrites=[
                    folder_quantized.rewrite(
                        files, one, grid=writing.grid, plain=writing.plain_rounding
                    )
                    for one in matrices.values()
                ],
                skip=COMPANIONS,
                progress=bar.update,
            )
        _keep_card(folder, output.staged)
        with TensorFiles(output.staged) as written:
            leak = measure_leak(
                files.read,
                edits,
                written.read,
                limit=self._max_leak,
                output=str(output.path),
                others=folder_quantized.comparisons(files, written, matrices),
            )
        if writing.keep_undo:
            place = undo_file.kept_path(output.staged)
            undo_file.keep_folder(place, files, self.plan, self.direction.sha256)
        types = {files.info(name).dtype for name in edits}
        types |= {one.type for one in matrices.values()}
        return Written(
            output,
            self._facts(output, leak, sorted(types), notes.not_copied(left_out), left_out),
            lambda streamed: nullcontext(
                chat_model.load(output.staged, check=False, streamed=streamed)
            ),
            limit=exactness.limit_for(types),
        )

    def _write_gguf(self, output: Output, label: Mapping[str, Any]) -> Written:
        assert self.plan is not None  # of every output but adapters
        folder, edits = self.source.path, self.plan.edits_of_gguf
        report = self._fill_gguf(output, label, edits)
        tower = further_files.write_tower(folder, output.staged)
        files = split(output.staged, new_parts.of(self.writing))
        read = replace(report, path=files[0]).reader()

        def read_back(name: str) -> mx.array:
            return mx.array(read(name))

        weights = FolderWeights(self.files, self.loaded.chat.config)
        leak = measure_leak(
            weights.values, edits, read_back, limit=self._max_leak, output=str(output.path)
        )
        types = sorted({report.types[report.tensors[name]] for name in edits})
        note = notes.joined(
            tower,
            notes.modelfile(lost_of_template(output.staged, folder)) if len(files) == 1 else None,
            notes.repacked(report.forms),
        )

        @contextmanager
        def in_loaded_model(streamed: bool) -> Iterator[ChatModel]:
            assert self.plan is not None  # as long as the model is there
            self.plan.load_into_model(read_back)
            yield self.loaded.chat

        # Parameters of a quantized model are packed, and those of a streamed one are not there;
        # then the file itself is loaded.
        floats = not self.plan.matrices and not self.streamed
        return Written(
            output,
            replace(
                self._facts(output, leak, types, note),
                output=str(output.path.with_name(files[0].name)),
                files=[file.name for file in files] if len(files) > 1 else None,
            ),
            in_loaded_model if floats else partial(opened, files[0]),
            on_loaded=floats,
            llamacpp=evaluate.InLlamaCpp(files[0]),
            notes=(_NOT_ASKED, _READ_BACK) if floats else (IN_MLX, OF_THE_FILE),
            limit=exactness.limit_for(types),
        )

    def _fill_gguf(
        self, output: Output, label: Mapping[str, Any], edits: Mapping[str, TensorEdit]
    ) -> GgufReport:
        """Write the GGUF to its staged path, with edited tensors rounded to preserve the edit."""
        writing, plain = self.writing, self.writing.plain_rounding

        def edited_blocks(name: str, blocks: Any, kind: Any, importance: Any) -> Any:
            one = edits[name]
            return edit_blocks(one, blocks, kind, importance, grid=writing.grid, plain=plain)

        with progress_to(f"write {output.path.name}", "tensor") as moved:
            return write_gguf(
                self.source.path,
                output.staged,
                file_type=writing.quantize,
                edits=edits,
                metadata=gguf_metadata(self.source, label),
                keep_types=writing.keep_types,
                quantize=None if plain else _quantizer(edits),
                edit_blocks=edited_blocks,
                imatrix=imatrix.given(writing.imatrix),
                progress=moved,
            )


def _in_dtype(edit: TensorEdit, info: TensorInfo) -> Callable[[mx.array], mx.array]:
    """The edit with its values rounded to the tensor's own dtype so that the edit is preserved."""
    dtype = float_dtype(info)
    return lambda values: edit.rounded(edit(values), dtype)


def edited_config(
    folder: Path,
    filled: Mapping[str, Any],
    label: Mapping[str, Any],
    quantization: Mapping[str, Any],
) -> dict[str, Any]:
    """The config.json of an edited folder.

    Args:
        folder: the source.
        filled: its config.json with the keys that mlx-lm needs added.
        label: the edit's label.
        quantization: module path -> its new entry in the map of quantized modules.
    """
    original = stored_config(folder)
    # mlx-lm takes eos_token_id from generation_config.json, where it stays.
    added = {key: value for key, value in filled.items() if key != "eos_token_id"}
    config = {**added, **original, "abl_mlx": dict(label)}
    # mlx-lm writes the map under both names, and reads the first.
    for key in ("quantization", "quantization_config"):
        if quantization and isinstance(config.get(key), dict) and "bits" in config[key]:
            config[key] = {**config[key], **quantization}
    return config


def _keep_card(source: Path, out: Path) -> None:
    if (source / "README.md").is_file():
        (out / "README.source.md").write_bytes((source / "README.md").read_bytes())


def _quantizer(edits: Mapping[str, TensorEdit]) -> Quantizer:
    def encoded(name: str, values: Any, kind: Any, importance: Any) -> Any:
        one = edits[name]
        dtype = FLOAT_DTYPES.get(kind.name)
        if dtype is None:
            return quantize(one, values, kind, importance)
        return encode(rounded_to_float(one, values, dtype), kind, name)

    return encoded
