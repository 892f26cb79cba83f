"""What a direction is made of, as lines of tables and as charts."""

from __future__ import annotations

from abl_mlx.records.explained import ConeOf, Explained
from abl_mlx.reports.charts import Chart, Series

# The widest matrix that is printed; larger ones are in the record.
_WIDEST = 16


def lines(found: Explained | None) -> list[str]:
    """The table of ``--explain``; nothing without it."""
    if found is None:
        return []
    rows = [
        "",
        f"what it is made of, after layer {found.layer} at token {found.position} "
        f"(cosine of random directions: 0 ± {found.chance:.2f})",
        *(f"  {one.cosine:+.2f}  {one.kind} {one.name}" for one in found.cosines),
    ]
    if found.cone is not None:
        rows += ["", *_cone(found.cone)]
    rows += ["", *_shares(found)]
    if len(found.layers) <= _WIDEST:
        head = "".join(f"{layer:>6}" for layer in range(len(found.layers)))
        rows += ["", "  cosines of the directions after each layer", f"    {head}"]
        rows += [
            f"  {layer:>2}" + "".join(f"{value:+6.2f}" for value in row)
            for layer, row in enumerate(found.layers)
        ]
    return rows


def _cone(cone: ConeOf) -> list[str]:
    wide = max(len(one.category) for one in cone.categories)
    return [
        f"  by category, {len(cone.categories)} directions: cosines of pairs {cone.smallest:+.2f} "
        f"and more, {cone.mean:+.2f} on average; effective rank {cone.effective_rank:.1f}",
        *(
            f"  {one.cosine:+.2f}  {one.category:<{wide}}  n={one.n}, length {one.length:.3g}, "
            f"noise {one.noise:.0%}"
            for one in cone.categories
        ),
    ]


def _shares(found: Explained) -> list[str]:
    rows = []
    if found.cone is not None:
        noise = sum(one.noise for one in found.cone.categories) / len(found.cone.categories)
        rows.append(
            f"  {found.cone.common:>6.1%}  of the categories' differences is common to all of them "
            f"(their noise taken off: {noise:.0%} on average)"
        )
    if found.topics is not None:
        rows.append(
            f"  {found.topics.share:>6.1%}  of it lies among the topics of harmless prompts "
            f"({found.topics.dimensions} dimensions; with shuffled topics: "
            f"{found.topics.chance:.1%})"
        )
    if found.matched is not None:
        rows.append(
            f"  {found.matched.cosine:>+6.2f}  cosine with the direction between prompts of the "
            f"same {found.matched.categories} categories"
        )
    return rows


def explain_charts(found: Explained | None) -> list[Chart]:
    """The cosines of the directions after all layers with that after the chosen one."""
    if found is None:
        return []
    row = found.layers[found.layer]
    points = tuple((float(layer), value) for layer, value in enumerate(row))
    return [
        Chart(
            f"Cosine with the direction after layer {found.layer}",
            "layer",
            "cosine",
            (Series("", points, joined=True),),
            marker=(float(found.layer), "chosen"),
            whole=True,
        )
    ]
