"""The command that answers requests of other programs: serve."""

from __future__ import annotations

from typing import Any

import click

from abl_mlx.cli.condition_flags import condition_flag, unconditional_flag
from abl_mlx.cli.flags import revision_flag, steered_flags
from abl_mlx.cli.group import cli

runtime_flag = click.option(
    "--runtime",
    type=click.Choice(["mlx-lm", "llama.cpp", "llama-server"]),
    help="What runs a .gguf, as for `eval`.",
)


@cli.command()
@click.argument("model")
@revision_flag()
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Listen on this address. Any other than this machine's own lets others in.",
)
@click.option(
    "--port",
    default=8080,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="Listen on this port; 0 chooses a free one.",
)
@click.option(
    "--allow-origin",
    "origins",
    metavar="URL",
    multiple=True,
    help="Let pages of this origin, such as http://localhost:3000, send requests from a browser. "
    "May be given several times.",
)
@click.option(
    "--max-tokens",
    default=512,
    show_default=True,
    type=click.IntRange(min=1),
    help="Longest reply to a request that says none, in tokens.",
)
@runtime_flag
@click.option(
    "--parallel",
    "slots",
    default=4,
    show_default=True,
    type=click.IntRange(1, 64),
    help="With llama.cpp: how many requests are answered at the same time.",
)
@click.option(
    "--context",
    default=4096,
    show_default=True,
    type=click.IntRange(min=64),
    help="With llama.cpp: the longest prompt and reply of a request together, in tokens.",
)
@steered_flags
@condition_flag
@unconditional_flag
def serve(model: str, host: str, origins: tuple[str, ...], **chosen: Any) -> None:
    """Serve MODEL to programs that speak OpenAI's API, edited as each request says.

    The model NAME is edited with --strength; NAME@0 is the model as it is, NAME@0.5 half edited,
    and NAME@-1 refuses, because the direction is added. A field `steering` of a request does the
    same. Nothing is written (docs/serve.md).

    \b
    abl-mlx serve SomeModel --direction d.safetensors
    """
    from abl_mlx.choices import SteerOptions
    from abl_mlx.commands import serve as serving
    from abl_mlx.serving.door import Door

    own = {name: chosen.pop(name) for name in ("port", "runtime", "max_tokens", "slots", "context")}
    door = Door(host, frozenset(one.rstrip("/") for one in origins))
    serving.serve(model, SteerOptions.of(**chosen), serving.Serving(door, **own))


@cli.command()
@click.argument("model")
@revision_flag()
@click.option(
    "--port",
    default=0,
    type=click.IntRange(0, 65535),
    help="Listen on this port of 127.0.0.1. Default: a free one.",
)
@click.option("--open/--no-open", "opens", default=True, help="Open a browser. Default: yes.")
@runtime_flag
@steered_flags
@condition_flag
@unconditional_flag
def studio(model: str, port: int, opens: bool, runtime: str | None, **chosen: Any) -> None:
    """Show MODEL and its direction in a browser: talk to it before and after the edit.

    A web app on this machine, whose address with its secret is printed. It sends nothing
    elsewhere, and writes nothing but what is asked for (docs/studio.md).

    \b
    abl-mlx studio demo
    """
    from abl_mlx.choices import SteerOptions
    from abl_mlx.studio import launch

    options = SteerOptions.of(**chosen)
    launch.launch(model, options, port=port, opens=opens, runtime=runtime)
