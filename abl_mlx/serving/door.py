"""What every request must pass before it is answered, and the list of models.

A server on the loopback interface can be reached by any page in a browser on the same machine: by a
request from another origin, or by a name whose address was changed to 127.0.0.1 (DNS rebinding).
So the headers Origin and Host are checked.
"""

from __future__ import annotations

import ipaddress
import json
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from abl_mlx.serving.dials import Dials, UnknownModel
from abl_mlx.support.console import say

#: Names of this machine that no server of names elsewhere gives an address. The last one is that by
#: which programs in Docker's containers call the machine on which they run.
_OURS = frozenset({"localhost", "host.docker.internal"})

#: The bytes of a refused request that are read at most.
_DRAINED = 1 << 20

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True)
class Door:
    """Who is let in.

    Attributes:
        host: the name or address on which the server listens.
        origins: the origins of pages that may send requests, besides the server's own.
    """

    host: str = "127.0.0.1"
    origins: frozenset[str] = field(default_factory=frozenset)

    def refusal(self, host: str | None, origin: str | None) -> str | None:
        """Why a request is refused; None where it is let in.

        Args:
            host: the header Host.
            origin: the header Origin, which browsers send.
        """
        name = _name(f"//{host}") if host else None
        if name is None or not self._is_ours(name):
            return "this server is not called by that name: use its address in the header Host."
        if origin is None or origin in self.origins:
            return None
        if urlsplit(origin).scheme == "http" and origin == f"http://{host}":
            return None
        return (
            "pages of that origin may not send requests: start the server with --allow-origin and "
            "the origin."
        )

    def _is_ours(self, name: str) -> bool:
        if name in _OURS or name in (self.host.lower(), socket.gethostname().lower()):
            return True
        try:  # an address cannot be rebound
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or self.host.lower() not in _LOOPBACK


class Server(ThreadingHTTPServer):
    """A server of HTTP whose threads end with the program."""

    daemon_threads = True

    def __init__(self, door: Door, dials: Dials, port: int, handler: Callable[..., Any]) -> None:
        """Listen on the door's host.

        Args:
            door: who is let in.
            dials: the names of the model.
            port: the port; 0 for a free one.
            handler: makes the handler of a request.

        Raises:
            OSError: when the address cannot be used.
        """
        self.dials = dials
        found = socket.getaddrinfo(
            door.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        self.address_family, *_, address = found[0]
        super().__init__(address[:2], handler)  # type: ignore[arg-type]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Tell an error in a line; that a client has gone is none."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):
            say(f"{type(error).__name__} in an answer: {error}")

    def close(self) -> None:
        """Stop listening."""
        self.server_close()

    @property
    def url(self) -> str:
        """The address that clients are given."""
        host, port = self.server_address[:2]
        name = str(host)
        return f"http://{f'[{name}]' if ':' in name else name}:{port}/v1"


def _name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


class Front(BaseHTTPRequestHandler):
    """The part of a handler of requests that all servers here share."""

    door: Door
    dials: Dials

    #: The routes of requests for a reply.
    ROUTES = frozenset({"/v1/chat/completions", "/chat/completions", "/v1/completions"})

    def let_in(self) -> bool:
        """Whether a request may be answered; if not, says so."""
        refused = self.door.refusal(self.headers.get("Host"), self.headers.get("Origin"))
        if refused is not None:
            self._drain()
            self.fail(403, refused)
        return refused is None

    def _drain(self) -> None:
        """Read a short body, because closing a connection before loses the answer."""
        length = self.headers.get("Content-Length", "")
        if length.isdecimal():
            self.rfile.read(min(int(length), _DRAINED))

    def fail(self, status: int, message: str, code: str | None = None) -> None:
        """Answer with an error in OpenAI's form."""
        kind = "invalid_request_error" if status < 500 else "server_error"
        error = {"message": message, "type": kind, "param": None, "code": code}
        self.send_json(status, {"error": error})

    def send_json(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_cors()
        self.end_headers()
        self.wfile.write(body)

    def send_cors(self) -> None:
        """Let a page of an allowed origin read the answer."""
        origin = self.headers.get("Origin")
        if origin in self.door.origins:
            self.send_header("Access-Control-Allow-Origin", str(origin))
            self.send_header("Access-Control-Allow-Methods", "GET, POST, OPTIONS")
            self.send_header("Access-Control-Allow-Headers", "*")
            self.send_header("Vary", "Origin")

    def send_models(self, path: str) -> None:
        """Answer ``/v1/models``, or ``/v1/models/NAME``."""
        asked = unquote(path.removeprefix("/v1/models").strip("/"))
        entry = {"object": "model", "created": int(time.time()), "owned_by": "abl-mlx"}
        if not asked:
            named = [{"id": one.name, **entry} for one in self.dials.listed]
            self.send_json(200, {"object": "list", "data": named})
            return
        try:
            self.send_json(200, {"id": self.dials.of(asked).name, **entry})
        except UnknownModel as error:
            self.fail(404, str(error), "model_not_found")
        except ValueError as error:
            self.fail(400, str(error))

    def do_OPTIONS(self) -> None:
        if self.let_in():
            self.send_response(204)
            self.send_cors()
            self.end_headers()
