"""The flags about behaviours other than refusal, of the commands that may search."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from abl_mlx.cli.flags import decorated


def scorer_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which scorers are asked, and what a search makes of their figures."""
    flags = [
        click.option(
            "--scorer",
            metavar="NAME[:FILE],...",
            help="Also measure behaviours other than refusal (slop, sycophancy, language, or "
            "scorers of installed packages; docs/eval.md), before and after. A search chooses an "
            "edit that does not raise their figures.",
        ),
        click.option(
            "--max-rise",
            default=0.0,
            show_default=True,
            type=click.FloatRange(min=0),
            help="With --scorer in a search: by how much an edit may raise a figure, in its unit.",
        ),
        click.option(
            "--search-for",
            metavar="NAME[:FILE]",
            help="Search for the edit that lowers this scorer's figure, instead of refusals: the "
            "direction is the one between --harmful and --harmless, which need not be about "
            "harm (docs/search.md).",
        ),
        click.option(
            "--target-figure",
            metavar="X",
            type=click.FloatRange(min=0),
            help="For --search-for: the figure that is good enough. Default: half of the unedited "
            "model's.",
        ),
    ]
    return decorated(command, flags)
