"""Records of the commands that measure, edit and write: measure, run, apply, undo and convert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from abl_mlx.choices import ApplyOptions, RunOptions
from abl_mlx.records.directions import Found
from abl_mlx.records.evaluations import Divergence, Kept, Made, Refusals, Settled, Template
from abl_mlx.records.measurements import Scored
from abl_mlx.records.record import Part, Record


@dataclass(frozen=True, kw_only=True)
class MeasureRecord(Record, Found, Made):
    """The record of `measure`.

    Attributes:
        outputs: the direction file.
        template: the chat template that was given in place of the model's own.
        seconds: step -> time in seconds.
        plot: the file with charts.
    """

    outputs: list[str]
    template: Template | None = None
    note: str | None = None
    seconds: dict[str, float]
    plot: str | None = None


@dataclass(frozen=True, kw_only=True)
class Drafting(Part):
    """The number of tensors for multi-token prediction, and the names of the edited ones."""

    tensors: int
    edited: list[str]


@dataclass(frozen=True, kw_only=True)
class Hashes(Part):
    """SHA-256 hashes of what an output was made from.

    Attributes:
        source: file name -> hash.
        direction: of the directions.
        options: of the options.
    """

    source: dict[str, str]
    direction: str
    options: str


@dataclass(frozen=True, kw_only=True)
class StoredArray(Part):
    """Numbers in a record.

    Attributes:
        shape: of the array.
        float32: its bytes, little-endian, in Base64.
    """

    shape: list[int]
    float32: str


@dataclass(frozen=True, kw_only=True)
class StoredUpdate(Part):
    """The change of one layer's MLP by ``--method rome``.

    Attributes:
        layer: its number.
        left, right, keys: as in a direction file.
    """

    layer: int
    left: StoredArray
    right: StoredArray
    keys: StoredArray


@dataclass(frozen=True, kw_only=True)
class Directions(StoredArray):
    """The directions of an edit, (k, d) or (L, k, d), and what a direction file says besides.

    Attributes:
        metadata: of the direction file.
        updates: the changes of MLPs; None for methods that remove directions.
    """

    metadata: dict[str, Any]
    updates: list[StoredUpdate] | None = None


@dataclass(frozen=True, kw_only=True)
class OutputHashes(Part):
    """Hashes of an output's weights.

    Attributes:
        files: file name -> SHA-256.
        tensors: tensor (of very many: block of tensors) -> the first 16 digits of the SHA-256 of
            its bytes.
    """

    files: dict[str, str]
    tensors: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Reproduction(Part):
    """What `reproduce` needs to make the edit again.

    Attributes:
        directions: the removed directions; None if they take more than 2 MB.
        outputs: name of each folder and GGUF -> its hashes.
    """

    directions: Directions | None = None
    outputs: dict[str, OutputHashes]


@dataclass(frozen=True, kw_only=True)
class ReproduceRecord(Record, Made):
    """The record of `reproduce`; its ``source`` is the base model.

    Attributes:
        record: the record whose edit was made again.
        verdict: ``identical`` or ``different``.
        tensors: the number of tensors that were compared.
        differing: those that differ.
        reasons: why bytes differ, a sentence each.
        files: file name -> SHA-256.
        output: where the model went, if it was kept.
        cosine: with ``--remeasure``, the least |cos| of the record's directions and those that were
            measured again.
        seconds: step -> time in seconds.
    """

    record: str
    verdict: str
    tensors: int
    differing: list[str]
    reasons: list[str]
    files: dict[str, str]
    output: str | None = None
    cosine: float | None = None
    seconds: dict[str, float]

    @property
    def differs(self) -> bool:
        """Whether any byte differs."""
        return self.verdict != "identical"


@dataclass(frozen=True, kw_only=True)
class WorstLeak(Part):
    """The leak, 0 to 1, of the output where it is largest.

    Attributes:
        total: of all edited tensors together.
        max: of the tensor where it is largest.
    """

    total: float
    max: float


@dataclass(frozen=True, kw_only=True)
class TensorLeak(Part):
    """How exactly one tensor was edited.

    Attributes:
        leak: its leak, 0 to 1.
        weight_error: distance of the written weights from the exact edit, relative to their norm.
        codes_changed: share of a quantized tensor's codes that differ from before, 0 to 1.
        bytes_changed: the number of bytes that differ, if a GGUF keeps the tensor's type.
        type: the tensor's type in a GGUF.
    """

    leak: float
    weight_error: float
    codes_changed: float | None = None
    bytes_changed: int | None = None
    type: str | None = None


@dataclass(frozen=True, kw_only=True)
class Leaks(WorstLeak):
    """The leak of an output, and that of every edited tensor.

    Attributes:
        tensors: tensor -> leak and further figures.
        with_left_out: the total leak, counting tensors that an adapter cannot edit.
    """

    tensors: dict[str, TensorLeak]
    with_left_out: float | None = None


@dataclass(frozen=True, kw_only=True)
class WrittenEdit(Part):
    """An output, measured in the bytes that were written.

    Attributes:
        output: its path.
        format: ``MLX``, ``GGUF``, or a kind of adapter or control vector.
        files: the parts of a split GGUF.
        types: the types of the edited tensors.
        leak: of all and of each edited tensor.
        weight_error: distance of the written weights from the exact edit, relative to their norm.
        embedding: whether an embedding was edited.
        left_out: what was not copied, or what an adapter cannot edit.
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
    """An output, and how it behaves.

    Attributes:
        kl: KL from the unedited model.
        component: the largest |r·h|/|h| over layers and held-out prompts; None for a constant.
        runtime: the runtime that ran it.
        after: its refusal rates.
        kept: set -> the refusals that are to stay, counted on held-out prompts.
        read_tokens: the number of tokens that were read of each reply to prompts whose refusals
            the edit does not aim at (harmless and borderline ones); None with thinking.
        scorers: name of each scorer -> its figure of this output.
    """

    kl: Divergence
    component: float | None = None
    runtime: str
    after: Refusals
    kept: dict[str, Kept] | None = None
    read_tokens: int | None = None
    scorers: dict[str, Scored] | None = None


@dataclass(frozen=True, kw_only=True)
class Edited(Found, Made):
    """The entries that the records of `run` and `apply` share.

    Attributes:
        source_is_repository: whether the source is a Hugging Face id.
        base_model: the base model that the outputs name.
        repository: the Hugging Face id, if it is known.
        outputs: their paths.
        options: the values of all flags.
        mtp: the tensors for multi-token prediction.
        hashes: of what the outputs were made from.
        seconds: step -> time in seconds.
        reproduction: what `reproduce` needs.
    """

    source_is_repository: bool
    base_model: str
    repository: str | None = None
    outputs: list[str]
    options: RunOptions | ApplyOptions
    mtp: Drafting | None = None
    hashes: Hashes
    seconds: dict[str, float]
    reproduction: Reproduction | None = None


@dataclass(frozen=True, kw_only=True)
class Component(Part):
    """The largest |r·h|/|h| over layers and held-out prompts, before and after the edit."""

    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class RunRecord(Record, Edited):
    """The record of `run`; ``after``, ``kl`` and ``component`` are those of the first output.

    Attributes:
        measured_on: with ``--gguf``, the model that the direction was measured on.
        induced: true with ``--induce``.
        template: the chat template that was given in place of the model's own.
        before: refusal rates of the unedited model.
        leak: the largest leaks of all outputs.
        settled: the length from which on the verdicts before the edit do not change; None with
            thinking.
        scorers: name of each scorer -> its figure of the unedited model.
        evaluations: all outputs.
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
    scorers: dict[str, Scored] | None = None
    evaluations: list[EvaluatedEdit]


@dataclass(frozen=True, kw_only=True)
class ApplyRecord(Record, Edited):
    """The record of `apply`."""

    options: ApplyOptions
    leak: WorstLeak
    written: list[WrittenEdit]


@dataclass(frozen=True, kw_only=True)
class Restored(Part):
    """An output of `undo`.

    Attributes:
        output: its path.
        format: ``MLX`` or ``GGUF``.
        missing: share of the component that could not be restored in the weights.
    """

    output: str
    format: str
    missing: float | None = None


@dataclass(frozen=True, kw_only=True)
class UndoRecord(Record, Made):
    """The record of `undo`.

    Attributes:
        outputs: their paths.
        from_: the source of the former values: an undo file, a direction file or a base model.
        tensors: the number of restored tensors.
        written: the outputs.
        seconds: step -> time in seconds.
    """

    outputs: list[str]
    from_: str
    tensors: int
    written: list[Restored]
    seconds: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Converted(Part):
    """A model that was converted.

    Attributes:
        output: its path.
        format: its format.
        tensors: type -> number of tensors.
        bytes: the size of all tensors.
        left_out: what the other format cannot hold.
    """

    output: str
    format: str
    tensors: dict[str, int]
    bytes: int
    left_out: list[str] | None = None
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class ConvertRecord(Record, Converted, Made):
    """The record of `convert`; ``seconds`` has the time of each step."""

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


@dataclass(frozen=True, kw_only=True)
class PublishRecord(Record, Made):
    """What `publish` wrote.

    Attributes:
        edited: the edited model; ``source`` is the original.
        output: the folder of the page.
        files: all files of the folder.
        pictures: the prompts whose activations are shown.
        note: why none are, if none are.
        seconds: step -> time in seconds.
    """

    edited: str
    output: str
    files: list[UploadedFile]
    pictures: list[str]
    note: str | None = None
    seconds: dict[str, float]
