"""The charts of a record: figures by layer and by tensor, and the two prompt sets in a plane."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from abl_mlx.records.directions import Cloud, Found, ScoredCandidate
from abl_mlx.records.edits import TensorLeak
from abl_mlx.records.looks import Weights
from abl_mlx.reports.charts import Chart, Series, number
from abl_mlx.reports.explain_tables import explain_charts

#: Where the embedding and the output head are drawn, which are in no layer.
_OUTSIDE = -1.0

_ENERGY = "What each writer holds along the weakest direction"

_NUMBERED = re.compile(r"(?:^|\.)(\d+)\.")


def layer_charts(record: Found) -> list[Chart]:
    """Charts of each layer's candidate: separation, effect, KL, explained variance.

    Charts without any number are left out.

    Args:
        record: the record of `run` or `measure`.
    """
    scores, chosen = record.scores or [], record.direction
    if not scores:
        return []
    positions = sorted({score.position for score in scores})
    position = positions[-1] if chosen.position is None else chosen.position
    marker = None if chosen.layer is None else (float(chosen.layer), "chosen")

    def chart(title: str, y: str, series: Sequence[Series], log: bool = False) -> list[Chart]:
        full = tuple(one for one in series if one.points)
        if not full:
            return []
        return [Chart(title, "layer", y, full, marker, log=log, whole=True)]

    def along(figure: Figure, name: str, at: int | None = position, **how: bool) -> Series:
        found = sorted(
            (score.layer, value, score.position)
            for score in scores
            if (value := figure(score)) is not None and at in (None, score.position)
        )
        labels = tuple(f"layer {x}, token {p}: {number(y)}" for x, y, p in found)
        return Series(name, tuple((float(x), float(y)) for x, y, _ in found), labels=labels, **how)

    others = [one for one in positions if one != position]
    separation = [along(_d_prime, f"token {position}", joined=True)]
    for index, other in enumerate(others):
        name = "other tokens" if index == 0 else ""
        separation.append(along(_d_prime, name, other, joined=True, faint=True))
    return [
        *chart("Separation of the two sets", "d′", separation),
        *chart(
            "Refusal score, direction removed or added",
            "log-odds",
            [
                along(lambda score: score.refusal, "harmful, removed", None),
                along(lambda score: score.induced, "harmless, added", None),
            ],
        ),
        *chart(
            "KL on harmless prompts, direction removed",
            "nats",
            [along(lambda score: score.kl, "", None)],
            log=True,
        ),
        *chart(
            "What the direction holds of the sets",
            "share",
            [
                along(lambda score: score.explained, "variance explained", joined=True),
                along(lambda score: score.auc, "AUC", joined=True),
                along(lambda score: score.accuracy, "accuracy", joined=True),
            ],
        ),
    ]


#: Reads a figure of a candidate.
Figure = Callable[[ScoredCandidate], "float | None"]


def _d_prime(score: ScoredCandidate) -> float | None:
    return score.d_prime


def cloud_chart(cloud: Cloud | None) -> Chart | None:
    """A chart of both prompt sets in a plane (`estimators.plane`); None if they were not kept."""
    if cloud is None or not cloud.harmful:
        return None
    series = tuple(
        Series(
            f"{name} prompts",
            tuple((float(x), float(y)) for x, y in points),
            labels=tuple(f"{number(x)}, {number(y)}" for x, y in points),
        )
        for name, points in (("harmful", cloud.harmful), ("harmless", cloud.harmless))
    )
    return Chart(
        f"The two prompt sets after layer {cloud.layer}, at token {cloud.position}",
        "component along the direction",
        "largest other component",
        series,
    )


def measure_charts(record: Found) -> list[Chart]:
    """The charts of `measure --plot`."""
    cloud = cloud_chart(record.cloud)
    more = explain_charts(record.explained)
    return [*layer_charts(record), *more, *([cloud] if cloud is not None else [])]


def place_of(name: str) -> tuple[float, str]:
    """(layer, kind) of a tensor: ``blk.3.ffn_down.weight`` is (3, "ffn_down")."""
    found = _NUMBERED.search(name)
    if found is None:
        return _OUTSIDE, name.removesuffix(".weight").rsplit(".", 1)[-1]
    return float(found[1]), name[found.end() :].removesuffix(".weight").rsplit(".", 1)[-1]


def tensor_chart(
    title: str, y: str, values: Mapping[str, float], *, log: bool = True
) -> Chart | None:
    """A chart of one number of each tensor by layer, with a series for each kind of tensor.

    Kinds after the sixth share a series. None if there is no number.
    """
    kinds: dict[str, list[tuple[float, float, str]]] = {}
    for name, value in values.items():
        layer, kind = place_of(name)
        kinds.setdefault(kind, []).append((layer, float(value), f"{name}: {number(value)}"))
    if not kinds:
        return None
    named = dict(list(kinds.items())[:5])
    rest = [one for kind, points in kinds.items() if kind not in named for one in points]
    if rest:
        named["others"] = rest
    series = tuple(
        Series(
            kind,
            tuple((x, value) for x, value, _ in points),
            labels=tuple(said for _, _, said in points),
        )
        for kind, points in named.items()
    )
    outside = any(x == _OUTSIDE for one in series for x, _ in one.points)
    names = ((_OUTSIDE, "none"),) if outside else ()
    log = log and any(value > 0 for value in values.values())
    return Chart(title, "layer", y, series, log=log, whole=True, names=names)


def leak_charts(tensors: Mapping[str, TensorLeak]) -> list[Chart]:
    """Charts of the leak and the weight error of every edited tensor of an output."""
    leaks = {name: one.leak for name, one in tensors.items()}
    errors = {name: one.weight_error for name, one in tensors.items()}
    found = [
        tensor_chart("Leak: share of the edit lost in writing", "share", leaks),
        tensor_chart("Weight error: change beside the edit", "relative", errors),
    ]
    return [one for one in found if one is not None]


def audit_charts(weights: Weights) -> list[Chart]:
    """Charts of an audit: the scores of the weakest directions, and each writer by layer."""
    charts = []
    series = tuple(
        Series(name, tuple((float(k), float(v)) for k, v in enumerate(one.scores, 1)), joined=True)
        for name, one in (weights.tests or {}).items()
        if one.scores
    )
    if series:
        charts.append(
            Chart("Directions that the writers hold least of", "rank", "score", series, whole=True)
        )
    writers = (weights.writers or {}).items()
    energy = {name: one.energy for name, one in writers}
    difference = {name: one.relative_difference for name, one in writers}
    strength = {name: one.strength for name, one in writers}
    for title, y, values, log in (
        (
            "What each writer holds along the weakest direction",
            "of its weakest others",
            energy,
            True,
        ),
        ("Difference from the base", "relative", difference, True),
        ("Strength of the removal", "strength", strength, False),
    ):
        known = {name: value for name, value in values.items() if value is not None}
        chart = tensor_chart(title, y, known, log=log)
        if chart is not None:
            charts.append(chart)
    return charts
