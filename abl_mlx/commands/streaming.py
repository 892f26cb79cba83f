"""`--stream`: models that are larger than the memory are measured layer by layer, from their files.

docs/streaming.md says what is read when, and which figures a streamed run has.
"""

from __future__ import annotations

from typing import TypeVar

from abl_mlx.choices import MeasureOptions, RunOptions
from abl_mlx.directions import methods
from abl_mlx.inputs import thinking
from abl_mlx.models import generation, memory, split_model, sweeps
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.outputs.model_file import ModelFile
from abl_mlx.support import ranks
from abl_mlx.support.console import percent, say
from abl_mlx.support.flags import first_given
from abl_mlx.support.units import in_bytes
from convert.base.errors import UserError
from convert.base.hf_config import read_config

Options = TypeVar("Options", MeasureOptions, RunOptions)


def chosen(model: ModelFile, options: Options, whole: str | None = None) -> Options:
    """The options, with ``stream`` for a model that is streamed.

    It is streamed if the user asked for it, or if it does not fit in memory and every flag allows
    it. Says on stderr what is done.

    Args:
        model: the model.
        options: the choices of the command.
        whole: a flag of the command that needs the whole model in memory, if it was given.

    Raises:
        UserError: when a flag needs the whole model in memory.
    """
    machine, size, asked = memory.machine(), model.size, options.stream
    if asked and ranks.everyone() > 1:
        raise UserError("--stream runs in one process: leave it out, or mlx.launch.")
    if ranks.lockstep():
        _check_split(model, options)
    large = ranks.everyone() == 1 and options.memory_check and memory.needed(size) > machine.total
    flag = whole or _first_whole(options)
    if flag is not None and (asked or (large and size > machine.total)):
        why = "--stream keeps one layer in memory at a time"
        if not asked:
            why = (
                f"{model.source.title} has {in_bytes(size)} of weights, but this machine has "
                f"{in_bytes(machine.total)} of memory, so one layer of it is in memory at a time "
                "(--no-memory-check tries all the same)"
            )
        raise UserError(f"{flag} needs the whole model in memory, and {why}: leave it out.")
    if not asked and (flag is not None or not large):
        memory.check(model.source.title, size, asked=options.memory_check)
        return options
    why = "" if asked else f"; this machine has {in_bytes(machine.total)} of memory"
    say(
        f"{model.source.title} is streamed: {in_bytes(size)} are read in each sweep over the "
        f"layers{why}. Directions, separation, and the choice by first reply tokens and KL are as "
        "in memory; the model is not asked for replies first."
    )
    if isinstance(options, RunOptions):
        say(
            "  replies before and after come from llama.cpp where it runs the files; in MLX each "
            f"token of up to {generation.STREAMED} replies takes a sweep (--max-tokens N)"
        )
    return options.but(stream=True)


def _first_whole(options: MeasureOptions | RunOptions) -> str | None:
    """The first flag that needs gradients, weights, or replies of many tokens."""
    how = options.measuring
    prompting, finding, searching = how.prompting, how.finding, how.searching
    method = methods.named(finding.method)
    flags: list[tuple[str, object]] = [
        (f"--thinking {prompting.thinking}", prompting.thinking != thinking.OFF),
        ("--keep", prompting.keep),
        ("--keep-system", prompting.keep_system),
        ("--search", searching.search),
        ("--minutes", searching.minutes),
        ("--learn-strengths", searching.learn_strengths),
        (f"--method {method.name}", bool(method.refine) or method.name == methods.ROME),
        ("--heads", how.editing.heads),
        ("--experts", how.editing.experts),
    ]
    if isinstance(options, RunOptions):
        flags += [("--gguf", options.gguf), ("--recognition", options.recognition)]
    else:
        flags += [
            ("--rank-parts", options.rank_parts),
            ("--explain", options.explain),
            ("--refusal-cliff", options.refusal_cliff),
        ]
    return first_given(flags)


def _check_split(model: ModelFile, options: MeasureOptions | RunOptions) -> None:
    """Check that no flag looks at what ranks have only parts of.

    Raises:
        UserError: naming the flag.
    """
    how = options.measuring
    method = methods.named(how.finding.method)
    flags: list[tuple[str, object]] = [
        ("--heads", how.editing.heads),
        ("--method rome", method.name == methods.ROME),
    ]
    if isinstance(options, MeasureOptions):
        flags += [
            ("--rank-parts", options.rank_parts),
            ("--refusal-cliff", options.refusal_cliff),
        ]
    if model.folder is not None and split_model.by_layers(read_config(model.folder)):
        flags += [
            ("--experts", how.editing.experts),
            ("--learn-strengths", how.searching.learn_strengths),
            (f"--method {method.name}", "cones" in (method.refine or "")),
        ]
    flag = first_given(flags)
    if flag is not None:
        raise UserError(
            f"{flag} needs every layer whole in one process, and --split-model leaves each a part: "
            "leave one of them out."
        )


def tell(chat: ChatModel) -> None:
    """Say how much a streamed model read, how fast, and how long passes waited for it."""
    streaming = sweeps.of(chat.model)
    if streaming is None or not streaming.stages.traffic.bytes:
        return
    traffic = streaming.stages.traffic
    rate = traffic.bytes / max(1e-9, traffic.reading) / 1e9
    say(
        f"  streamed: {in_bytes(traffic.bytes)} read at {rate:.2f} GB/s, waited for "
        f"{traffic.waiting:.1f} seconds ({percent(traffic.share_waited)} of the time)"
    )
