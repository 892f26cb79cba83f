"""Compares a model with its base model: whether the differences are the removal of a direction.

An edit changes a writer W by D = −α r (rᵀW). D has rank 1, all writers share its left singular
vector r, and along r it is −α times the base's component. This last property distinguishes an edit
from training: fine-tunes and merged adapters may also have low rank, but their differences are not
proportional to the base's components. Rounding to another type adds noise to D, in which the
writers share no direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from abl_mlx.audit_weights import other_tensors, spectrum, stacked
from abl_mlx.audit_weights.pairs import Pair, both, largest, matched
from abl_mlx.audit_weights.stacked import Stacked
from abl_mlx.outputs.model_file import ModelFile
from abl_mlx.outputs.stream_weights import StreamWeight, StreamWeights
from abl_mlx.records.looks import AuditedWriter, Weights
from abl_mlx.support.console import progress

#: How many directions the differences have most in common, and how many to compare them with.
_TOP, _OTHERS = 8, 16

#: A writer was edited if it lost at least this share along a direction, more than along others, and
#: if the lost components have at least this cosine with the base's components.
_STRENGTH, _RESEMBLANCE = 0.08, 0.4

#: In two writers this cosine must be at least so large. Training also changes weights along their
#: own largest directions, and reaches .9.
_ALIKE = 0.93


def compare(model: ModelFile, base: ModelFile) -> tuple[Weights, np.ndarray | None]:
    """Compare a model with its base; the two may have different formats and types.

    Returns:
        Verdict, evidence and figures; and the removed directions (k, d), None if there are none.

    Raises:
        UserError: when the two models have different shapes.
        Unreachable: when their writers cannot be found or matched.
    """
    after, before = model.stream_weights(), base.stream_weights()
    pairs, left_out = matched(before, after, base.source.name, model.source.name)
    with spectrum.threads(after.width):
        weights, directions = judge(pairs, left_out, after)
    writers = [name for one in (*after.writers, *before.writers) for name in one.tensors]
    others = other_tensors.compare(model, base, writers)
    evidence = [*weights.evidence, *other_tensors.evidence(others)]
    return replace(weights, evidence=evidence, others=others), directions


def judge(
    pairs: Sequence[Pair], left_out: list[str], model: StreamWeights
) -> tuple[Weights, np.ndarray | None]:
    """The verdict on pairs of writers, and the removed directions (k, d)."""
    d = model.width
    total = np.zeros((d, d))
    tensors: dict[str, AuditedWriter] = {}
    vectors: dict[str, np.ndarray] = {}
    with progress(2 * sum(new.lines for _, new in pairs), "compare", "vector") as bar:
        for old, new in pairs:
            gram, size = _difference(old, new)
            bar.update(new.lines)
            squares = float(np.trace(gram))
            share: float | None = None
            if squares > 0:
                value, vectors[new.name] = largest(gram, 1)
                share = float(value[0]) / squares
                total += gram / squares
            tensors[new.name] = AuditedWriter(
                relative_difference=(squares / max(size, 1e-30)) ** 0.5,
                types=[old.type, new.type],
                rank_1_share=share,
            )
        if not vectors:
            return Weights(
                verdict="not edited",
                evidence=["every residual writer is the same as in the base"],
                layers=[],
                rank=0,
                writers=tensors,
                left_out=left_out,
            ), None
        top = largest(total, min(_TOP, d))[1]
        random = np.random.default_rng(0).standard_normal((d, min(_OTHERS, d)))
        directions = np.concatenate([top, random / np.linalg.norm(random, axis=0)], axis=1)
        strengths, resemblances = [], []
        for pair in pairs:
            strength, resemblance = _lost(pair, directions)
            strengths.append(strength)
            resemblances.append(resemblance)
            bar.update(pair[1].lines)
    return _judge(
        pairs, tensors, vectors, top, np.array(strengths), np.array(resemblances), left_out, model
    )


def _difference(old: StreamWeight, new: StreamWeight) -> tuple[np.ndarray, float]:
    """D Dᵀ (d, d), and the sum of squares of the base's weights."""
    gram = np.zeros((new.width, new.width))
    size = 0.0
    for before, after in both((old, new)):
        size += float(np.vdot(before, before))
        before = after - before
        gram += before @ before.T
    return gram, size


def _lost(pair: Pair, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For one writer and each direction v, the removed share and its resemblance to the base.

    With a = vᵀW₀ and b = vᵀW these are 1 − a·b / a·a, and the cosine of a − b and a.
    """
    narrow = np.ascontiguousarray(directions.T, dtype=np.float32)
    count = len(narrow)
    aa, ab, dd = np.zeros(count), np.zeros(count), np.zeros(count)
    for before, after in both(pair):
        a = (narrow @ before).astype(np.float64)
        b = (narrow @ after).astype(np.float64)
        aa += (a * a).sum(axis=1)
        ab += (a * b).sum(axis=1)
        dd += ((a - b) ** 2).sum(axis=1)
    aa = np.maximum(aa, 1e-30)
    return 1 - ab / aa, (aa - ab) / np.sqrt(aa * np.maximum(dd, 1e-30))


def _evidence(lost: str, median: float, most: float, left_out: Sequence[str]) -> list[str]:
    """The evidence for a verdict, one sentence each.

    Args:
        lost: a sentence about what the writers lost along a direction; empty if they lost nothing.
        median: the median relative difference of the writers from the base's.
        most: the largest cosine of lost components and the base's.
        left_out: names of tensors that were not compared.
    """
    if lost:
        evidence = [
            lost,
            f"what they lost resembles what was there by up to {most:.3f}; the writers differ from "
            f"the base's by {median:.2%} (median)",
        ]
    else:
        evidence = [
            f"the residual writers differ from the base's by {median:.2%} (median), and not by the "
            f"removal of a direction: what differs resembles what was there by {most:.2f} at most"
        ]
    if left_out:
        evidence.append(f"not compared: {', '.join(left_out[:3])}" + ("…" if left_out[3:] else ""))
    return evidence


def _agreement(common: np.ndarray, vectors: np.ndarray | None) -> float | None:
    """The norm of a writer's first left singular vector projected on the common directions.

    Args:
        common: (d, k), orthonormal.
        vectors: (d, ·), the left singular vectors; None if they are not known.
    """
    return None if vectors is None else float(np.linalg.norm(common.T @ vectors[:, 0]))


def _judge(
    pairs: Sequence[Pair],
    tensors: dict[str, AuditedWriter],
    vectors: dict[str, np.ndarray],
    top: np.ndarray,
    strengths: np.ndarray,
    resemblances: np.ndarray,
    left_out: list[str],
    model: StreamWeights,
) -> tuple[Weights, np.ndarray | None]:
    k = top.shape[1]
    usual = np.median(strengths[:, k:], axis=1, keepdims=True)
    part = (np.abs(strengths[:, :k] - usual) >= _STRENGTH) & (
        np.abs(resemblances[:, :k]) >= _RESEMBLANCE
    )
    two = stacked.found(pairs, part, top.T)
    if two is not None:
        return _in_steps(pairs, tensors, two, left_out)
    alike = part & (np.abs(resemblances[:, :k]) >= _ALIKE)
    chosen = [j for j in range(k) if alike[:, j].sum() >= min(2, len(pairs))]
    doubtful = [j for j in range(k) if alike[:, j].any() or 2 * part[:, j].sum() >= len(pairs)]
    verdict = "edited" if chosen else "cannot tell" if doubtful else "not edited"
    shown = chosen or doubtful or [0]
    took = part[:, shown].any(axis=1)
    for index, (_, new) in enumerate(pairs):
        j = max(shown, key=lambda j: abs(resemblances[index, j]))
        tensors[new.name] = replace(
            tensors[new.name],
            strength=float(strengths[index, j]),
            resemblance=float(resemblances[index, j]),
            edited=bool(took[index]),
            left_vector_agreement=_agreement(top[:, shown], vectors.get(new.name)),
        )
    layers = sorted({new.layer for (_, new), t in zip(pairs, took, strict=True) if t} - {-1})
    apart = [one.relative_difference for one in tensors.values()]
    median = float(np.median([value for value in apart if value is not None]))
    most = float(np.abs(resemblances[:, shown]).max())
    if verdict == "not edited":
        evidence = _evidence("", median, most, left_out)
        none = Weights(verdict=verdict, evidence=evidence, layers=[], embedding=False, rank=0)
        nulls = frozenset({"strength"})
        return replace(none, nulls=nulls, writers=tensors, left_out=left_out), None
    strength = float(np.median(strengths[:, shown][part[:, shown]]))
    what = "one direction" if len(shown) == 1 else f"{len(shown)} directions"
    lost = (
        f"{int(took.sum())} of {len(pairs)} residual writers lost {strength:.0%} (median) of "
        f"what the base has along {what} that they share, in layers "
        f"{spectrum.spans(layers) or 'none'} of {model.layers}"
    )
    return Weights(
        verdict=verdict,
        evidence=_evidence(lost, median, most, left_out),
        layers=layers,
        embedding=any(t and new.axis == -1 for (_, new), t in zip(pairs, took, strict=True)),
        rank=len(shown),
        strength=strength,
        writers=tensors,
        left_out=left_out,
    ), top[:, shown].T


def _in_steps(
    pairs: Sequence[Pair], tensors: dict[str, AuditedWriter], two: Stacked, left_out: list[str]
) -> tuple[Weights, np.ndarray]:
    """The verdict on two edits, one after the other."""
    taken = two.strengths.any(axis=1)
    apart = []
    for (_, new), strengths in zip(pairs, two.strengths, strict=True):
        before = tensors[new.name]
        strongest = float(max(strengths, key=abs))
        tensors[new.name] = replace(before, edited=bool(strongest), strength=strongest)
        apart.append(before.relative_difference or 0.0)
    edited = [pairs[int(index)][1] for index in np.flatnonzero(taken)]
    said = stacked.sentence(two, [new.layer for _, new in pairs])
    far = f"the writers differ from the base's by {np.median(apart):.2%} (median)"
    return Weights(
        verdict="edited",
        evidence=[said, far],
        layers=sorted({one.layer for one in edited} - {-1}),
        embedding=any(one.axis == -1 for one in edited),
        rank=2,
        strength=float(np.median(two.strengths[two.strengths != 0])),
        writers=tensors,
        left_out=left_out,
    ), np.linalg.qr(two.directions.T)[0].T
