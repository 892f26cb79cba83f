"""The verdict on a model's weights alone: whether its writers lack a direction.

`abl_mlx.audit_weights.spectrum` has the mathematics, and docs/audit.md the calibration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from abl_mlx.audit_weights import single_layers, spectrum
from abl_mlx.audit_weights.gram import threads
from abl_mlx.audit_weights.single_layers import Layer
from abl_mlx.audit_weights.spectrum import Found, Gap
from abl_mlx.outputs.stream_weights import StreamWeight, StreamWeights
from abl_mlx.records.looks import AuditedWriter, LowestDirections, Weights
from abl_mlx.support import ranks
from abl_mlx.support.console import progress
from convert.base.errors import UserError

EDITED, NOT_EDITED, CANNOT_TELL = "edited", "not edited", "cannot tell"

#: Gram matrices are kept between the two passes if together they take at most this many bytes.
_KEPT = 1 << 28

#: Up to this width Gram matrices are computed in float64.
_DOUBLE = 384

#: The largest number of lines of a writer that its Gram matrix is computed from, in multiples of d;
#: the second pass uses all lines.
_LINES = 8


@dataclass(frozen=True)
class Limits:
    """Which gap means an edit, for one of the two searches with `spectrum.search`.

    The limits were calibrated by benchmarks/audit_table.py; see docs/audit.md.

    Attributes:
        reach: the search's ``reach``.
        size, ratio: a gap is an edit if it is at least so large, absolutely and in units of the
            spread of the following directions.
        doubt_size, doubt_ratio: with a smaller gap that is at least so large, the verdict is
            "cannot tell".
        low: a writer was edited if its energy, in units of the reference, is below this.
    """

    name: str
    reach: float
    size: float
    ratio: float
    doubt_size: float
    doubt_ratio: float
    low: float


LIMITS = (
    Limits("low everywhere", 1.0, 0.35, 3.0, 0.2, 3.0, 0.5),
    Limits("empty in some", 0.1, 0.15, 3.0, 0.1, 3.0, 0.1),
)

#: With fewer edited writers than this, a direction cannot be distinguished from chance.
_LEAST_WRITERS = 3


@dataclass(frozen=True)
class Energies:
    """The energies of all writers in a small subspace.

    Attributes:
        basis: maps the subspace to the stream, (d, m).
        forms: the writers' energies in the subspace.
        means: (N,), the mean energy of each writer over all directions, without the few largest.
    """

    basis: np.ndarray
    forms: spectrum.Forms
    means: np.ndarray


def alone(model: StreamWeights) -> tuple[Weights, np.ndarray | None]:
    """The verdict on a model without its base, and the directions that it lacks, (k, d).

    Raises:
        UserError: when all writers are zero, or a file is damaged.
    """
    with threads(model.width):
        energies, writers = measure(model)
        return judge(energies, writers, model)


def measure(model: StreamWeights) -> tuple[Energies, list[StreamWeight]]:
    """The energies of all writers that are not zero, in two passes over the files, or in one."""
    d, writers = model.width, model.writers
    keep = len(writers) * d * d * 8 <= _KEPT
    kept: list[np.ndarray] = []
    means, diagonals, used = [], [], []
    candidates = spectrum.Candidates(model.layers)
    total = sum(one.lines for one in writers)
    with progress(total * (1 if keep else 2), "audit", "vector") as bar:
        kind = np.float64 if d <= _DOUBLE else np.float32
        grams = ranks.in_turn("writers", writers, lambda one: _gram(one, kind))
        for one, gram in zip(writers, grams, strict=True):
            bar.update(one.lines)
            if not candidates.add(one.role, one.layer, gram):
                continue
            used.append(one)
            means.append(spectrum.typical(gram))
            diagonals.append(np.diagonal(gram).astype(float))
            if keep:
                kept.append(gram)
        if not used:
            raise UserError("every residual writer of this model is zero: nothing to audit.")
        basis, count = candidates.basis()
        del candidates
        small = [basis.T @ (gram @ basis) for gram in kept]
        again = [] if keep else used
        for gram in ranks.in_turn("writers again", again, lambda one: _small_gram(one, basis)):
            bar.update(again[len(small)].lines)
            small.append(gram)
    forms = spectrum.forms(small, diagonals, basis, count)
    return Energies(basis, forms, np.fromiter(means, float) / forms.units), used


def _gram(one: StreamWeight, dtype: type) -> np.ndarray:
    """Σ x xᵀ over a writer's lines x, (d, d); with very many lines, over every n-th of them."""
    d = one.width
    step = max(1, one.lines // (_LINES * d))
    gram: np.ndarray = np.zeros((d, d), dtype)
    for values in one.each():
        values = np.ascontiguousarray(values[:, ::step], dtype=dtype)
        gram += values @ values.T
    return gram * dtype(step)


def _small_gram(one: StreamWeight, basis: np.ndarray) -> np.ndarray:
    m = basis.shape[1]
    gram = np.zeros((m, m))
    narrow = np.ascontiguousarray(basis.T, dtype=np.float32)
    for values in one.each():
        inside = (narrow @ values).astype(np.float64)
        gram += inside @ inside.T
    return gram


def judge(
    energies: Energies, writers: Sequence[StreamWeight], model: StreamWeights
) -> tuple[Weights, np.ndarray | None]:
    """The verdict on a model's energies, and the recovered directions (k, d)."""
    tests, structural = _searched(energies)
    if not all(one.found for _, one in tests):
        alone = ["the weakest directions of this model are single dimensions"]
        return Weights(verdict=CANNOT_TELL, evidence=alone, layers=[]), None
    verdicts = [_of_gap(limits, one) for limits, one in tests]
    verdict = next(v for v in (EDITED, CANNOT_TELL, NOT_EDITED) if v in verdicts)
    limits, best = max(
        (pair for pair, v in zip(tests, verdicts, strict=True) if v == verdict),
        key=lambda pair: pair[1].size / pair[0].size,
    )
    clean = verdict == NOT_EDITED
    low, strongest = limits.low, best.found[:1] if clean else best.found
    each = _each_layer(energies, writers)
    single = [] if verdict == EDITED else single_layers.emptied(each, doubtful=clean)
    if single:
        verdict = EDITED if single[0].empty else CANNOT_TELL
        low, strongest = single_layers.LOW, [one.found for one in single]
    along = _along(np.array([one.energies for one in strongest]), low)
    takes_part = along < low
    layers = _layers(along, writers, takes_part)
    recovered = _in_stream(energies, strongest)
    of_means = _of_means(along, energies.means)
    strength = _strength(of_means[takes_part])
    if single:
        evidence = single_layers.evidence(single, strength)
    else:
        evidence = _evidence(verdict, limits, best, along, takes_part, layers, strength, model)
        evidence += _apart(strongest, limits, writers)
    evidence += [f"left out: {why}" for why in sorted(structural)]
    unseen = not_seen_below(energies, writers, tests, each) if verdict == NOT_EDITED else None
    if unseen is not None:
        layers, takes_part = [], np.zeros(len(writers), bool)
        evidence.append(_blind(unseen))
    return Weights(
        verdict=verdict,
        evidence=evidence,
        layers=layers,
        embedding=any(t and w.axis == -1 for t, w in zip(takes_part, writers, strict=True)),
        rank=0 if verdict == NOT_EDITED else len(recovered),
        strength=None if verdict == NOT_EDITED else strength,
        nulls=frozenset({"strength"}) if verdict == NOT_EDITED else frozenset(),
        tests={
            limits.name: LowestDirections(
                gap=one.size,
                gap_over_spread=one.ratio,
                rank=one.rank,
                scores=[round(found.score, 4) for found in one.all],
                verdict=v,
            )
            for (limits, one), v in zip(tests, verdicts, strict=True)
        },
        not_seen_below=unseen,
        writers=_figures(writers, along, of_means),
    ), recovered


def _of_means(along: np.ndarray, means: np.ndarray) -> np.ndarray:
    """The writers' energies as shares of their mean ones; NaN for a writer of zeros."""
    return np.divide(along, means, out=np.full(along.shape, np.nan), where=means > 0)


def _figures(
    writers: Sequence[StreamWeight], along: np.ndarray, of_means: np.ndarray
) -> dict[str, AuditedWriter]:
    """What the record says of each writer."""
    return {
        one.name: AuditedWriter(
            energy=float(energy), of_mean=None if np.isnan(share) else float(share), type=one.type
        )
        for one, energy, share in zip(writers, along, of_means, strict=True)
    }


def _strength(left: np.ndarray) -> float:
    """α of a removal that left these shares of writers' energies."""
    known = left[~np.isnan(left)]
    return float(np.clip(1 - np.sqrt(max(np.median(known), 0.0)), 0, 1)) if known.size else 0.0


def _searched(energies: Energies) -> tuple[list[tuple[Limits, Gap]], set[str]]:
    """Each search and its gap, and why directions were left out that no edit emptied."""
    tests: list[tuple[Limits, Gap]] = []
    structural: set[str] = set()
    for limits in LIMITS:
        found = []
        for one in spectrum.search(energies.forms, limits.reach):
            why = spectrum.structure(_in_stream(energies, [one])[0])
            if why is None:
                found.append(one)
            elif (one.energies < limits.low).sum() >= _LEAST_WRITERS:
                structural.add(why)
        tests.append((limits, spectrum.gap(found)))
    return tests, structural


def _each_layer(energies: Energies, writers: Sequence[StreamWeight]) -> list[Layer]:
    """The weakest direction of each layer, if no structure of the model explains it."""
    each = single_layers.weakest(energies.forms, [one.layer for one in writers])
    return [one for one in each if spectrum.structure(_in_stream(energies, [one.found])[0]) is None]


def _along(energies: np.ndarray, low: float) -> np.ndarray:
    """The mean energy of each writer along those directions that it lacks; of others, along all.

    Args:
        energies: (k, N).
        low: the energy below which a writer lacks a direction.
    """
    lacks = energies < low
    few = (energies * lacks).sum(axis=0) / np.maximum(lacks.sum(axis=0), 1)
    found: np.ndarray = np.where(lacks.any(axis=0), few, energies.mean(axis=0))
    return found


def not_seen_below(
    energies: Energies,
    writers: Sequence[StreamWeight],
    tests: Sequence[tuple[Limits, Gap]],
    each: Sequence[Layer],
) -> dict[str, float]:
    """Below which strength an edit of this model does not show, where it was not edited.

    An edit of strength α along a usual direction leaves (1 − α)² of each writer's mean energy. Its
    score is compared with those of the directions that this model is weakest along by chance: it
    shows if the verdict on them were at least "cannot tell". docs/audit.md compares this with
    edits that were made.

    Args:
        energies: the energies of all writers.
        writers: the writers.
        tests: the searches' limits and gaps.
        each: the weakest direction of each layer.

    Returns:
        Which layers are edited -> that strength, in steps of 0.05; 0.99 if only a full removal
        shows, and 1 if no edit of them does.
    """
    layers = sorted({one.layer for one in writers} - {-1})
    parts = {
        "all layers": {-1, *layers},
        "every other layer": set(layers[::2]),
        "one layer": set(layers[len(layers) // 2 :][:1]),
    }
    found = dict.fromkeys(parts, 1.0)
    for name, some in parts.items():
        inside = np.array([one.layer in some for one in writers])
        for percent in (*range(5, 100, 5), 99):
            left = np.where(inside, (1 - percent / 100) ** 2, 1.0) * energies.means
            alone = [one.planted(left) for one in each if one.number in some]
            if single_layers.emptied(alone, doubtful=True) or any(
                _stands_out(left, limits, chance) for limits, chance in tests
            ):
                found[name] = percent / 100
                break
    return found


def _stands_out(left: np.ndarray, limits: Limits, chance: Gap) -> bool:
    """Whether a direction with these energies would be noticed among those there by chance."""
    score = spectrum.score(left, limits.reach)
    others = [one.score for one in chance.all[:6]]
    planted = Found(np.empty(0), score, left)
    gap = Gap(1, score - others[0], others[0] - others[-1], [planted], [planted, *chance.all])
    return _of_gap(limits, gap) != NOT_EDITED


def _blind(below: Mapping[str, float]) -> str:
    """What `not_seen_below` says, as a sentence."""
    weak = [f"of {name} below about {one:g}" for name, one in below.items() if one < 1]
    none = [f"of {name}" for name, one in below.items() if one == 1]
    return f"what does not show in this model without its base: edits {', '.join(weak + none)}"


def _in_stream(energies: Energies, found: Sequence[Found]) -> np.ndarray:
    """Orthonormal directions in the stream (k, d); those that several have in common count once."""
    turned = energies.basis @ np.stack([one.direction for one in found], axis=1)
    return spectrum.orthonormal(turned / np.linalg.norm(turned, axis=0)).T


def _of_gap(limits: Limits, found: Gap) -> str:
    agreed = all((one.energies < limits.low).sum() >= _LEAST_WRITERS for one in found.found)
    if agreed and found.size >= limits.size and found.ratio >= limits.ratio:
        return EDITED
    if agreed and found.size >= limits.doubt_size and found.ratio >= limits.doubt_ratio:
        return CANNOT_TELL
    return NOT_EDITED


def _layers(
    along: np.ndarray, writers: Sequence[StreamWeight], takes_part: np.ndarray
) -> list[int]:
    """The layers with low energy along the direction in all writers, or with energy 0 in one."""
    found = []
    for layer in sorted({one.layer for one in writers if one.layer >= 0}):
        inside = np.array([one.layer == layer for one in writers])
        mean = np.exp(np.log(np.maximum(along[inside], 1e-6)).mean())
        if mean < 0.6 and takes_part[inside].any():
            found.append(layer)
    return found


def _apart(found: Sequence[Found], limits: Limits, writers: Sequence[StreamWeight]) -> list[str]:
    """A sentence where directions are missing from different layers, as after several edits."""
    layers = [_layers(one.energies, writers, one.energies < limits.low) for one in found]
    if len({tuple(one) for one in layers}) < 2:
        return []
    said = "; ".join(spectrum.spans(one) or "none as a whole" for one in layers)
    return [f"the directions are missing from different layers, as after several edits: {said}"]


def _evidence(
    verdict: str,
    limits: Limits,
    best: Gap,
    along: np.ndarray,
    takes_part: np.ndarray,
    layers: Sequence[int],
    strength: float,
    model: StreamWeights,
) -> list[str]:
    size = f"gap {best.size:.2f}, {best.ratio:.1f} times the spread of the model's next directions"
    if verdict == NOT_EDITED:
        return [f"no direction stands out at the low end of the residual writers ({size})"]
    what = "one direction" if best.rank == 1 else f"{best.rank} directions"
    lines = [
        f"{int(takes_part.sum())} of {len(takes_part)} residual writers hold next to nothing along "
        f"{what} (at most {along[takes_part].max():.1e} of what they hold along their own weakest "
        f"ones; {size})",
        f"in layers {spectrum.spans(layers) or 'none as a whole'} of {model.layers}; strength "
        f"about {strength:.2f}, if it was once as strong there as any other",
    ]
    if verdict == CANNOT_TELL:
        lines.append(
            f"that is more than chance gives this model, and less than an edit is sure to leave "
            f"(gap {limits.size:g}, ratio {limits.ratio:g})"
        )
    return lines
