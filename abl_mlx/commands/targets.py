"""Opens the targets of `eval`: a model in MLX, a GGUF in llama.cpp, or a server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from abl_mlx.behaviour import evaluate
from abl_mlx.behaviour.completions import Completions
from abl_mlx.behaviour.endpoint import Endpoint, is_endpoint
from abl_mlx.behaviour.target import Target
from abl_mlx.commands import thinking_switch
from abl_mlx.eval_choices import EvalOptions
from abl_mlx.models import gguf_template, given_template, memory, prompt_tokens
from abl_mlx.outputs.model_file import ModelFile, find_model
from abl_mlx.support.clock import Clock
from abl_mlx.support.console import say
from convert.base.errors import UserError

RUNTIMES = ("mlx-lm", "llama.cpp", "llama-server")
"""The accepted values of ``--runtime``."""


def find(text: str, template: str | None) -> ModelFile | None:
    """The files of the model that ``text`` names; None for the address of a server.

    Args:
        template: the value of ``--template``.

    Raises:
        UserError: when there is none, or a server is to write prompts with a template.
    """
    if not is_endpoint(text):
        return find_model(text, template)
    if template not in (None, given_template.PLAIN):
        raise UserError(
            f"--template {template}: a server writes conversations with its own template; give the "
            "model as a folder or a .gguf file, or --template plain for completions."
        )
    return None


@contextmanager
def opened(
    text: str, file: ModelFile | None, options: EvalOptions, clock: Clock, model: str | None
) -> Iterator[Target]:
    """Context manager with a loaded model or a server, which is released at the end.

    Args:
        text: the target as the user typed it.
        file: the result of `find`.
        options: the chosen options.
        clock: times the steps.
        model: the model's name on a server; None if the server has only one.

    Raises:
        UserError: when the model cannot be loaded, or the server cannot be reached.
    """
    with ExitStack() as stack:
        if file is None:
            with clock.step("meet the server"):
                given = given_template.read(options.chatting.template)
                endpoint = (
                    Endpoint(text, model, options.asking)
                    if given is None
                    else Completions(text, model, options.asking, given.ready({}))
                )
            if given is None:
                thinking_switch.check_server(endpoint, options.prompting.thinking)
            yield Target(
                endpoint.name, "server", endpoint.identity, endpoint.ask, model=endpoint.model,
                note=given_template.note(given), wholes=endpoint.wholes, endpoint=endpoint,
            )  # fmt: skip
            return
        name, path, thinking = file.source.name, file.source.path, options.prompting.thinking
        runtime = runtime_of(file, options.targeting.runtime)
        file.check_template()
        note = given_template.note(file.given)
        identity = {"model": name, "files": file.fingerprint(), "runtime": runtime}
        if runtime == "mlx-lm":
            with clock.step("load the model"):
                memory.check(file.source.title, file.size, asked=options.memory_check)
                chat = file.load()
            thinking_switch.check(chat, thinking)
            batch = options.replying.batch_size
            ask = evaluate.stream_in_mlx(chat, batch_size=batch)
            wholes = evaluate.wholes_in_mlx(chat, batch_size=batch)
            yield Target(name, runtime, identity, ask, chat=chat, note=note, wholes=wholes)
            return
        thinking_switch.check_gguf(path, file.given, thinking)
        template = file.given.ready({}) if file.given else gguf_template.template_of(path)
        if options.prompting.system and template is not None and not template.takes_system:
            say(prompt_tokens.without_system_role(name))
        memory.check(file.source.title, file.size, asked=options.memory_check)
        if runtime == "llama.cpp":
            in_llamacpp = evaluate.InLlamaCpp(
                path, given=file.given, batch_size=options.replying.batch_size
            )
            ask, wholes, served = in_llamacpp.stream, in_llamacpp.wholes, None
            hold = in_llamacpp.opened
        else:
            from abl_mlx.behaviour.llama_server import LlamaServer

            with clock.step("start llama-server"):
                server = stack.enter_context(LlamaServer(path, options.asking, given=file.given))
            served = server.endpoint
            ask, wholes, hold = served.ask, served.wholes, None
        yield Target(
            name, runtime, identity, ask, gguf=path, note=note, wholes=wholes, given=file.given,
            endpoint=served, opened=hold,
        )  # fmt: skip


def runtime_of(file: ModelFile, wanted: str | None) -> str:
    """The runtime for a model on this machine, one of `RUNTIMES`; a folder always runs in MLX.

    Raises:
        UserError: when the runtime of ``--runtime`` is not installed.
    """
    server = shutil.which("llama-server")
    if file.runtimes == ("mlx-lm",):
        return "mlx-lm"
    if wanted == "llama-server" and server is None:
        raise UserError("--runtime llama-server: no llama-server is on the PATH.")
    if wanted is not None:
        return wanted
    if evaluate.llamacpp_is_there():
        return "llama.cpp"
    return "mlx-lm" if server is None else "llama-server"
