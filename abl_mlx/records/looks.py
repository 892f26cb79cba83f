"""What was looked at and left as it is: the records of inspect, diff, show and audit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from abl_mlx.records.edits import Drafting, Leaks
from abl_mlx.records.evaluations import Made
from abl_mlx.records.record import LEFT_OUT, Part, Record


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
    template_tail: int | None = LEFT_OUT
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
        output: the page.
    """

    prompt: str
    direction: dict[str, Any]
    tokens: list[str]
    before: list[list[float]]
    after: list[list[float]]
    output: str | None = None


@dataclass(frozen=True, kw_only=True)
class Mention(Part):
    """An edit's name in what the model's publisher says."""

    place: str
    text: str


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
    weights: dict[str, Any]
    label: dict[str, Any] | None
    mentions: list[Mention]
    hashes: dict[str, str]
    behaviour: dict[str, Any] | None = None
    output: str | None = None
    seconds: dict[str, float]
