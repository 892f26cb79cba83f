"""The flags that `eval` alone has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from abl_mlx.cli.flags import decorated
from abl_mlx.cli.values import HERE


def server_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """How a server is asked."""
    flags = [
        click.option("--model", metavar="NAME", help="The model's name on a server."),
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
            type=HERE,
            help="Keep verdicts here (and replies with --save-replies), and go on from what the "
            "file has. Without it they are kept in the cache until all is done.",
        ),
    ]
    return decorated(command, flags)


def judge_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Who judges."""
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
    ]
    return decorated(command, flags)


def metric_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """What else is measured."""
    flags = [
        click.option(
            "--perplexity",
            is_flag=True,
            help="Measure perplexity on a bundled text too: the opening of Alice in Wonderland.",
        ),
        click.option(
            "--capability",
            is_flag=True,
            help="Ask sixty small tasks with one right answer each too: sums, instructions, "
            "finding something in a text.",
        ),
        click.option(
            "--lm-eval",
            metavar="TASKS",
            help="Then run these tasks of lm-evaluation-harness (with commas between) through "
            "mlx_lm.evaluate; --limit holds for each. Of a model in MLX.",
        ),
    ]
    return decorated(command, flags)


def gate_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Limits that the command fails by."""
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
            help="Exit with 3 when the model is further away from --baseline on harmless prompts "
            "(nats a token).",
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
            help="Write limits and categories as a JUnit report, for a CI to show.",
        ),
    ]
    return decorated(command, flags)
