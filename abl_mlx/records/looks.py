"""What was looked at and left as it is: the records of inspect, diff, show and audit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from abl_mlx.records.directions import Chosen
from abl_mlx.records.edits import Drafting, Leaks
from abl_mlx.records.evaluations import EvalRecord, Made, Template
from abl_mlx.records.record import Part, Record


@dataclass(frozen=True, kw_only=True)
class WriterGroup(Part):
    """Residual writers that differ in their layer alone, told once."""

    pattern: str
    kind: str
    gain: bool
    bias: bool
    count: int


@dataclass(frozen=True, kw_only=True)
class EditShare(Part):
    """How much of a model a full edit changes."""

    tensors: int
    parameters: int
    share: float


@dataclass(frozen=True, kw_only=True)
class InspectRecord(Record):
    """What `inspect` says.

    Attributes:
        folder, file: where the model is.
        quantization: config.json's of a folder; the types of a GGUF, counted.
        tied: whether the output head shares the embedding.
        head_copies: further copies of the embedding in the files.
        template_tail: tokens behind the instruction in the chat template; None without one, whose
            fault is ``template_fault``.
        runs_in_mlx: of a GGUF.
    """

    source: str
    folder: str | None = None
    file: str | None = None
    architecture: str
    layers: int
    width: int
    parameters: int
    dtypes: list[str]
    quantization: dict[str, Any] | str | None
    tied: bool
    head_copies: list[str] | None = None
    template_tail: int | None = None
    template_fault: str | None = None
    runs_in_mlx: bool | None = None
    writers: list[WriterGroup]
    edit: EditShare
    mtp: Drafting | None = None


@dataclass(frozen=True, kw_only=True)
class Changed(Part):
    """A tensor that differs between two GGUFs: its type, or both; how many bytes differ."""

    type: str
    bytes_changed: int | None = None


@dataclass(frozen=True, kw_only=True)
class DiffRecord(Record):
    """What `diff` found; the last four with ``--direction``."""

    first: str
    second: str
    tensors: int
    changed: dict[str, Changed]
    types: list[str] | None = None
    leak: Leaks | None = None
    weight_error: float | None = None
    direction: str | None = None


@dataclass(frozen=True, kw_only=True)
class ShowRecord(Record, Made):
    """The share of the direction that every layer and token of a prompt holds.

    Attributes:
        direction: as in the record of `measure`.
        before, after: [layer][token].
        template: what the prompt was written with, in place of the model's own template.
        output: the page.
    """

    prompt: str
    direction: Chosen
    tokens: list[str]
    before: list[list[float]]
    after: list[list[float]]
    template: Template | None = None
    output: str | None = None


@dataclass(frozen=True, kw_only=True)
class Mention(Part):
    """An edit's name in what the model's publisher says."""

    place: str
    text: str


@dataclass(frozen=True, kw_only=True)
class LowestDirections(Part):
    """A search for directions of which the residual writers hold least.

    Attributes:
        gap: between those that stand apart and the next ones.
        gap_over_spread: the same in units of the spread of the next ones.
        rank: how many stand apart.
        scores: of all of them, the lowest first.
        verdict: by this search alone.
    """

    gap: float
    gap_over_spread: float
    rank: int
    scores: list[float]
    verdict: str


@dataclass(frozen=True, kw_only=True)
class AuditedWriter(Part):
    """A residual writer along the direction that was found.

    Attributes:
        energy: what it holds, in units of its own weakest directions.
        of_mean: the same in units of its mean over directions.
        type: of its weights.
        relative_difference: from the base's weights.
        types: the base's type and the model's.
        rank_1_share: share of the difference that is of rank 1.
        strength: share that it lost of what the base has.
        resemblance: cosine of what it lost and what was there.
        edited: whether it took part.
        left_vector_agreement: of the difference's direction with the one all share.
    """

    energy: float | None = None
    of_mean: float | None = None
    type: str | None = None
    relative_difference: float | None = None
    types: list[str] | None = None
    rank_1_share: float | None = None
    strength: float | None = None
    resemblance: float | None = None
    edited: bool | None = None
    left_vector_agreement: float | None = None


@dataclass(frozen=True, kw_only=True)
class OtherTensors(Part):
    """Tensors that do not write to the residual stream, beside the base's.

    Attributes:
        compared: how many.
        changed: those whose bytes differ.
        only_one: those that one of the two models has alone.
        not_compared: how many are of another type or shape.
    """

    compared: int
    changed: list[str]
    only_one: list[str]
    not_compared: int


@dataclass(frozen=True, kw_only=True)
class Weights(Part):
    """What the weights alone say.

    Attributes:
        verdict, evidence, layers: as those of `AuditRecord`.
        embedding: whether an embedding was edited.
        rank: how many directions.
        strength: of the removal; None where none was found.
        tests: search -> what it found, without a base.
        writers: name -> figures.
        left_out: writers that could not be compared with the base's.
        others: with a base.
        direction_cosine: as that of `AuditRecord`.
    """

    verdict: str
    evidence: list[str]
    layers: list[int]
    embedding: bool | None = None
    rank: int | None = None
    strength: float | None = None
    tests: dict[str, LowestDirections] | None = None
    writers: dict[str, AuditedWriter] | None = None
    left_out: list[str] | None = None
    others: OtherTensors | None = None
    direction_cosine: float | None = None


@dataclass(frozen=True, kw_only=True)
class NotAsked(Part):
    """Why a model could not be asked."""

    not_asked: str


@dataclass(frozen=True, kw_only=True)
class AuditRecord(Record, Made):
    """What `audit` judged.

    Attributes:
        verdict: ``edited``, ``not edited`` or ``cannot tell``.
        evidence: sentences.
        layers: in which an edit was found.
        direction_cosine: |cos| with the given direction; None without one, or without a find.
        weights: what the weights alone say, with the figures.
        label: what the model says of its own edit.
        hashes: SHA-256 of its files.
        behaviour: with ``--ask``, the record of `eval`, or why it could not be asked.
        output: the file of the recovered direction.
    """

    base: str | None = None
    verdict: str
    evidence: list[str]
    layers: list[int]
    direction_cosine: float | None
    weights: Weights
    label: dict[str, Any] | None
    mentions: list[Mention]
    hashes: dict[str, str]
    behaviour: EvalRecord | NotAsked | None = None
    output: str | None = None
    seconds: dict[str, float]
