"""Opens the judge that ``--judge`` names: a local model or a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from abl_mlx.behaviour.endpoint import Endpoint, is_endpoint
from abl_mlx.behaviour.judge import CONTEXT, Judge, judge_with
from abl_mlx.eval_choices import EvalOptions
from abl_mlx.support.clock import Clock
from convert.base.errors import UserError


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
