"""The command line's flags, in groups that several commands share: those of `abl_mlx.choices`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from abl_mlx.choices import METHODS, NORMS
from abl_mlx.cli.values import HERE, Layers, PinValue, Position


def decorated(command: Callable[..., Any], flags: list[Any]) -> Callable[..., Any]:
    """A command with flags, which its help shows in this order."""
    for flag in reversed(flags):
        command = flag(command)
    return command


def prompt_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which prompts."""
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
        click.option(
            "--quick",
            is_flag=True,
            help="A first look: 48 prompts of each set to measure, 16 to choose on, 24 to ask. No "
            "refusal among 24 replies means at most 14% (95% interval).",
        ),
        click.option(
            "--system",
            metavar="TEXT|FILE",
            help="Put this system message before every prompt that has none of its own.",
        ),
        click.option(
            "--thinking",
            metavar="off|on|both|LEVEL",
            default="off",
            show_default=True,
            help="Whether the model thinks before it replies; both measures and judges in both "
            "ways. LEVEL is an amount that its template knows, such as low, medium or high.",
        ),
    ]
    return decorated(command, flags)


def chat_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """How the model is talked to."""
    flags = [
        click.option(
            "--template",
            metavar="FILE|chatml|plain",
            help="Write prompts with this Jinja file, or with ChatML, instead of the model's own "
            "chat template. plain gives the model the text as it is, to be completed: for base "
            "models.",
        ),
    ]
    return decorated(command, flags)


def given_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """A direction from elsewhere."""
    flags = [
        click.option(
            "--direction",
            type=HERE,
            help="Remove the direction in this file instead of measuring one: what `measure` "
            "wrote, a .npy, .npz or .safetensors vector (a SAE decoder's row, say), or a control "
            "vector (.gguf, --layer).",
        ),
        click.option("--tensor", metavar="NAME", help="Which tensor of --direction FILE."),
    ]
    return decorated(command, flags)


def choice_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which direction."""
    flags = [
        click.option(
            "--method",
            type=click.Choice(METHODS),
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
        click.option(
            "--anyway",
            is_flag=True,
            help="Go on where the model does not refuse harmful prompts clearly more often than "
            "harmless ones. Without it such a model is not edited.",
        ),
    ]
    return decorated(command, flags)


def search_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """How to search for a gentler edit."""
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
            type=HERE,
            help="For --search: keep its trials here, and go on from those that the file has. "
            "Without it: OUTPUT.search.journal.",
        ),
    ]
    return decorated(command, flags)


def edit_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """What is done to the weights."""
    flags = [
        click.option(
            "--strength",
            default=1.0,
            show_default=True,
            help="1 removes the direction, 0.5 half of it, negative values strengthen it; beyond 2 "
            "it comes back reversed. The direction is chosen by what its whole removal does.",
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
            type=click.Choice(NORMS),
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
    ]
    return decorated(command, flags)


def writing_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """How the edit is written, and where the result goes."""
    flags = [
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
            type=HERE,
            help="Where the edited model goes: a folder (MLX) or NAME.gguf; or an adapter for the "
            "model as it is: NAME.adapter (mlx-lm) or NAME.lora.gguf (llama.cpp). May be given "
            "again.",
        ),
    ]
    return decorated(command, flags)


def reply_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """How replies are generated and kept."""
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
            type=HERE,
            help="Keep the replies in this .jsonl file; without it only verdicts are kept.",
        ),
        report_flag(
            "Write the page to read in a browser here. Without it `run` writes report.html into "
            "the output folder, or NAME.report.html beside NAME.gguf; `eval` writes none."
        ),
        click.option(
            "--save-completions",
            is_flag=True,
            help="Show the replies on that page too; without it only verdicts are there.",
        ),
    ]
    return decorated(command, flags)


def report_flag(text: str) -> Callable[..., Any]:
    return click.option("--report", metavar="FILE.html", type=HERE, help=text)


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
    return decorated(command, flags)


json_flag = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object instead of the table."
)


def memory_flag(command: Callable[..., Any]) -> Callable[..., Any]:
    """Whether memory is checked first."""
    return click.option(
        "--memory-check/--no-memory-check",
        default=True,
        help="Refuse a model whose weights are larger than this machine's memory. Default: yes.",
    )(command)


def steered_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """What is steered at runtime."""
    flags = [
        click.option(
            "--direction",
            type=HERE,
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
    return memory_flag(choice_flags(chat_flags(prompt_flags(decorated(command, flags)))))
