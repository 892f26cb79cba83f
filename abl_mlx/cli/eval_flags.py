"""The flags that only `eval` has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from abl_mlx.cli.flags import decorated, recognition_flag
from abl_mlx.cli.values import HERE, Lengths


def server_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags about servers and other runtimes."""
    flags = [
        click.option("--model", metavar="NAME", help="The model's name on a server."),
        click.option(
            "--baseline",
            metavar="TARGET",
            help="Ask this model the same prompts as well and show how far the two differ; for "
            "instance the original of an edited model.",
        ),
        click.option("--baseline-model", metavar="NAME", help="The baseline's name on its server."),
        click.option(
            "--runtime",
            type=click.Choice(["mlx-lm", "llama.cpp", "llama-server"]),
            help="What runs a .gguf: MLX, llama.cpp in this process, or a llama-server on the "
            "PATH. Default: the first that is available of llama.cpp, llama-server and MLX.",
        ),
        click.option(
            "--concurrency",
            default=4,
            show_default=True,
            type=click.IntRange(min=1, max=256),
            help="How many requests a server gets at the same time.",
        ),
        click.option(
            "--timeout",
            default=120.0,
            show_default=True,
            type=click.FloatRange(min=0, min_open=True),
            help="Seconds that a server may take for one reply.",
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
            type=HERE,
            help="Keep verdicts in this file (and replies with --save-replies), and continue from "
            "those that it has. Without it they are kept in the cache until the command ends.",
        ),
    ]
    return decorated(command, flags)


def judge_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags about judging replies."""
    flags = [
        click.option(
            "--judge",
            metavar="URL|MODEL|FILE.gguf",
            help="Let this local model decide by a fixed rubric what is a refusal, instead of the "
            "markers. Its answers outside the rubric are counted separately.",
        ),
        click.option("--judge-model", metavar="NAME", help="The judge's name on its server."),
        click.option(
            "--judge-tokens",
            default=16,
            show_default=True,
            type=click.IntRange(min=1),
            help="Longest answer of the judge, in tokens. A judge that thinks first needs more.",
        ),
    ]
    return decorated(command, flags)


def metric_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags about further measurements."""
    flags = [
        click.option(
            "--perplexity",
            is_flag=True,
            help="Also measure perplexity on a bundled text, the opening of Alice in Wonderland.",
        ),
        click.option(
            "--capability",
            is_flag=True,
            help="Also ask sixty small tasks with one right answer each: sums, instructions, "
            "finding something in a text.",
        ),
        click.option(
            "--tool-calls",
            is_flag=True,
            help="Also ask forty small tasks with functions to call: which function, with which "
            "arguments, and when to call none. The model's chat template must have a place for "
            "tools.",
        ),
        click.option(
            "--length-sweep",
            metavar="N,N,...",
            type=Lengths(),
            help="Judge each reply after so many tokens, such as 32,64,128,256,512, and show how "
            "many are enough. Prompts are asked once, at the longest, and the rates are those at "
            "the shortest length that suffices; in place of --max-tokens.",
        ),
        recognition_flag,
        click.option(
            "--scorer",
            metavar="NAME[:FILE],...",
            help="Also ask the prompts of these scorers of behaviours other than refusal: slop, "
            "sycophancy, language, or those of installed packages. FILE has a scorer's own data, a "
            "phrase or a prompt on each line. Lower figures are better.",
        ),
        click.option(
            "--lm-eval",
            metavar="TASKS",
            help="Also run these tasks of lm-evaluation-harness (separated by commas) through "
            "mlx_lm.evaluate, with --limit for each task. Only for a model in MLX.",
        ),
    ]
    return decorated(command, flags)


against_flag = click.option(
    "--against",
    metavar="EVIDENCE",
    type=HERE,
    help="Exit with 3 when the verdicts differ from those of this signed evidence of the same "
    "prompts more than chance explains (McNemar's test): the server runs another model.",
)


def key_flag(text: str, *, required: bool = False) -> Callable[..., Any]:
    """The flag that names a public key."""
    return click.option("--key", metavar="PUBLIC.pem", type=HERE, required=required, help=text)


def signing_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags with which an evaluation is signed."""
    flags = [
        click.option(
            "--sign",
            metavar="KEY.pem",
            type=HERE,
            help="Sign the record and the hashes of the model's files with this private key.",
        ),
        click.option(
            "--evidence",
            metavar="FILE",
            type=HERE,
            help="The file for what --sign signs, a Sigstore bundle; `verify` reads it.",
        ),
    ]
    return decorated(command, flags)


def gate_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags with limits that make the command exit with code 3."""
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
            type=click.FloatRange(min=0),
            help="Exit with 3 when the KL divergence from --baseline on harmless prompts is larger "
            "(nats per token).",
        ),
        click.option(
            "--max-drop-from",
            metavar="RECORD.json",
            type=HERE,
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
            "--max-thought-growth",
            metavar="RATIO",
            type=click.FloatRange(min=0, min_open=True),
            help="Exit with 3 when thoughts are longer than this many times the length of those of "
            "--baseline.",
        ),
        against_flag,
        key_flag("The public key of --against, PEM."),
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
            type=HERE,
            help="Write limits and categories as a JUnit report, which CI systems can show.",
        ),
    ]
    return decorated(command, flags)
