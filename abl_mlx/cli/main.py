"""The command line: parse, call one function, print. No logic, and no heavy import at the top."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from abl_mlx import __version__
from abl_mlx.cli.flags import (
    HERE,
    choice_flags,
    edit_flags,
    gate_flags,
    gguf_flags,
    json_flag,
    judge_flags,
    memory_flag,
    prompt_flags,
    reply_flags,
    report_flag,
    search_flags,
    server_flags,
    steered_flags,
)
from abl_mlx.support import interrupts
from abl_mlx.support.flags import said
from convert.base import atomic, escape, scratch
from convert.base.errors import UserError

if TYPE_CHECKING:
    from abl_mlx.choices import Options


class Group(click.Group):
    """Tells a person's mistakes in one sentence, with exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with atomic.claims():
                scratch.sweep()
                return super().invoke(ctx)
        except UserError as error:
            raise click.ClickException(escape.line(said(error))) from None
        except OSError as error:
            if error.filename is None:
                raise
            told = f"{os.fsdecode(error.filename)}: {error.strerror}."
            raise click.ClickException(escape.line(told)) from None
        except MemoryError:
            raise click.ClickException(
                "not enough memory: choose a smaller model, or a smaller --batch-size."
            ) from None


def _typed(what: str, text: str) -> str:
    """What was typed as text: under a locale without UTF-8 Python hands its bytes on in pieces.

    Raises:
        UserError: when it is no UTF-8.
    """
    try:
        return os.fsencode(text).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is not UTF-8 at byte {error.start}: type it anew.") from None


def _options(chosen: dict[str, Any]) -> Options:
    from abl_mlx.choices import Options

    return Options(**chosen)


@contextmanager
def _stdout_kept_for_results() -> Iterator[None]:
    """Send everything that libraries print to stderr, native code included."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _answer(
    as_json: bool, table: str | Callable[[Any], str], work: Callable[..., Any], *args: Any
) -> Any:
    """Do the work, print its record, and return that."""
    from abl_mlx.reports import tables
    from abl_mlx.support.strict_json import to_json

    with _stdout_kept_for_results():
        record = work(*args)
    if as_json:
        said = to_json(record)
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        click.echo(said if encoding.lower().startswith("utf") else escape.json_ascii(said))
    else:
        told = escape.record(record)
        click.echo(table(told) if callable(table) else getattr(tables, table)(told))
    return record


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="abl-mlx")
def cli() -> None:
    """Find, remove and measure the refusal direction of a local chat model.

    MODEL is `demo` (bundled, works offline), a folder in MLX or Hugging Face form, a .gguf file, a
    Hugging Face id such as mlx-community/SomeModel, a GGUF there (owner/repo:Q4_K_M or
    hf:owner/repo/file.gguf), or a model that Ollama has (ollama:NAME).

    \b
    Try it:   abl-mlx run demo -o demo-edited
    """


@cli.command()
@click.argument("model")
@edit_flags
@click.option(
    "--direction",
    type=HERE,
    help="Remove the direction in this file instead of measuring one: what `measure` wrote, a "
    ".npy, .npz or .safetensors vector (a SAE decoder's row, say), or a control vector (.gguf, "
    "--layer).",
)
@click.option("--tensor", metavar="NAME", help="Which tensor of --direction FILE.")
@click.option(
    "--gguf",
    metavar="BASE.gguf",
    help="Measure on MODEL (MLX or Hugging Face) and edit this GGUF of the same model instead.",
)
@click.option(
    "--induce",
    is_flag=True,
    help="The reverse: make MODEL refuse everything, by a constant after one layer; --strength "
    "scales it, --layer fixes where. Written as a bias, or with -o NAME.cvec.gguf as a control "
    "vector for llama.cpp.",
)
@prompt_flags
@choice_flags
@search_flags
@reply_flags
@gguf_flags
@memory_flag
@json_flag
def run(model: str, outputs: tuple[Path, ...], induce: bool, as_json: bool, **chosen: Any) -> None:
    """Find MODEL's refusal direction, remove it, write the result and show what changed.

    The format follows the name: `-o edited/` is an MLX folder, `-o edited.gguf` a GGUF for
    llama.cpp, Ollama and LM Studio; several -o write several. Refusals are counted before and
    after, on prompts that were not used to find the direction, and from the files as written.

    MODEL may be a .gguf of any type: nothing else is needed, and every tensor keeps its type.
    """
    from abl_mlx.commands import run as running
    from abl_mlx.reports import induce_tables, tables

    work = running.run_induced if induce else running.run
    table = induce_tables.table if induce else tables.run_table
    _answer(as_json, table, work, model, outputs, _options(chosen))


@cli.command()
@click.argument("model")
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
    help="Draw separation, causal scores, KL and explained variance by layer, and both prompt sets "
    "in a plane.",
)
@prompt_flags
@choice_flags
@search_flags
@memory_flag
@json_flag
def measure(model: str, output: Path, plot: Path | None, as_json: bool, **chosen: Any) -> None:
    """Find MODEL's refusal direction and keep it, with all candidates, in a file to share."""
    from abl_mlx.commands import measure_apply

    _answer(
        as_json,
        "measure_line",
        measure_apply.measure,
        model,
        output,
        _options(chosen),
        plot,
    )


@cli.command()
@click.argument("direction", type=HERE)
@click.argument("model")
@edit_flags
@gguf_flags
@click.option(
    "--lazy",
    is_flag=True,
    help="Edit file to file: no more of the model is in memory at a time than one tensor. For "
    "models larger than the memory this is done unasked; a GGUF is always edited so.",
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
    from abl_mlx.commands import measure_apply

    _answer(
        as_json, "apply_table", measure_apply.apply, direction, model, outputs, _options(chosen)
    )


@cli.command()
@click.argument("model")
@click.option(
    "-o",
    "--output",
    "outputs",
    multiple=True,
    required=True,
    type=HERE,
    help="Where the model goes as it was: a folder for a folder, NAME.gguf for a GGUF; or an "
    "adapter for MODEL that undoes its edit. May be given again.",
)
@click.option(
    "--factors",
    type=HERE,
    help="What the edit took out, as --keep-undo wrote it. Without it: the undo file that lies "
    "with MODEL.",
)
@click.option(
    "--direction",
    type=HERE,
    help="The edit's direction file, where there is no undo file: with --base, or for an edit of "
    "a strength other than 1.",
)
@click.option("--base", metavar="MODEL", help="The model before the edit.")
@json_flag
def undo(model: str, outputs: tuple[Path, ...], as_json: bool, **given: Any) -> None:
    """Put back what abl-mlx took out of MODEL, a folder or GGUF of float weights.

    A full removal leaves nothing to go back by, so it needs what `run --keep-undo` or
    `apply --keep-undo` kept, or the base model.
    """
    from abl_mlx.commands import undo as undoing

    _answer(as_json, "undo_table", lambda: undoing.undo(model, outputs, **given))


@cli.command("eval")
@click.argument("model", metavar="TARGET")
@server_flags
@judge_flags
@gate_flags
@prompt_flags
@reply_flags
@memory_flag
@json_flag
def evaluate(model: str, as_json: bool, **chosen: Any) -> None:
    """Count TARGET's refusals of harmful, harmless and borderline prompts; nothing is edited.

    TARGET is a model as for the other commands, or a server that speaks OpenAI's chat API
    (llama-server, Ollama, LM Studio, mlx_lm.server). A .gguf file is run by llama.cpp where that is
    installed, else by a llama-server on the PATH, else by MLX.

    \b
    abl-mlx eval http://127.0.0.1:11434/v1 --model llama3.2
    abl-mlx eval edited.gguf --baseline original.gguf
    abl-mlx eval SomeModel --min-refusal 0.9 --max-over-refusal 0.1 --junit refusals.xml

    An evaluation that was stopped goes on where it stopped when the same command is given again.
    A key for a server is read from ABL_API_KEY, or OPENAI_API_KEY (this machine and https alone).

    Exit codes: 1 for anything that went wrong, 3 when a limit is not met.
    """
    from abl_mlx.behaviour.gate import NOT_MET
    from abl_mlx.choices import EvalOptions
    from abl_mlx.commands import evaluate_model
    from abl_mlx.reports import eval_tables

    record = _answer(
        as_json, eval_tables.table, evaluate_model.evaluate_model, model, EvalOptions(**chosen)
    )
    if not record.get("gate", {"passed": True})["passed"]:
        click.echo(eval_tables.failures(escape.record(record)), err=True)
        sys.exit(NOT_MET)


@cli.command()
@click.argument("model")
@click.option("--base", metavar="MODEL", help="The model that MODEL is said to come from.")
@click.option(
    "--direction",
    type=HERE,
    help="A direction file to hold against the recovered direction.",
)
@click.option(
    "--ask/--no-ask",
    default=False,
    show_default=True,
    help="Run MODEL too, and count its refusals as `abl-mlx eval` does.",
)
@click.option(
    "--fail-on",
    multiple=True,
    type=click.Choice(["edited", "cannot-tell", "not-edited"]),
    help="Exit with 3 when this is the verdict. May be given again.",
)
@click.option(
    "-o",
    "--output",
    type=HERE,
    help="Keep the recovered direction in this file, NAME.safetensors.",
)
@report_flag("Write a page to read in a browser here.")
@json_flag
def audit(model: str, as_json: bool, fail_on: tuple[str, ...], **given: Any) -> None:
    """Was a direction taken out of MODEL's weights? For folders and GGUFs of any type.

    The verdict is "edited", "not edited" or "cannot tell", with its evidence. Nothing but the model
    is needed: what is looked for is a direction along which the weights that write to the residual
    stream hold less than chance can explain. docs/audit.md says what that cannot see.

    \b
    abl-mlx audit some-model-Q4_K_M.gguf --fail-on edited --fail-on cannot-tell

    Exit codes: 1 for anything that went wrong, 3 for a verdict of --fail-on.
    """
    from abl_mlx.behaviour.gate import NOT_MET
    from abl_mlx.commands import audit as auditing

    record = _answer(as_json, auditing.table, lambda: auditing.audit(model, **given))
    if auditing.fails(record, fail_on):
        sys.exit(NOT_MET)


@cli.command()
@click.argument("model")
@json_flag
def inspect(model: str, as_json: bool) -> None:
    """Show MODEL's architecture, its residual writers, and what an edit would touch."""
    from abl_mlx.commands import measure_apply

    _answer(as_json, "inspect_table", measure_apply.inspect, model)


@cli.command("convert")
@click.argument("source")
@click.argument("output", type=HERE)
@click.option(
    "--quantize",
    default="F16",
    show_default=True,
    metavar="TYPE",
    help="Type of a GGUF: F32, F16, BF16, Q8_0, Q4_0, ..., or a K-quant such as Q4_K_M.",
)
@click.option(
    "--bits",
    type=click.Choice(["2", "3", "4", "5", "6", "8"]),
    help="Of an MLX folder: quantize to so many bits what MLX has no type for (Q6_K, Q3_K, Q2_K, "
    "IQ*), instead of writing bfloat16.",
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
    help="Of an MLX folder: all floats in this type. Without it every float stays exactly what it "
    "is, and mlx-lm computes in float32 where types mix.",
)
@json_flag
def convert_model(
    source: str,
    output: Path,
    quantize: str,
    bits: str | None,
    group_size: str,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Write SOURCE in the other format: a GGUF as an MLX folder, or a folder as OUTPUT.gguf.

    Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and MXFP4 become MLX tensors without requantizing.
    """
    from abl_mlx.commands import conversion

    _answer(
        as_json,
        "convert_table",
        lambda: conversion.convert(
            source,
            output,
            quantize=quantize,
            bits=int(bits) if bits else None,
            group_size=int(group_size),
            dtype=dtype,
        ),
    )


@cli.command()
@click.argument("first", type=HERE)
@click.argument("second", type=HERE)
@click.option(
    "--direction",
    type=HERE,
    help="Show how much of this direction's removal from FIRST has arrived in SECOND.",
)
@click.option("--tensors", metavar="REGEX", help="The tensors to look at for --direction.")
@json_flag
def diff(
    first: Path, second: Path, direction: Path | None, as_json: bool, tensors: str | None
) -> None:
    """Show which tensors differ between two GGUF files, and what is left of a direction."""
    from abl_mlx.commands import diff as comparing

    _answer(
        as_json,
        "diff_table",
        lambda: comparing.diff(first, second, direction=direction, tensors=tensors),
    )


@cli.command()
@click.argument("model")
@click.argument("prompt")
@click.option(
    "--reply",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Read so many tokens of the model's own reply as well.",
)
@click.option(
    "-o",
    "--output",
    type=HERE,
    help="Draw it too, in this page.html.",
)
@steered_flags
@json_flag
def show(
    model: str,
    prompt: str,
    direction: Path | None,
    reply: int,
    output: Path | None,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Show how much of the refusal direction every layer and token of PROMPT holds.

    Before and after the edit, which is made at runtime: nothing is written.
    """
    from abl_mlx.commands import session
    from abl_mlx.commands import show as showing

    color = sys.stdout.isatty()
    prompt = _typed("PROMPT", prompt)
    _answer(
        as_json,
        lambda record: showing.table(record, color=color),
        lambda: showing.show(
            session.load(model, direction, _options(chosen)), prompt, reply=reply, page=output
        ),
    )


@cli.command()
@click.argument("model")
@click.option(
    "--side-by-side", is_flag=True, help="Show what the original says beside what the edited does."
)
@click.option(
    "--max-tokens",
    default=512,
    show_default=True,
    type=click.IntRange(min=1),
    help="Longest reply.",
)
@click.option(
    "--temp",
    default=0.0,
    show_default=True,
    type=click.FloatRange(min=0),
    help="Temperature; 0 takes the likeliest token.",
)
@steered_flags
def chat(
    model: str,
    direction: Path | None,
    side_by_side: bool,
    max_tokens: int,
    temp: float,
    **chosen: Any,
) -> None:
    """Talk with MODEL, its edit switched on, off and scaled live (/help says how).

    The edit is made at runtime, and equals that of the weights; nothing is written.
    """
    from abl_mlx.commands import chat as chatting
    from abl_mlx.commands import session

    with suppress(ImportError):
        import readline  # noqa: F401  (editing of the line, and its history)
    conversation = chatting.Conversation(
        session.load(model, direction, _options(chosen)),
        side_by_side=side_by_side, max_tokens=max_tokens, temp=temp,
    )  # fmt: skip
    chatting.talk(conversation, input, lambda text: click.echo(escape.block(text), nl=False))


def main() -> None:
    """Entry point of the console script."""
    # transformers tells everyone who has no PyTorch that they have no PyTorch.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):
        # Whatever the locale's encoding lacks is escaped instead of failing.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    interrupts.listen()
    try:
        cli()
    except Exception as error:  # a fault of ours, which no user can do anything about
        if os.environ.get(TRACEBACK):
            raise
        click.echo(escape.line(_internal_error(error)), err=True)
        sys.exit(1)


#: Set, a fault of this program ends in Python's traceback.
TRACEBACK = "ABL_MLX_TRACEBACK"


def _internal_error(error: Exception) -> str:
    """One sentence that says where a fault is, and what to do about it."""
    ours = ("abl_mlx", "convert")
    frames = traceback.extract_tb(error.__traceback__)
    inside = [one for one in frames if Path(one.filename).parent.name in ours] or list(frames)
    last = inside[-1]
    return (
        f"Error: internal error: {type(error).__name__} at {last.filename}:{last.lineno} "
        f"({escape.shortened(str(error), 200)}). This is a fault of abl-mlx {__version__}: please "
        f"report it with the command, and with what it prints when {TRACEBACK}=1 is set."
    )


if __name__ == "__main__":
    main()
