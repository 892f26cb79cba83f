"""The charts of a record: by layer, the two clouds, by tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from abl_mlx.reports.charts import Chart, Series, number

Record = Mapping[str, Any]

#: Where the embedding and the output head are drawn, which are in no layer.
_OUTSIDE = -1.0

_NUMBERED = re.compile(r"(?:^|\.)(\d+)\.")


def layer_charts(record: Record) -> list[Chart]:
    """What is known of each layer's candidate: separation, effect, KL, explained variance.

    Args:
        record: of `run` or `measure`: its ``scores`` and ``direction``. Charts without a number
            are left out.
    """
    scores, chosen = record.get("scores", []), record["direction"]
    if not scores:
        return []
    positions = sorted({score["position"] for score in scores})
    position = chosen.get("position", positions[-1])
    marker = (float(chosen["layer"]), "chosen") if "layer" in chosen else None

    def chart(title: str, y: str, series: Sequence[Series], log: bool = False) -> list[Chart]:
        full = tuple(one for one in series if one.points)
        if not full:
            return []
        return [Chart(title, "layer", y, full, marker, log=log, whole=True)]

    def along(key: str, name: str, at: Any = position, **how: Any) -> Series:
        found = sorted(
            (score["layer"], score[key], score["position"])
            for score in scores
            if score.get(key) is not None and at in (None, score["position"])
        )
        labels = tuple(f"layer {x}, token {p}: {number(y)}" for x, y, p in found)
        return Series(name, tuple((float(x), float(y)) for x, y, _ in found), labels=labels, **how)

    others = [one for one in positions if one != position]
    separation = [along("d_prime", f"token {position}", joined=True)]
    for index, other in enumerate(others):
        name = "other tokens" if index == 0 else ""
        separation.append(along("d_prime", name, other, joined=True, faint=True))
    return [
        *chart("Separation of the two sets", "d′", separation),
        *chart(
            "Refusal score, direction removed or added",
            "log-odds",
            [along("refusal", "harmful, removed", None), along("induced", "harmless, added", None)],
        ),
        *chart(
            "KL on harmless prompts, direction removed", "nats", [along("kl", "", None)], log=True
        ),
        *chart(
            "What the direction holds of the sets",
            "share",
            [
                along("explained", "variance explained", joined=True),
                along("auc", "AUC", joined=True),
                along("accuracy", "accuracy", joined=True),
            ],
        ),
    ]


def cloud_chart(record: Record) -> Chart | None:
    """Both prompt sets in a plane (`estimators.plane`); None where they were not kept."""
    cloud = record.get("cloud")
    if not cloud or not cloud["harmful"]:
        return None
    series = tuple(
        Series(
            f"{name} prompts",
            tuple((float(x), float(y)) for x, y in cloud[name]),
            labels=tuple(f"{number(x)}, {number(y)}" for x, y in cloud[name]),
        )
        for name in ("harmful", "harmless")
    )
    return Chart(
        f"The two prompt sets after layer {cloud['layer']}, at token {cloud['position']}",
        "component along the direction",
        "largest other component",
        series,
    )


def measure_charts(record: Record) -> list[Chart]:
    """What `measure --plot` draws."""
    cloud = cloud_chart(record)
    return [*layer_charts(record), *([cloud] if cloud is not None else [])]


def place_of(name: str) -> tuple[float, str]:
    """(layer, kind) of a tensor: ``blk.3.ffn_down.weight`` is (3, "ffn_down")."""
    found = _NUMBERED.search(name)
    if found is None:
        return _OUTSIDE, name.removesuffix(".weight").rsplit(".", 1)[-1]
    return float(found[1]), name[found.end() :].removesuffix(".weight").rsplit(".", 1)[-1]


def tensor_chart(
    title: str, y: str, values: Mapping[str, float], *, log: bool = True
) -> Chart | None:
    """One number of each tensor by its layer, a series for each kind; None of nothing.

    Kinds beyond the sixth are drawn together.
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


def leak_charts(tensors: Mapping[str, Record]) -> list[Chart]:
    """Leak and weight error of every edited tensor of an output."""
    found = [
        tensor_chart(title, y, {name: one[key] for name, one in tensors.items() if key in one})
        for key, title, y in (
            ("leak", "Leak: share of the edit lost in writing", "share"),
            ("weight_error", "Weight error: change beside the edit", "relative"),
        )
    ]
    return [one for one in found if one is not None]


def audit_charts(weights: Record) -> list[Chart]:
    """What an audit saw of the writers: the weakest directions, and each writer by layer."""
    charts = []
    tests = weights.get("tests", {})
    series = tuple(
        Series(
            name, tuple((float(k), float(v)) for k, v in enumerate(one["scores"], 1)), joined=True
        )
        for name, one in tests.items()
        if one.get("scores")
    )
    if series:
        charts.append(
            Chart("Directions that the writers hold least of", "rank", "score", series, whole=True)
        )
    writers = weights.get("writers", {})
    for key, title, y in (
        ("energy", "What each writer holds along the weakest direction", "of its weakest others"),
        ("relative_difference", "Difference from the base", "relative"),
        ("strength", "Strength of the removal", "strength"),
    ):
        values = {
            name: one[key] for name, one in writers.items() if isinstance(one.get(key), int | float)
        }
        chart = tensor_chart(title, y, values, log=key != "strength")
        if chart is not None:
            charts.append(chart)
    return charts
