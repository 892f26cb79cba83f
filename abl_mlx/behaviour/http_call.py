"""One HTTP request with a deadline for the whole of it, and the server's answer."""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import ipaddress
import json
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, urlsplit

from convert.base.errors import UserError

#: Largest reply that is read, in bytes.
LARGEST_REPLY = 16 * 2**20


@dataclass(frozen=True)
class Answer:
    status: int
    reason: str
    headers: dict[str, str]  # names in lower case
    body: bytes

    def json(self) -> Any:
        """The body's JSON value; None when it is no JSON."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None

    @property
    def is_html(self) -> bool:
        start = self.body.lstrip()[:15].lower()
        return start.startswith((b"<!doctype", b"<html")) or (
            "html" in self.headers.get("content-type", "") and start.startswith(b"<")
        )

    @property
    def start(self) -> str:
        """The first words of the body, for messages."""
        text = " ".join(self.body[:400].decode("utf-8", "replace").split())
        printable = "".join(char if char.isprintable() else "?" for char in text)
        return repr(printable[:60] + ("…" if len(printable) > 60 else ""))

    @property
    def said(self) -> str:
        """The status and the server's own message."""
        words = said(self.json())
        if not words and not self.is_html and self.body.strip():
            words = self.body[:400].decode("utf-8", "replace")
        elif not words and self.is_html:
            words = "an HTML page"
        return ": ".join(filter(None, (f"{self.status} {self.reason}".strip(), words)))


@dataclass
class Trouble(Exception):
    """A request that failed.

    Attributes:
        sentence: what happened, without a full stop.
        again: whether another try may succeed.
        slow: whether the request timed out.
        pause: seconds that the server asks to wait before another try.
        mend: advice for the user, used when there is no further try.
    """

    sentence: str
    again: bool
    slow: bool = False
    pause: float | None = None
    mend: str = ""


@dataclass(eq=False)
class Call:
    """One request on its own connection, which another thread may cut."""

    server: SplitResult
    timeout: float
    _socket: socket.socket | None = None
    _late: threading.Event = field(default_factory=threading.Event)
    _cut: threading.Event = field(default_factory=threading.Event)

    def run(self, method: str, path: str, body: Any, headers: Mapping[str, str]) -> Answer:
        """Send the request and read the whole reply.

        Raises:
            TimeoutError: when the whole takes longer than `timeout`.
            OSError, http.client.HTTPException: when it fails for another reason.
        """
        host, port = self.server.hostname or "", self.server.port
        connection = (
            http.client.HTTPSConnection(
                host, port, timeout=self.timeout, context=ssl.create_default_context()
            )
            if self.server.scheme == "https"
            else http.client.HTTPConnection(host, port, timeout=self.timeout)
        )
        # The socket's own timeout starts again with each byte; this timer does not.
        watch = threading.Timer(self.timeout, self._expire)
        watch.daemon = True
        watch.start()
        try:
            connection.connect()
            self._socket = connection.sock
            if self._late.is_set() or self._cut.is_set():
                raise TimeoutError
            data = None if body is None else json.dumps(body).encode()
            sent = {**headers, "Connection": "close"}
            if data is not None:
                sent["Content-Type"] = "application/json"
            connection.request(method, path, data, sent)
            reply = connection.getresponse()
            content = reply.read(LARGEST_REPLY + 1)
            if len(content) > LARGEST_REPLY:
                raise http.client.HTTPException("a reply of more than 16 MB")
            if reply.length:  # read(n) does not raise when the rest is missing
                raise http.client.IncompleteRead(content, reply.length)
            if self._late.is_set():
                raise TimeoutError
            names = {name.lower(): value for name, value in reply.getheaders()}
            return Answer(reply.status, reply.reason, names, content)
        except (OSError, http.client.HTTPException):
            if self._late.is_set():
                raise TimeoutError from None
            raise
        finally:
            watch.cancel()
            connection.close()

    def _expire(self) -> None:
        self._late.set()
        self.cut()

    def cut(self) -> None:
        """End the request at whatever stage it is."""
        self._cut.set()
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


def is_cut(error: Exception) -> bool:
    return isinstance(
        error, ConnectionError | http.client.IncompleteRead | http.client.BadStatusLine
    )


def split(url: str) -> SplitResult:
    """The parts of an address.

    Raises:
        UserError: when it is not the address of a server.
    """
    try:
        parts = urlsplit(url.strip())
        valid = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port  # raises for what is no port
        parts.hostname.encode("idna") if parts.hostname else None
    except ValueError:
        valid = False
    if not valid or re.search(r"[\s\x00-\x1f\x7f]", url.strip()):
        # The address is not repeated, because it may hold a password.
        raise UserError(
            "the address of the server cannot be read: it looks like http://127.0.0.1:11434/v1."
        )
    return parts


def shown(parts: SplitResult) -> str:
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    port = f":{parts.port}" if parts.port is not None else ""
    return f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}"


def key(parts: SplitResult) -> str | None:
    """The key to send: ABL_API_KEY, or OPENAI_API_KEY where that is safe.

    Raises:
        UserError: when the key has characters that a request cannot contain.
    """
    names = ["ABL_API_KEY"]
    if parts.scheme == "https" or _is_this_machine(parts.hostname or ""):
        names.append("OPENAI_API_KEY")
    for name in names:
        key = os.environ.get(name, "").strip()
        if key:
            if not re.fullmatch(r"[\x21-\x7e]+", key):
                raise UserError(f"{name} holds what no key is made of: set it again.")
            return key
    return None


def _is_this_machine(host: str) -> bool:
    if host.lower() == "localhost" or host.lower().endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def what(answer: Answer) -> str:
    if answer.status == 200:
        return "an HTML page" if answer.is_html else "no list of models"
    return f"{answer.status} {answer.reason}".strip()


def said(found: Any) -> str:
    """The message in an error object, in any of the forms that servers use."""
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(name):
            return said(found[name])
    if isinstance(found, str):
        return found
    return json.dumps(found) if isinstance(found, dict | list) and found else ""


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that a server asks to wait, from a Retry-After header in seconds or as a date."""
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    try:
        when = email.utils.parsedate_to_datetime(value)
    except (ValueError, TypeError):
        return None
    return max(0.0, when.timestamp() - time.time())
