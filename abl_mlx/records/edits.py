"""What was measured, edited and written: the records of measure, run, apply, undo and convert."""

from __future__ import annotations

from dataclasses import dataclass

from abl_mlx.choices import ApplyOptions, RunOptions
from abl_mlx.records.directions import Found
from abl_mlx.records.evaluations import Divergence, Kept, Made, Refusals, Settled, Template
from abl_mlx.records.record import Part, Record


@dataclass(frozen=True, kw_only=True)
class MeasureRecord(Record, Found, Made):
    """What `measure` did.

    Attributes:
        template: what prompts were written with, in place of the model's own template.
        plot: the file of its charts.
    """

    outputs: list[str]
    template: Template | None = None
    note: str | None = None
    seconds: dict[str, float]
    plot: str | None = None


@dataclass(frozen=True, kw_only=True)
class Drafting(Part):
    """Tensors of multi-token prediction: how many, and those that were edited."""

    tensors: int
    edited: list[str]


@dataclass(frozen=True, kw_only=True)
class Hashes(Part):
    """SHA-256 of the source's files by name, of the direction, and of the options."""

    source: dict[str, str]
    direction: str
    options: str


@dataclass(frozen=True, kw_only=True)
class WorstLeak(Part):
    """The largest share of the component that is left: of all tensors, and of one."""

    total: float
    max: float


@dataclass(frozen=True, kw_only=True)
class TensorLeak(Part):
    """What became of an edited tensor.

    Attributes:
        leak: share of its part of the edit that was lost in writing.
        weight_error: relative distance of the written weights from the exact edit.
        codes_changed: share of the codes of a quantized type that are others than before.
        bytes_changed: how many; of a GGUF that stays one.
        type: of a tensor of a GGUF.
    """

    leak: float
    weight_error: float
    codes_changed: float | None = None
    bytes_changed: int | None = None
    type: str | None = None


@dataclass(frozen=True, kw_only=True)
class Leaks(WorstLeak):
    """The same with every tensor.

    Attributes:
        with_left_out: the total with what an adapter leaves alone.
    """

    tensors: dict[str, TensorLeak]
    with_left_out: float | None = None


@dataclass(frozen=True, kw_only=True)
class WrittenEdit(Part):
    """An output, measured in the bytes that were written.

    Attributes:
        output: its path.
        format: ``MLX``, ``GGUF``, or one of the adapters' and the control vector's.
        files: of a GGUF, its parts.
        types: of the edited tensors.
        weight_error: relative distance of the written weights from the exact edit.
        embedding: whether an embedding is among what was edited.
        left_out: what was not copied, or not edited by an adapter.
    """

    output: str
    format: str
    files: list[str] | None = None
    types: list[str] | None = None
    leak: Leaks | None = None
    weight_error: float | None = None
    embedding: bool | None = None
    left_out: list[str] | None = None
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluatedEdit(WrittenEdit):
    """An output and what it does.

    Attributes:
        kl: from the model as it was.
        component: largest share of the direction in the stream; not of a constant.
        runtime: what ran it.
        kept: set -> what is left of the refusals that are to stay, on held-out prompts.
        read_tokens: how far replies were read, in tokens, of the sets whose refusals the edit does
            not aim at (harmless and borderline prompts); None with thinking.
    """

    kl: Divergence
    component: float | None = None
    runtime: str
    after: Refusals
    kept: dict[str, Kept] | None = None
    read_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Edited(Found, Made):
    """What `run` and `apply` have in common.

    Attributes:
        source_is_repository: whether the source is a Hugging Face id.
        base_model: what written models say they come from.
        repository: the Hugging Face id, where it is known.
        options: all flags of the command.
        hashes: of what the outputs were made from.
    """

    source_is_repository: bool
    base_model: str
    repository: str | None = None
    outputs: list[str]
    options: RunOptions | ApplyOptions
    mtp: Drafting | None = None
    hashes: Hashes
    seconds: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Component(Part):
    """The largest share of the direction in the stream of held-out prompts."""

    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class RunRecord(Record, Edited):
    """What `run` did; ``after``, ``kl`` and ``component`` are the first output's.

    Attributes:
        measured_on: the model that the direction was measured on, with ``--gguf``.
        induced: with ``--induce``.
        template: what prompts were written with, in place of the model's own template.
        settled: from where on the verdicts before stay as they are; None with thinking.
        evaluations: every output.
    """

    options: RunOptions
    measured_on: str | None = None
    induced: bool | None = None
    template: Template | None = None
    before: Refusals
    after: Refusals
    kl: Divergence
    component: Component | None = None
    leak: WorstLeak | None = None
    settled: Settled | None = None
    evaluations: list[EvaluatedEdit]


@dataclass(frozen=True, kw_only=True)
class ApplyRecord(Record, Edited):
    """What `apply` wrote."""

    options: ApplyOptions
    leak: WorstLeak
    written: list[WrittenEdit]


@dataclass(frozen=True, kw_only=True)
class Restored(Part):
    """An output of `undo`; ``missing`` is what could not be put back of a model's weights."""

    output: str
    format: str
    missing: float | None = None


@dataclass(frozen=True, kw_only=True)
class UndoRecord(Record, Made):
    """What `undo` wrote.

    Attributes:
        from_: where that was known from: an undo file, a direction file, a base model.
        tensors: how many were put back.
    """

    outputs: list[str]
    from_: str
    tensors: int
    written: list[Restored]
    seconds: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Converted(Part):
    """A model in the other format.

    Attributes:
        tensors: type -> how many.
        bytes: of all tensors.
        left_out: what the other format has no place for.
    """

    output: str
    format: str
    tensors: dict[str, int]
    bytes: int
    left_out: list[str] | None = None
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class ConvertRecord(Record, Converted, Made):
    """What `convert` wrote."""

    seconds: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class UploadedFile(Part):
    """A file of a repository on Hugging Face."""

    name: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class PushRecord(Record):
    """What `push` published, or would publish.

    Attributes:
        output: the folder or file.
        repository: OWNER/NAME.
        address: of the repository's page.
        private: whether a new repository is seen by its owner alone.
        files: what is uploaded.
        commit: the address of the commit; None where nothing was uploaded.
    """

    abl_mlx: str
    output: str
    repository: str
    address: str
    private: bool
    files: list[UploadedFile]
    commit: str | None = None
