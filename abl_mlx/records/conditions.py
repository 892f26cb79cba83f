"""Records of edits at runtime: what is done, and on which prompts."""

from __future__ import annotations

from dataclasses import dataclass

from abl_mlx.records.record import Part


@dataclass(frozen=True, kw_only=True)
class ConditionFound(Part):
    """On which prompts an edit at runtime is made (``--condition``).

    Attributes:
        prompts: those on which it should be made, as given.
        kind: how its vector was found: ``difference``, ``principal`` or ``probe``.
        layer: the layer after which states are read.
        tokens: the number of the prompt's last tokens whose mean state is read.
        threshold: of the cosine of that state and the vector.
        above: whether the edit is made at and above the threshold, or below it.
        f1, precision, recall: of the decision on validation prompts, 0 to 1.
        validation: the numbers of validation prompts on which it should and should not be made.
    """

    prompts: str
    kind: str
    layer: int
    tokens: int
    threshold: float
    above: bool
    f1: float
    precision: float
    recall: float
    validation: list[int]


@dataclass(frozen=True, kw_only=True)
class Decided(Part):
    """Whether an edit at runtime is made on a prompt, by its condition.

    Attributes:
        score: the cosine of the prompt's state and the condition's vector.
        threshold: the threshold of the cosine.
        met: whether the condition is met and the edit is made.
        told: the same in words.
    """

    score: float
    threshold: float
    met: bool
    told: str


@dataclass(frozen=True, kw_only=True)
class MetOn(Part):
    """The number of prompts of a set, or of a category, and on how many an edit was made."""

    n: int
    met: int


@dataclass(frozen=True, kw_only=True)
class SteeredBy(Part):
    """The edit at runtime with which `eval` asked a model.

    Attributes:
        direction: the name of the direction file.
        sha256: of the float32 bytes of the directions.
        steer: ``ablate`` or ``add``.
        strength: the strength.
        condition: on which prompts it was made; None for all.
        met: set, or ``SET/CATEGORY`` -> on how many prompts it was made.
    """

    direction: str
    sha256: str
    steer: str
    strength: float
    condition: ConditionFound | None = None
    met: dict[str, MetOn] | None = None
