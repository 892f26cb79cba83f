"""Real HTTP servers for the tests of `eval`: one that behaves as it is told, badly mostly."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REFUSAL = "I'm sorry, but I can't help with that."
ANSWER = "Take two eggs, beat them well, and fry them in a little butter."

#: What a handler does with a chat request: gets the handler, the request and its number from 0.
Script = Callable[["Handler", dict[str, Any], int], None]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def send(
        self, status: int, body: str | bytes, kind: str = "application/json", **headers: str
    ) -> None:
        data = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def say(self, reply: str | None, **more: Any) -> None:
        """Answer as OpenAI's API does."""
        message = {"role": "assistant", "content": reply, **more}
        self.choose({"message": message})

    def choose(self, said: dict[str, Any]) -> None:
        """Answer with one choice."""
        choice = {"index": 0, "finish_reason": "stop", **said}
        self.send(200, json.dumps({"object": "chat.completion", "choices": [choice]}))

    def do_GET(self) -> None:
        self.server.gets.append((self.path, dict(self.headers)))
        if self.server.listing is not None:
            self.server.listing(self)
        elif self.path == f"{self.server.root}/models":
            owner = self.server.owner
            listed = [{"id": name, "owned_by": owner} for name in self.server.models]
            self.send(200, json.dumps({"object": "list", "data": listed}))
        else:
            self.send(404, "<html><body>Not found</body></html>", "text/html")

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.posts)
            self.server.posts.append((self.path, dict(self.headers), request))
        if self.path not in [f"{self.server.root}/{route}" for route in self.server.routes]:
            self.send(404, "Not Found", "text/plain")
            return
        self.server.script(self, request, number)


class Server(ThreadingHTTPServer):
    """A context manager; `url` is its API's address.

    Args:
        script: what it does with a chat request; without one it refuses prompts that hold a word of
            ``refused``, and answers the others.
        port: a free one for 0.
    """

    daemon_threads = True
    # A server that is started again where another was shall get its port.
    allow_reuse_address = True

    def __init__(
        self,
        script: Script | None = None,
        *,
        port: int = 0,
        models: tuple[str, ...] = ("tiny",),
        root: str = "/v1",
        listing: Callable[[Handler], None] | None = None,
        refused: Callable[[str], bool] = lambda prompt: False,
        routes: tuple[str, ...] = ("chat/completions",),
        owner: str = "someone",
    ) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.script = script or self.behave
        self.models = models
        self.root = root
        self.listing = listing
        self.refused = refused
        self.routes = routes
        self.owner = owner
        self.lock = threading.Lock()
        self.gets: list[tuple[str, dict[str, str]]] = []
        self.posts: list[tuple[str, dict[str, str], dict[str, Any]]] = []

    def behave(self, handler: Handler, request: dict[str, Any], number: int) -> None:
        if "prompt" in request:
            handler.choose({"text": REFUSAL if self.refused(request["prompt"]) else ANSWER})
            return
        handler.say(REFUSAL if self.refused(request["messages"][0]["content"]) else ANSWER)

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.root}"

    @property
    def asked(self) -> list[str]:
        """The prompts that came, in order."""
        return [request["messages"][0]["content"] for _, _, request in self.posts]

    def die(self) -> None:
        """Stop listening, as a killed process does."""
        self.socket.close()
        threading.Thread(target=self.shutdown, daemon=True).start()

    def handle_error(self, *args: Any) -> None:
        pass  # clients that leave are what is tested

    def __enter__(self) -> Server:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def _serve(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # its socket may be closed under it
            self.serve_forever(0.02)

    def __exit__(self, *args: Any) -> None:
        self.shutdown()
        self.server_close()


def dribble(handler: Handler, request: dict[str, Any], number: int) -> None:
    """A byte now and then, for as long as anybody listens."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        time.sleep(0.05)


def headers_without_end(handler: Handler, request: dict[str, Any], number: int) -> None:
    """The same within the headers."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
    while True:
        handler.wfile.write(b"a")
        time.sleep(0.05)
