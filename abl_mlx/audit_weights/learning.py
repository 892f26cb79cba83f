"""Learns an edit from a base model and what somebody made of it.

The writers' changes say which directions were removed, where and how far
(`abl_mlx.audit_weights.taken_out`); from that follows one description of the whole edit, in the
terms of a direction file. docs/learn.md has the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from abl_mlx.audit_weights import habits, partial, spectrum, stacked, taken_out
from abl_mlx.audit_weights.gram import threads
from abl_mlx.audit_weights.pairs import Pair, matched
from abl_mlx.audit_weights.stacked import Stacked
from abl_mlx.audit_weights.taken_out import TOP, Candidates, Fit, Lost, Slope
from abl_mlx.outputs.model_file import ModelFile
from abl_mlx.outputs.stream_weights import StreamWeights
from abl_mlx.records.learned import LearnedWriter
from abl_mlx.support.console import progress

EDITED, NO_SUCH_EDIT, CANNOT_TELL = "edited", "no such edit", "cannot tell"

#: Layers have directions of their own if these explain so much more than common ones do.
_BY_LAYER = 0.03

#: Strengths that lie so close together are one, and one so close to 1 is a full removal.
_SAME, _FULL = 0.04, 0.015

#: A slope of lengths tells whether norms were kept if its standard error is at most this.
_SURE_SLOPE = 0.2


@dataclass(frozen=True)
class Learned:
    """An edit as far as the weights tell it.

    Attributes:
        verdict: ``edited``, ``no such edit`` or ``cannot tell``.
        evidence: the reasons, a sentence each.
        directions: (k, d), or (L, k, d) with directions for each layer; None if none was removed.
        strength: α of the embedding if that was edited, else of most writers.
        profile: for ``attention`` and ``mlp``, a factor of ``strength`` for each layer; None if all
            writers were edited alike.
        embedding: whether the embedding was edited.
        norm: one of `choices.NORMS`; None if it cannot be told.
        agreement: |cos| that the directions have with the true ones, as two halves of the writers
            agree; None for a single writer.
        experts: (layer, expert) of the experts that were edited, if others were not.
        steps: where two edits were made one after the other, each of them; the whole has no
            strength, profile or norm then.
        writers: writer -> figures.
        left_out: writers that could not be compared.
    """

    verdict: str
    evidence: list[str]
    writers: dict[str, LearnedWriter]
    left_out: list[str]
    directions: np.ndarray | None = None
    strength: float | None = None
    profile: dict[str, list[float]] | None = None
    embedding: bool = False
    norm: str | None = None
    agreement: float | None = None
    experts: tuple[tuple[int, int], ...] = ()
    steps: tuple[Learned, ...] = ()

    @property
    def layers(self) -> list[int]:
        """The layers that were edited."""
        return sorted({one.layer for one in self.writers.values() if one.edited} - {-1})


def learn(model: ModelFile, base: ModelFile) -> Learned:
    """Learn the edit that made a model of its base; the two may have other formats and types.

    Raises:
        UserError: when the two models have different shapes.
        Unreachable: when their writers cannot be found or matched.
    """
    after, before = model.stream_weights(), base.stream_weights()
    pairs, left_out = matched(before, after, base.source.name, model.source.name)
    pairs, differing = partial.to_learn(model, base, pairs)
    read = {new.name for _, new in differing}
    with threads(after.width), progress(len(pairs) * 3, "learn", "tensor") as bar:
        found = []
        for pair in pairs:
            known = pair[1].name in read
            found.append(taken_out.candidates(pair) if known else Candidates.none(after.width))
            bar.update()
        return _Learning(pairs, found, left_out, after, bar.update).learned()


class _Learning:
    """What is learned from the candidates of all writers, in two more passes."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        found: Sequence[Candidates],
        left_out: list[str],
        model: StreamWeights,
        done: Callable[[], object],
    ) -> None:
        self.pairs, self.found, self.left_out, self.model = pairs, found, left_out, model
        self.done = done
        self.layer_of = [max(0, new.layer) for _, new in pairs]
        self.writers = {
            new.name: LearnedWriter(
                layer=new.layer,
                types=[old.type, new.type],
                relative_difference=float(np.sqrt(one.change / max(one.size, 1e-30))),
                rank_1_share=one.rank_1,
                edited=False,
            )
            for (old, new), one in zip(pairs, found, strict=True)
        }

    def learned(self) -> Learned:
        """The edit."""
        if not any(one.change for one in self.found):
            return self._none(["every residual writer is the same as in the base"])
        everywhere = taken_out.common(self.found, TOP)
        by_layer = {layer: self._of_layer(layer) for layer in set(self.layer_of)}
        losses = []
        for pair, one, layer in zip(self.pairs, self.found, self.layer_of, strict=True):
            directions = np.concatenate([everywhere, by_layer[layer]])
            same = Lost.nothing(len(directions))
            losses.append(taken_out.lost(pair, directions) if one.change else same)
            self.done()
        m = len(everywhere)
        part = np.array([one.part[:m] for one in losses])
        if stacked.possible(part):
            plane, agreement = self._refined(everywhere[:2])
            two = stacked.found(self.pairs, part, plane)
            if two is not None:
                return self._in_steps(two, agreement)
        chosen = self._chosen([_part(one, slice(0, m)) for one in losses])
        own = self._own([_part(one, slice(m, None)) for one in losses], by_layer)
        if not chosen and not own:
            doubt = any(one.part.any() and np.abs(one.resemblances).max() > 0.7 for one in losses)
            return self._none(self._unlike(losses), CANNOT_TELL if doubt else NO_SUCH_EDIT)
        rank = _rank(own)
        if own and (not chosen or len(chosen) > rank or self._apart(losses, m, chosen, own)):
            return self._described(by_layer, own, rank, losses, m)
        return self._described(None, {}, len(chosen), losses, m, everywhere[chosen], chosen)

    def _of_layer(self, layer: int) -> np.ndarray:
        inside = [one for one, at in zip(self.found, self.layer_of, strict=True) if at == layer]
        found = taken_out.common(inside, TOP)
        return found if found.size else np.zeros((0, self.model.width))

    def _chosen(self, losses: Sequence[Lost]) -> list[int]:
        """Which of the common directions were removed."""
        alike = np.array([one.alike for one in losses])
        return [j for j in range(alike.shape[1]) if alike[:, j].sum() >= min(2, len(losses))]

    def _own(self, losses: Sequence[Lost], by_layer: dict[int, np.ndarray]) -> dict[int, list[int]]:
        """Layer -> which of its own directions were removed there, in layers with such ones."""
        own = {}
        for layer, directions in by_layer.items():
            inside = [one for one, at in zip(losses, self.layer_of, strict=True) if at == layer]
            changed = [one for one in inside if one.energies.size]
            taken = [
                j
                for j in range(len(directions))
                if any(one.alike[j] for one in changed)
                and 2 * sum(one.part[j] for one in changed) >= len(changed)
            ]
            if taken:
                own[layer] = taken
        return own if len(own) >= min(2, len(by_layer)) else {}

    def _apart(
        self, losses: Sequence[Lost], m: int, chosen: list[int], own: dict[int, list[int]]
    ) -> bool:
        """Whether directions of single layers explain more than common ones, beyond rounding."""
        common, single, noise = 0.0, 0.0, 0.0
        for one, layer, found in zip(losses, self.layer_of, self.found, strict=True):
            if layer not in own or found.change <= 0:
                continue
            common += float(one.energies[chosen].sum()) / found.size
            single += float(one.energies[[m + j for j in own[layer]]].sum()) / found.size
            noise += 4 * one.noise * len(own[layer]) / found.size
        return single - noise > (1 + _BY_LAYER) * common

    # --- the description ---------------------------------------------------------------------

    def _in_steps(self, two: Stacked, agreement: float | None) -> Learned:
        """The description of two edits, one after the other."""
        whole = Learned(
            EDITED, [], self.writers, self.left_out, two.directions, agreement=agreement
        )
        for index, ((_, new), change) in enumerate(zip(self.pairs, self.found, strict=True)):
            taken = bool(two.strengths[index].any())
            left = max(change.change - float(two.squares[index]), 0.0)
            self.writers[new.name] = replace(
                self.writers[new.name],
                edited=taken,
                strengths=two.strengths[index].tolist() if taken else None,
                error=float(two.errors[index].max()) if taken else None,
                explained=1 - left / change.change if taken else None,
                left=float(np.sqrt(left / max(change.size, 1e-30))) if taken else None,
            )
        steps = tuple(self._step(two, number) for number in (0, 1))
        said = stacked.sentence(two, [new.layer for _, new in self.pairs])
        return replace(
            whole,
            evidence=[said, *self._evidence(whole)],
            embedding=any(one.embedding for one in steps),
            steps=steps,
        )

    def _step(self, two: Stacked, number: int) -> Learned:
        """One of two edits, with its own writers alone."""
        each = [float(one) or None for one in two.strengths[:, number]]
        embedding, strength, profile = self._recipe(each)
        mine = {
            new.name: replace(self.writers[new.name], strength=one)
            for (_, new), one in zip(self.pairs, each, strict=True)
            if one is not None
        }
        return Learned(
            EDITED, [], mine, [], two.directions[number : number + 1], strength, profile, embedding
        )

    def _described(
        self,
        by_layer: dict[int, np.ndarray] | None,
        own: dict[int, list[int]],
        rank: int,
        losses: Sequence[Lost],
        m: int,
        everywhere: np.ndarray | None = None,
        chosen: Sequence[int] = (),
    ) -> Learned:
        shown = {layer: [m + j for j in taken[:rank]] for layer, taken in own.items()}
        if by_layer is None:
            shown = {layer: list(chosen) for layer in set(self.layer_of)}
            assert everywhere is not None
            everywhere, agreement = self._refined(everywhere)
            bases = dict.fromkeys(set(self.layer_of), everywhere)
        else:
            bases = {layer: by_layer[layer][taken[:rank]] for layer, taken in own.items()}
            agreement = self._layer_agreement(bases)
        fits: list[Fit | None] = []
        for index, (pair, layer) in enumerate(zip(self.pairs, self.layer_of, strict=True)):
            here = bases.get(layer)
            took = here is not None and self.found[index].change > 0
            about = float(losses[index].strengths[shown[layer]].mean()) if took else 0.0
            fits.append(taken_out.fit(pair, here, about) if took else None)  # type: ignore[arg-type]
            self.done()
        strengths = self._strengths(fits, losses, "none")
        edited = [s for s in strengths if s is not None]
        if not edited:
            return self._none(self._unlike(losses), CANNOT_TELL)
        directions = everywhere if by_layer is None else self._stacked(bases, rank)
        embedding, strength, profile = self._recipe(strengths)
        norm, said = _norm(fits, strengths)
        if norm in ("columns", "rows"):
            strengths = self._strengths(fits, losses, norm)
            embedding, strength, profile = self._recipe(strengths)
        self._explained(fits, norm or "none")
        learned = Learned(
            EDITED, [], self.writers, self.left_out, directions, strength, profile, embedding,
            norm, agreement, self._experts(fits, strengths),
        )  # fmt: skip
        habit = habits.sentence(
            strength=strength,
            profile=profile,
            embedding=embedding,
            norm=norm,
            per_layer=by_layer is not None,
        )
        evidence = [
            *self._evidence(learned),
            *self._spread(fits),
            said,
            *([habit] if habit else []),
        ]
        return replace(learned, evidence=evidence)

    def _refined(self, directions: np.ndarray) -> tuple[np.ndarray, float | None]:
        """The common directions from those writers alone that show them, and their agreement."""
        near = [self._towards(one, directions) for one in self.found]
        halves = [taken_out.common(near[start::2], len(directions)) for start in (0, 1)]
        better = taken_out.common(near, len(directions))
        if any(len(one) < len(directions) for one in (better, *halves)):
            return directions, None
        return better, _agreement(*halves)

    def _towards(self, one: Candidates, directions: np.ndarray) -> Candidates:
        """A writer's candidates, weighted by how far they lie in the span of directions."""
        if not len(one.vectors):
            return one
        inside = ((one.vectors @ directions.T) ** 2).sum(axis=1)
        return replace(one, weights=one.weights * inside**2)

    def _layer_agreement(self, bases: dict[int, np.ndarray]) -> float | None:
        found = []
        for layer, basis in bases.items():
            inside = [
                self._towards(one, basis)
                for one, at in zip(self.found, self.layer_of, strict=True)
                if at == layer and len(one.vectors)
            ]
            halves = [taken_out.common(inside[start::2], len(basis)) for start in (0, 1)]
            if all(len(one) == len(basis) for one in halves):
                found.append(_agreement(*halves))
        return float(np.median(found)) if found else None

    def _stacked(self, bases: dict[int, np.ndarray], rank: int) -> np.ndarray:
        """(L, k, d); layers that were not edited get the directions of the nearest that was."""
        known = sorted(layer for layer, one in bases.items() if len(one) == rank)
        return np.stack([
            bases[min(known, key=lambda other, layer=layer: abs(other - layer))]  # type: ignore[misc]
            for layer in range(self.model.layers)
        ])  # fmt: skip

    def _strengths(
        self, fits: Sequence[Fit | None], losses: Sequence[Lost], norm: str
    ) -> list[float | None]:
        """α of each writer, None for those that were not edited; the writers' figures say it."""
        found: list[float | None] = []
        for (_, new), one, loss in zip(self.pairs, fits, losses, strict=True):
            if one is None:
                found.append(None)
                continue
            strength = one.strengths[norm] - loss.usual
            edited = bool(abs(strength) >= max(0.05, 6 * one.error))
            found.append(strength if edited else None)
            self.writers[new.name] = replace(
                self.writers[new.name],
                edited=edited,
                strength=float(strength),
                error=one.error,
            )
        return found

    def _explained(self, fits: Sequence[Fit | None], norm: str) -> None:
        """Put into the writers' figures how far the edit explains their changes."""
        for (_, new), one, change in zip(self.pairs, fits, self.found, strict=True):
            if one is not None:
                left = one.left[norm]
                self.writers[new.name] = replace(
                    self.writers[new.name],
                    explained=1 - left / change.change,
                    left=float(np.sqrt(left / max(change.size, 1e-30))),
                )

    def _recipe(
        self, strengths: Sequence[float | None]
    ) -> tuple[bool, float, dict[str, list[float]] | None]:
        """Whether the embedding was edited, its or the usual strength, and factors by layer."""
        known = [one for one in strengths if one is not None]
        usual = float(np.median(known))
        if max(known) - min(known) <= 2 * _SAME or all(abs(one - usual) <= _SAME for one in known):
            usual = 1.0 if abs(usual - 1) <= _FULL else round(usual, 4)
            snapped = [None if one is None else usual for one in strengths]
        else:
            snapped = [
                None if one is None else 1.0 if abs(one - 1) <= _FULL else round(one, 4)
                for one in strengths
            ]
        first = [
            one for (_, new), one in zip(self.pairs, snapped, strict=True) if new.layer < 0 and one
        ]
        embedding = bool(first)
        strength = first[0] if first else round(float(np.median([s for s in snapped if s])), 4)
        profile: dict[str, list[float]] = {}
        for part in ("attention", "mlp"):
            alphas: list[list[float]] = [[] for _ in range(self.model.layers)]
            for (_, new), one in zip(self.pairs, snapped, strict=True):
                if new.layer >= 0 and new.component == part:
                    alphas[new.layer].append(one or 0.0)
            profile[part] = [round(float(np.mean(a)) / strength, 4) if a else 1.0 for a in alphas]
        same = all(one == 1.0 for part in profile.values() for one in part)
        return embedding, strength, None if same else profile

    def _experts(
        self, fits: Sequence[Fit | None], strengths: Sequence[float | None]
    ) -> tuple[tuple[int, int], ...]:
        """The edited experts, if others of their stacks were not."""
        edited, whole = [], True
        for (_, new), one, strength in zip(self.pairs, fits, strengths, strict=True):
            if one is None or strength is None or len(one.experts) < 2:
                continue
            took = np.abs(one.experts) >= 0.5 * np.abs(one.experts).max()
            whole &= bool(took.all())
            edited += [(new.layer, int(expert)) for expert in np.flatnonzero(took)]
        return () if whole else tuple(edited)

    # --- words -------------------------------------------------------------------------------

    def _none(self, evidence: list[str], verdict: str = NO_SUCH_EDIT) -> Learned:
        return Learned(verdict, evidence, self.writers, self.left_out)

    def _unlike(self, losses: Sequence[Lost]) -> list[str]:
        changed = [apart for one in self.writers.values() if (apart := one.relative_difference)]
        most = max(float(np.abs(one.resemblances).max(initial=0.0)) for one in losses)
        said = [
            f"{len(changed)} of {len(self.writers)} residual writers differ from the base's, by "
            f"{np.median(changed):.2%} (median), not by the removal of directions: what differs "
            f"resembles what was there by {most:.2f} at most"
        ]
        ranks = [one.rank for one in self.found if one.change]
        if ranks and all(ranks):
            rank = max(one for one in ranks if one is not None)
            few = f"{rank} directions or fewer hold" if rank > 1 else "one direction holds"
            after = "the merge of a LoRA" + ("" if rank > 1 else " or `--method rome`")
            said.append(f"{few} 98% of each writer's change, as after {after}")
        return said

    def _evidence(self, learned: Learned) -> list[str]:
        took = [one for one in self.writers.values() if one.edited]
        assert learned.directions is not None
        rank = learned.directions.shape[-2]
        what = "one direction" if rank == 1 else f"{rank} directions"
        own = " of each layer's own" if learned.directions.ndim == 3 else ""
        errors = [one.error for one in took if one.error is not None]
        explained = [one.explained for one in took if one.explained is not None]
        left = [one.left for one in took if one.left is not None]
        lines = [
            f"{len(took)} of {len(self.writers)} residual writers lost {what}{own}, in layers "
            f"{spectrum.spans(learned.layers) or 'none'} of {self.model.layers}",
            f"the standard error of a writer's strength is at most {max(errors):.3f}",
            f"that explains {np.median(explained):.1%} (median) of how they differ from the "
            f"base's; what is left is {np.median(left):.2%} of the weights",
        ]
        if learned.agreement is not None:
            lines.append(
                f"two halves of the writers agree on the directions as at |cos| "
                f"{learned.agreement:.4f} with the true ones"
            )
        rounding = max(sum(map(taken_out.rounding_of, one.types)) for one in took)
        if np.median(left) > rounding:
            lines.append("that is more than rounding leaves: something else was changed as well")
        return lines

    def _spread(self, fits: Sequence[Fit | None]) -> list[str]:
        """A sentence where the strengths of several directions differ."""
        each = [one.each for one in fits if one is not None and len(one.each) > 1]
        spread = float(np.median([np.ptp(one) for one in each])) if each else 0.0
        if spread <= 0.1:
            return []
        return [
            f"the directions' strengths differ, by {spread:.2f} (median), which one strength "
            "cannot say"
        ]


def _part(one: Lost, which: slice) -> Lost:
    return replace(
        one,
        strengths=one.strengths[which],
        resemblances=one.resemblances[which],
        errors=one.errors[which],
        energies=one.energies[which],
    )


def _rank(own: dict[int, list[int]]) -> int:
    return int(np.median([len(one) for one in own.values()])) if own else 0


def _agreement(first: np.ndarray, second: np.ndarray) -> float:
    """|cos| of the mean of two estimates and the truth, from |cos| of the two (of several: least).

    Two independent estimates with the cosine c to the truth have c² to each other, and their mean
    has half of their squared errors.
    """
    cosine = float(np.linalg.svd(first @ second.T, compute_uv=False).min())
    return float(1 / np.sqrt(1 + (1 / max(cosine, 1e-6) - 1) / 2))


def _norm(fits: Sequence[Fit | None], strengths: Sequence[float | None]) -> tuple[str | None, str]:
    """Which norms were kept, one of `choices.NORMS` or None, and a sentence on it."""
    took = [one for one, s in zip(fits, strengths, strict=True) if one and s is not None]
    columns = taken_out.pooled([one.columns for one in took])
    rows = taken_out.pooled([one.rows for one in took])
    kept = {"columns": columns, "rows": rows}
    told = {name: one for name, one in kept.items() if _error(one) <= _SURE_SLOPE}
    figures = ", ".join(f"{name} {one.value:.2f} ± {_error(one):.2f}" for name, one in told.items())
    near = [name for name, one in told.items() if abs(one.value - 1) < 0.35]
    if near:
        name = min(near, key=lambda one: abs(told[one].value - 1))
        return name, f"norms of {name} were kept (of the change that this makes: {figures})"
    if len(told) == 2 and all(abs(one.value) < 0.5 for one in told.values()):
        return "none", f"no norms were kept (of the change that keeping them makes: {figures})"
    if all(abs(s * (2 - s)) < 0.1 for s in strengths if s is not None):
        return "none", "whether norms were kept makes no difference at this strength"
    return None, "whether norms were kept cannot be told: rounding hides it"


def _error(one: Slope) -> float:
    return float("inf") if one.weight <= 0 else one.weight**-0.5
