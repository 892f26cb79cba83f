"""Records of the commands that change nothing: inspect, diff, show and audit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from abl_mlx.records.conditions import Decided
from abl_mlx.records.directions import Chosen
from abl_mlx.records.edits import Drafting, Leaks
from abl_mlx.records.evaluations import EvalRecord, Gate, Made, Template
from abl_mlx.records.record import Part, Record


@dataclass(frozen=True, kw_only=True)
class WriterGroup(Part):
    """Residual writers that differ only in their layer.

    Attributes:
        pattern: their common name.
        kind: the kind of writer.
        gain, bias: whether a gain follows them, and whether they have a bias.
        count: their number.
    """

    pattern: str
    kind: str
    gain: bool
    bias: bool
    count: int


@dataclass(frozen=True, kw_only=True)
class EditShare(Part):
    """The tensors and parameters of a full edit, and their share of all parameters, 0 to 1."""

    tensors: int
    parameters: int
    share: float


@dataclass(frozen=True, kw_only=True)
class InspectRecord(Record):
    """The record of `inspect`.

    Attributes:
        folder, file: the place of the model.
        width: d, the number of dimensions of the residual stream.
        quantization: that of config.json, or type -> number of tensors in a GGUF.
        tied: whether the output head shares the embedding.
        head_copies: further tensors in the files that hold a copy of the embedding.
        template_tail: the number of tokens that the chat template writes behind the instruction;
            None without a usable template, which ``template_fault`` explains.
        runs_in_mlx: of a GGUF, whether MLX can run it.
        writers: the residual writers.
        edit: how much of the model a full edit changes.
        mtp: the tensors for multi-token prediction.
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
    """The type of a tensor in two GGUFs (or both types), and the number of bytes that differ."""

    type: str
    bytes_changed: int | None = None


@dataclass(frozen=True, kw_only=True)
class DiffRecord(Record):
    """The record of `diff`; the last four entries are those of ``--direction``."""

    first: str
    second: str
    tensors: int
    changed: dict[str, Changed]
    types: list[str] | None = None
    leak: Leaks | None = None
    weight_error: float | None = None
    direction: str | None = None


@dataclass(frozen=True, kw_only=True)
class ShownFeature(Part):
    """A feature of a sparse autoencoder at the tokens of a prompt.

    Attributes:
        feature: its number.
        activations: its activation at every token.
        cosine: of its decoder row and the direction; with a subspace, without a sign.
    """

    feature: int
    activations: list[float]
    cosine: float


@dataclass(frozen=True, kw_only=True)
class ShownSae(Part):
    """The features of a sparse autoencoder at the tokens of a prompt.

    Attributes:
        name, architecture, model, layer, count: as of the record of `measure`.
        prompt_tokens: the number of the prompt's tokens; the last of them is where features were
            chosen.
        features: those of the direction, and those with the largest activations at that token.
    """

    name: str
    architecture: str
    model: str | None = None
    layer: int
    count: int
    prompt_tokens: int
    features: list[ShownFeature]


@dataclass(frozen=True, kw_only=True)
class ShowRecord(Record, Made):
    """The record of `show`.

    Attributes:
        direction: the direction, as in the record of `measure`.
        before, after: r·h/|h| in every layer at every token, as [layer][token], without and with
            the direction ablated.
        template: the chat template that was given in place of the model's own.
        output: the page.
        sae: with ``--sae``, the features of a sparse autoencoder.
        condition: whether the edit is made on the prompt, if it has a condition.
    """

    prompt: str
    direction: Chosen
    tokens: list[str]
    before: list[list[float]]
    after: list[list[float]]
    template: Template | None = None
    output: str | None = None
    sae: ShownSae | None = None
    condition: Decided | None = None


@dataclass(frozen=True, kw_only=True)
class Mention(Part):
    """A place in what the publisher says of the model, with the words that name an edit."""

    place: str
    text: str


@dataclass(frozen=True, kw_only=True)
class LowestDirections(Part):
    """A search for directions along which all residual writers have little energy.

    Attributes:
        gap: the distance of the last direction that stands apart from the next one, in the score.
        gap_over_spread: the gap, divided by the spread of the next directions.
        rank: the number of directions that stand apart.
        scores: of all directions, the highest score, with the lowest energies, first.
        verdict: by this search only.
    """

    gap: float
    gap_over_spread: float
    rank: int
    scores: list[float]
    verdict: str


@dataclass(frozen=True, kw_only=True)
class AuditedWriter(Part):
    """The figures of a residual writer for the direction that was found.

    Attributes:
        energy: its energy along the direction, relative to that along directions in which all
            writers are weak.
        of_mean: its energy along the direction, relative to its mean energy over directions; None
            if it holds nothing at all.
        type: of its weights.
        relative_difference: norm of the difference from the base's weights, relative to their norm.
        types: the type in the base model and in the model.
        rank_1_share: share of the difference's squared norm in its largest singular value, 0 to 1.
        strength: share of the base's component that is missing.
        resemblance: cosine of the missing part and the base's component.
        edited: whether it is among the edited writers.
        left_vector_agreement: |cos| of the difference's left singular vector and the common one.
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
    """Tensors that are no residual writers, compared with those of the base model.

    Attributes:
        compared: their number.
        changed: names of those whose bytes differ.
        only_one: names of those that only one of the two models has.
        not_compared: the number of those that differ in type or shape.
    """

    compared: int
    changed: list[str]
    only_one: list[str]
    not_compared: int


@dataclass(frozen=True, kw_only=True)
class Weights(Part):
    """Findings from the weights only.

    Attributes:
        verdict, evidence, layers: as in `AuditRecord`.
        embedding: whether an embedding was edited.
        rank: the number of directions.
        strength: of the removal; None if none was found.
        tests: without a base model, search -> its result.
        not_seen_below: for a model that was not edited, without a base model, which layers -> the
            strength below which an edit of these does not show, 1 if none does.
        writers: writer -> figures.
        left_out: writers that could not be compared with the base model's.
        others: with a base model, the tensors that are no residual writers.
        direction_cosine: as in `AuditRecord`.
    """

    verdict: str
    evidence: list[str]
    layers: list[int]
    embedding: bool | None = None
    rank: int | None = None
    strength: float | None = None
    tests: dict[str, LowestDirections] | None = None
    not_seen_below: dict[str, float] | None = None
    writers: dict[str, AuditedWriter] | None = None
    left_out: list[str] | None = None
    others: OtherTensors | None = None
    direction_cosine: float | None = None


@dataclass(frozen=True, kw_only=True)
class NotAsked(Part):
    """The reason why a model could not be asked."""

    not_asked: str


@dataclass(frozen=True, kw_only=True)
class PartRead(Part):
    """How much of a model on Hugging Face was read.

    Attributes:
        model: the model as typed.
        commit: of the repository.
        read: bytes that were fetched.
        kept: bytes that were used, and had been fetched before.
        total: bytes of all its files that hold weights.
        share: of ``read`` and ``kept`` together in ``total``.
    """

    model: str
    commit: str
    read: int
    kept: int
    total: int
    share: float


@dataclass(frozen=True, kw_only=True)
class AuditRecord(Record, Made):
    """The record of `audit`.

    Attributes:
        verdict: ``edited``, ``not edited`` or ``cannot tell``.
        evidence: the reasons, a sentence each.
        layers: the layers with an edit.
        direction_cosine: |cos| of the given direction and the one that was found; None if one is
            missing.
        weights: findings from the weights only.
        label: what the model's own files say of an edit.
        mentions: what the publisher says of an edit.
        hashes: file name -> SHA-256.
        behaviour: with ``--ask``, the record of `eval`, or the reason why there is none.
        output: the file with the recovered direction.
        parts_read: for models on Hugging Face of which parts were read, how much.
        seconds: step -> time in seconds.
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
    parts_read: list[PartRead] | None = None
    seconds: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class NotAudited(Part):
    """A model of a list that could not be judged, and why."""

    source: str
    error: str


@dataclass(frozen=True, kw_only=True)
class AuditListRecord(Record):
    """The record of `audit --list`.

    Attributes:
        abl_mlx: the version.
        source: the file with the list.
        audits: the models in its order.
        output: the table in CSV.
    """

    abl_mlx: str
    source: str
    audits: list[AuditRecord | NotAudited]
    output: str | None = None


@dataclass(frozen=True, kw_only=True)
class VerifyRecord(Record, Made):
    """The record of `verify`.

    Attributes:
        source: the file with the evidence.
        passed: whether everything that was checked is as it should be.
        evidence: what was found, a sentence each.
        model: the model's name when it was signed.
        command: the command that made the signed record.
        files: the signed hashes, file -> SHA-256.
        gate: the limits, if any were given.
        record: the signed record.
        outputs: the files that were written.
    """

    passed: bool
    evidence: list[str]
    model: str
    command: str
    files: dict[str, str]
    gate: Gate | None = None
    record: dict[str, Any]
    outputs: list[str] | None = None
