"""The commands that write files or publish them: run, measure, apply, undo, convert, push."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from abl_mlx.cli.answer import answer
from abl_mlx.cli.condition_flags import condition_flag
from abl_mlx.cli.flags import (
    chat_flags,
    choice_flags,
    edit_flags,
    given_flags,
    json_flag,
    memory_flag,
    prompt_flags,
    recognition_flag,
    reply_flags,
    revision_flag,
    search_flags,
    split_flag,
    stream_flag,
)
from abl_mlx.cli.group import cli
from abl_mlx.cli.scorer_flags import scorer_flags
from abl_mlx.cli.values import HERE, Bytes
from abl_mlx.cli.writing_flags import (
    gguf_flags,
    imatrix_flag,
    keep_types_flag,
    parts_flags,
    writing_flags,
)


@cli.command()
@click.argument("model")
@revision_flag()
@edit_flags
@writing_flags
@given_flags
@click.option(
    "--gguf",
    metavar="BASE.gguf",
    help="Measure on MODEL (MLX or Hugging Face) and edit this GGUF of the same model instead.",
)
@click.option(
    "--induce",
    is_flag=True,
    help="The reverse: make MODEL refuse everything, by adding a constant after one layer. "
    "--strength scales it, --layer chooses the layer. It is written as a bias, or with "
    "-o NAME.cvec.gguf as a control vector for llama.cpp.",
)
@prompt_flags
@chat_flags
@choice_flags
@search_flags
@scorer_flags
@reply_flags
@recognition_flag
@gguf_flags
@memory_flag
@stream_flag
@split_flag
@click.option(
    "--sign",
    metavar="KEY.pem",
    type=HERE,
    help="Sign the record and the hashes of each output with this private key, in "
    "OUTPUT.sigstore.json beside it; `verify` reads it.",
)
@json_flag
def run(
    model: str,
    outputs: tuple[Path, ...],
    induce: bool,
    sign: Path | None,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Find MODEL's refusal direction, remove it, write the result and show what changed.

    The format follows the name: `-o edited/` is an MLX folder, `-o edited.gguf` a GGUF for
    llama.cpp, Ollama and LM Studio; several -o write several. Refusals are counted before and
    after, on prompts that were not used to find the direction, and from the files as written.

    MODEL may be a .gguf of any type: nothing else is needed, and every tensor keeps its type.
    """
    from abl_mlx.choices import RunOptions
    from abl_mlx.edits import early

    early.begin(model, chosen["quantize"])
    from abl_mlx.commands import evidence
    from abl_mlx.commands import run as running
    from abl_mlx.reports import induce_tables, tables

    work = running.run_induced if induce else running.run
    table = induce_tables.table if induce else tables.run_table
    options = RunOptions.of(**chosen)
    answer(as_json, table, evidence.signed_run, work, model, outputs, options, sign)


@cli.command()
@click.argument("model")
@revision_flag()
@click.option(
    "-o",
    "--output",
    required=True,
    type=HERE,
    help="The direction file, NAME.safetensors.",
)
@click.option(
    "--plot",
    metavar="FILE.png|FILE.svg",
    type=HERE,
    help="Plot separation, causal scores, KL and explained variance by layer, and both prompt sets "
    "in a plane.",
)
@click.option(
    "--imatrix",
    metavar="FILE.gguf",
    type=HERE,
    help="Write an importance matrix of the prompts here, for --imatrix of other commands or for "
    "llama-quantize.",
)
@click.option(
    "--explain",
    is_flag=True,
    help="Also tell what the direction is made of: its cosines with other methods' directions, "
    "with length, language and politeness, by category and by layer, and its share of topic "
    "(docs/explain.md).",
)
@click.option(
    "--explain-with",
    metavar="FILE",
    multiple=True,
    type=HERE,
    help="With --explain: another direction file of the same width. May be given several times.",
)
@click.option(
    "--refusal-cliff",
    is_flag=True,
    help="With --thinking on: also tell how sure a probe is of a refusal at the last tokens of the "
    "thought, and which attention heads write against it there (refusal suppression heads).",
)
@condition_flag
@click.option(
    "--rank-parts",
    is_flag=True,
    help="Also rank attention heads by what they write along the direction, and experts by how "
    "much more often tokens of harmful prompts are sent to them (for --heads N and --experts N).",
)
@prompt_flags
@chat_flags
@choice_flags
@search_flags
@scorer_flags
@memory_flag
@stream_flag
@split_flag
@json_flag
def measure(
    model: str,
    output: Path,
    plot: Path | None,
    imatrix: Path | None,
    explain_with: tuple[Path, ...],
    as_json: bool,
    **chosen: Any,
) -> None:
    """Find MODEL's refusal direction and keep it, with all candidates, in a file to share."""
    from abl_mlx.choices import MeasureOptions
    from abl_mlx.commands import measure_apply

    options = MeasureOptions.of(**chosen)
    answer(
        as_json, "measure_line", measure_apply.measure, model, output, options, plot, imatrix,
        explain_with,
    )  # fmt: skip


@cli.command()
@click.argument("direction", type=HERE)
@click.argument("model")
@revision_flag()
@edit_flags
@writing_flags
@gguf_flags
@click.option(
    "--lazy",
    is_flag=True,
    help="Edit file to file, with only one tensor in memory at a time. This is the default for "
    "models larger than the memory, and for GGUFs.",
)
@memory_flag
@json_flag
def apply(
    direction: Path, model: str, outputs: tuple[Path, ...], as_json: bool, **chosen: Any
) -> None:
    """Remove DIRECTION, a file made by `measure` (or a bare .npy vector), from MODEL's weights.

    MODEL may also be a .gguf of any type: it is edited tensor by tensor in its own types, rounded
    so that the edit survives, and everything else in it is copied byte for byte.
    """
    from abl_mlx.choices import ApplyOptions
    from abl_mlx.edits import early

    early.begin(model, chosen["quantize"])  # before imports that take half a second
    from abl_mlx.commands import measure_apply

    options = ApplyOptions.of(**chosen)
    answer(as_json, "apply_table", measure_apply.apply, direction, model, outputs, options)


@cli.command()
@click.argument("model")
@revision_flag()
@click.option(
    "-o",
    "--output",
    "outputs",
    multiple=True,
    required=True,
    type=HERE,
    help="Where the restored model goes: a folder for a folder, NAME.gguf for a GGUF; or an "
    "adapter for MODEL that undoes its edit. May be given several times.",
)
@click.option(
    "--factors",
    type=HERE,
    help="The undo file that --keep-undo wrote. Default: the one in or beside MODEL.",
)
@click.option(
    "--direction",
    type=HERE,
    help="The edit's direction file, if there is no undo file: with --base, or for an edit with a "
    "strength other than 1.",
)
@click.option("--base", metavar="MODEL", help="The model before the edit.")
@json_flag
def undo(model: str, outputs: tuple[Path, ...], as_json: bool, **given: Any) -> None:
    """Undo the edit that abl-mlx made of MODEL, a folder or GGUF of float weights.

    A full removal cannot be undone from MODEL alone: it needs the file that `run --keep-undo` or
    `apply --keep-undo` wrote, or the base model.
    """
    from abl_mlx.commands import undo as undoing

    answer(as_json, "undo_table", lambda: undoing.undo(model, outputs, **given))


@cli.command("convert")
@click.argument("source")
@click.argument("output", type=HERE)
@revision_flag("source")
@click.option(
    "--quantize",
    metavar="TYPE",
    help="Type of a GGUF, as llama-quantize names them: F32, F16, BF16, Q8_0, Q6_K, Q4_K_M, "
    "IQ4_XS, Q3_K_M, ... Default, from a folder: F16, and matrices quantized by MLX keep their "
    "weights where a GGUF has a type for them.",
)
@keep_types_flag
@imatrix_flag
@parts_flags
@click.option(
    "--bits",
    type=click.Choice(["2", "3", "4", "5", "6", "8"]),
    help="For an MLX folder: quantize tensors of types that MLX does not have (Q6_K, Q3_K, Q2_K, "
    "IQ*) to this many bits, instead of writing bfloat16.",
)
@click.option(
    "--group-size",
    type=click.Choice(["32", "64", "128"]),
    default="64",
    show_default=True,
    help="Weights per scale, for --bits.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    help="For an MLX folder: the type of all floats. Without it every float keeps its exact value, "
    "and mlx-lm computes in float32 where types mix.",
)
@json_flag
def convert_model(
    source: str,
    output: Path,
    quantize: str | None,
    keep_types: bool,
    imatrix: Path | None,
    split_max_size: int | None,
    join: bool,
    bits: str | None,
    group_size: str,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Write SOURCE in the other format: a GGUF as an MLX folder, or a folder as OUTPUT.gguf.

    A GGUF may also be written as a GGUF of another type. On the way from a GGUF to a folder, Q4_0,
    Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and MXFP4 become MLX tensors without requantizing; on the way
    back, matrices of 2 to 5 bits become Q4_1 and Q5_1, and mxfp4 becomes MXFP4.
    """
    from abl_mlx.commands import conversion

    answer(
        as_json,
        "convert_table",
        lambda: conversion.convert(
            source,
            output,
            quantize=quantize,
            keep_types=keep_types,
            imatrix=imatrix,
            split_max_size=split_max_size,
            join=join,
            bits=int(bits) if bits else None,
            group_size=int(group_size),
            dtype=dtype,
        ),
    )


@cli.command()
@click.argument("output", type=HERE)
@click.argument("repository")
@click.option("--yes", is_flag=True, help="Upload. Without it nothing leaves this machine.")
@click.option(
    "--public",
    is_flag=True,
    help="A repository that is made for this is seen by everybody. Without it, by its owner alone.",
)
@json_flag
def push(output: Path, repository: str, yes: bool, public: bool, as_json: bool) -> None:
    """Publish OUTPUT, which `run` or `apply` wrote, as REPOSITORY (OWNER/NAME) on Hugging Face.

    With the model go its card, its record, its report and, for a GGUF, Modelfile and projector.
    Without --yes the files are listed, and nothing is uploaded. Log in with `hf auth login`.
    """
    from abl_mlx.commands import push as pushing

    answer(as_json, "push_table", lambda: pushing.push(output, repository, yes=yes, public=public))


@cli.command()
@click.argument("edited", metavar="EDITED.gguf", type=HERE)
@click.option("-o", "--output", required=True, type=HERE, help="The folder to write.")
@click.option(
    "--base", metavar="MODEL", help="The original. Default: the one that EDITED's record names."
)
@click.option(
    "--example",
    "examples",
    metavar="TEXT",
    multiple=True,
    help="A prompt that the page offers, and whose activations it shows. May be given several "
    "times. Default: four held-out ones.",
)
@click.option(
    "--split-max-size",
    "part",
    default="512M",
    show_default=True,
    type=Bytes(),
    metavar="SIZE",
    help="Write models in files no larger than this. Browsers read none beyond 2G, and some hosts "
    "take none beyond 100M or 25M.",
)
@json_flag
def publish(edited: Path, output: Path, as_json: bool, **chosen: Any) -> None:
    """Write a page on which visitors ask the original and EDITED.gguf in their own browser.

    EDITED.gguf is an output of `run` or `apply`, with its record beside it. The page is a folder
    for any web server: llama.cpp in WebAssembly, both models, what was edited and how, and the
    activations of example prompts. It loads nothing from elsewhere (docs/studio.md).

    \b
    abl-mlx publish edited.gguf -o site/
    """
    from abl_mlx.commands import publish as publishing
    from abl_mlx.reports import site_page

    answer(as_json, site_page.table, lambda: publishing.publish(edited, output, **chosen))
