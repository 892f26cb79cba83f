"""Groups of flags that several commands share, one for each group of `abl_mlx.choices`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from abl_mlx.choices import KINDS, NORMS, PLACES
from abl_mlx.cli.values import HERE, Features, Layers, Parts, PinValue, Position
from abl_mlx.directions.methods import METHODS, TABLE


def decorated(command: Callable[..., Any], flags: list[Any]) -> Callable[..., Any]:
    """The command with these flags, which its help shows in this order."""
    for flag in reversed(flags):
        command = flag(command)
    return command


def revision_flag(argument: str = "model") -> Callable[..., Any]:
    """The flag that chooses a branch, a tag or a commit of the model that an argument names."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def at_revision(*args: Any, revision: str | None, **chosen: Any) -> Any:
            if revision is not None:
                if chosen[argument] is None:
                    raise click.UsageError(f"--revision needs {argument.upper()}.")
                from abl_mlx.inputs import sources

                chosen[argument] = sources.at_revision(chosen[argument], revision)
            return command(*args, **chosen)

        return click.option(
            "--revision",
            metavar="REV",
            help="Of a model on Hugging Face, this branch, tag or commit, as by MODEL@REV.",
        )(at_revision)

    return decorate


def prompt_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags about prompts; long because each flag has its help text here."""
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
            help="Use at most this many prompts of each set and part.",
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
        click.option(
            "--thought-tokens",
            default=512,
            show_default=True,
            type=click.IntRange(min=1),
            help="Longest thought; with thinking on, a reply may be longer by so many tokens.",
        ),
        click.option(
            "--keep",
            metavar="FILE|DATASET|category:NAME[,NAME]",
            help="Prompts whose refusals are to stay, which are taken out of the harmful ones: in "
            "the forms of --harmful, or categories of the harmful set.",
        ),
        click.option(
            "--keep-system",
            metavar="TEXT|FILE",
            help="A system message such as: Only answer questions about cooking. What the model "
            "declines because of it, asked harmless prompts, it is to decline as before.",
        ),
    ]
    return decorated(command, flags)


def chat_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags about the chat template."""
    flags = [
        click.option(
            "--template",
            metavar="FILE|chatml|plain",
            help="Write prompts with this Jinja file, or with ChatML, instead of the model's own "
            "chat template. plain gives the model the text as it is, to be completed: for models "
            "without a chat template.",
        ),
    ]
    return decorated(command, flags)


def given_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags about a direction from a file."""
    flags = [
        click.option(
            "--direction",
            type=HERE,
            help="Remove the direction in this file instead of measuring one: a file of `measure`, "
            "a .npy, .npz or .safetensors vector (such as a row of an SAE's decoder), or a control "
            "vector (.gguf, with --layer).",
        ),
        click.option("--tensor", metavar="NAME", help="Which tensor of --direction FILE."),
    ]
    return decorated(command, flags)


def _subspaces() -> str:
    """The methods that find subspaces, with the number of directions that each finds by itself."""
    return ", ".join(f"--method {one.name} (default {one.rank})" for one in TABLE if one.subspace)


def choice_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags about measuring and choosing a direction; long because of their help texts."""
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
            help=f"The number of directions in the subspace of {_subspaces()} or of --across "
            "(default 3).",
        ),
        click.option(
            "--across",
            type=click.Choice(["layers", "positions"]),
            help="Combine the directions of all layers, or of all tokens at the template's end, in "
            "one subspace of --rank.",
        ),
        click.option(
            "--per-layer",
            is_flag=True,
            help="Remove from the writers of each layer the direction of that layer.",
        ),
        click.option(
            "--sae",
            metavar="FOLDER|FILE|hf:OWNER/NAME/FOLDER",
            help="Take directions from the decoder of this sparse autoencoder of the residual "
            "stream, written by SAELens or from Gemma Scope (docs/sae.md).",
        ),
        click.option(
            "--feature",
            metavar="N[,N]|auto",
            type=Features(),
            help="For --sae: the numbers of the features whose directions are taken; auto (the "
            "default) ranks features by how they tell the prompt sets apart, and chooses among "
            "the first by effect.",
        ),
        click.option(
            "--layer",
            type=click.FloatRange(min=0),
            help="Use the direction after this layer (counted from 0) instead of choosing one by "
            "its effect; 2.4 means between layers 2 and 3.",
        ),
        click.option(
            "--position",
            type=Position(),
            metavar="N|instruction-end",
            help="Use directions at this token, counted from the prompt's end: -1 is the last. "
            "instruction-end is the instruction's own last token.",
        ),
        click.option(
            "--borderline",
            metavar="FILE|DATASET",
            help="For --method over-refusal: harmless prompts that this model refuses.",
        ),
        click.option(
            "--protect",
            metavar="FILE|DATASET",
            help="Prompts of concepts, such as code or mathematics, that the direction is made to "
            "leave: one concept for each category of a .jsonl file.",
        ),
        click.option(
            "--max-kl",
            default=0.1,
            show_default=True,
            type=click.FloatRange(min=0),
            help="Reject directions whose removal changes harmless prompts by a larger KL "
            "divergence (nats, first reply token).",
        ),
        click.option(
            "--measured-at",
            type=click.Choice(["end-of-prompt", "end-of-thought"]),
            help="With --thinking on or both: where directions are measured, before the thought or "
            "behind it. Both are tried without it.",
        ),
        click.option(
            "--max-thought-growth",
            default=1.2,
            show_default=True,
            type=click.FloatRange(min=0, min_open=True),
            help="With --thinking on or both: drop edits whose thoughts become so many times as "
            "long.",
        ),
        click.option(
            "--anyway",
            is_flag=True,
            help="Continue even if the model does not refuse harmful prompts clearly more often "
            "than harmless ones. Without it such a model is not edited.",
        ),
    ]
    return decorated(command, flags)


def search_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags about searching for a gentler edit."""
    flags = [
        click.option(
            "--search",
            metavar="N",
            type=click.IntRange(min=1),
            help="Try at most N edits (directions, layers, strengths by layer for attention and "
            "MLP, the embedding) and choose the one with the lowest KL that meets "
            "--target-refusals. The search ends early when nothing better is found; Ctrl-C ends it "
            "with the best so far.",
        ),
        click.option(
            "--minutes",
            metavar="M",
            type=click.FloatRange(min=0, min_open=True, max=100_000),
            help="Try edits as with --search, for at most M minutes; with --search N, until one of "
            "the two limits is reached. The replies that choose one of them come after.",
        ),
        click.option(
            "--from",
            "--warm-start",
            "warm_start",
            metavar="FILE",
            type=HERE,
            help="For --search: the second edit that is tried is that of FILE, which is an "
            "abl.json, or a model card with a table of direction_index, attn.o_proj.max_weight "
            "and so on.",
        ),
        click.option(
            "--target-refusals",
            default=0.05,
            show_default=True,
            type=click.FloatRange(min=0, max=1),
            help="For --search: the share of refused or broken replies that is good enough.",
        ),
        click.option(
            "--learn-strengths",
            metavar="N",
            type=click.IntRange(min=1),
            help="Learn the strengths of each layer's attention and MLP by N gradient steps: the "
            "lowest KL at which harmful prompts stay clear of opening with a refusal. --search "
            "starts from them.",
        ),
        click.option(
            "--search-journal",
            metavar="FILE",
            type=HERE,
            help="For --search: keep its trials in this file, and continue from those that it has. "
            "Default: OUTPUT.search.journal.",
        ),
    ]
    return decorated(command, flags)


def edit_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags about the edit of the weights; long because of their help texts."""
    flags = [
        click.option(
            "--strength",
            default=1.0,
            show_default=True,
            help="1 removes the direction, 0.5 half of it, negative values strengthen it; beyond 2 "
            "it comes back reversed. The direction is chosen by the effect of its full removal.",
        ),
        click.option(
            "--layers", type=Layers(), help="Edit only these layers: 3, 2-5 or 0,4-6. Default: all."
        ),
        click.option(
            "--embedding/--no-embedding",
            default=True,
            show_default=True,
            help="Also edit the embedding. With tied embeddings this edits the output head, too.",
        ),
        click.option(
            "--norm",
            type=click.Choice(NORMS),
            default="none",
            show_default=True,
            help="Keep the norms of the edited weights' columns (a full removal stays full), or of "
            "their rows (which puts part of the direction back; for comparison).",
        ),
        click.option(
            "--pin",
            type=PinValue(),
            metavar="harmless|harmful|VALUE",
            help="Hold the component along the direction at the harmless (or harmful) prompts' "
            "mean, or at a value, instead of at 0.",
        ),
        click.option(
            "--edit",
            type=click.Choice(PLACES),
            default="writers",
            show_default=True,
            help="writers: nothing is written along the direction any more. readers: the stream "
            "keeps it, and the layers (queries, keys, values, gate, up, routers) no longer read "
            "along it. routers: fewer tokens are sent to the experts of --experts, by the routers' "
            "own bias.",
        ),
        click.option(
            "--heads",
            type=Parts(),
            metavar="N|LAYER.HEAD,...",
            help="Edit only what these attention heads write (with --experts, these too): named "
            "ones, or the N that write most along the direction on harmful prompts.",
        ),
        click.option(
            "--experts",
            type=Parts(),
            metavar="N|LAYER.EXPERT,...",
            help="Edit only what these experts write: named ones, or the N to which tokens of "
            "harmful prompts are sent more often than those of harmless ones.",
        ),
        click.option(
            "--kind",
            type=click.Choice(KINDS),
            default="project",
            show_default=True,
            help="project takes the component along the direction out; reflect reverses it (a "
            "Householder reflection, which keeps the length of every column of a writer).",
        ),
    ]
    return decorated(command, flags)


def reply_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags about generating and saving replies."""
    flags = [
        click.option(
            "--max-tokens",
            default=64,
            show_default=True,
            type=click.IntRange(min=1),
            help="Longest reply in the evaluation, in tokens.",
        ),
        click.option(
            "--batch-size",
            default=32,
            show_default=True,
            type=click.IntRange(min=1),
            help="How many replies are generated at the same time; with 1 every run gives the "
            "same ones.",
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


recognition_flag = click.option(
    "--recognition",
    is_flag=True,
    help="Measure whether the model can tell harmful from harmless prompts when it is asked which "
    "of the two a prompt is, whatever it refuses.",
)


def report_flag(text: str) -> Callable[..., Any]:
    return click.option("--report", metavar="FILE.html", type=HERE, help=text)


json_flag = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object instead of the table."
)


def memory_flag(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flag about checking the machine's memory first."""
    return click.option(
        "--memory-check/--no-memory-check",
        default=True,
        help="Refuse a model whose weights are larger than this machine's memory. Default: yes.",
    )(command)


stream_flag = click.option(
    "--stream",
    is_flag=True,
    help="Keep one layer of MODEL in memory at a time, and run all prompts through it while the "
    "next one is read (docs/streaming.md). This is the default where MODEL does not fit in memory.",
)


def split_flag(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flag for a model that no single machine holds."""

    def begin(context: click.Context, parameter: click.Parameter, given: bool) -> None:
        if given:
            from abl_mlx.models import split_model

            split_model.begin()

    return click.option(
        "--split-model",
        is_flag=True,
        expose_value=False,
        callback=begin,
        help="Under mlx.launch: each process holds a part of every matrix, or some of the layers "
        "where mlx-lm cannot split these, and all run every prompt together, for a model that no "
        "single machine holds.",
    )(command)


def steered_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags about an edit at runtime."""
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
