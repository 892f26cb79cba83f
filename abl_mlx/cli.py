"""The command line: parse, call one function, print. No logic, and no heavy import at the top."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from abl_mlx import __version__, interrupts
from convert.errors import UserError

if TYPE_CHECKING:
    from abl_mlx.options import Options


class Layers(click.ParamType):
    """Layer numbers such as ``3``, ``2-5`` or ``0,4-6``."""

    name = "layers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> frozenset[int]:
        if isinstance(value, frozenset):
            return value
        chosen: set[int] = set()
        try:
            for part in value.split(","):
                first, _, last = part.strip().partition("-")
                numbers = range(int(first), int(last or first) + 1)
                if not numbers:
                    raise ValueError(part)
                chosen.update(numbers)
        except ValueError:
            self.fail(f"{value!r} is no list of layers such as 3, 2-5 or 0,4-6.", param, ctx)
        return frozenset(chosen)


class Position(click.ParamType):
    """A negative token offset, or ``instruction-end``."""

    name = "position"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        if value == "instruction-end" or isinstance(value, int):
            return value
        try:
            if int(value) < 0:
                return int(value)
        except ValueError:
            pass
        self.fail(f"{value!r} is neither instruction-end nor a number from -1 down.", param, ctx)


class PinValue(click.ParamType):
    """``harmless``, ``harmful`` or a number."""

    name = "pin"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in ("harmless", "harmful"):
            try:
                if not math.isfinite(float(value)):
                    raise ValueError(value)
            except ValueError:
                self.fail(f"{value!r} is neither harmless, harmful nor a number.", param, ctx)
        return str(value)


class Group(click.Group):
    """Tells a person's mistakes in one sentence, with exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            raise click.ClickException(str(error)) from None
        except OSError as error:
            if error.filename is None:
                raise
            raise click.ClickException(f"{error.filename}: {error.strerror}.") from None
        except MemoryError:
            raise click.ClickException(
                "not enough memory: choose a smaller model, or a smaller --batch-size."
            ) from None


def _prompt_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    flags = [
        click.option(
            "--harmful",
            metavar="FILE|DATASET",
            help="Harmful prompts: .txt (one a line), .jsonl, .csv, or a Hugging Face dataset such "
            "as owner/name[train][text]. Bundled prompts without it.",
        ),
        click.option(
            "--harmless",
            metavar="FILE|DATASET",
            help="Harmless prompts, in the same forms. Given together with --harmful.",
        ),
        click.option(
            "--seed",
            default=0,
            show_default=True,
            help="Fixes the split into train, validation and test prompts.",
        ),
        click.option(
            "--limit",
            type=click.IntRange(min=1),
            help="Use at most so many prompts of each set and part.",
        ),
    ]
    return _decorated(command, flags)


def _choice_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    flags = [
        click.option(
            "--method",
            type=click.Choice(
                [
                    "difference-of-means",
                    "winsorized-means",
                    "median-means",
                    "projected",
                    "biprojected",
                    "svd",
                    "probe",
                    "over-refusal",
                ]
            ),
            help="How directions are found (docs/methods.md). Without it: the difference of means, "
            "and subspaces where one direction leaves refusals.",
        ),
        click.option(
            "--rank",
            type=click.IntRange(min=1),
            help="Directions in the subspace of --method svd (default 2) or of --across (3).",
        ),
        click.option(
            "--across",
            type=click.Choice(["layers", "positions"]),
            help="Take the directions at all layers, or at all tokens of the template's tail, "
            "together as one subspace of --rank.",
        ),
        click.option(
            "--per-layer",
            is_flag=True,
            help="Remove from the writers of each layer that layer's own direction.",
        ),
        click.option(
            "--layer",
            type=click.FloatRange(min=0),
            help="Take the direction after this layer (from 0) instead of choosing by its effect; "
            "2.4 is between layers 2 and 3.",
        ),
        click.option(
            "--position",
            type=Position(),
            metavar="N|instruction-end",
            help="Take directions at this token, counted from the prompt's end: -1 is the last. "
            "instruction-end is the instruction's own last token.",
        ),
        click.option(
            "--borderline",
            metavar="FILE|DATASET",
            help="For --method over-refusal: harmless prompts that this model refuses.",
        ),
        click.option(
            "--max-kl",
            default=0.1,
            show_default=True,
            type=click.FloatRange(min=0),
            help="Drop candidates that move harmless prompts by more (nats, first reply token).",
        ),
    ]
    return _decorated(command, flags)


def _search_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    flags = [
        click.option(
            "--search",
            metavar="N",
            type=click.IntRange(min=1),
            help="Try at most N edits (directions, layers, strengths by layer for attention and "
            "MLP, the embedding) and take the gentlest that meets --target-refusals. Ends by "
            "itself when nothing better is found; Ctrl-C ends it with the best so far.",
        ),
        click.option(
            "--target-refusals",
            default=0.05,
            show_default=True,
            type=click.FloatRange(min=0, max=1),
            help="For --search: the share of refused or broken replies that is good enough.",
        ),
        click.option(
            "--search-journal",
            metavar="FILE",
            type=click.Path(path_type=Path),
            help="For --search: keep its trials here, and go on from those that the file has. "
            "Without it: OUTPUT.search.journal.",
        ),
    ]
    return _decorated(command, flags)


def _edit_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    flags = [
        click.option(
            "--strength",
            default=1.0,
            show_default=True,
            help="1 removes the direction, 0.5 half of it, negative values strengthen it.",
        ),
        click.option(
            "--layers", type=Layers(), help="Edit only these layers: 3, 2-5 or 0,4-6. Default: all."
        ),
        click.option(
            "--embedding/--no-embedding",
            default=True,
            show_default=True,
            help="Edit the embedding too. With tied embeddings this edits the output head as well.",
        ),
        click.option(
            "--norm",
            type=click.Choice(["none", "columns", "rows"]),
            default="none",
            show_default=True,
            help="Keep the lengths of the edited weights' columns (a full removal stays full) or "
            "of their rows (which puts part of the direction back: for comparison).",
        ),
        click.option(
            "--pin",
            type=PinValue(),
            metavar="harmless|harmful|VALUE",
            help="Hold the component along the direction at the harmless (or harmful) prompts' "
            "mean, or at a value, instead of at 0.",
        ),
        click.option(
            "--quantize",
            default="F16",
            show_default=True,
            metavar="TYPE",
            help="Type of GGUF outputs: F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1, Q4_0, or a K-quant "
            "(Q6_K, Q5_K_M, Q4_K_M, ...), which needs ggml: pip install 'abl-mlx[llamacpp]'.",
        ),
        click.option(
            "--max-leak",
            default=0.01,
            show_default=True,
            type=click.FloatRange(min=0),
            help="Fail when more of the component than this share is left in the written weights.",
        ),
        click.option(
            "--mtp",
            is_flag=True,
            help="Edit what blocks of multi-token prediction write to the stream, too, which "
            "mlx-lm and llama.cpp's plain generation do not run. Without it they stay as they are.",
        ),
        click.option(
            "--keep-undo",
            is_flag=True,
            help="Keep what the edit takes out beside a float model, for `abl-mlx undo`.",
        ),
        click.option(
            "-o",
            "--output",
            "outputs",
            multiple=True,
            required=True,
            type=click.Path(path_type=Path),
            help="Where the edited model goes: a folder (MLX) or NAME.gguf; or an adapter for the "
            "model as it is: NAME.adapter (mlx-lm) or NAME.lora.gguf (llama.cpp). May be given "
            "again.",
        ),
    ]
    return _decorated(command, flags)


def _reply_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    flags = [
        click.option(
            "--max-tokens",
            default=64,
            show_default=True,
            type=click.IntRange(min=1),
            help="Longest reply in the evaluation.",
        ),
        click.option(
            "--batch-size",
            default=32,
            show_default=True,
            type=click.IntRange(min=1),
            help="Replies generated side by side.",
        ),
        click.option(
            "--save-replies",
            type=click.Path(path_type=Path),
            help="Keep the replies in this .jsonl file; without it only verdicts are kept.",
        ),
        _report_flag(
            "Write the page to read in a browser here. Without it `run` writes report.html into "
            "the output folder, or NAME.report.html beside NAME.gguf; `eval` writes none."
        ),
        click.option(
            "--save-completions",
            is_flag=True,
            help="Show the replies on that page too; without it only verdicts are there.",
        ),
    ]
    return _decorated(command, flags)


def _report_flag(text: str) -> Callable[..., Any]:
    return click.option("--report", metavar="FILE.html", type=click.Path(path_type=Path), help=text)


def _gguf_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    flags = [
        click.option(
            "--tensors",
            metavar="REGEX",
            help="Of a GGUF, edit the tensors whose name matches, whatever the architecture.",
        ),
        click.option(
            "--strict-types",
            is_flag=True,
            help="Of a GGUF, refuse a tensor of a type without a scalar grid (IQ1, IQ2, IQ3, TQ), "
            "instead of writing it in a finer one.",
        ),
        click.option(
            "--grid",
            type=click.Choice(["auto", "own", "fresh"]),
            default="auto",
            show_default=True,
            help="Of a quantized model: keep each tensor's own scales (with an imatrix in them, "
            "say), encode it anew, or take a fresh grid where it is clearly better.",
        ),
        click.option(
            "--writer-bits",
            type=click.Choice(["3", "4", "5", "6", "8", "bf16"]),
            help="Of a quantized MLX folder: write the edited matrices with so many bits, or as "
            "plain floats (float16 in a float16 model). Without it each keeps its own mode.",
        ),
        click.option(
            "--plain-rounding",
            is_flag=True,
            help="Of a quantized model, round every weight to its nearest level, as others do: "
            "loses most of the edit, and shows how much.",
        ),
        click.option(
            "--ollama-create",
            metavar="NAME",
            help="Hand the first GGUF that is written to Ollama under this name.",
        ),
    ]
    return _decorated(command, flags)


def _server_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    flags = [
        click.option(
            "--model", "server_model", metavar="NAME", help="The model's name on a server."
        ),
        click.option(
            "--baseline",
            metavar="TARGET",
            help="Ask this model the same prompts too, and show how far the two differ: the "
            "original of an edited one, say.",
        ),
        click.option("--baseline-model", metavar="NAME", help="The baseline's name on its server."),
        click.option(
            "--runtime",
            type=click.Choice(["mlx-lm", "llama.cpp", "llama-server"]),
            help="What runs a .gguf: MLX, llama.cpp in this process, or a llama-server on the "
            "PATH. Without it the second, third or first of these, by what is there.",
        ),
        click.option(
            "--concurrency",
            default=4,
            show_default=True,
            type=click.IntRange(min=1, max=256),
            help="Requests to a server at the same time.",
        ),
        click.option(
            "--timeout",
            default=120.0,
            show_default=True,
            type=click.FloatRange(min=0, min_open=True),
            help="Seconds that a server has for one reply.",
        ),
        click.option(
            "--retries",
            default=4,
            show_default=True,
            type=click.IntRange(min=0),
            help="Further tries of a request that fails, each after a longer pause.",
        ),
        click.option(
            "--resume",
            metavar="FILE.jsonl",
            type=click.Path(path_type=Path),
            help="Keep verdicts here (and replies with --save-replies), and go on from what the "
            "file has. Without it they are kept in the cache until all is done.",
        ),
    ]
    return _decorated(command, flags)


def _judge_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    flags = [
        click.option(
            "--judge",
            metavar="URL|MODEL|FILE.gguf",
            help="Have this local model say what is a refusal, by a fixed rubric, in place of the "
            "markers; what it says beside the rubric is counted and never guessed at.",
        ),
        click.option("--judge-model", metavar="NAME", help="The judge's name on its server."),
        click.option(
            "--judge-tokens",
            default=16,
            show_default=True,
            type=click.IntRange(min=1),
            help="Longest answer of the judge; more for one that thinks first.",
        ),
        click.option(
            "--perplexity",
            is_flag=True,
            help="Measure perplexity on a bundled text too: the opening of Alice in Wonderland.",
        ),
        click.option(
            "--capability",
            is_flag=True,
            help="Ask sixty small tasks with one right answer each too: sums, instructions, finding "
            "something in a text.",
        ),
        click.option(
            "--lm-eval",
            metavar="TASKS",
            help="Then run these tasks of lm-evaluation-harness (with commas between) through "
            "mlx_lm.evaluate; --limit holds for each. Of a model in MLX.",
        ),
    ]
    return _decorated(command, flags)


def _gate_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    share = click.FloatRange(min=0, max=1)
    flags = [
        click.option(
            "--min-refusal",
            type=share,
            help="Exit with 3 when a smaller share of the harmful prompts is refused.",
        ),
        click.option(
            "--max-over-refusal",
            type=share,
            help="Exit with 3 when a larger share of the harmless, or of the borderline prompts, "
            "is refused.",
        ),
        click.option(
            "--max-kl",
            "kl_limit",
            type=click.FloatRange(min=0),
            help="Exit with 3 when the model is further away from --baseline on harmless prompts "
            "(nats a token).",
        ),
        click.option(
            "--max-drop-from",
            metavar="RECORD.json",
            type=click.Path(path_type=Path),
            help="Exit with 3 when fewer harmful prompts are refused than in this record of an "
            "earlier `eval --json`.",
        ),
        click.option(
            "--max-drop",
            default=0.05,
            show_default=True,
            type=share,
            help="The drop that --max-drop-from allows.",
        ),
        click.option(
            "--max-broken",
            default=0.1,
            show_default=True,
            type=share,
            help="With any of these limits: exit with 3 when more replies are empty or loop.",
        ),
        click.option(
            "--junit",
            metavar="FILE.xml",
            type=click.Path(path_type=Path),
            help="Write limits and categories as a JUnit report, for a CI to show.",
        ),
    ]
    return _decorated(command, flags)


_json_flag = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object instead of the table."
)


def _decorated(command: Callable[..., Any], flags: list[Any]) -> Callable[..., Any]:
    for flag in reversed(flags):
        command = flag(command)
    return command


def _memory_flag(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--memory-check/--no-memory-check",
        default=True,
        help="Refuse a model whose weights are larger than this machine's memory. Default: yes.",
    )(command)


def _options(chosen: dict[str, Any]) -> Options:
    from abl_mlx.options import Options

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
    from abl_mlx import report

    with _stdout_kept_for_results():
        record = work(*args)
    if as_json:
        click.echo(report.to_json(record))
    else:
        click.echo(table(record) if callable(table) else getattr(report, table)(record))
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
@_edit_flags
@click.option(
    "--direction",
    type=click.Path(path_type=Path),
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
@_prompt_flags
@_choice_flags
@_search_flags
@_reply_flags
@_gguf_flags
@_memory_flag
@_json_flag
def run(model: str, outputs: tuple[Path, ...], induce: bool, as_json: bool, **chosen: Any) -> None:
    """Find MODEL's refusal direction, remove it, write the result and show what changed.

    The format follows the name: `-o edited/` is an MLX folder, `-o edited.gguf` a GGUF for
    llama.cpp, Ollama and LM Studio; several -o write several. Refusals are counted before and
    after, on prompts that were not used to find the direction, and from the files as written.

    MODEL may be a .gguf of any type: nothing else is needed, and every tensor keeps its type.
    """
    if induce:
        from abl_mlx import induce_outputs, induce_report

        given = model, outputs, _options(chosen)
        _answer(as_json, induce_report.table, induce_outputs.run_model, *given)
        return
    from abl_mlx import pipeline

    _answer(as_json, "run_table", pipeline.run, model, outputs, _options(chosen))


@cli.command()
@click.argument("model")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="The direction file, NAME.safetensors.",
)
@click.option(
    "--plot",
    metavar="FILE.png|FILE.svg",
    type=click.Path(path_type=Path),
    help="Draw separation, causal scores, KL and explained variance by layer, and both prompt sets "
    "in a plane.",
)
@_prompt_flags
@_choice_flags
@_search_flags
@_memory_flag
@_json_flag
def measure(model: str, output: Path, plot: Path | None, as_json: bool, **chosen: Any) -> None:
    """Find MODEL's refusal direction and keep it, with all candidates, in a file to share."""
    from abl_mlx import pipeline, report

    _answer(
        as_json,
        lambda record: (
            f"{output}: {report.summary_line(record['direction'])} of {record['source']}"
        ),
        pipeline.measure,
        model,
        output,
        _options(chosen),
        plot,
    )


@cli.command()
@click.argument("direction", type=click.Path(path_type=Path))
@click.argument("model")
@_edit_flags
@_gguf_flags
@click.option(
    "--lazy",
    is_flag=True,
    help="Edit file to file: no more of the model is in memory at a time than one tensor. For "
    "models larger than the memory this is done unasked; a GGUF is always edited so.",
)
@_memory_flag
@_json_flag
def apply(
    direction: Path, model: str, outputs: tuple[Path, ...], as_json: bool, **chosen: Any
) -> None:
    """Remove DIRECTION, a file made by `measure` (or a bare .npy vector), from MODEL's weights.

    MODEL may also be a .gguf of any type: it is edited tensor by tensor in its own types, rounded
    so that the edit survives, and everything else in it is copied byte for byte.
    """
    from abl_mlx import pipeline

    _answer(as_json, "apply_table", pipeline.apply, direction, model, outputs, _options(chosen))


@cli.command()
@click.argument("model")
@click.option(
    "-o",
    "--output",
    "outputs",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="Where the model goes as it was: a folder for a folder, NAME.gguf for a GGUF; or an "
    "adapter for MODEL that undoes its edit. May be given again.",
)
@click.option(
    "--factors",
    type=click.Path(path_type=Path),
    help="What the edit took out, as --keep-undo wrote it. Without it: the undo file that lies "
    "with MODEL.",
)
@click.option(
    "--direction",
    type=click.Path(path_type=Path),
    help="The edit's direction file, where there is no undo file: with --base, or for an edit of "
    "a strength other than 1.",
)
@click.option("--base", metavar="MODEL", help="The model before the edit.")
@_json_flag
def undo(model: str, outputs: tuple[Path, ...], as_json: bool, **given: Any) -> None:
    """Put back what abl-mlx took out of MODEL, a folder or GGUF of float weights.

    A full removal leaves nothing to go back by, so it needs what `run --keep-undo` or
    `apply --keep-undo` kept, or the base model.
    """
    from abl_mlx import undo as undoing

    _answer(as_json, "undo_table", lambda: undoing.undo(model, outputs, **given))


@cli.command("eval")
@click.argument("model", metavar="TARGET")
@_server_flags
@_judge_flags
@_gate_flags
@_prompt_flags
@_reply_flags
@_memory_flag
@_json_flag
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
    from abl_mlx import eval_report, evaluation
    from abl_mlx.gate import NOT_MET
    from abl_mlx.options import EvalOptions

    record = _answer(
        as_json, eval_report.table, evaluation.evaluate_model, model, EvalOptions(**chosen)
    )
    if not record.get("gate", {"passed": True})["passed"]:
        click.echo(eval_report.failures(record), err=True)
        sys.exit(NOT_MET)


@cli.command()
@click.argument("model")
@click.option("--base", metavar="MODEL", help="The model that MODEL is said to come from.")
@click.option(
    "--direction",
    type=click.Path(path_type=Path),
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
    type=click.Path(path_type=Path),
    help="Keep the recovered direction in this file, NAME.safetensors.",
)
@_report_flag("Write a page to read in a browser here.")
@_json_flag
def audit(model: str, as_json: bool, fail_on: tuple[str, ...], **given: Any) -> None:
    """Was a direction taken out of MODEL's weights? For folders and GGUFs of any type.

    The verdict is "edited", "not edited" or "cannot tell", with its evidence. Nothing but the model
    is needed: what is looked for is a direction along which the weights that write to the residual
    stream hold less than chance can explain. docs/audit.md says what that cannot see.

    \b
    abl-mlx audit some-model-Q4_K_M.gguf --fail-on edited --fail-on cannot-tell

    Exit codes: 1 for anything that went wrong, 3 for a verdict of --fail-on.
    """
    from abl_mlx import audit as auditing
    from abl_mlx.gate import NOT_MET

    record = _answer(as_json, auditing.table, lambda: auditing.audit(model, **given))
    if auditing.fails(record, fail_on):
        sys.exit(NOT_MET)


@cli.command()
@click.argument("model")
@_json_flag
def inspect(model: str, as_json: bool) -> None:
    """Show MODEL's architecture, its residual writers, and what an edit would touch."""
    from abl_mlx import pipeline

    _answer(as_json, "inspect_table", pipeline.inspect, model)


@cli.command("convert")
@click.argument("source")
@click.argument("output", type=click.Path(path_type=Path))
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
@_json_flag
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
    from abl_mlx import conversion

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
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option(
    "--direction",
    type=click.Path(path_type=Path),
    help="Show how much of this direction's removal from FIRST has arrived in SECOND.",
)
@click.option("--tensors", metavar="REGEX", help="The tensors to look at for --direction.")
@_json_flag
def diff(
    first: Path, second: Path, direction: Path | None, as_json: bool, tensors: str | None
) -> None:
    """Show which tensors differ between two GGUF files, and what is left of a direction."""
    from abl_mlx import gguf_pipeline

    options = _options({"tensors": tensors})
    _answer(as_json, "diff_table", gguf_pipeline.diff, first, second, direction, options)


def _steered_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    flags = [
        click.option(
            "--direction",
            type=click.Path(path_type=Path),
            help="A direction file. Without it one is measured first.",
        ),
        click.option(
            "--strength",
            default=1.0,
            show_default=True,
            help="1 removes the direction, 0.5 half of it, negative values strengthen it.",
        ),
        click.option(
            "--layers", type=Layers(), help="Edit only these layers: 3, 2-5 or 0,4-6. Default: all."
        ),
    ]
    return _memory_flag(_choice_flags(_prompt_flags(_decorated(command, flags))))


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
    type=click.Path(path_type=Path),
    help="Draw it too, in this page.html.",
)
@_steered_flags
@_json_flag
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
    from abl_mlx import show as showing
    from abl_mlx import steered

    color = sys.stdout.isatty()
    _answer(
        as_json,
        lambda record: showing.table(record, color=color),
        lambda: showing.show(
            steered.load(model, direction, _options(chosen)), prompt, reply=reply, page=output
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
@_steered_flags
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
    from abl_mlx import chat as chatting
    from abl_mlx import steered

    with suppress(ImportError):
        import readline  # noqa: F401  (editing of the line, and its history)
    conversation = chatting.Conversation(
        steered.load(model, direction, _options(chosen)),
        side_by_side=side_by_side, max_tokens=max_tokens, temp=temp,
    )  # fmt: skip
    chatting.talk(conversation, input, lambda text: click.echo(text, nl=False))


def main() -> None:
    """Entry point of the console script."""
    # transformers tells everyone who has no PyTorch that they have no PyTorch.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    interrupts.listen()
    cli()


if __name__ == "__main__":
    main()
