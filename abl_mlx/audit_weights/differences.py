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

from abl_mlx.audit_weights import other_tensors, spectrum, stacked, taken_out
from abl_mlx.audit_weights.gram import threads
from abl_mlx.audit_weights.pairs import Pair, matched
from abl_mlx.audit_weights.stacked import Stacked
from abl_mlx.audit_weights.taken_out import Candidates, Lost
from abl_mlx.outputs.model_file import ModelFile
from abl_mlx.outputs.stream_weights import StreamWeights
from abl_mlx.records.looks import AuditedWriter, Weights
from abl_mlx.support.console import progress

#: How many directions the differences have most in common.
_TOP = 8


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
    with threads(after.width):
        weights, directions = judge(pairs, left_out, after)
    writers = [name for one in (*after.writers, *before.writers) for name in one.tensors]
    others = other_tensors.compare(model, base, writers)
    evidence = [*weights.evidence, *other_tensors.evidence(others)]
    return replace(weights, evidence=evidence, others=others), directions


def judge(
    pairs: Sequence[Pair], left_out: list[str], model: StreamWeights
) -> tuple[Weights, np.ndarray | None]:
    """The verdict on pairs of writers, and the removed directions (k, d)."""
    tensors: dict[str, AuditedWriter] = {}
    with progress(2 * len(pairs), "compare", "tensor") as bar:
        found = []
        for pair in pairs:
            one = taken_out.candidates(pair)
            found.append(one)
            bar.update()
            tensors[pair[1].name] = AuditedWriter(
                relative_difference=(one.change / max(one.size, 1e-30)) ** 0.5,
                types=[pair[0].type, pair[1].type],
                rank_1_share=one.rank_1,
            )
        if not any(one.change for one in found):
            return Weights(
                verdict="not edited",
                evidence=["every residual writer is the same as in the base"],
                layers=[],
                rank=0,
                writers=tensors,
                left_out=left_out,
            ), None
        top = taken_out.common(found, _TOP)
        losses = []
        for pair in pairs:
            losses.append(taken_out.lost(pair, top))
            bar.update()
    return _judge(pairs, tensors, found, top, losses, left_out, model)


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


def _agreement(common: np.ndarray, one: Candidates) -> float | None:
    """The norm of a writer's first candidate projected on common directions, orthonormal (k, d)."""
    return float(np.linalg.norm(common @ one.vectors[0])) if len(one.vectors) else None


def _judge(
    pairs: Sequence[Pair],
    tensors: dict[str, AuditedWriter],
    found: Sequence[Candidates],
    top: np.ndarray,
    losses: Sequence[Lost],
    left_out: list[str],
    model: StreamWeights,
) -> tuple[Weights, np.ndarray | None]:
    strengths = np.array([one.strengths for one in losses])
    resemblances = np.array([one.resemblances for one in losses])
    part = np.array([one.part for one in losses])
    alike = np.array([one.alike for one in losses])
    two = stacked.found(pairs, part, top)
    if two is not None:
        return _in_steps(pairs, tensors, two, left_out)
    everywhere = range(len(top))
    chosen = [j for j in everywhere if alike[:, j].sum() >= min(2, len(pairs))]
    doubtful = [j for j in everywhere if alike[:, j].any() or 2 * part[:, j].sum() >= len(pairs)]
    verdict = "edited" if chosen else "cannot tell" if doubtful else "not edited"
    shown = chosen or doubtful or [0]
    took = part[:, shown].max(axis=1)
    for index, (_, new) in enumerate(pairs):
        j = max(shown, key=lambda j: abs(resemblances[index, j]))
        tensors[new.name] = replace(
            tensors[new.name],
            strength=float(strengths[index, j]),
            resemblance=float(resemblances[index, j]),
            edited=bool(took[index]),
            left_vector_agreement=_agreement(top[shown], found[index]),
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
    ), top[shown]


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
