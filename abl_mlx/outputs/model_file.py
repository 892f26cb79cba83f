"""A model on this machine in any format: a folder, a GGUF, a split GGUF, an entry of a store.

Commands use a `ModelFile`; only this module distinguishes the formats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from abl_mlx.behaviour.evaluate import InLlamaCpp
from abl_mlx.choices import Editing, Writing
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.edits.steering import Induction
from abl_mlx.edits.weight_edit import WeightEdit
from abl_mlx.inputs import sources
from abl_mlx.inputs.sources import Source
from abl_mlx.models import given_template
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.given_template import GivenTemplate
from abl_mlx.models.input_squares import Matrices
from abl_mlx.models.loaded_model import LoadedModel
from abl_mlx.models.prompt_tokens import Count
from abl_mlx.models.writers import Writer
from abl_mlx.outputs.edit_label import Label
from abl_mlx.outputs.folder import FolderFile
from abl_mlx.outputs.further_files import FurtherFiles
from abl_mlx.outputs.gguf import GgufFile
from abl_mlx.outputs.other_format import NewTypes
from abl_mlx.outputs.staging import Output, Written
from abl_mlx.outputs.stream_weights import StreamWeights
from abl_mlx.outputs.undo_file import Taken, Tensors
from abl_mlx.records.edits import Converted, Drafting
from abl_mlx.records.looks import InspectRecord
from abl_mlx.support.clock import Clock


class PlannedEdit(Protocol):
    """A change of a model, ready to be written in any format that is possible for the model."""

    @property
    def needs_model(self) -> bool:
        """Whether the loaded model is needed for writing, or for judging an output."""

    @property
    def original(self) -> InLlamaCpp | None:
        """The unchanged model in llama.cpp; None if MLX runs it."""

    def predicting(self) -> Drafting | None:
        """The record's entry about tensors of multi-token prediction; None if there are none."""

    def write(self, output: Output, clock: Clock) -> Written:
        """Write an output to its staged name, and measure its leak in the written bytes.

        Raises:
            UserError: when more than ``--max-leak`` is left.
        """

    def let_go(self) -> None:
        """Release the loaded model; nothing can be written afterwards."""


class ModelFile(Protocol):
    """A model in files, which are opened when they are first needed.

    Use it as a context manager, which closes the files, for everything but the model's size.
    """

    @property
    def source(self) -> Source:
        """Where the files are, and the model's name."""

    @property
    def given(self) -> GivenTemplate | None:
        """The chat template that replaces the model's own; None for its own."""

    @property
    def format(self) -> str:
        """The format, one of `abl_mlx.outputs.staging.MODELS`."""

    @property
    def adapter(self) -> str:
        """The format of adapters for such a model, one of `staging.ADAPTERS`."""

    @property
    def runtimes(self) -> tuple[str, ...]:
        """The programs that run such files: ``mlx-lm``, ``llama.cpp``, ``llama-server``."""

    @property
    def folder(self) -> Path | None:
        """The folder that mlx-lm's own commands accept; None for a GGUF."""

    @property
    def size(self) -> int:
        """Bytes of the weights."""

    @property
    def further(self) -> FurtherFiles:
        """The further files of the model, looked for once.

        Raises:
            UserError: when the model's files cannot be read.
        """

    # --- what the files say ---

    def context_length(self) -> int | None:
        """The context length in tokens; None if the files do not say it."""

    def token_counter(self) -> Count:
        """A function that counts the tokens of a text as a user's message in the chat template."""

    def check_template(self) -> None:
        """Check, before the model is loaded, that there is a chat template for its prompts.

        Raises:
            TemplateError: when the model has none and none was given.
        """

    def has_tokens(self, wanted: Mapping[str, int]) -> bool:
        """Whether the vocabulary has all of these tokens with these ids."""

    def fingerprint(self) -> list[list[Any]]:
        """Name, size and time of change of each file, which show that a model was changed."""

    def label(self) -> dict[str, Any] | None:
        """The values of the label of an edit by abl-mlx; None if the model has none."""

    def said(self) -> dict[str, str]:
        """Place (a metadata key, the card) -> its publisher's text there."""

    def inspect(self) -> InspectRecord:
        """Architecture, residual writers, and how much an edit would change."""

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every file that holds weights."""

    # --- its tensors ---

    def kinds(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Tensor name -> type and shape as stored."""

    def raw(self, name: str) -> np.ndarray:
        """The stored bytes of a tensor."""

    def values(self, name: str) -> mx.array:
        """A tensor in float32, in the file's layout; in a folder, quantized ones as stored."""

    def release(self, name: str) -> None:
        """Let the system drop from memory the pages of a tensor that was read."""

    def stream_weights(self) -> StreamWeights:
        """The weights of the residual writers, as vectors that are added to the stream.

        Raises:
            Unreachable: when the writers of the architecture cannot be found.
        """

    # --- running it ---

    def load(self, *, streamed: bool = False) -> ChatModel:
        """Load the whole model in MLX.

        Args:
            streamed: leave the matrices in the files, which must stay open, and read them layer by
                layer whenever the model runs.

        Raises:
            UserError: when MLX cannot run the architecture, files are damaged, or there is no chat
                template.
        """

    def find_writers(self, chat: ChatModel, pattern: str | None = None) -> list[Writer]:
        """The residual writers that an edit of the files changes, as modules of the loaded model.

        Args:
            chat: the loaded model.
            pattern: for a GGUF, a regular expression that names the tensors to edit, instead of
                the architecture's list of writers.

        Raises:
            UserError: when something writes to the stream that an edit cannot change.
        """

    def matrices(self) -> Matrices:
        """The model's matrices, and the GGUF tensors that hold them or would hold them.

        Raises:
            UserError: when the model cannot be a GGUF.
        """

    # --- editing it ---

    def check(self, paths: Sequence[Path], editing: Editing, writing: Writing) -> None:
        """Check, before any long work, that the outputs can be written from these files.

        Raises:
            UserError: naming the output, the tensor or the flag that does not fit.
        """

    def outline(
        self, clock: Clock, *, lazy: bool = False, memory_check: bool = True
    ) -> LoadedModel | None:
        """Load what `plan` needs of a model that is not run; None if the files are enough.

        Args:
            clock: times the steps.
            lazy: whether to leave the weights in the files.
            memory_check: whether to refuse a model that is larger than the machine's memory.
        """

    def plan(
        self,
        edit: WeightEdit,
        direction: DirectionFile,
        paths: Sequence[Path],
        loaded: LoadedModel | None,
        editing: Editing,
        writing: Writing,
    ) -> PlannedEdit:
        """Find what the removal of directions changes.

        Args:
            edit: the removal.
            direction: the directions, for the written model's label.
            paths: the outputs.
            loaded: the model, from `load` or `outline`.
            editing: the chosen options of the edit, for the written model's label.
            writing: the options of writing.

        Raises:
            UserError: when the edit changes nothing or cannot be written.
        """

    def check_constant(self, paths: Sequence[Path], loaded: LoadedModel, writing: Writing) -> None:
        """Check, before any long work, that the outputs can hold a constant (``--induce``).

        Raises:
            UserError: naming the output that cannot.
        """

    def plan_constant(
        self, found: Induction, direction: DirectionFile, loaded: LoadedModel, writing: Writing
    ) -> PlannedEdit:
        """Find where a constant (``--induce``) is added.

        Args:
            found: the constant.
            direction: the constant as a direction file.
            loaded: the model.
            writing: the options of writing.
        """

    # --- what comes of it ---

    def convert(self, out: Path, types: NewTypes) -> Converted:
        """Write the same weights, unedited, in the other format.

        Returns:
            Facts about the output for a record.
        """

    def taken(self, edit: WeightEdit, label: Label, of: Tensors) -> dict[str, Taken]:
        """What an edit of this model removes from the tensors ``of``.

        Args:
            edit: the edit.
            label: the edited model's label.
            of: this model's tensors, or those of the model before its edit.

        Returns:
            Tensor name -> what the edit removes.

        Raises:
            UserError: when a tensor that the edit changes is quantized.
        """

    def restore(self, path: Path, found: Mapping[str, Taken]) -> float:
        """Write the model as it was before its edit, in its own format.

        Args:
            path: where it is written.
            found: tensor name -> what the edit removed from it.

        Returns:
            The share of the removed components that is missing from the written weights.
        """

    def restore_by_adapter(self, path: Path, found: Mapping[str, Taken], label: Label) -> None:
        """Write an adapter for the edited model that undoes its edit.

        Raises:
            UserError: when no adapter can hold what the edit removed.
        """

    def __enter__(self) -> ModelFile: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None: ...


def open_model(source: Source, given: GivenTemplate | None = None) -> ModelFile:
    """The files of a model in any format.

    Args:
        source: where they are.
        given: a chat template that replaces the model's own.
    """
    return GgufFile(source, given) if source.is_gguf else FolderFile(source, given)


def find_gguf(text: str, template: str | None = None) -> GgufFile:
    """The GGUF that ``text`` names, in any of the forms of `abl_mlx.inputs.sources.resolve_gguf`.

    Args:
        template: the value of ``--template``.

    Raises:
        UserError: when there is no such file, or ``text`` names something else.
    """
    given = given_template.read(template)
    return GgufFile(sources.resolve_gguf(text), given)


def find_model(text: str, template: str | None = None) -> ModelFile:
    """The files of the model that ``text`` names.

    Args:
        template: the value of ``--template``.

    Raises:
        UserError: when there is no such model, or it cannot be downloaded.
    """
    given = given_template.read(template)
    return open_model(sources.resolve(text), given)
