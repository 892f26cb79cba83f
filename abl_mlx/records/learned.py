"""The record of `learn`."""

from __future__ import annotations

from dataclasses import dataclass

from abl_mlx.records.directions import Recipe
from abl_mlx.records.evaluations import Made
from abl_mlx.records.looks import OtherTensors, PartRead
from abl_mlx.records.record import Part, Record


@dataclass(frozen=True, kw_only=True)
class LearnedWriter(Part):
    """The figures of a residual writer.

    Attributes:
        layer: the number of its layer; -1 for an embedding.
        types: the type in the base model and in the edited one.
        relative_difference: norm of the difference from the base's weights, relative to their norm.
        rank_1_share: share of the difference's squared norm in its largest singular value, 0 to 1.
        edited: whether it lost a part of its component along the directions.
        strength, error: that part, and its standard error.
        strengths: of two edits one after the other, the part of each, in place of ``strength``.
        explained: share of the difference's squared norm that the removal explains.
        left: norm of the rest of the difference, relative to the norm of the base's weights.
    """

    layer: int
    types: list[str]
    relative_difference: float
    rank_1_share: float | None = None
    edited: bool
    strength: float | None = None
    error: float | None = None
    strengths: list[float] | None = None
    explained: float | None = None
    left: float | None = None


@dataclass(frozen=True, kw_only=True)
class LearnedStep(Part):
    """One of two edits that were made one after the other.

    Attributes:
        strength, recipe, layers: as in `LearnRecord`.
        output: its direction file.
    """

    strength: float
    recipe: Recipe
    layers: list[int]
    output: str | None = None


@dataclass(frozen=True, kw_only=True)
class LearnRecord(Record, Made):
    """The record of `learn`.

    Attributes:
        base, edited: the models as typed.
        verdict: ``edited``, ``no such edit`` or ``cannot tell``.
        evidence: the reasons, a sentence each.
        rank: the number of directions.
        per_layer: whether the writers of each layer lost directions of their own.
        strength: α of the embedding if that was edited, else of most writers.
        recipe: the rest of the edit, as the direction file has it.
        norm: the norms that were kept: none, columns or rows; null if that cannot be told.
        layers: the layers that were edited.
        experts: LAYER.EXPERT of the experts that were edited, if others were not.
        agreement: |cos| that the directions have with the true ones, as two halves of the writers
            agree.
        steps: where two edits were made one after the other, each of them, in that order;
            ``strength``, ``recipe`` and ``norm`` are left out then.
        writers: writer -> figures.
        left_out: writers that could not be compared.
        others: the tensors that are no residual writers.
        output: the direction file; of two edits, that of the first.
        apply: the command that makes the edit of another model.
        parts_read: for models on Hugging Face of which parts were read, how much.
        seconds: step -> how long it took.
    """

    base: str
    edited: str
    verdict: str
    evidence: list[str]
    rank: int | None = None
    per_layer: bool | None = None
    strength: float | None = None
    recipe: Recipe | None = None
    norm: str | None = None
    layers: list[int]
    experts: list[str] | None = None
    agreement: float | None = None
    steps: list[LearnedStep] | None = None
    writers: dict[str, LearnedWriter]
    left_out: list[str]
    others: OtherTensors | None = None
    output: str | None = None
    apply: str | None = None
    parts_read: list[PartRead] | None = None
    seconds: dict[str, float]
