"""A model in a GGUF: one file or a split one, or an entry of Ollama's store."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx.choices import Editing, Writing
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.edits import routing
from abl_mlx.edits.edit import stream_axis
from abl_mlx.edits.steering import Induction
from abl_mlx.edits.weight_edit import WeightEdit
from abl_mlx.inputs.sources import Source
from abl_mlx.models import context_length, from_gguf, prompt_tokens, routers
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.given_template import GivenTemplate
from abl_mlx.models.input_squares import Matrices
from abl_mlx.models.loaded_model import LoadedModel
from abl_mlx.models.same_model import check_same
from abl_mlx.models.writers import Writer
from abl_mlx.outputs import (
    adapter_outputs,
    further_files,
    gguf_outputs,
    induced,
    other_format,
    record_parts,
    staging,
    stream_weights,
    undo_gguf,
)
from abl_mlx.outputs.edit_label import Label, gguf_label
from abl_mlx.outputs.further_files import FurtherFiles
from abl_mlx.outputs.gguf_outputs import GgufEdit
from abl_mlx.outputs.gguf_plan import plan, stored_values
from abl_mlx.outputs.induced import GgufConstant
from abl_mlx.outputs.inspection import edit_share, grouped
from abl_mlx.outputs.mentions import READ, read_card
from abl_mlx.outputs.other_format import NewTypes
from abl_mlx.outputs.stream_weights import StreamWeights
from abl_mlx.outputs.undo_file import Taken, Tensors, taken
from abl_mlx.records.edits import Converted
from abl_mlx.records.looks import InspectRecord
from abl_mlx.support import notes
from abl_mlx.support.clock import Clock
from convert import gguf_to_mlx
from convert.architectures import gguf_mtp, gguf_writers
from convert.architectures.gguf_writers import GgufWriter
from convert.architectures.table import IN_MLX
from convert.base.errors import UserError, of
from convert.gguf import imatrix
from convert.gguf.file import GgufSource
from convert.gguf.parts import size_of
from convert.gguf.quantize import Quantization
from convert.tokenizers import template_files
from convert.tokenizers.from_gguf import chat_templates


class GgufFile(ExitStack):
    """A GGUF as a `abl_mlx.outputs.model_file.ModelFile`."""

    format = staging.GGUF
    adapter = staging.LORA
    runtimes: tuple[str, ...] = ("llama.cpp", "mlx-lm", "llama-server")
    folder: Path | None = None

    def __init__(self, source: Source, given: GivenTemplate | None = None) -> None:
        super().__init__()
        self.source = source
        self.given = given

    @cached_property
    def gguf(self) -> GgufSource:
        """The open file."""
        return self.enter_context(GgufSource(self.source.path))

    @cached_property
    def layout(self) -> gguf_to_mlx.Layout:
        """Which tensors become which parameters of mlx-lm's model."""
        return gguf_to_mlx.layout(self.gguf)

    @cached_property
    def further(self) -> FurtherFiles:
        return further_files.of_source(self.source)

    @property
    def size(self) -> int:
        return size_of(self.source.path)

    @property
    def width(self) -> int:
        """d, the number of dimensions of the residual stream."""
        return int(self.gguf.tensor("token_embd.weight").shape[-1])

    def named_writers(self, pattern: str | None = None) -> list[GgufWriter]:
        """The residual writers of the file's architecture, or those that ``--tensors`` names."""
        gguf = self.gguf
        return gguf_writers.find(gguf.architecture, gguf.shapes, gguf.metadata, pattern)

    # --- what the file says --------------------------------------------------------------------

    def context_length(self) -> int | None:
        return context_length.of_metadata(self.gguf.metadata)

    def token_counter(self) -> prompt_tokens.Count:
        # If MLX cannot run the tokenizer, llama.cpp counts the tokens.
        with suppress(UserError):
            tokenizer = from_gguf.tokenizer(self.gguf, {})
            return prompt_tokens.counter(tokenizer, self.source.path, self.given)
        return lambda text: 0

    def check_template(self) -> None:
        with of(self.source.path):
            templates = chat_templates(self.gguf.metadata)
        if self.given is not None or template_files.plain(templates) is not None:
            return
        if templates:
            raise prompt_tokens.without_plain_template(templates, self.source.path)
        raise prompt_tokens.without_template(self.source.path)

    def has_tokens(self, wanted: Mapping[str, int]) -> bool:
        tokens = self.gguf.metadata.get("tokenizer.ggml.tokens")
        # The file may have further tokens, which only pad the vocabulary.
        return isinstance(tokens, list) and all(
            index < len(tokens) and tokens[index] == text for text, index in wanted.items()
        )

    def fingerprint(self) -> list[list[Any]]:
        return record_parts.fingerprint([self.source.path])

    def label(self) -> dict[str, Any] | None:
        return gguf_label(self.gguf) or None

    def said(self) -> dict[str, str]:
        metadata, path = self.gguf.metadata, self.source.path
        texts = {key: _text(metadata[key]) for key in metadata if key.startswith("general.")}
        return {
            **{key: text for key, text in texts.items() if text is not None},
            "card": read_card(path.with_name(f"{path.stem}.README.md")),
        }

    def inspect(self) -> InspectRecord:
        gguf, named = self.gguf, self.named_writers()
        sizes = {name: math.prod(entry.shape) for name, entry in gguf.tensors.items()}
        types = Counter(entry.type.name for entry in gguf.tensors.values() if len(entry.shape) > 1)
        whole = sum(sizes.values()) or 1
        return InspectRecord(
            source=self.source.name,
            file=str(gguf.parts[0]),
            architecture=gguf.architecture,
            layers=self._blocks(),
            width=self.width,
            parameters=whole,
            dtypes=sorted({entry.type.name for entry in gguf.tensors.values()}),
            quantization=", ".join(f"{count} × {name}" for name, count in types.most_common()),
            tied=any(one.tied for one in named),
            runs_in_mlx=gguf.architecture in IN_MLX,
            writers=grouped(
                (one.name, one.kind, bool(one.gains), one.bias is not None) for one in named
            ),
            edit=edit_share((sizes[name] for one in named for name in one.parameters), whole),
            mtp=gguf_outputs.predicting(gguf, []),
        )

    def _blocks(self) -> int:
        key = f"{self.gguf.architecture}.block_count"
        if key not in self.gguf.metadata:
            raise UserError(
                f"{self.gguf.parts[0]} has no {key} in its metadata: download it again."
            )
        return int(self.gguf.metadata[key])

    def hashes(self) -> dict[str, str]:
        return record_parts.file_hashes(self.gguf.parts)

    # --- its tensors ---------------------------------------------------------------------------

    def kinds(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {name: (one.type.name, one.shape) for name, one in self.gguf.tensors.items()}

    def raw(self, name: str) -> np.ndarray:
        return self.gguf.raw(name).reshape(-1)

    def values(self, name: str) -> mx.array:
        return stored_values(self.gguf, name)

    def release(self, name: str) -> None:
        self.gguf.release(name)

    def stream_weights(self) -> StreamWeights:
        return self._stream_weights

    @cached_property
    def _stream_weights(self) -> StreamWeights:
        return stream_weights.of_gguf(self.gguf)

    # --- running it ----------------------------------------------------------------------------

    def load(self, *, streamed: bool = False) -> ChatModel:
        self.check_template()
        # The layout is dropped, because it would keep the model in memory while this file is open.
        chat = from_gguf.load(self.gguf, streamed=streamed)[0]
        chat.write_with(self.given)
        return chat

    def find_writers(self, chat: ChatModel, pattern: str | None = None) -> list[Writer]:
        return from_gguf.find_writers(chat, self.layout, self.gguf, self.named_writers(pattern))

    def matrices(self) -> Matrices:
        return Matrices(self.layout.weights, self.gguf.shapes, self.gguf.architecture)

    def check_same(self, chat: ChatModel, pattern: str | None) -> None:
        """Check that a loaded model is the same as the one in this file.

        Args:
            chat: the loaded model.
            pattern: as for `find_writers`.

        Raises:
            UserError: when it is another model.
        """
        check_same(chat, self.gguf, self.named_writers(pattern))

    # --- editing it ----------------------------------------------------------------------------

    def check(self, paths: Sequence[Path], editing: Editing, writing: Writing) -> None:
        gguf_outputs.check(paths, self.gguf, writing)
        named = self._edited(paths, editing, writing)
        # An edit that would change nothing is refused now, before the direction is measured.
        axis = stream_axis(named[0].kind, "weight")
        width = self.gguf.tensors[named[0].name].shape[axis]
        plan(
            self.gguf,
            routing.of_any_directions(width, editing),
            named,
            readers=self.named_readers(editing.edit),
            quantization=self._quantization(writing),
        )

    def named_readers(self, edit: str) -> list[Writer]:
        """The tensors that read the residual stream, or the biases of routers.

        There are none if ``--edit`` is about writers.
        """
        if edit == "routers":
            return routers.of_gguf(self.gguf)
        return self._readers if edit == "readers" else []

    @cached_property
    def _readers(self) -> list[Writer]:
        return from_gguf.find_readers(self.gguf, self.layout)

    def _edited(
        self, paths: Sequence[Path], editing: Editing, writing: Writing
    ) -> list[GgufWriter]:
        """All residual writers that an edit may change, with those of multi-token prediction."""
        named = [
            *self.named_writers(writing.tensors),
            *gguf_outputs.drafting(self.gguf, paths, editing, writing),
        ]
        if any(staging.format_of(path) == staging.LORA for path in paths):
            adapter_outputs.check_gguf(self.gguf, named)
        return named

    def outline(
        self, clock: Clock, *, lazy: bool = False, memory_check: bool = True
    ) -> LoadedModel | None:
        return None  # the file alone is enough to plan an edit

    def plan(
        self,
        edit: WeightEdit,
        direction: DirectionFile,
        paths: Sequence[Path],
        loaded: LoadedModel | None,
        editing: Editing,
        writing: Writing,
    ) -> GgufEdit:
        named = self._edited(paths, editing, writing)
        quantization = self._quantization(writing)
        plans = plan(
            self.gguf,
            edit,
            named,
            readers=self.named_readers(edit.places),
            quantization=quantization,
        )
        own = self.named_writers(writing.tensors)
        return GgufEdit(
            self.source, self.gguf, plans, own, direction, editing, writing, loaded, quantization,
        )  # fmt: skip

    def _quantization(self, writing: Writing) -> Quantization:
        """The type of every tensor in GGUF outputs."""
        weights = imatrix.given(writing.imatrix)
        return Quantization.of(self.gguf, writing.quantize, weights, keep=writing.keep_types)

    def check_constant(self, paths: Sequence[Path], loaded: LoadedModel, writing: Writing) -> None:
        for path in paths:
            induced.check_gguf(path, self.gguf)
            induced.check_place(path, loaded)
        self._quantization(writing)

    def plan_constant(
        self, found: Induction, direction: DirectionFile, loaded: LoadedModel, writing: Writing
    ) -> GgufConstant:
        types = self._quantization(writing)
        return GgufConstant(self.source, loaded, found, direction, writing, self.gguf, types)

    # --- what comes of it ----------------------------------------------------------------------

    def convert(self, out: Path, types: NewTypes) -> Converted:
        if staging.format_of(out) == staging.GGUF:
            written = other_format.to_other_types(self.gguf, out, types)
            note = notes.came_along(self.further.place(out))
        else:
            written = other_format.to_folder(self.gguf, out, types)
            note = notes.no_projector(further_files.projector_names(self.source))
        return replace(written, note=notes.joined(written.note, note))

    def taken(self, edit: WeightEdit, label: Label, of: Tensors) -> dict[str, Taken]:
        # The label has the regular expression of --tensors, which finds the same tensors again.
        writers = self.named_writers(label.tensors)
        if label.mtp:
            gguf = self.gguf
            writers += gguf_mtp.find(gguf.architecture, gguf.shapes, gguf.metadata)
        plans = plan(self.gguf, edit, writers, readers=self.named_readers(edit.places))
        return {name: taken(one, of.values(name)) for name, one in plans.items()}

    def restore(self, path: Path, found: Mapping[str, Taken]) -> float:
        return undo_gguf.write(self.gguf, path, found)

    def restore_by_adapter(self, path: Path, found: Mapping[str, Taken], label: Label) -> None:
        undo_gguf.write_adapter(self.gguf, path, found, label)


def _text(value: Any) -> str | None:
    """A metadata value as text; None for values that are no text or number."""
    if isinstance(value, list):
        return " ".join(map(str, value))[:READ]
    return str(value)[:READ] if isinstance(value, str | int | float | bool) else None
