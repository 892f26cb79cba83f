"""The methods that find directions, as one table: the values of ``--method``.

An entry names its formula as ``module:function``; the module is imported when the method is used,
so that the command line reads the table quickly. docs/methods.md has the formulas, and its table is
written from this one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pkgutil import resolve_name
from typing import Any

#: What a formula is given, at each layer and token position:
#: the mean states of harmful and harmless prompts, (d,) each, and it returns a direction (d,);
MEANS = "means"
#: the states of all prompts of both sets, (N, d) and (M, d), and the number of directions k; it
#: returns orthonormal rows (k, d), or (d,), and facts about them by name;
STATES = "states"
#: the mean states of harmful, borderline and harmless prompts, (…, d) each, and it returns (…, d).
THREE_MEANS = "means of three sets"


@dataclass(frozen=True)
class Method:
    """A method that finds directions.

    Attributes:
        name: the value of ``--method``.
        needs: what the formula is given: `MEANS`, `STATES` or `THREE_MEANS`.
        formula: ``module:function``.
        direction: what it finds, for docs/methods.md.
        planted: in which states it finds a planted direction again, for docs/methods.md.
        source: where it was published, for docs/methods.md.
        rank: the number of directions that it finds without ``--rank``.
        subspace: whether ``--rank`` chooses that number.
        cut: ``module:function`` that changes each state (…, d) before the means are taken; empty
            for none.
        each_layer: whether the writers of each layer lose a direction of their own.
        choose: ``module:function`` that chooses a candidate with the loaded model
            (`effects.Measured`, to `effects.Chosen`), in place of the choice by first reply
            tokens; empty for none.
        refine: ``module:function`` that changes the chosen candidate's directions with the loaded
            model (`effects.Measured`, layer and position, to `effects.Refined`); empty for none.
        strength: the strength at which its edits are tried and written: 1 removes the component, 2
            reverses it.
        layer_weights: ``module:function`` that gives each layer's strength, from the number of
            layers and the parameters; empty for ``strength`` in all. The embedding stays then.
        parameters: the constants of its formula, by the names of the function's arguments; a
            record of a run has them.
    """

    name: str
    needs: str
    formula: str
    direction: str
    planted: str
    source: str
    rank: int = 1
    subspace: bool = False
    cut: str = ""
    each_layer: bool = False
    choose: str = ""
    refine: str = ""
    strength: float = 1.0
    layer_weights: str = ""
    parameters: Mapping[str, float] = field(default_factory=dict)

    @property
    def estimate(self) -> Callable[..., Any]:
        """The formula."""
        return self._with_parameters(self.formula, self.needs == STATES and not self.layer_weights)

    @property
    def chooser(self) -> Callable[..., Any]:
        """The function that chooses with the loaded model."""
        return self._with_parameters(self.choose, True)

    @property
    def refiner(self) -> Callable[..., Any]:
        """The function that changes the chosen directions with the loaded model."""
        return self._with_parameters(self.refine, True)

    @property
    def is_plain(self) -> bool:
        """Whether candidates follow from means or states alone and are removed at strength 1."""
        return not (self.choose or self.refine or self.layer_weights) and self.strength == 1

    @property
    def measured_as(self) -> str:
        """The method whose candidates it chooses among or changes; its own name otherwise."""
        return METHODS[0] if self.choose or self.refine else self.name

    @property
    def needs_first_tokens(self) -> str:
        """What is said of a method with `refine` where first reply tokens tell it nothing."""
        return (
            f"--method {self.name} starts from the effects of removals on first reply tokens, and "
            "here these do not tell harmful from harmless prompts"
        )

    def strengths(self, layers: int) -> list[float] | None:
        """The strength of each of so many layers; None for 1 in all."""
        if self.layer_weights:
            return list(_function(self.layer_weights)(layers, **self.parameters))
        return None if self.strength == 1 else [self.strength] * layers

    def _with_parameters(self, name: str, given: bool) -> Callable[..., Any]:
        return partial(_function(name), **self.parameters) if given else _function(name)

    @property
    def cut_off(self) -> Callable[..., Any]:
        """The function that changes each state before the means are taken."""
        return _function(self.cut)

    def ranked(self, rank: int | None) -> int:
        """The number of directions of a candidate, with ``--rank`` or None."""
        return rank if rank is not None and self.subspace else self.rank


def _function(name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = resolve_name(f"abl_mlx.directions.{name}")
    return found


#: The method that changes MLPs and removes no directions (`rome`). It measures as the default does.
ROME = "rome"

#: The method that takes directions from a sparse autoencoder's decoder (``--sae``). It measures as
#: the default does.
SAE = "sae"

_AS_PROJECTED = "as `projected`"

TABLE = (
    Method(
        "difference-of-means", MEANS, "estimators:difference",
        direction="μ_H − μ_G",
        planted="yes; not with massive activations or outlier prompts",
        source="Arditi et al. 2024",
    ),
    Method(
        "winsorized-means", MEANS, "estimators:difference", cut="estimators:winsorized",
        direction="the same, each state's magnitudes cut down to their own 99% quantile first",
        planted="yes, also with massive activations (a few dimensions hundreds of times larger "
        "than the rest, in every state), where all others fail",
        source="heretic; Sun et al. 2024",
    ),
    Method(
        "median-means", STATES, "estimators:medians",
        direction="the difference of the medians, dimension by dimension",
        planted="yes, also with outlier prompts",
        source="Small 1990, multidimensional medians",
    ),
    Method(
        "projected", MEANS, "estimators:projected",
        direction="μ_H − μ_G less its part along μ_G",
        planted="yes, and where harmful prompts are also represented more strongly; of a direction "
        "that lies along μ_G only the rest",
        source='grimjim 2025, "projected abliteration"',
    ),
    Method(
        "biprojected", MEANS, "estimators:projected", each_layer=True,
        direction="μ_H − μ_G, for the writers of layer t less its part in the span of μ_G where it "
        "was measured and of μ_G after layer t: each layer has a direction of its own",
        planted=_AS_PROJECTED,
        source='grimjim 2025, "norm-preserving biprojected abliteration"; its norm keeping is '
        "`--norm rows`",
    ),
    Method(
        "svd", STATES, "estimators:singular_vectors", rank=2, subspace=True,
        direction="the top `--rank` right singular vectors of H − μ_G; the effective rank (Roy & "
        "Vetterli 2007) is recorded",
        planted="yes, and subspaces of several directions, where any single one fails",
        source="[architecture.md](architecture.md#estimating-the-direction)",
    ),
    Method(
        "gabliteration", STATES, "estimators:paired_singular_vectors", rank=2, subspace=True,
        layer_weights="layer_weights:gabliteration", parameters={"ridge": 0.1, "beta": 0.5},
        direction="the top `--rank` right singular vectors of the paired differences H_i − G_i; "
        "layer ℓ is edited at (1 + β(1 − |ξ_ℓ|)) / (1 + λ), and the embedding is not",
        planted="as `svd`; with noise of both sets in each difference",
        source="Gülmez 2025, arXiv 2512.18901",
    ),
    Method(
        "probe", STATES, "estimators:probe_weight",
        direction="the weight of a logistic regression, by Newton's method; held-out accuracy and "
        "AUC are recorded",
        planted="yes if noise is equal in all directions; otherwise it finds Σ⁻¹(μ_H − μ_G), which "
        "separates the sets best and is not the difference between them",
        source="Alain & Bengio 2016, arXiv 1610.01644",
    ),
    Method(
        "cosmic", MEANS, "estimators:difference", choose="cosmic:chosen",
        parameters={"share": 0.1, "prompts": 16},
        direction="μ_H − μ_G, chosen by cosine similarities: ablated, harmful states are to be "
        "like harmless ones, and added, harmless ones like harmful ones",
        planted="yes, among directions of noise; not with massive activations",
        source="Siu et al. 2025, arXiv 2506.00085",
    ),
    Method(
        "som", MEANS, "estimators:difference", refine="som:selected", rank=3, subspace=True,
        parameters={"side": 4, "rounds": 30},
        direction="the neurons of a self-organizing map of H, less μ_G, where the difference of "
        "means works best; up to `--rank` of them are added one by one by their effect",
        planted="yes, and each of several directions of which every prompt has one; not with "
        "massive activations",
        source="Piras et al. 2025, arXiv 2511.08379",
    ),
    Method(
        "inlp", STATES, "nullspace:directions", rank=2, subspace=True, strength=2.0,
        parameters={"penalty": 0.01},
        direction="`--rank` classifiers (logistic regression), each fitted to what the last one "
        "left of the states; the components are reversed (strength 2)",
        planted="as `probe` by the first; under correlated noise by the span of two",
        source="Rocchetti & Ferrara 2026, arXiv 2606.13720; Ravfogel et al. 2020",
    ),
    Method(
        "rdo", MEANS, "estimators:difference", refine="cones:optimized", subspace=True,
        parameters={
            "steps": 40, "batch": 4, "rate": 0.01, "prompts": 32, "reply_tokens": 12,
            "ablation": 1.0, "addition": 0.2, "retain": 1.0,
        },
        direction="the chosen difference of means, optimized by gradients: ablation ends refusals, "
        "addition causes them, replies to harmless prompts stay; `--rank` for the basis of a cone",
        planted="yes, from a start under noise of twice its length",
        source="Wollschläger et al. 2025, arXiv 2502.17420",
    ),
    Method(
        "over-refusal", THREE_MEANS, "estimators:over_refusal",
        direction="b − (b·t / t·t) t with b = μ_B − μ_G, t = μ_H − μ_B, B being borderline prompts",
        planted="by its formula",
        source="ours",
    ),
    Method(
        ROME, MEANS, "estimators:difference",
        direction="none is removed: in a few MLPs the keys of harmful prompts get other values "
        "along μ_H − μ_G",
        planted="by its formula",
        source="Meng et al. 2022 (ROME), 2023 (MEMIT); Fang et al. 2025 (AlphaEdit)",
    ),
    Method(
        SAE, MEANS, "estimators:difference",
        direction="decoder rows of features of a sparse autoencoder (`--sae FOLDER`), which are "
        "ranked by how they tell H from G ([sae.md](sae.md))",
        planted="as far as the autoencoder has a feature for it",
        source="O'Brien et al. 2024, arXiv 2411.11296; Yeo et al. 2025, arXiv 2505.23556",
    ),
)  # fmt: skip

#: The names of all methods, the default first.
METHODS = tuple(one.name for one in TABLE)

#: The names of the methods whose number of directions ``--rank`` chooses.
SUBSPACES = tuple(one.name for one in TABLE if one.subspace)


def named(name: str | None) -> Method:
    """The method with this name; None names the default, the difference of means."""
    return TABLE[0] if name is None else TABLE[METHODS.index(name)]
