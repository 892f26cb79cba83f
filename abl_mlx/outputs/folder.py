"""A model in an MLX or Hugging Face folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx.choices import Editing, Writing
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.edits.steering import Induction
from abl_mlx.edits.weight_edit import WeightEdit
from abl_mlx.inputs.sources import Source
from abl_mlx.models import chat_model, context_length, memory, prompt_tokens, sweeps
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.given_template import GivenTemplate
from abl_mlx.models.input_squares import Matrices
from abl_mlx.models.loaded_model import LoadedModel
from abl_mlx.models.readers import with_edited
from abl_mlx.models.writers import Writer, find_writers
from abl_mlx.outputs import (
    folder_outputs,
    further_files,
    head_copy,
    induced,
    mtp,
    other_format,
    record_parts,
    staging,
    stream_weights,
    undo_folder,
)
from abl_mlx.outputs.edit_label import Label
from abl_mlx.outputs.folder_outputs import ROWS_WARNING, FolderEdit
from abl_mlx.outputs.folder_plan import plan
from abl_mlx.outputs.further_files import FurtherFiles
from abl_mlx.outputs.induced import FolderConstant
from abl_mlx.outputs.inspection import edit_share, grouped
from abl_mlx.outputs.mentions import read_card
from abl_mlx.outputs.other_format import NewTypes
from abl_mlx.outputs.stream_weights import StreamWeights
from abl_mlx.outputs.undo_file import Taken, Tensors, taken
from abl_mlx.records.edits import Converted
from abl_mlx.records.looks import InspectRecord
from abl_mlx.support.arrays import parameters
from abl_mlx.support.clock import Clock
from abl_mlx.support.console import say
from convert.architectures import hf_to_gguf
from convert.architectures.folder_config import architecture
from convert.base import json_text
from convert.base.errors import UserError
from convert.base.hf_config import read_config
from convert.mlx.folder_weights import FolderWeights
from convert.mlx.safetensors_files import TensorFiles
from convert.tokenizers.hf_files import TOKENIZER


class FolderFile(ExitStack):
    """A folder as a `abl_mlx.outputs.model_file.ModelFile`."""

    format = staging.FOLDER
    adapter = staging.ADAPTER
    runtimes: tuple[str, ...] = ("mlx-lm",)

    def __init__(self, source: Source, given: GivenTemplate | None = None) -> None:
        super().__init__()
        self.source = source
        self.given = given

    @cached_property
    def files(self) -> TensorFiles:
        """Its safetensors files."""
        return self.enter_context(TensorFiles(self.source.path))

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json with renamed keys filled in."""
        return read_config(self.source.path)

    @cached_property
    def lazily(self) -> ChatModel:
        """The model in MLX, with weights still in the files and without a tokenizer."""
        return chat_model.load_lazily(self.source.path)

    @property
    def folder(self) -> Path | None:
        return self.source.path

    @cached_property
    def further(self) -> FurtherFiles:
        return further_files.of_source(self.source)

    @property
    def size(self) -> int:
        return sum(file.stat().st_size for file in self.source.path.glob("model*.safetensors"))

    # --- what the files say --------------------------------------------------------------------

    def context_length(self) -> int | None:
        if not (self.source.path / "config.json").is_file():
            return None
        return context_length.of_config(self.config)

    def token_counter(self) -> prompt_tokens.Count:
        folder = self.source.path
        tokenizer = chat_model.load_tokenizer(folder, self.config, folder)
        return prompt_tokens.counter(tokenizer, folder, self.given)

    def check_template(self) -> None:
        pass  # a tokenizer may have code instead of a template, which loading it will show

    def has_tokens(self, wanted: Mapping[str, int]) -> bool:
        file = self.source.path / "tokenizer.json"
        try:
            vocabulary = (json_text.read(file, TOKENIZER).get("model") or {}).get("vocab")
        except (FileNotFoundError, UserError):
            return False  # loading the tokenizer will report what is wrong with it
        return isinstance(vocabulary, dict) and wanted.items() <= vocabulary.items()

    def fingerprint(self) -> list[list[Any]]:
        files = [path for path in self.source.path.iterdir() if path.is_file()]
        kept = (".safetensors", ".json", ".jinja")
        return record_parts.fingerprint(path for path in files if path.suffix in kept)

    def label(self) -> dict[str, Any] | None:
        label = self.config.get("abl_mlx")
        return dict(label) if isinstance(label, Mapping) and label else None

    def said(self) -> dict[str, str]:
        kept = {k: v for k, v in self.config.items() if k not in ("abl_mlx", "quantization")}
        return {
            "config.json": json.dumps(kept),
            "README.md": read_card(self.source.path / "README.md"),
        }

    def inspect(self) -> InspectRecord:
        config, files = self.config, self.files
        stored = Counter(files.info(name).dtype for name in files.names)
        chat = self.lazily
        writers = find_writers(chat)
        copies = head_copy.find(files, chat.config, writers)
        whole = sum(value.size for _, value in parameters(chat.model))
        touched = [
            writer.module[path.rsplit(".", 1)[1]].size
            for writer in writers
            for path in writer.parameters
        ]
        tail, fault = _template(chat)
        return InspectRecord(
            source=self.source.name,
            folder=str(self.source.path),
            architecture=config["model_type"],
            layers=len(chat.layers),
            width=chat.width,
            parameters=whole,
            dtypes=sorted(stored),
            quantization=config.get("quantization") or config.get("quantization_config"),
            tied=any(writer.tied for writer in writers) or bool(copies),
            head_copies=copies or None,
            template_tail=tail,
            template_fault=fault,
            nulls=frozenset({"template_tail"}) if tail is None else frozenset(),
            writers=grouped(
                (writer.path, writer.kind, writer.gain is not None, writer.has_bias)
                for writer in writers
            ),
            edit=edit_share(touched, whole),
            mtp=mtp.record(mtp.tensors(files, len(chat.layers)), []),
        )

    def hashes(self) -> dict[str, str]:
        return record_parts.file_hashes(self.files.files)

    # --- its tensors ---------------------------------------------------------------------------

    def kinds(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        infos = {name: self.files.info(name) for name in self.files.names}
        return {name: (info.dtype, info.shape) for name, info in infos.items()}

    def raw(self, name: str) -> np.ndarray:
        return np.frombuffer(self.files.bytes(name), np.uint8)

    def values(self, name: str) -> mx.array:
        return self.files.read(name).astype(mx.float32)

    def release(self, name: str) -> None:
        self.files.release(name)

    def stream_weights(self) -> StreamWeights:
        return self._stream_weights

    @cached_property
    def _stream_weights(self) -> StreamWeights:
        return stream_weights.of_folder(self.source.path, self.files)

    # --- running it ----------------------------------------------------------------------------

    def load(self, *, streamed: bool = False) -> ChatModel:
        chat = chat_model.load(self.source.path, streamed=streamed)
        chat.write_with(self.given)
        chat.template  # noqa: B018 - raises here if there is none
        return chat

    def find_writers(self, chat: ChatModel, pattern: str | None = None) -> list[Writer]:
        return find_writers(chat)

    def matrices(self) -> Matrices:
        config = read_config(self.source.path)
        shapes = FolderWeights(self.files, config).shapes
        made = hf_to_gguf.plan(config, shapes, self.source.path)
        found = {one.name: one.shape for one in made.targets}
        return Matrices(made.placed, found, architecture(config).gguf)

    # --- editing it ----------------------------------------------------------------------------

    def check(self, paths: Sequence[Path], editing: Editing, writing: Writing) -> None:
        folder_outputs.check(self.source, self.files, paths, writing)

    def outline(
        self, clock: Clock, *, lazy: bool = False, memory_check: bool = True
    ) -> LoadedModel | None:
        with clock.step("load the model"):
            if lazy or not memory.fits(self.size):
                chat = self.lazily
            else:
                memory.check(self.source.title, self.size, asked=memory_check)
                chat = chat_model.load(self.source.path, encodes=False)
        with clock.step("find the residual writers"):
            return LoadedModel(chat, find_writers(chat))  # `plan` adds readers

    def plan(
        self,
        edit: WeightEdit,
        direction: DirectionFile,
        paths: Sequence[Path],
        loaded: LoadedModel | None,
        editing: Editing,
        writing: Writing,
    ) -> FolderEdit:
        assert loaded is not None  # `outline` gives it
        if edit.norm == "rows":
            say(ROWS_WARNING)
        streamed = sweeps.of(loaded.chat.model) is not None
        if streamed:
            # Matrices of a streamed model are not there; these are read when they are edited.
            loaded = LoadedModel(self.lazily, find_writers(self.lazily))
        loaded.hold(loaded.chat, with_edited(loaded.chat, loaded.writers, edit.places))
        tensors = None
        if any(staging.format_of(path) != staging.ADAPTER for path in paths):
            tensors = plan(
                loaded.chat, self.files, edit, loaded.writers,
                writer_bits=writing.writer_bits, mtp=writing.mtp,
            )  # fmt: skip
        return FolderEdit(
            self.source, self.files, loaded, edit, direction, editing, writing, tensors, streamed
        )

    def check_constant(self, paths: Sequence[Path], loaded: LoadedModel, writing: Writing) -> None:
        for path in paths:
            induced.check_place(path, loaded)

    def plan_constant(
        self, found: Induction, direction: DirectionFile, loaded: LoadedModel, writing: Writing
    ) -> FolderConstant:
        return FolderConstant(self.source, loaded, found, direction, writing)

    # --- what comes of it ----------------------------------------------------------------------

    def convert(self, out: Path, types: NewTypes) -> Converted:
        return other_format.to_gguf(self.source, self.label(), out, types)

    def taken(self, edit: WeightEdit, label: Label, of: Tensors) -> dict[str, Taken]:
        plan = undo_folder.plan(self.source, self.lazily, self.files, edit, mtp=label.mtp)
        return {name: taken(one, of.values(name)) for name, one in plan.edits.items()}

    def restore(self, path: Path, found: Mapping[str, Taken]) -> float:
        return undo_folder.write(self.source, self.files, path, found)

    def restore_by_adapter(self, path: Path, found: Mapping[str, Taken], label: Label) -> None:
        undo_folder.write_adapter(self.source, self.lazily, self.files, path, found, label)


def _template(chat: ChatModel) -> tuple[int | None, str | None]:
    """How many tokens follow the instruction in the chat template, or an error."""
    try:
        chat_model.add_tokenizer(chat)
        return chat.template_tail(), None
    except UserError as error:
        return None, str(error)
