"""The flags about how an edit is written, and about quantized models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from abl_mlx.cli.flags import decorated
from abl_mlx.cli.values import HERE, Bytes


def parts_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags about the number of files of a GGUF."""
    flags = [
        click.option(
            "--split-max-size",
            type=Bytes(),
            metavar="SIZE",
            help="Write a GGUF larger than this (2G, 500M) in parts, NAME-00001-of-00003.gguf and "
            "so on, as llama-gguf-split does.",
        ),
        click.option(
            "--join",
            is_flag=True,
            help="Write one GGUF, even if the source is in parts. For Ollama this is always done.",
        ),
    ]
    return decorated(command, flags)


keep_types_flag = click.option(
    "--keep-types",
    is_flag=True,
    help="Tensors that are quantized keep their type, --quantize is for the others. In a GGUF from "
    "an MLX folder, matrices keep their weights where a GGUF has a type for them.",
)

imatrix_flag = click.option(
    "--imatrix",
    type=HERE,
    metavar="FILE",
    help="An importance matrix of `measure --imatrix` or llama-imatrix: where GGUF tensors are "
    "quantized, the errors of their input columns are weighted by it.",
)


def writing_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags about writing the edit."""
    flags = [
        click.option(
            "--quantize",
            metavar="TYPE",
            help="Type of GGUF outputs, as llama-quantize names them: F32, F16, BF16, Q8_0, Q6_K, "
            "Q5_K_M, Q4_K_M, IQ4_XS, Q4_0, Q3_K_M, Q2_K, ... Default: F16 from a folder, every "
            "tensor's own type from a GGUF.",
        ),
        keep_types_flag,
        imatrix_flag,
        parts_flags,
        click.option(
            "--max-leak",
            default=0.01,
            show_default=True,
            type=click.FloatRange(min=0),
            help="Fail when a larger share of the component is left in the written weights.",
        ),
        click.option(
            "--mtp",
            is_flag=True,
            help="Also edit blocks for multi-token prediction, which mlx-lm and llama.cpp's plain "
            "generation do not run. Without it they stay as they are.",
        ),
        click.option(
            "--keep-undo",
            is_flag=True,
            help="Write the components that the edit removes beside a float model, for "
            "`abl-mlx undo`.",
        ),
        click.option(
            "-o",
            "--output",
            "outputs",
            multiple=True,
            required=True,
            type=HERE,
            help="Where the edited model goes: a folder (MLX) or NAME.gguf; or an adapter for the "
            "unedited model: NAME.adapter (mlx-lm) or NAME.lora.gguf (llama.cpp); or an app: "
            "ollama:NAME (its store) or lmstudio:OWNER/NAME. May be given "
            "several times.",
        ),
    ]
    return decorated(command, flags)


def _without_strict_types(context: click.Context, flag: click.Parameter, given: bool) -> None:
    if given:
        raise click.UsageError(
            "--strict-types is gone: every tensor of a GGUF keeps its own type, or gets that of "
            "--quantize; leave the flag out."
        )


def gguf_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """What concerns quantized models, GGUFs and Ollama."""
    flags = [
        click.option(
            "--tensors",
            metavar="REGEX",
            help="Of a GGUF, edit the tensors whose name matches, whatever the architecture.",
        ),
        click.option(
            "--strict-types",
            is_flag=True,
            hidden=True,
            expose_value=False,
            callback=_without_strict_types,
        ),
        click.option(
            "--grid",
            type=click.Choice(["auto", "own", "fresh"]),
            default="auto",
            show_default=True,
            help="For a quantized model: keep each tensor's own scales (which may come from an "
            "imatrix), choose new ones, or choose new ones where these are clearly better.",
        ),
        click.option(
            "--writer-bits",
            type=click.Choice(["3", "4", "5", "6", "8", "bf16"]),
            help="For a quantized MLX folder: write the edited matrices with this many bits, or as "
            "plain floats (float16 in a float16 model). Without it each keeps its own mode.",
        ),
        click.option(
            "--plain-rounding",
            is_flag=True,
            help="For a quantized model: round every weight to its nearest level, as other tools "
            "do. This loses most of the edit; the leak shows how much.",
        ),
        click.option(
            "--ollama-create",
            metavar="NAME",
            help="Give the first GGUF output to Ollama under this name.",
        ),
        click.option(
            "--overwrite",
            is_flag=True,
            help="With -o ollama:NAME: replace the model that Ollama has under this name. No other "
            "output is ever replaced.",
        ),
    ]
    return decorated(command, flags)
