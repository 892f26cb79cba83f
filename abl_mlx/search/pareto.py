"""The Pareto front of two minimized objectives, its hypervolume, and whether it still moves."""

from __future__ import annotations

from collections.abc import Sequence

Point = tuple[float, float]


def front(points: Sequence[Point]) -> list[int]:
    """Indices of the points on the Pareto front, by rising first coordinate.

    A point is on the front if no other point is at most as large in both coordinates and smaller in
    one. Of equal points only the first is on it.
    """
    order = sorted(range(len(points)), key=lambda number: (*points[number], number))
    kept: list[int] = []
    for number in order:
        if not kept or points[number][1] < points[kept[-1]][1]:
            kept.append(number)
    return kept


def hypervolume(points: Sequence[Point], reference: Point = (1.0, 1.0)) -> float:
    """The area between the points' front and ``reference`` (Zitzler and Thiele 1998).

    Points that are not below the reference in both coordinates add nothing.
    """
    inside = [point for point in points if point[0] < reference[0] and point[1] < reference[1]]
    area, ceiling = 0.0, reference[1]
    for number in front(inside):
        x, y = inside[number]
        area += (reference[0] - x) * (ceiling - y)
        ceiling = y
    return area


def still(volumes: Sequence[float], patience: int, least: float = 0.001) -> bool:
    """Whether the front has stopped moving.

    Args:
        volumes: the hypervolume after each trial so far.
        patience: the number of last trials to compare.
        least: the share by which the hypervolume must have grown over these to count as moving.
    """
    if len(volumes) <= patience:
        return False
    before, now = volumes[-1 - patience], volumes[-1]
    return now > 0 and now - before <= least * now
