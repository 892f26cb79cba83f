"""One HTTP request with a deadline for all of it, and its answer."""

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
        """The body's value, or None when it is no JSON."""
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
        """The body's first words, to be shown."""
        text = " ".join(self.body[:400].decode("utf-8", "replace").split())
        printable = "".join(char if char.isprintable() else "?" for char in text)
        return repr(printable[:60] + ("…" if len(printable) > 60 else ""))

    @property
    def said(self) -> str:
        """Status and the server's own words."""
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
        again: whether another try may help.
        slow: whether its time ran out.
        pause: seconds that the server asks for.
        mend: added when there is no other try.
    """

    sentence: str
    again: bool
    slow: bool = False
    pause: float | None = None
    mend: str = ""


@dataclass(eq=False)
class Call:
    """One request on a connection of its own, which another thread may cut."""

    server: SplitResult
    timeout: float
    _socket: socket.socket | None = None
    _late: threading.Event = field(default_factory=threading.Event)
    _cut: threading.Event = field(default_factory=threading.Event)

    def run(self, method: str, path: str, body: Any, headers: Mapping[str, str]) -> Answer:
        """Send the request and read the whole reply.

        Raises:
            TimeoutError: when that takes longer than `timeout`, however it is spread.
            OSError, http.client.HTTPException: when it fails otherwise.
        """
        host, port = self.server.hostname or "", self.server.port
        connection = (
            http.client.HTTPSConnection(
                host, port, timeout=self.timeout, context=ssl.create_default_context()
            )
            if self.server.scheme == "https"
            else http.client.HTTPConnection(host, port, timeout=self.timeout)
        )
        # The socket's own timeout begins anew with each byte; this one does not.
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
            if reply.length:  # read(n) does not tell that the rest never came
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
        """End the request, wherever it is."""
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
        UserError: when it is none that can be asked.
    """
    try:
        parts = urlsplit(url.strip())
        valid = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port  # raises for what is no port
        parts.hostname.encode("idna") if parts.hostname else None
    except ValueError:
        valid = False
    if not valid or re.search(r"[\s\x00-\x1f\x7f]", url.strip()):
        # What may hold a password is not repeated.
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
    """The key to send, which is the one meant for any server, or OpenAI's where it is safe.

    Raises:
        UserError: when it is no text that a request can carry.
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
    """The words in an error object, in the forms that servers use."""
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(name):
            return said(found[name])
    if isinstance(found, str):
        return found
    return json.dumps(found) if isinstance(found, dict | list) and found else ""


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait: given as such, or as a date."""
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    try:
        when = email.utils.parsedate_to_datetime(value)
    except (ValueError, TypeError):
        return None
    return max(0.0, when.timestamp() - time.time())
