"""The flags about edits at runtime: what is done, and on which prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from abl_mlx.choices import ABLATE, STEERS
from abl_mlx.cli.flags import decorated
from abl_mlx.cli.values import HERE

condition_flag = click.option(
    "--condition",
    metavar="FILE|DATASET|category:NAME[,NAME]",
    help="Find a condition as well, by which an edit at runtime is made on these prompts alone: in "
    "the forms of --keep (docs/conditions.md).",
)


unconditional_flag = click.option(
    "--unconditional",
    is_flag=True,
    help="Make the edit on all prompts, even if the direction file has a condition.",
)


def conditioning_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """What is done at runtime, and whether the condition of a direction file counts."""
    flags = [
        click.option(
            "--steer",
            type=click.Choice(STEERS),
            default=ABLATE,
            show_default=True,
            help="Remove the direction, or add the difference of the means after its layer, which "
            "makes a model refuse; --strength scales both.",
        ),
        unconditional_flag,
    ]
    return decorated(command, flags)


def steering_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags of `eval` about an edit at runtime."""
    flags = [
        click.option(
            "--direction",
            type=HERE,
            help="Ask TARGET with this direction file's edit made at runtime, in MLX, on the "
            "prompts that meet its condition if it has one.",
        ),
        click.option(
            "--strength",
            default=1.0,
            show_default=True,
            help="For --direction: 1 removes the direction, 0.5 half of it.",
        ),
    ]
    return decorated(conditioning_flags(command), flags)
