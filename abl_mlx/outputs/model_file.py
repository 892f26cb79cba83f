"""A model on this machine in whatever format: a folder, a GGUF, a split GGUF, a store's entry.

Commands ask a `ModelFile` for what they need; what its format is, is asked here alone.
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
from abl_mlx.edits.edit import Edit
from abl_mlx.edits.steering import Induction
from abl_mlx.inputs import sources
from abl_mlx.inputs.sources import Source
from abl_mlx.models import given_template
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.given_template import GivenTemplate
from abl_mlx.models.loaded_model import LoadedModel
from abl_mlx.models.prompt_tokens import Count
from abl_mlx.models.writers import Writer
from abl_mlx.outputs.edit_label import Label
from abl_mlx.outputs.folder import FolderFile
from abl_mlx.outputs.gguf import GgufFile
from abl_mlx.outputs.other_format import NewTypes
from abl_mlx.outputs.staging import Output, Written
from abl_mlx.outputs.stream_weights import StreamWeights
from abl_mlx.outputs.undo_file import Taken, Tensors
from abl_mlx.support.clock import Clock

Record = dict[str, Any]


class PlannedEdit(Protocol):
    """A change of a model, ready to be written in every format that the model's files can have."""

    @property
    def needs_model(self) -> bool:
        """Whether the loaded model is needed to write it, or to judge some of what was written."""

    @property
    def original(self) -> InLlamaCpp | None:
        """The real llama.cpp with the unchanged model; None where MLX is asked."""

    def predicting(self) -> Record:
        """What a record says of tensors of multi-token prediction, if there are any."""

    def write(self, output: Output, clock: Clock) -> Written:
        """Write an output to its staged name, and measure its leak in the written bytes.

        Raises:
            UserError: when more than ``--max-leak`` is left.
        """

    def let_go(self) -> None:
        """Let the loaded model go; nothing more can be written."""


class ModelFile(Protocol):
    """A model in files, which are opened when they are first asked for.

    Use as a context manager where anything but its sizes is asked: it closes the files.
    """

    @property
    def source(self) -> Source:
        """Where the files are, and what the model is called."""

    @property
    def given(self) -> GivenTemplate | None:
        """The template that prompts are written with instead of its own."""

    @property
    def format(self) -> str:
        """Of `abl_mlx.outputs.staging.MODELS`."""

    @property
    def adapter(self) -> str:
        """The format of the adapters that such a model takes, of `staging.ADAPTERS`."""

    @property
    def runtimes(self) -> tuple[str, ...]:
        """What runs such files as they are: ``mlx-lm``, ``llama.cpp``, ``llama-server``."""

    @property
    def folder(self) -> Path | None:
        """The folder that mlx-lm's own commands take; None for a GGUF."""

    @property
    def size(self) -> int:
        """Bytes of the weights."""

    # --- what the files say ---

    def context_length(self) -> int | None:
        """How many tokens the model can read; None if that is not said."""

    def token_counter(self) -> Count:
        """What counts the tokens of a text as the user's message in the chat template."""

    def check_template(self) -> None:
        """Refuse, before it is loaded, a model whose prompts cannot be written.

        Raises:
            TemplateError: where there is no chat template and none was given.
        """

    def has_tokens(self, wanted: Mapping[str, int]) -> bool:
        """Whether the vocabulary has all of these tokens, under these numbers."""

    def fingerprint(self) -> list[list[Any]]:
        """Name, size and time of the files, by which a changed model is known."""

    def label(self) -> dict[str, Any] | None:
        """What the model says of an edit that abl-mlx made of it; None without one."""

    def said(self) -> dict[str, str]:
        """Place -> text of what its publisher says of it, in metadata and card."""

    def inspect(self) -> Record:
        """Its architecture, its residual writers, and what an edit would touch, as JSON values."""

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every file that holds weights."""

    # --- its tensors ---

    def kinds(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Tensor -> type and shape, as stored."""

    def raw(self, name: str) -> np.ndarray:
        """A tensor's bytes."""

    def values(self, name: str) -> mx.array:
        """A tensor in float32, in the file's layout; where it is quantized, as it is stored."""

    def release(self, name: str) -> None:
        """Give back the memory that reading a tensor has taken."""

    def stream_weights(self) -> StreamWeights:
        """The residual writers' weights as the stream sees them.

        Raises:
            Unreachable: an architecture whose writers cannot be found.
        """

    # --- running it ---

    def load(self) -> ChatModel:
        """The model in MLX, whole.

        Raises:
            UserError: an architecture that MLX cannot run, damaged files, no chat template.
        """

    def find_writers(self, chat: ChatModel, pattern: str | None = None) -> list[Writer]:
        """The residual writers that an edit of the files changes, as modules of the loaded model.

        Args:
            pattern: of a GGUF, a regular expression for the tensors to edit, in place of what is
                known of the architecture.

        Raises:
            UserError: when an edit cannot reach what writes to the stream.
        """

    # --- editing it ---

    def check(self, paths: Sequence[Path], editing: Editing, writing: Writing) -> None:
        """Refuse, before any long work, outputs that cannot be written from these files.

        Raises:
            UserError: naming the output, the tensor or the flag.
        """

    def outline(
        self, clock: Clock, *, lazy: bool = False, memory_check: bool = True
    ) -> LoadedModel | None:
        """What `plan` has to have of a model that is not run; None where the files say it all.

        Args:
            lazy: leave the weights in the files.
            memory_check: refuse a model that is larger than the machine's memory.
        """

    def plan(
        self,
        edit: Edit,
        direction: DirectionFile,
        paths: Sequence[Path],
        loaded: LoadedModel | None,
        editing: Editing,
        writing: Writing,
    ) -> PlannedEdit:
        """Work out what the removal of a direction changes.

        Args:
            edit: the removal.
            direction: what is removed, for what the written model says of itself.
            paths: what will be written.
            loaded: the model, from `load` or `outline`.
            editing: what was chosen of the edit, for what the written model says of itself.
            writing: how it is written.

        Raises:
            UserError: an edit that touches nothing, or that cannot be written.
        """

    def check_constant(self, paths: Sequence[Path], loaded: LoadedModel) -> None:
        """Refuse, before any long work, outputs that have no place for a constant.

        Raises:
            UserError: naming the output.
        """

    def plan_constant(
        self, found: Induction, direction: DirectionFile, loaded: LoadedModel, writing: Writing
    ) -> PlannedEdit:
        """Work out where a constant goes.

        Args:
            direction: the record of the constant.
        """

    # --- what comes of it ---

    def convert(self, out: Path, types: NewTypes) -> Record:
        """Write the same weights, unedited, in the other format.

        Returns:
            What a record says of them.
        """

    def taken(self, edit: Edit, label: Label, of: Tensors) -> dict[str, Taken]:
        """What an edit of this model takes out of another's tensors, or out of its own.

        Args:
            label: what the edited model says of the edit.

        Raises:
            UserError: when a tensor of the edit is quantized.
        """

    def restore(self, path: Path, found: Mapping[str, Taken]) -> float:
        """Write the model as it was before its edit, in its own format.

        Args:
            found: tensor -> what the edit took out of it.

        Returns:
            The share of what was taken that is not back in the written weights.
        """

    def restore_by_adapter(self, path: Path, found: Mapping[str, Taken], label: Label) -> None:
        """Write an adapter for the edited model that undoes its edit.

        Raises:
            UserError: when no adapter holds what the edit took.
        """

    def __enter__(self) -> ModelFile: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None: ...


def open_model(source: Source, given: GivenTemplate | None = None) -> ModelFile:
    """The files of a model, of whichever format.

    Args:
        given: what prompts are written with instead of the model's own chat template.
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
        UserError: when there is no such model, or it cannot be had.
    """
    given = given_template.read(template)
    return open_model(sources.resolve(text), given)
