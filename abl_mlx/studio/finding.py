"""What a measurement found, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from abl_mlx.commands.session import Steered
from abl_mlx.outputs.record_parts import measured
from abl_mlx.reports import charts, figures
from abl_mlx.studio.desk import Event


def found(steered: Steered, body: Mapping[str, Any]) -> Iterator[Event]:
    """Yield the charts of `measure --plot` as SVG, and the measurement's record."""
    record = measured(steered.direction)
    drawn = figures.measure_charts(record)
    yield {
        "charts": [{"title": one.title, "svg": charts.sheet([one], one.title)} for one in drawn],
        "record": record.json,
    }
