"""Records of what a direction is made of (``measure --explain``)."""

from __future__ import annotations

from dataclasses import dataclass

from abl_mlx.records.record import Part


@dataclass(frozen=True, kw_only=True)
class CosineWith(Part):
    """The cosine of the direction and a known one.

    Attributes:
        kind: ``method``, ``file`` or ``contrast``.
        name: of the method, the file, or what neutral prompts differ in.
        cosine: the cosine; with a subspace the length of the projection, without a sign.
    """

    kind: str
    name: str
    cosine: float


@dataclass(frozen=True, kw_only=True)
class CategoryDirection(Part):
    """The direction from harmless prompts to one category of harmful ones.

    Attributes:
        category: its name.
        n: the number of its train prompts.
        cosine: with the chosen direction.
        length: of the difference, in units of the residual stream.
        noise: the share of its squared length that the spread of so few prompts explains.
    """

    category: str
    n: int
    cosine: float
    length: float
    noise: float


@dataclass(frozen=True, kw_only=True)
class ConeOf(Part):
    """The directions of all categories of harmful prompts.

    Attributes:
        categories: each of them.
        cosines: of all pairs, in the order of ``categories``.
        smallest, mean: of the cosines of different categories.
        effective_rank: exp of the entropy of the normalized singular values of the unit directions.
        common: the share of the differences that all categories have in common, 0 to 1.
    """

    categories: list[CategoryDirection]
    cosines: list[list[float]]
    smallest: float
    mean: float
    effective_rank: float
    common: float


@dataclass(frozen=True, kw_only=True)
class TopicShare(Part):
    """How much of the direction lies in the span of the topics of harmless prompts.

    Attributes:
        share: of its squared length, 0 to 1.
        dimensions: of the span.
        chance: the mean share with shuffled categories.
    """

    share: float
    dimensions: int
    chance: float


@dataclass(frozen=True, kw_only=True)
class Matched(Part):
    """The direction between harmful and harmless prompts of the same categories.

    Attributes:
        cosine: with the chosen direction.
        categories: the number of categories that both sets have.
    """

    cosine: float
    categories: int


@dataclass(frozen=True, kw_only=True)
class Explained(Part):
    """What a direction is made of.

    Attributes:
        layer, position: where all directions were measured.
        chance: the standard deviation of the cosine with a random direction.
        cosines: with known directions.
        layers: the cosines of the candidates after all layers, as [layer][layer].
        cone: by category of the harmful prompts, if they have categories.
        topics: by the categories of the harmless prompts, if they have any.
        matched: by categories that both sets have.
    """

    layer: int
    position: int
    chance: float
    cosines: list[CosineWith]
    layers: list[list[float]]
    cone: ConeOf | None = None
    topics: TopicShare | None = None
    matched: Matched | None = None
