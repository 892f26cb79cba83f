"""Opens the judge that ``--judge`` names: a local model or a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from abl_mlx.behaviour.endpoint import Endpoint, is_endpoint
from abl_mlx.behaviour.judge import CONTEXT, RUBRIC, Judge, judge_with
from abl_mlx.eval_choices import EvalOptions
from abl_mlx.inputs.sets import Prompt
from abl_mlx.support.clock import Clock
from abl_mlx.support.flags import said
from convert.base.errors import UserError
from convert.tokenizers.chat_template import TemplateError

if TYPE_CHECKING:
    from abl_mlx.outputs.model_file import ModelFile


@contextmanager
def opened(options: EvalOptions, clock: Clock) -> Iterator[Judge]:
    """Context manager with the judge that ``--judge`` names, which is released at the end.

    Raises:
        UserError: when the judge cannot be loaded, or its server cannot be reached.
    """
    from abl_mlx.behaviour import evaluate
    from abl_mlx.models import memory
    from abl_mlx.outputs.model_file import find_model

    judging = options.judging
    assert judging.judge is not None
    tokens = judging.judge_tokens
    if is_endpoint(judging.judge):
        with clock.step("meet the judge"):
            endpoint = Endpoint(judging.judge, judging.judge_model, options.asking)
        yield judge_with(lambda text: endpoint.reply(text, tokens))
        return
    if judging.judge_model is not None:
        raise UserError(
            f"--judge-model {judging.judge_model} names a model of a server, and --judge is none."
        )
    model = find_model(judging.judge)
    _check(model, judging.judge, tokens)
    memory.check(model.source.title, model.size, asked=options.memory_check)
    if "llama.cpp" in model.runtimes and evaluate.llamacpp_is_there():
        from abl_mlx.behaviour.llamacpp import LlamaCpp

        with clock.step("load the judge"):
            server = LlamaCpp(model.source.path, n_ctx=CONTEXT, n_parallel=1, lean=True)
        with server:
            yield judge_with(lambda text: server.chat([text], tokens)[0])
        return
    with clock.step("load the judge"), model:
        chat = model.load()
    in_mlx = evaluate.in_mlx(chat, batch_size=1)
    yield judge_with(lambda text: in_mlx([text], tokens)[0])


def _check(model: ModelFile, text: str, tokens: int) -> None:
    """Refuse, before anything is loaded, a model that cannot be asked the rubric.

    Args:
        text: the value of ``--judge``.
        tokens: the longest answer.
    """
    room, needed = model.context_length(), 0
    try:
        model.check_template()
        if room is not None and room < 4 * len(RUBRIC):
            needed = model.token_counter()(Prompt(RUBRIC)) + tokens
    except TemplateError as error:
        reason = said(error).partition(": ")[0]
        raise UserError(
            f"--judge {text}: {reason}: choose an instruction-tuned model as the judge."
        ) from None
    if room is not None and needed > room:
        raise UserError(
            f"--judge {text}: the question to a judge has {needed:,} tokens without the reply, and "
            f"the model's context {room:,}: choose a larger model as the judge."
        )
