"""Features of a sparse autoencoder, as rows of tables and pages."""

from __future__ import annotations

from abl_mlx.records.directions import SaeFound
from abl_mlx.records.looks import ShownSae
from abl_mlx.reports import columns

HEAD = ("feature", "d", "AUC", "95% interval", "active on harmful, harmless", "cos with μH − μG")

#: What the figures are of, for a line above them.
ABOUT = (
    "d: difference of mean activation over the pooled deviation, ± its standard error; validation "
    "prompts"
)

# The features that `show` prints with their tokens.
_TOKENS = 3


def title(found: SaeFound | ShownSae) -> str:
    """The autoencoder in a few words."""
    trained = "" if found.model is None else f", trained on {found.model}"
    return (
        f"{found.name}: {found.count:,} features ({found.architecture}) of the stream after layer "
        f"{found.layer}{trained}"
    )


def rows(found: SaeFound) -> list[tuple[str, ...]]:
    """The cells of each feature, under `HEAD`."""
    return [
        (
            str(one.feature),
            f"{one.difference:+.2f} ± {one.error:.2f}",
            f"{one.auc:.2f}",
            f"{one.interval[0]:.2f} to {one.interval[1]:.2f}",
            f"{one.active[0]:.0%}, {one.active[1]:.0%}",
            f"{one.cosine:+.2f}",
        )
        for one in found.features
    ]


def lines(found: SaeFound | None) -> list[str]:
    """The features as lines of a table; nothing without an autoencoder."""
    if found is None:
        return []
    table = columns.lines([HEAD, *rows(found)], right=range(len(HEAD) - 1))
    return ["", title(found), f"  {ABOUT}", *table]


def shown_lines(found: ShownSae | None, tokens: list[str]) -> list[str]:
    """The features of a prompt as lines: the last activation, and the tokens with the largest."""
    if found is None:
        return []
    cells: list[tuple[str, ...]] = [("feature", "last token", "cos with r", "largest at")]
    for one in found.features:
        order = sorted(range(len(tokens)), key=lambda t: -one.activations[t])[:_TOKENS]
        places = (
            f"{tokens[t]!r} {one.activations[t]:.2f}" for t in order if one.activations[t] > 0
        )
        last = f"{one.activations[found.prompt_tokens - 1]:.2f}"
        cells.append((str(one.feature), last, f"{one.cosine:+.2f}", ", ".join(places) or "–"))
    return ["", title(found), *columns.lines(cells, right=range(len(cells[0]) - 1))]
