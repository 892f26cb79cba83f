"""Chooses among the features of a sparse autoencoder: by number, by effect, or by separation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx.choices import Finding, Measuring
from abl_mlx.commands.candidate_choice import Finder
from abl_mlx.directions import estimators, methods, sae_features, sae_files, selection
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.directions.sae import Sae
from abl_mlx.directions.variants import Variant
from abl_mlx.models import capture
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.records.directions import RankedFeature, SaeFound
from abl_mlx.support.arrays import numpy_of
from abl_mlx.support.flags import first_given, not_together
from convert.base.errors import UsageError, UserError

#: How many features are tried alone, and how many of the first are tried together.
ALONE, TOGETHER = 8, (2, 3, 4, 6)

# Rows of a record: the features that were taken, and so many of the first.
_SHOWN = 10

# States that are encoded at once, because of the memory that all features take.
_ROWS = 32


def read(finding: Finding, chat: ChatModel) -> Sae:
    """The autoencoder of ``--sae``.

    Raises:
        UserError: when it cannot be read, or does not fit the model.
    """
    assert finding.sae is not None
    layer = finding.layer
    if layer is not None and layer != int(layer):
        raise UserError(f"--layer {layer:g}: an autoencoder reads the stream after a whole layer.")
    sae = sae_files.read(finding.sae, layer=None if layer is None else int(layer))
    sae.check(chat.width, len(chat.layers), str(chat.folder))
    return sae


def check(how: Measuring, chat: ChatModel) -> None:
    """Check, before the model runs, ``--sae`` and ``--feature``.

    Raises:
        UsageError: when flags do not go together.
        UserError: when the autoencoder cannot be used.
    """
    finding = how.finding
    if finding.sae is None:
        if finding.feature is not None:
            raise UsageError(f"--feature {finding.feature} is of an autoencoder: add --sae FOLDER.")
        if finding.method == methods.SAE:
            raise UsageError("--method sae needs an autoencoder: add --sae FOLDER.")
        return
    other = None if finding.method == methods.SAE else finding.method
    flag = first_given((
        (f"--method {other}", other), ("--across", finding.across),
        ("--per-layer", finding.per_layer), ("--keep", how.prompting.keep),
        ("--keep-system", how.prompting.keep_system), ("--search", how.searching.searches),
    ))  # fmt: skip
    if flag is not None:
        raise UsageError(not_together("--sae", flag))
    sae = read(finding, chat)
    try:
        chosen = finding.features
    except ValueError:
        raise UsageError(
            f"--feature {finding.feature} is neither auto nor numbers such as 12,345."
        ) from None
    if chosen:
        sae.directions(chosen)


def encode(sae: Sae, states: np.ndarray) -> np.ndarray:
    """The activations of all features, (N, d) -> (N, F) float32, some rows at a time."""
    rows = []
    for start in range(0, len(states), _ROWS):
        rows.append(numpy_of(sae.encode(mx.array(states[start : start + _ROWS]))))
    return np.concatenate(rows)


class SaeFinder(Finder):
    """Chooses among the decoder rows of a sparse autoencoder's features."""

    def __init__(self, sae: Sae, *measured: Any):
        """Keep what was measured.

        Args:
            sae: the autoencoder.
            measured: as for `Finder`.
        """
        super().__init__(*measured)
        self._sae = sae

    @cached_property
    def _place(self) -> tuple[int, int]:
        """The token position that is encoded, and its number among those that were measured."""
        position = self._candidates.positions[-1]
        return position, self._candidates.positions.index(position)

    @cached_property
    def _activations(self) -> tuple[np.ndarray, np.ndarray]:
        """Activations on harmful and on harmless train prompts, (N, F) and (M, F)."""
        refused = "borderline" if "borderline" in self._train else "harmful"
        found = []
        for name in (refused, "harmless"):
            rows: list[np.ndarray] = []
            batches = capture.iterate(
                self._chat, self._train[name], [self._place[0]], label=f"features, {name}"
            )
            for _, states in batches:
                rows.append(numpy_of(self._sae.encode(states[:, self._sae.layer, 0])))
            found.append(np.concatenate(rows))
        return found[0], found[1]

    @cached_property
    def _ranked(self) -> Sequence[int]:
        found = sae_features.ranked(*self._activations, _SHOWN)
        if not found:
            raise UserError(
                f"no feature of {self._sae.name} is more active on harmful prompts than on "
                "harmless ones: choose features with --feature, or another autoencoder."
            )
        return found

    def _of(self, features: Sequence[int]) -> Variant:
        chosen = tuple(features)
        rows = numpy_of(self._sae.directions(chosen)).astype(np.float64)
        if len(chosen) > 1:
            rows, lengths = estimators.orthonormal(rows)
            if lengths.min() < 1e-4:
                raise UserError(
                    f"--feature {','.join(map(str, chosen))}: these decoder rows of "
                    f"{self._sae.name} lie in fewer dimensions than there are features; leave one "
                    "out."
                )
        directions = mx.array(rows.astype(np.float32))
        position = self._place[0]
        return Variant(directions, methods.SAE, self._sae.layer, position, features=chosen)

    def _chosen(self, causal: bool) -> Variant:
        given = self._how.finding.features
        if given:
            self._notes["chosen_by"] = "hand"
            return self._of(given)
        if causal:
            return self._among(self._candidate_variants())
        self._notes["chosen_by"] = "largest d of train prompts, as completions refuse none"
        return self._of(self._ranked[:1])

    def _candidate_variants(self) -> list[Variant]:
        """Each of the first features alone, and the first few together."""
        variants = [self._of([feature]) for feature in self._ranked[:ALONE]]
        for count in TOGETHER:
            if count <= len(self._ranked):
                try:
                    variants.append(self._of(self._ranked[:count]))
                except UserError:  # two of them are the same direction
                    break
        return variants

    def files_of(self, scores: Sequence[selection.Score]) -> list[DirectionFile]:
        """Directions of features as direction files, as many as there are scores.

        These are the features that separate the train prompts best, whatever the scores of the
        differences of means.
        """
        given = self._how.finding.features
        if given:
            return [self._file(self._chosen(causal=False))]
        self._notes["chosen_by"] = "largest d of train prompts"
        return [self._file(self._of([feature])) for feature in self._ranked[: len(scores)]]

    def _file(self, variant: Variant) -> DirectionFile:
        file = super()._file(variant)
        file.metadata["sae"] = self._record(variant).json
        return file

    def _record(self, variant: Variant) -> SaeFound:
        sae, (position, column) = self._sae, self._place
        features = list(dict.fromkeys([*(variant.features or ()), *self._first()]))
        train = [one[:, features] for one in self._activations]
        wanted = sae_features.differences(*train)
        held_out = [encode(sae, states[sae.layer, column])[:, features] for states in self._states]
        means = numpy_of(self._candidates.difference(sae.layer, position)).astype(np.float64)
        cosines = estimators.unit(numpy_of(sae.decoder[mx.array(features)])) @ estimators.unit(
            means
        )
        rows = []
        for at, feature in enumerate(features):
            apart = sae_features.separation_of(held_out[0][:, at], held_out[1][:, at])
            rows.append(
                RankedFeature(
                    feature=feature,
                    difference=apart.difference,
                    error=apart.error,
                    auc=apart.auc,
                    interval=list(apart.interval),
                    active=list(apart.active),
                    train_difference=float(wanted[at]),
                    cosine=float(cosines[at]),
                )
            )
        return SaeFound(
            name=sae.name,
            architecture=sae.architecture,
            model=sae.model,
            layer=sae.layer,
            position=position,
            count=sae.count,
            features=rows,
        )

    def _first(self) -> Sequence[int]:
        """The first features by rank; none where no feature is more active on harmful prompts."""
        return sae_features.ranked(*self._activations, _SHOWN)
