"""Reads parts of files on Hugging Face: HTTP range requests, with their errors in one sentence."""

from __future__ import annotations

import email.utils
import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from abl_mlx.inputs import hub_errors
from abl_mlx.support.console import say
from convert.base.errors import UserError

_CHUNK = 1 << 20

#: Seconds without a byte after which a connection counts as lost.
_TIMEOUT = 30

#: How often a request is made again if no byte came, and the longest wait that is granted, in
#: seconds.
_TRIES, _LONGEST_WAIT = 4, 120


class Ranges:
    """Reads parts of the files of one repository at one commit.

    Its methods may be called from several threads.
    """

    def __init__(self, repository: str, commit: str, name: str) -> None:
        """Nothing is read yet.

        Args:
            repository: OWNER/NAME.
            commit: the commit, all 40 digits.
            name: how messages name the repository.
        """
        self._repository, self._commit, self._name = repository, commit, name
        self._opener = urllib.request.build_opener(_Redirects)
        # Where the hub sent a file's last request: the storage, which has no rate limit.
        self._storage: dict[str, str] = {}

    def read(self, file: str, start: int, end: int, size: int) -> Iterator[bytes]:
        """Yield the bytes from ``start`` to ``end`` of a file in chunks, in order.

        Args:
            file: its path in the repository.
            start, end: the first byte, and the one after the last.
            size: the file's length, which the server must confirm.

        Raises:
            UserError: when the server does not let this user have the file, does not send parts of
                files, or cannot be reached.
        """
        tries = 0
        while start < end:
            pause = 2.0**tries / 2
            try:
                for chunk in self._once(file, start, end, size):
                    start, tries = start + len(chunk), 0
                    yield chunk
                problem = "the connection ended early"
            except urllib.error.HTTPError as error:
                error.close()
                problem, pause = self._refused(file, error, pause)
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", None) or error
                problem = str(reason) or type(error).__name__
            if start < end:
                tries += 1
                if tries == _TRIES:
                    raise UserError(
                        f"{file} of {self._name} could not be read ({problem}): give the same "
                        "command again later; what was read is kept."
                    )
                time.sleep(pause)

    def _once(self, file: str, start: int, end: int, size: int) -> Iterator[bytes]:
        with self._opener.open(self._request(file, start, end), timeout=_TIMEOUT) as answer:
            whole = start == 0 and end == size
            self._check(file, answer, start, size, whole)
            if answer.url != self._url(file):
                self._storage[file] = answer.url
            left = end - start
            while left and (chunk := answer.read(min(_CHUNK, left))):
                left -= len(chunk)
                yield chunk

    def _url(self, file: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self._repository, file, revision=self._commit)

    def _request(self, file: str, start: int, end: int) -> urllib.request.Request:
        from huggingface_hub.utils import build_hf_headers

        storage = self._storage.get(file)
        request = urllib.request.Request(storage or self._url(file))
        for name, value in build_hf_headers().items():
            if name.lower() == "authorization":
                if storage is None:
                    # The storage that the hub redirects to must not get the token.
                    request.add_unredirected_header(name, value)
            else:
                request.add_header(name, value)
        request.add_header("Range", f"bytes={start}-{end - 1}")
        request.add_header("Accept-Encoding", "identity")
        return request

    def _check(self, file: str, answer: Any, start: int, size: int, whole: bool) -> None:
        """Check that the answer is the wanted part of the wanted file."""
        said = answer.headers.get("Content-Range", "")
        if whole and answer.status == 200:
            return
        if answer.status != 206 or not said.startswith(f"bytes {start}-"):
            where = urlsplit(answer.url).netloc
            raise UserError(
                f"{where} does not send parts of {file}: download {self._name} (`hf download "
                f"{self._repository}`) and name its folder."
            )
        if not said.endswith((f"/{size}", "/*")):
            raise UserError(
                f"{file} of {self._name} has another length than Hugging Face says ({said}): try "
                "again later."
            )

    def _refused(self, file: str, error: urllib.error.HTTPError, pause: float) -> tuple[str, float]:
        """What went wrong with a request that may be made again, and the seconds until then.

        Raises:
            UserError: for other requests.
        """
        if self._storage.pop(file, None) is not None and error.code < 429:
            return f"HTTP {error.code}", 0  # its address has expired: ask the hub for a new one
        if error.code == 429 or error.headers.get("Retry-After"):
            pause = _seconds(error.headers.get("Retry-After"))
            if pause > _LONGEST_WAIT:
                raise hub_errors.too_often(self._name, pause)
            say(f"Hugging Face asks to wait {pause:.0f} s (HTTP {error.code})")
        if error.code == 429 or error.code >= 500:
            return f"HTTP {error.code}", pause
        if error.headers.get("X-Error-Code") == "GatedRepo":
            raise hub_errors.gated(self._name)
        if error.code in (401, 403):
            raise hub_errors.no_access(self._name, error.code)
        raise UserError(
            f"{file} of {self._name} could not be read (HTTP {error.code}): check that the "
            "repository still has it."
        )


def _seconds(text: str | None) -> float:
    """The value of Retry-After in seconds; 5 where there is none."""
    try:
        return max(0.0, float(text or 5))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(str(text)).timestamp() - time.time())
    except (TypeError, ValueError):
        return 5.0


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from https to http."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if urlsplit(req.full_url).scheme == "https" and urlsplit(newurl).scheme != "https":
            raise UserError(
                f"{urlsplit(req.full_url).netloc} redirects to {newurl[:60]}, which is not "
                "encrypted: check for a proxy or a sign-in page between."
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)
