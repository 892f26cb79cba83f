"""`abl-mlx eval`: ask a model the held-out prompts and record what it did; nothing is edited.

The record is one dict. Each metric is a function of this module, or of a module of its own, that
returns the keys it adds.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from abl_mlx import __version__, evaluate, memory, models, sources
from abl_mlx.clock import Clock
from abl_mlx.models import ChatModel
from abl_mlx.options import Options
from abl_mlx.pipeline import load_prompts
from abl_mlx.refusals import rates
from abl_mlx.sources import Source
from convert.atomic import check_new

Record = dict[str, Any]


def evaluate_model(text: str, options: Options) -> Record:
    """`abl-mlx eval`: refusal rate and over-refusal of a model or a GGUF; no edit."""
    clock = Clock()
    source = sources.resolve(text)
    sets = load_prompts(source, options)
    memory.check(source, asked=options.memory_check)
    name = source.name
    with ExitStack() as stack:
        if source.is_gguf and evaluate.llamacpp_is_there():
            answer, runtime = evaluate.in_llamacpp(source.path), "llama.cpp"
        else:
            with clock.step("load the model"):
                chat = load_any(source)
            answer, runtime = evaluate.in_mlx(chat, batch_size=options.batch_size), "mlx-lm"
        if options.save_replies is not None:
            check_new(options.save_replies)
        stack.enter_context(clock.step("ask the held-out prompts"))
        behaviour = evaluate.behaviour(
            answer, sets.harmful.test, sets.harmless.test, max_tokens=options.max_tokens
        )
        record = {"abl_mlx": __version__, "source": name, "runtime": runtime}
        record |= behaviour.record()
        if sets.borderline is not None:
            replies = answer(sets.borderline.texts, options.max_tokens)
            record |= evaluate.refusal_record("borderline", rates(replies, sets.borderline))
    if options.save_replies is not None:
        evaluate.save_replies(options.save_replies, {name: behaviour}, sets)
    return record | {"seconds": clock.seconds}


def load_any(source: Source) -> ChatModel:
    """A folder or a GGUF as a model in MLX."""
    if not source.is_gguf:
        return models.load(source.path)
    from abl_mlx import gguf_model
    from convert.gguf_file import GgufSource

    with GgufSource(source.path) as gguf:
        return gguf_model.load(gguf)[0]
