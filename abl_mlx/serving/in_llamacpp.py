"""A GGUF in llama.cpp, with the edit as a LoRA adapter whose scale each request chooses.

llama.cpp's server runs on a port of its own. The server here stands in front of it: it checks where
requests come from, and turns a strength into llama.cpp's field ``lora``. llama.cpp batches only
requests of one scale, and drops a prefix that was computed with another one.
"""

from __future__ import annotations

import http.client
import json
import re
from typing import Any
from urllib.parse import urlsplit

from abl_mlx.serving.dials import Dials, UnknownModel
from abl_mlx.serving.door import Door, Front, Server

#: The model in an answer. Within a text of an answer the marks would be escaped.
_MODEL = re.compile(rb'"model":"(?:[^"\\]|\\.)*"')

#: The largest request, in bytes.
_LARGEST = 64 << 20


def listen(
    address: str, dials: Dials, door: Door, port: int, template_values: dict[str, Any],
    max_tokens: int,
) -> Server:  # fmt: skip
    """A bound server, which does not answer yet.

    Args:
        address: that of llama.cpp's own server.
        dials: the names of the model.
        door: who is let in.
        port: the port on which to listen; 0 for a free one.
        template_values: variables that the chat template gets where a request sets none.
        max_tokens: the longest reply of a request that names no length, in tokens.

    Raises:
        OSError: when the address cannot be used.
    """
    about = {
        "door": door, "dials": dials, "upstream": address, "template_values": template_values,
        "max_tokens": max_tokens,
    }  # fmt: skip
    return Server(door, dials, port, type("Handler", (_Handler,), about))


class _Handler(Front):
    """Hands requests on to llama.cpp's server."""

    upstream: str
    template_values: dict[str, Any]
    max_tokens: int

    def do_GET(self) -> None:
        if not self.let_in():
            return
        if self.path.startswith("/v1/models"):
            self.send_models(self.path)
        elif self.path == "/health":
            self._hand_on("GET", None)
        else:
            self.fail(404, f"there is no {self.path[:100]} here.")

    def do_POST(self) -> None:
        if not self.let_in():
            return
        if self.path not in self.ROUTES:
            self._drain()
            self.fail(404, f"there is no {self.path[:100]} here.")
            return
        try:
            asked = self._steered(self._body())
        except UnknownModel as error:
            self.fail(404, str(error), "model_not_found")
        except ValueError as error:
            self.fail(400, str(error))
        else:
            self._hand_on("POST", json.dumps(asked).encode(), asked["model"])

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > _LARGEST:
            raise ValueError(f"a request needs a Content-Length of at most {_LARGEST} bytes.")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise ValueError("the request is no JSON.") from None
        if not isinstance(body, dict):
            raise ValueError("the request must be a JSON object.")
        return body

    def _steered(self, body: dict[str, Any]) -> dict[str, Any]:
        """A request to llama.cpp."""
        model, steering = body.get("model"), body.pop("steering", None)
        if model is not None and not isinstance(model, str):
            raise ValueError("model must be a string.")
        dial = self.dials.of(model, steering)
        given = body.get("chat_template_kwargs")
        values = {**self.template_values, **(given if isinstance(given, dict) else {})}
        body |= {"model": dial.name, "lora": [{"id": 0, "scale": dial.strength}]}
        body["chat_template_kwargs"] = values
        body.setdefault("reasoning_format", "auto")
        if body.get("max_completion_tokens") is None and body.get("max_tokens") is None:
            body["max_tokens"] = self.max_tokens
        if body.get("temperature") is None:
            body["temperature"] = 0  # as in MLX
        return body

    def _hand_on(self, method: str, body: bytes | None, name: str = "") -> None:
        """Send a request to llama.cpp and its answer to the client, line by line.

        Args:
            name: the model's name at this strength, which stands in the answer for llama.cpp's.
        """
        place = urlsplit(self.upstream)
        connection = http.client.HTTPConnection(place.hostname or "", place.port)
        try:
            connection.request(method, self.path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
        except (OSError, http.client.HTTPException):
            connection.close()
            self.fail(503, "llama.cpp does not answer: start the server again.")
            return
        try:
            self.send_response(answer.status)
            kind = answer.getheader("Content-Type", "application/json")
            self.send_header("Content-Type", kind)
            self.send_header("Cache-Control", "no-cache")
            self.send_cors()
            self.end_headers()
            named = f'"model":{json.dumps(name)}'.encode()
            while line := answer.readline():
                self.wfile.write(_MODEL.sub(lambda _: named, line, count=1))
                self.wfile.flush()
        finally:
            connection.close()  # which ends the reply if the client has gone
