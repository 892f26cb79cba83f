"""`abl-mlx measure --explain`: what the direction is made of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from abl_mlx.choices import Prompting
from abl_mlx.directions import decomposition, direction_file, methods
from abl_mlx.directions.decomposition import Cone
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.inputs import prompts, thinking
from abl_mlx.inputs.sets import Prompt, PromptSets
from abl_mlx.models import capture
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.records.explained import (
    CategoryDirection,
    ConeOf,
    CosineWith,
    Explained,
    Matched,
    TopicShare,
)
from abl_mlx.support.arrays import numpy_of
from abl_mlx.support.clock import Clock
from abl_mlx.support.flags import not_together
from convert.base.errors import UsageError

Array = np.ndarray


def check(explain: bool, others: Sequence[Path], prompting: Prompting) -> dict[Path, DirectionFile]:
    """Check the flags before the model is loaded, and read the other directions.

    Raises:
        UsageError: when flags do not go together.
        UserError: when a file cannot be read.
    """
    if others and not explain:
        raise UsageError("--explain-with compares with a direction: add --explain.")
    if explain and prompting.thinking != thinking.OFF:
        raise UsageError(not_together("--explain", "--thinking"))
    return {path: direction_file.read(path) for path in others}


def explain(
    chat: ChatModel,
    sets: PromptSets,
    prompting: Prompting,
    others: Mapping[Path, DirectionFile],
    direction: DirectionFile,
    clock: Clock,
) -> DirectionFile:
    """A direction with what it is made of, in its metadata.

    Args:
        chat: the model.
        sets: the prompts with which it was measured.
        prompting: how they were asked.
        others: further directions to compare it with.
        direction: the direction.
        clock: times the step.
    """
    with clock.step("explain the direction"):
        place = direction.metadata.get("cloud", {})
        layer, position = int(place["layer"]), int(place["position"])
        states = {
            name: _states(chat, part.train.prompts, layer, position, name)
            for name, part in {"harmful": sets.harmful, "harmless": sets.harmless}.items()
        }
        found = _Explaining(chat, sets, direction, layer, position, states)
        known = [
            *found.methods(),
            *(found.file(path, one) for path, one in others.items()),
            *found.contrasts(prompting),
        ]
        explained = found.record(known)
    return replace(direction, metadata={**direction.metadata, "explained": explained.json})


def pairs() -> dict[str, list[tuple[str, str]]]:
    """What neutral prompts differ in -> pairs of prompts, the one that has more of it first."""
    found: dict[str, list[tuple[str, str]]] = {}
    path = Path(prompts.__file__).parent / "prompt_sets" / "contrasts.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["contrast"], []).append((row["high"], row["low"]))
    return found


class _Explaining:
    """A direction and the states around it."""

    def __init__(
        self,
        chat: ChatModel,
        sets: PromptSets,
        direction: DirectionFile,
        layer: int,
        position: int,
        states: Mapping[str, Array],
    ):
        self._chat, self._sets, self._direction = chat, sets, direction
        self._layer, self._position, self._states = layer, position, states
        self._difference = states["harmful"].mean(axis=0) - states["harmless"].mean(axis=0)
        self._lead = decomposition.lead(self._rows(direction), self._difference)

    def _rows(self, file: DirectionFile) -> Array:
        """The directions of a file that are removed at the layer, (k, d) float64."""
        selected = numpy_of(file.selected).astype(np.float64)
        return selected if selected.ndim == 2 else selected[self._layer]

    def methods(self) -> Iterator[CosineWith]:
        """Cosines with what the methods that need means or states alone find here."""
        bad, good = self._states["harmful"], self._states["harmless"]
        for one in methods.TABLE:
            same = one.each_layer or one.name in (methods.ROME, methods.SAE)  # as the default
            if not one.is_plain or one.needs == methods.THREE_MEANS or same:
                continue
            if one.needs == methods.STATES:
                found, _ = one.estimate(bad, good, 1)
            else:
                cut = one.cut_off if one.cut else np.asarray
                found = one.estimate(cut(bad).mean(axis=0), cut(good).mean(axis=0))
            yield self._with("method", one.name, np.atleast_2d(found)[0])

    def file(self, path: Path, file: DirectionFile) -> CosineWith:
        """The cosine with another direction file's directions."""
        direction_file.check_width(file, path, self._chat)
        return self._with("file", path.name, self._rows(file))

    def contrasts(self, prompting: Prompting) -> Iterator[CosineWith]:
        """Cosines with what sets pairs of neutral prompts apart."""
        system = prompts.system_message(prompting.system)
        for name, both in pairs().items():
            high, low = (
                self._neutral([Prompt(pair[side], system=system) for pair in both], name)
                for side in (0, 1)
            )
            yield self._with("contrast", name, decomposition.contrast(high, low))

    def _neutral(self, asked: Sequence[Prompt], name: str) -> Array:
        return _states(self._chat, asked, self._layer, self._position, name)

    def _with(self, kind: str, name: str, rows: Array) -> CosineWith:
        return CosineWith(kind=kind, name=name, cosine=decomposition.cosine(self._lead, rows))

    def record(self, known: Sequence[CosineWith]) -> Explained:
        """Everything that is known of the direction."""
        sets, states = self._sets, self._states
        parts = {
            name: decomposition.by_category(
                states[name], [one.category for one in split.train.prompts]
            )
            for name, split in {"harmful": sets.harmful, "harmless": sets.harmless}.items()
        }
        cone = decomposition.cone(parts["harmful"], states["harmless"])
        topics = decomposition.topics(self._lead, parts["harmless"])
        matched = decomposition.matched(parts["harmful"], parts["harmless"])
        return Explained(
            layer=self._layer,
            position=self._position,
            chance=decomposition.chance(self._chat.width),
            cosines=list(known),
            layers=self._layers(),
            cone=None if cone is None else self._cone(cone),
            topics=None if topics is None else TopicShare(**vars(topics)),
            matched=None if matched is None else Matched(
                cosine=decomposition.cosine(self._lead, matched[0]), categories=len(matched[1])
            ),
        )  # fmt: skip

    def _layers(self) -> list[list[float]]:
        candidates = self._direction.candidates
        assert candidates is not None  # `measure` always finds them
        column = candidates.positions.index(self._position)
        found: list[list[float]] = decomposition.matrix(
            numpy_of(candidates.leads[:, column]).astype(np.float64)
        ).tolist()
        return found

    def _cone(self, cone: Cone) -> ConeOf:
        cosines = cone.cosines
        apart = cosines[~np.eye(len(cosines), dtype=bool)]
        return ConeOf(
            categories=[
                CategoryDirection(
                    category=name,
                    n=cone.counts[at],
                    cosine=decomposition.cosine(self._lead, cone.differences[at]),
                    length=float(np.linalg.norm(cone.differences[at])),
                    noise=cone.noise[at],
                )
                for at, name in enumerate(cone.names)
            ],
            cosines=cosines.tolist(),
            smallest=float(apart.min()),
            mean=float(apart.mean()),
            effective_rank=cone.effective_rank,
            common=cone.common,
        )


def _states(
    chat: ChatModel, asked: Sequence[Prompt], layer: int, position: int, label: str
) -> Array:
    """The states of prompts after a layer, behind what replies open with, (N, d) float64."""
    opening = list(chat.reply_prefixes.get(asked[0].thinking, ()))
    tokens = [chat.encode(one) + opening for one in asked]
    found = capture.after_layer(chat, tokens, layer, [position], label=f"explain, {label}")
    return found[:, 0].astype(np.float64)
