"""Requests to a server that are repeated where that can help, for a limited time."""

from __future__ import annotations

import base64
import http.client
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import unquote

from abl_mlx import __version__
from abl_mlx.behaviour.http_call import Answer, Call, Trouble, is_cut, key, shown, split
from abl_mlx.eval_choices import Asking
from convert.base.errors import UserError

#: The longest pause between two tries, in seconds.
LONGEST_PAUSE = 120.0

#: What a request returns.
Said = TypeVar("Said")


class PatientServer:
    """One server; several threads may send requests through it."""

    def __init__(self, url: str, asking: Asking, say: Callable[[str], None]) -> None:
        """
        Args:
            url: an address on the server.
            asking: the timeout, the number of tries, the key and the concurrency.
            say: called with a message before a pause.

        Raises:
            UserError: when the address or the key cannot be used.
        """
        self.asking = asking
        self._say = say
        parts = split(url)
        self._key = key(parts)
        password = parts.password or ""
        self._secrets = [text for text in (self._key, password, unquote(password)) if text]
        self._server = parts
        #: The address without user, password and query, for messages.
        self.name = shown(parts)
        self._stopped = threading.Event()
        self._open: set[Call] = set()
        self._lock = threading.Lock()
        self._not_before = 0.0
        self._met = False

    def _clean(self, text: str) -> str:
        """A text as one short line, without the key, which some servers repeat."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        text = " ".join(text.split()).rstrip(".")
        return text if len(text) <= 200 else text[:199] + "…"

    def _persist(self, attempt: Callable[[], Said]) -> Said:
        """Repeat an attempt until it succeeds, fails for good, or has been made often enough."""
        tries = 0
        while True:
            self._wait(self._not_before - time.monotonic())
            try:
                return attempt()
            except Trouble as trouble:
                tries += 1
                # A request that timed out is repeated only once.
                most = min(1, self.asking.retries) if trouble.slow else self.asking.retries
                if not trouble.again or tries > most:
                    times = f", {tries} times" if tries > 1 else ""
                    raise UserError(f"{trouble.sentence}{times}{trouble.mend}.") from None
                pause = self.asking.backoff * 2 ** (tries - 1) * random.uniform(0.75, 1.25)
                if trouble.pause is not None:
                    if trouble.pause > LONGEST_PAUSE:
                        raise UserError(
                            f"{trouble.sentence} and asks to wait {trouble.pause:.0f} s: try again "
                            "then, or lower --concurrency."
                        ) from None
                    pause = trouble.pause
                    # Other requests wait as well, because they would fail in the same way.
                    self._not_before = max(self._not_before, time.monotonic() + pause)
                pause = min(pause, LONGEST_PAUSE)
                self._wait(0)
                self._say(f"· {trouble.sentence}: another try in {pause:.1f} s ({tries} of {most})")
                self._wait(pause)

    def _wait(self, seconds: float) -> None:
        if self._stopped.wait(max(0.0, seconds)):
            raise UserError(f"{self.name} was interrupted before all prompts were asked.")

    def _exchange(self, method: str, path: str, body: Any = None) -> Answer:
        call = Call(self._server, self.asking.timeout)
        with self._lock:
            self._open.add(call)
        headers = {"Accept": "application/json", "User-Agent": f"abl-mlx/{__version__}"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        elif self._server.username:
            user = f"{unquote(self._server.username)}:{unquote(self._server.password or '')}"
            headers["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
        try:
            return call.run(method, path, body, headers)
        except TimeoutError:
            raise Trouble(
                f"{self.name} did not finish an answer within {self.asking.timeout:g} s",
                again=True,
                slow=True,
                mend=": raise --timeout, or lower --concurrency or --max-tokens",
            ) from None
        except ssl.SSLError as error:
            raise Trouble(
                f"{self.name} has no TLS connection that can be trusted "
                f"({error.reason or error}): check the address and the certificate",
                again=False,
            ) from None
        except socket.gaierror:
            raise Trouble(
                f"{self._server.hostname} is not a known host: check the address", again=False
            ) from None
        except http.client.InvalidURL:
            raise Trouble(
                f"{self.name} is no address to which requests can be sent", again=False
            ) from None
        except ConnectionRefusedError:
            raise Trouble(
                f"{self.name} refuses connections", again=self._met, mend=": is the server running?"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            what = "cut the connection" if is_cut(error) else f"cannot be asked ({error})"
            raise Trouble(
                f"{self.name} {self._clean(what)}", again=True, mend=": is the server running?"
            ) from None
        finally:
            with self._lock:
                self._open.discard(call)
