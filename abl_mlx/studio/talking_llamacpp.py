"""Replies of a GGUF in llama.cpp, with the edit as a LoRA adapter at the scale of each request."""

from __future__ import annotations

import http.client
import json
import queue
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from abl_mlx.behaviour.refusals import classify
from abl_mlx.choices import SteerOptions
from abl_mlx.commands import serve
from abl_mlx.commands.session import Steered
from abl_mlx.inputs.thinking import template_values
from abl_mlx.studio import asked
from abl_mlx.studio.desk import Event
from convert.base.errors import UserError

#: Seconds in which a reply waits for its next piece before other work takes its turn.
_TURN = 0.02

#: How many replies are generated at the same time: both columns of two pages.
_SLOTS = 4


@dataclass
class _Server:
    """llama.cpp with one adapter.

    Attributes:
        edit: identifies the edit of the adapter.
        users: how many replies are being read.
    """

    edit: str
    address: str
    stack: ExitStack
    users: int = 0


class Talking:
    """The model in llama.cpp, which starts with the first question.

    Another direction or other layers need another adapter, with which llama.cpp starts anew; the
    strength is a scale of each request.
    """

    def __init__(self, text: str, path: Path, runtime: str, options: SteerOptions) -> None:
        """
        Args:
            text: the model, as the user typed it.
            path: its .gguf file.
            runtime: ``llama.cpp`` or ``llama-server``.
            options: those of the command line.
        """
        self._text, self._path, self._options = text, path, options
        self._serving = serve.Serving(runtime=runtime, slots=_SLOTS)
        self._folder = tempfile.TemporaryDirectory(prefix="abl-mlx-talk-")
        self._servers: list[_Server] = []

    def reply(self, steered: Steered, body: Mapping[str, Any]) -> Iterator[Event]:
        """Yield the events of `talking.reply`."""
        chosen, prompt = asked.edited(steered, body), asked.conversation(steered, body)
        request = {
            "messages": prompt.messages(),
            "max_tokens": asked.whole(body, "max_tokens", 512, 1, 100_000),
            "temperature": asked.number(body, "temperature", 0, 0, 5),
            "chat_template_kwargs": template_values(prompt.thinking),
            "reasoning_format": "none",
            "stream": True,
            "lora": [{"id": 0, "scale": chosen.strength}],
        }
        yield {"told": "llama.cpp loads the model"}
        server = self._server(chosen)
        server.users += 1
        pieces, done = [], None
        try:
            for line in _lines(server.address, request):
                if line is None:
                    yield {}  # other work takes its turn
                    continue
                (choice,) = json.loads(line)["choices"]
                done = choice.get("finish_reason") or done
                if piece := choice["delta"].get("content"):
                    pieces.append(piece)
                    yield {"text": piece}
        finally:
            server.users -= 1
            self._let_go()
        yield {
            "done": done,
            "tokens": len(pieces),
            "verdict": classify("".join(pieces), prompt.text).value,
            "condition": None,
        }

    def _server(self, chosen: asked.Edited) -> _Server:
        """llama.cpp with the adapter of an edit; any will do for strength 0."""
        steered = chosen.steered
        recipe = steered.direction.metadata.get("recipe")
        layers = sorted(steered.editing.layers or ())
        edit = json.dumps([steered.direction.sha256, recipe, layers])
        for server in reversed(self._servers):
            if server.edit == edit or chosen.strength == 0:
                return server
        lora = Path(tempfile.mkdtemp(dir=self._folder.name), "edit.lora.gguf")
        options = replace(self._options, editing=steered.editing)
        serve.write_lora(self._text, steered.direction, options, lora)
        stack = ExitStack()
        address = stack.enter_context(serve.llamacpp(self._path, lora, self._serving))
        self._servers.append(_Server(edit, address, stack))
        self._let_go()
        return self._servers[-1]

    def _let_go(self) -> None:
        """End all but the last server, once nobody reads their replies."""
        for server in [one for one in self._servers[:-1] if not one.users]:
            self._servers.remove(server)
            server.stack.close()

    def close(self) -> None:
        """End all servers."""
        for server in self._servers:
            server.stack.close()
        self._servers = []
        self._folder.cleanup()


def _lines(address: str, request: Mapping[str, Any]) -> Iterator[str | None]:
    """Yield the data of a reply's events as they come, and None where none has come lately.

    Raises:
        UserError: when llama.cpp refuses the request, or does not answer.
    """
    place = urlsplit(address)
    connection = http.client.HTTPConnection(place.hostname or "", place.port)
    try:
        connection.connect()
    except OSError as error:
        raise UserError(f"llama.cpp does not answer: {error}.") from None
    wire = connection.sock
    found: queue.SimpleQueue[bytes | UserError | None] = queue.SimpleQueue()
    thread = threading.Thread(target=_read, args=(connection, request, found), daemon=True)
    thread.start()
    try:
        while True:
            try:
                line = found.get(timeout=_TURN)
            except queue.Empty:
                yield None
                continue
            if isinstance(line, UserError):
                raise line
            if line is None:
                return
            if line.startswith(b"data: {"):
                yield line[6:].decode()
    finally:
        with suppress(OSError):
            wire.shutdown(socket.SHUT_RDWR)  # which ends the reply
        thread.join()
        connection.close()


def _read(
    connection: http.client.HTTPConnection,
    request: Mapping[str, Any],
    found: queue.SimpleQueue[bytes | UserError | None],
) -> None:
    """Put the lines of an answer, and None or an error at its end."""
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(request), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            said = json.loads(answer.read()).get("error", {}).get("message", answer.reason)
            found.put(UserError(f"llama.cpp refuses the request: {said}."))
            return
        while line := answer.readline():
            found.put(line)
    except (OSError, ValueError, http.client.HTTPException) as error:
        found.put(UserError(f"llama.cpp does not answer: {error}."))
    else:
        found.put(None)
