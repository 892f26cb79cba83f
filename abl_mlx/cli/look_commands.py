"""The commands that do not edit files: eval, audit, inspect, diff, show, chat."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from abl_mlx.cli.answer import answer, typed
from abl_mlx.cli.condition_flags import condition_flag, conditioning_flags, steering_flags
from abl_mlx.cli.eval_flags import (
    gate_flags,
    judge_flags,
    key_flag,
    metric_flags,
    server_flags,
    signing_flags,
)
from abl_mlx.cli.flags import (
    chat_flags,
    json_flag,
    memory_flag,
    prompt_flags,
    reply_flags,
    report_flag,
    revision_flag,
    steered_flags,
)
from abl_mlx.cli.group import cli
from abl_mlx.cli.values import HERE
from convert.base import escape


@cli.command("eval")
@click.argument("target")
@revision_flag("target")
@server_flags
@steering_flags
@judge_flags
@metric_flags
@gate_flags
@signing_flags
@prompt_flags
@chat_flags
@reply_flags
@memory_flag
@json_flag
def evaluate(target: str, as_json: bool, **chosen: Any) -> None:
    """Count TARGET's refusals of harmful, harmless and borderline prompts; nothing is edited.

    TARGET is a model as for the other commands, or a server that speaks OpenAI's chat API
    (llama-server, Ollama, LM Studio, mlx_lm.server). A .gguf file is run by llama.cpp where that is
    installed, else by a llama-server on the PATH, else by MLX.

    \b
    abl-mlx eval http://127.0.0.1:11434/v1 --model llama3.2
    abl-mlx eval edited.gguf --baseline original.gguf
    abl-mlx eval SomeModel --min-refusal 0.9 --max-over-refusal 0.1 --junit refusals.xml

    An evaluation that was stopped continues where it stopped when the same command is given again.
    A key for a server is read from ABL_API_KEY, or OPENAI_API_KEY (only this machine and https).

    Exit codes: 1 for any error, 3 when a limit is not met.
    """
    from abl_mlx.behaviour.gate import NOT_MET
    from abl_mlx.commands import evaluate_model
    from abl_mlx.eval_choices import EvalOptions
    from abl_mlx.reports import eval_tables

    source = click.get_current_context().get_parameter_source("max_tokens")
    if chosen["length_sweep"] is not None and source is not ParameterSource.DEFAULT:
        raise click.UsageError(
            "--length-sweep says how long replies are: leave --max-tokens out, or end the list "
            "with it."
        )
    options = EvalOptions.of(**chosen)
    record = answer(as_json, eval_tables.table, evaluate_model.evaluate_model, target, options)
    if record.gate is not None and not record.gate.passed:
        click.echo(eval_tables.failures(record.of(escape.record(record))), err=True)
        sys.exit(NOT_MET)


@cli.command()
@click.argument("model", required=False)
@revision_flag()
@click.option(
    "--list",
    "listed",
    type=HERE,
    help="Judge every model that this file names, one a line, in place of MODEL.",
)
@click.option("--csv", "table", type=HERE, help="Also write the verdicts of --list to this file.")
@click.option("--base", metavar="MODEL", help="The base model from which MODEL is said to come.")
@click.option(
    "--direction",
    type=HERE,
    help="A direction file to compare with the recovered direction.",
)
@click.option(
    "--ask/--no-ask",
    default=False,
    show_default=True,
    help="Also run MODEL and count its refusals as `abl-mlx eval` does.",
)
@click.option(
    "--fail-on",
    multiple=True,
    type=click.Choice(["edited", "cannot-tell", "not-edited"]),
    help="Exit with 3 when this is the verdict. May be given several times.",
)
@click.option(
    "-o",
    "--output",
    type=HERE,
    help="Write the recovered direction to this file, NAME.safetensors.",
)
@report_flag("Write a page to read in a browser here.")
@json_flag
def audit(
    model: str | None,
    listed: Path | None,
    table: Path | None,
    as_json: bool,
    fail_on: tuple[str, ...],
    **given: Any,
) -> None:
    """Decide whether a direction was removed from MODEL's weights, in a folder or a GGUF.

    The verdict is "edited", "not edited" or "cannot tell", with its evidence. Only the model is
    needed: the command looks for a direction along which the weights that write to the residual
    stream have smaller components than chance explains. docs/audit.md says what it cannot find.

    Of a model on Hugging Face only the parts are read that the verdict needs, a few percent of a
    large one. They are kept for the next time.

    \b
    abl-mlx audit some-model-Q4_K_M.gguf --fail-on edited --fail-on cannot-tell
    abl-mlx audit --list repositories.txt --csv verdicts.csv

    Exit codes: 1 for any error, 3 for a verdict of --fail-on.
    """
    from abl_mlx.behaviour.gate import NOT_MET
    from abl_mlx.commands import audit as auditing
    from abl_mlx.commands import audit_list

    if (model is None) == (listed is None):
        raise click.UsageError("Name one MODEL, or give --list FILE.")
    if listed is not None:
        if refused := next((one for one in ("output", "report", "ask") if given.pop(one)), None):
            raise click.UsageError(f"--{refused} is for one MODEL, not for --list.")
        every = answer(
            as_json, audit_list.table, lambda: audit_list.audit_list(listed, table=table, **given)
        )
        if any(auditing.fails(one, fail_on) for one in every.audits):
            sys.exit(NOT_MET)
        sys.exit(1 if audit_list.failed(every) else 0)
    if table is not None:
        raise click.UsageError("--csv is for --list.")
    record = answer(as_json, auditing.table, lambda: auditing.audit(str(model), **given))
    if auditing.fails(record, fail_on):
        sys.exit(NOT_MET)


@cli.command()
@click.argument("evidence", type=HERE)
@key_flag("The public key of whoever signed it, PEM.", required=True)
@click.option("--model", help="Also check that this model's files are the signed ones.")
@click.option(
    "--min-refusal",
    type=click.FloatRange(min=0, max=1),
    help="Exit with 3 when a smaller share of the harmful prompts was refused.",
)
@click.option(
    "--max-over-refusal",
    type=click.FloatRange(min=0, max=1),
    help="Exit with 3 when a larger share of the harmless, or of the borderline prompts, was.",
)
@click.option(
    "--bom",
    metavar="FILE",
    type=HERE,
    help="Write model, files and figures to this new file: CycloneDX 1.6 (ML-BOM), in JSON.",
)
@click.option(
    "--card",
    metavar="FILE",
    type=HERE,
    help="Write the figures to this new file, as a block of Markdown for the model card.",
)
@json_flag
def verify(
    evidence: Path,
    key: Path,
    model: str | None,
    bom: Path | None,
    card: Path | None,
    as_json: bool,
    **chosen: float | None,
) -> None:
    """Check EVIDENCE, which `eval --sign` wrote: its signature, a model's files, and its figures.

    If all is as it should be, --bom and --card write the figures for others to read.

    \b
    abl-mlx eval SomeModel --sign key.pem --evidence evidence.json
    abl-mlx verify evidence.json --key public.pem --model SomeModel --min-refusal 0.9

    Exit codes: 1 for any error, 3 for a bad or missing signature, another model's files, or a limit
    that is not met.
    """
    from abl_mlx.behaviour.gate import NOT_MET
    from abl_mlx.commands import evidence as signed
    from abl_mlx.eval_choices import Limits

    limits = Limits.of(**chosen)
    record = answer(
        as_json,
        signed.table,
        lambda: signed.verify(evidence, key, model, limits, bom=bom, card=card),
    )
    if not record.passed:
        sys.exit(NOT_MET)


@cli.command()
@click.argument("base")
@click.argument("edited")
@click.option(
    "-o",
    "--output",
    type=HERE,
    help="Write the edit to this direction file, NAME.safetensors, for `apply` and others.",
)
@click.option(
    "--fail-on",
    multiple=True,
    type=click.Choice(["edited", "cannot-tell", "no-such-edit"]),
    help="Exit with 3 when this is the verdict. May be given several times.",
)
@json_flag
def learn(
    base: str, edited: str, output: Path | None, fail_on: tuple[str, ...], as_json: bool
) -> None:
    """Learn the edit that made EDITED of BASE: directions, strengths, layers and kept norms.

    The two may be folders or GGUFs, of other types. EDITED may be made by any program, as long as
    it removed directions from the weights that write to the residual stream. Of anything else, such
    as a fine-tune, the verdict is "no such edit", and no file is written.

    \b
    abl-mlx learn Model edited-Q4_K_M.gguf -o edit.safetensors
    abl-mlx apply edit.safetensors Model-Q6_K.gguf -o same-edit-Q6_K.gguf
    """
    from abl_mlx.behaviour.gate import NOT_MET
    from abl_mlx.commands import learn as learning

    record = answer(as_json, learning.table, learning.learn, base, edited, output)
    if record.verdict.replace(" ", "-") in fail_on:
        sys.exit(NOT_MET)


@cli.command()
@click.argument("record")
@click.option(
    "-o",
    "--output",
    type=HERE,
    help="Keep the model here: a folder or NAME.gguf, as the record's. Default: only compare it.",
)
@click.option(
    "--base", metavar="MODEL", help="The base model. Default: what the record names, as typed then."
)
@click.option(
    "--direction", type=HERE, help="The direction file, for a record that does not hold it."
)
@click.option(
    "--remeasure",
    is_flag=True,
    help="Also measure the direction again, and show how far it lies from the record's.",
)
@json_flag
def reproduce(record: str, output: Path | None, as_json: bool, **given: Any) -> None:
    """Make the edit of RECORD again and compare every byte with the hashes that it holds.

    RECORD is the abl.json that `run` or `apply` wrote, or the folder, GGUF or Hugging Face
    repository with it. It holds the directions, so that only the base model is needed. Tensors that
    differ are named, with what may be the reason.

    \b
    abl-mlx reproduce abl.json --base Model -o edited/

    Exit codes: 1 for any error, 3 for bytes that differ.
    """
    from abl_mlx.behaviour.gate import NOT_MET
    from abl_mlx.commands import reproduce as again

    def work() -> Any:
        return again.reproduce(record, output, **given)

    if answer(as_json, again.table, work).differs:
        sys.exit(NOT_MET)


@cli.command()
@click.argument("model")
@revision_flag()
@json_flag
def inspect(model: str, as_json: bool) -> None:
    """Show MODEL's architecture, its residual writers, and how much an edit would change."""
    from abl_mlx.commands import measure_apply

    answer(as_json, "inspect_table", measure_apply.inspect, model)


@cli.command()
@click.argument("first", type=HERE)
@click.argument("second", type=HERE)
@click.option(
    "--direction",
    type=HERE,
    help="Show how much of the removal of this direction from FIRST is present in SECOND.",
)
@click.option("--tensors", metavar="REGEX", help="The tensors to compare for --direction.")
@json_flag
def diff(
    first: Path, second: Path, direction: Path | None, as_json: bool, tensors: str | None
) -> None:
    """Show which tensors differ between two GGUF files, and how much of a direction is left."""
    from abl_mlx.commands import diff as comparing

    answer(
        as_json,
        "diff_table",
        lambda: comparing.diff(first, second, direction=direction, tensors=tensors),
    )


@cli.command()
@click.argument("model")
@click.argument("prompt")
@revision_flag()
@click.option(
    "--reply",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Also show this many tokens of the model's own reply.",
)
@click.option(
    "-o",
    "--output",
    type=HERE,
    help="Also draw it, in this page NAME.html.",
)
@click.option(
    "--rank-parts",
    is_flag=True,
    help="Also rank attention heads by what they write along the direction, and experts by how "
    "much more often tokens of harmful prompts are sent to them. Without it the ranking of the "
    "--direction file is shown, if it has one (`measure --rank-parts`).",
)
@steered_flags
@condition_flag
@conditioning_flags
@json_flag
def show(
    model: str,
    prompt: str,
    reply: int,
    output: Path | None,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Show the component along the refusal direction at every layer and token of PROMPT.

    It is shown before and after the edit, which is made at runtime; no model is written.
    """
    from abl_mlx.choices import SteerOptions
    from abl_mlx.commands import session
    from abl_mlx.commands import show as showing

    color = sys.stdout.isatty()
    prompt = typed("PROMPT", prompt)
    options = SteerOptions.of(**chosen)
    answer(
        as_json,
        lambda record: showing.table(record, color=color),
        lambda: showing.show(
            session.load(model, options, shows=True),
            prompt,
            reply=reply,
            page=output,
            options=options,
        ),
    )


@cli.command()
@click.argument("model")
@revision_flag()
@click.option(
    "--side-by-side", is_flag=True, help="Show the original's reply beside the edited model's."
)
@click.option(
    "--max-tokens",
    default=512,
    show_default=True,
    type=click.IntRange(min=1),
    help="Longest reply, in tokens.",
)
@click.option(
    "--temp",
    default=0.0,
    show_default=True,
    type=click.FloatRange(min=0),
    help="Temperature; 0 always chooses the likeliest token.",
)
@click.option(
    "--tools",
    metavar="FILE.json",
    type=HERE,
    help="Tell the model of these functions, a JSON list as OpenAI's tools. Calls are shown as the "
    "model writes them, and /tool RESULT gives what one returned.",
)
@steered_flags
@condition_flag
@conditioning_flags
def chat(
    model: str,
    tools: Path | None,
    side_by_side: bool,
    max_tokens: int,
    temp: float,
    **chosen: Any,
) -> None:
    """Chat with MODEL while its edit is switched on, off or scaled (/help lists the commands).

    The edit is made at runtime and has the same effect as the edit of the weights; nothing is
    written.
    """
    from abl_mlx.choices import SteerOptions
    from abl_mlx.commands import chat as chatting
    from abl_mlx.commands import session
    from abl_mlx.inputs.tools import read

    with suppress(ImportError):
        import readline  # noqa: F401  (editing of the line, and its history)
    told = () if tools is None else read(tools)
    conversation = chatting.Conversation(
        session.load(model, SteerOptions.of(**chosen), told),
        side_by_side=side_by_side, max_tokens=max_tokens, temp=temp,
    )  # fmt: skip
    chatting.talk(conversation, input, lambda text: click.echo(escape.block(text), nl=False))
