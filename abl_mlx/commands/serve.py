"""`abl-mlx serve`: an OpenAI-compatible server on which each request chooses the strength."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from abl_mlx.behaviour.llama_server import LlamaServer
from abl_mlx.behaviour.llamacpp import LlamaCpp
from abl_mlx.choices import ApplyOptions, SteerOptions, Writing
from abl_mlx.commands import condition_choice, measure_apply, session, targets
from abl_mlx.commands.session import Steered
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.eval_choices import Asking
from abl_mlx.inputs import thinking
from abl_mlx.outputs.model_file import find_model
from abl_mlx.serving.dials import Dials
from abl_mlx.serving.door import Door, Server
from abl_mlx.support import interrupts
from abl_mlx.support.arrays import evaluate, let_go
from abl_mlx.support.console import say
from convert.base.errors import UsageError, UserError


@dataclass(frozen=True)
class Serving:
    """How a model is served.

    Attributes:
        door: where the server listens, and to whom.
        port: the port; 0 for a free one.
        runtime: what runs a GGUF, as for `eval`; None for the first available one.
        max_tokens: the longest reply of a request that names no length, in tokens.
        slots: with llama.cpp, how many requests are answered at the same time.
        context: with llama.cpp, the longest prompt and reply together, in tokens.
    """

    door: Door = field(default_factory=Door)
    port: int = 8080
    runtime: str | None = None
    max_tokens: int = 512
    slots: int = 4
    context: int = 4096


def serve(text: str, options: SteerOptions, serving: Serving) -> None:
    """Serve a model until Ctrl-C.

    Raises:
        UserError: when the model or the direction cannot be loaded, or the port is taken.
    """
    try:
        with opened(text, options, serving) as server:
            say(f"{server.dials.name} is served at {server.url}; Ctrl-C ends it")
            run(server)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES, errno.EADDRNOTAVAIL):
            raise
        raise UserError(
            f"port {serving.port} of {serving.door.host} cannot be used ({error.strerror}): choose "
            "another with --port, or --port 0 for a free one."
        ) from None


@contextmanager
def opened(text: str, options: SteerOptions, serving: Serving) -> Iterator[Server]:
    """Context manager with a bound server of a loaded model, which does not answer yet.

    Raises:
        UserError: when the model or the direction cannot be loaded.
        OSError: when the address cannot be used.
    """
    with find_model(text, options.chatting.template) as file:
        serving = replace(serving, runtime=targets.runtime_of(file, serving.runtime))
        dials = Dials(file.source.hub_id or file.source.title, options.editing.strength)
    in_runtime = _in_mlx if serving.runtime == "mlx-lm" else _in_llamacpp
    with in_runtime(text, options, serving, dials) as server, closing(server):
        yield server


def run(server: Server) -> None:
    """Answer requests until Ctrl-C."""
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        interrupts.forget()
        say("stopped")


@contextmanager
def _in_mlx(text: str, options: SteerOptions, serving: Serving, dials: Dials) -> Iterator[Server]:
    from abl_mlx.serving import in_mlx

    steered = session.load(text, options)
    evaluate(steered)  # another thread uses it
    conditional = condition_choice.when(steered.direction, steered.conditioning) is not None
    served = in_mlx.Served(
        steered.chat, dials, steered.turned,
        (lambda tokens: _met(steered, tokens)) if conditional else None,
        lambda strength: _check(steered, strength),
        thinking.template_values(thinking.modes(options.prompting.thinking)[-1]),
        serving.max_tokens,
    )  # fmt: skip
    _check(steered, dials.default)
    server, generator = in_mlx.listen(served, serving.door, serving.port)
    try:
        yield server
    finally:
        generator.stop_and_join()


def _check(steered: Steered, strength: float) -> None:
    if strength < 0:
        condition_choice.addition(steered.direction, strength)


def _met(steered: Steered, tokens: Sequence[int]) -> bool:
    decision = steered.decide(tokens)
    if decision is not None:
        say(str(decision))
    return decision is None or decision.met


@contextmanager
def _in_llamacpp(
    text: str, options: SteerOptions, serving: Serving, dials: Dials
) -> Iterator[Server]:
    from abl_mlx.serving import in_llamacpp

    _check_llamacpp(options)
    with tempfile.TemporaryDirectory(prefix="abl-mlx-serve-") as folder, ExitStack() as stack:
        lora = Path(folder, "edit.lora.gguf")
        write_lora(text, _direction(text, options), options, lora)
        with find_model(text) as file:
            path = file.source.path
        address = stack.enter_context(llamacpp(path, lora, serving))
        server = in_llamacpp.listen(
            address, dials, serving.door, serving.port,
            thinking.template_values(thinking.modes(options.prompting.thinking)[-1]),
            serving.max_tokens,
        )  # fmt: skip
        yield server


def _check_llamacpp(options: SteerOptions) -> None:
    """Check what only MLX does.

    Raises:
        UsageError: naming the flag.
    """
    if options.chatting.template is not None:
        raise UsageError(
            "--template: llama.cpp writes prompts with the file's own template; add --runtime "
            "mlx-lm."
        )
    if options.condition is not None:
        raise UsageError("--condition: an adapter holds no condition; add --runtime mlx-lm.")


def _direction(text: str, options: SteerOptions) -> Path | DirectionFile:
    if options.direction is not None:
        return options.direction
    direction = session.load(text, options).direction
    let_go()
    return direction


def write_lora(
    text: str, direction: Path | DirectionFile, options: SteerOptions, lora: Path
) -> None:
    """Write the edit of a GGUF at strength 1 as a LoRA adapter."""
    editing = options.editing.but(strength=1.0)
    # What a LoRA cannot hold, the biases, is told and not refused: an adapter is asked for.
    applying = ApplyOptions(editing, Writing(max_leak=1.0), memory_check=options.memory_check)
    record = measure_apply.apply(direction, text, [lora], applying)
    for one in record.written:
        if one.note:
            say(one.note)


@contextmanager
def llamacpp(path: Path, lora: Path, serving: Serving) -> Iterator[str]:
    """Context manager with the address of llama.cpp's own server, which runs inside."""
    if serving.runtime == "llama-server":
        asking = Asking(concurrency=serving.slots)
        with LlamaServer(path, asking, lora=lora, context=serving.context) as server:
            yield server.address
        return
    with LlamaCpp(path, n_ctx=serving.context, n_parallel=serving.slots, lora=lora) as llama:
        yield llama.address
