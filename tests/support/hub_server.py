"""A small Hugging Face on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

COMMIT = "5" * 40
CUT = b"the connection ends here"
OTHER_COMMIT = "7" * 40  # of the tag v2


class Generated(Protocol):
    """A file whose bytes are made when they are asked for."""

    size: int

    def read(self, start: int, end: int) -> bytes: ...


@dataclass
class Hub:
    """The part of Hugging Face that downloads need.

    Attributes:
        repositories: OWNER/NAME -> the paths of its files.
        files: "OWNER/NAME PATH" -> what a file holds; others hold a line of text.
        generated: "OWNER/NAME PATH" -> a file that is too large to hold.
        ranges: whether parts of files are sent when they are asked for.
        stores: whether files are sent by a storage, to whose address the hub redirects.
        busy: how many of the next requests for files get the answer 429.
        retry_after: what that answer asks for.
        asked: for each request for a file: its address, the range, whether it had a token, and the
            status of the answer.
    """

    repositories: dict[str, list[str]]
    files: dict[str, bytes] = field(default_factory=dict)
    url: str = ""
    fetched: list[str] = field(default_factory=list)
    broken: bool = False
    generated: dict[str, Generated] = field(default_factory=dict)
    ranges: bool = True
    stores: bool = False
    busy: int = 0
    retry_after: str = "0"
    asked: list[tuple[str, str | None, bool, int]] = field(default_factory=list)

    def content(self, repository: str, file: str) -> bytes:
        text = f"GGUF {repository} {file}".encode()
        return self.files.get(f"{repository} {file}", text)

    def size(self, repository: str, file: str) -> int:
        large = self.generated.get(f"{repository} {file}")
        return len(self.content(repository, file)) if large is None else large.size

    def sha256(self, repository: str, file: str) -> str:
        if f"{repository} {file}" in self.generated:
            return "0" * 64
        return hashlib.sha256(self.content(repository, file)).hexdigest()

    def part(self, repository: str, file: str, start: int, end: int) -> bytes:
        large = self.generated.get(f"{repository} {file}")
        if large is None:
            return self.content(repository, file)[start:end]
        return large.read(start, end)


@contextmanager
def serve(state: Hub) -> Iterator[Hub]:
    """Serve the repositories of a hub, whose ``url`` is set."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            parts = path.removeprefix("api/models/").split("/")
            if parts[0] == "storage":
                return self.send_file("/".join(parts[1:3]), "/".join(parts[3:]))
            repository = "/".join(parts[:2])
            if state.broken:
                return self.answer(410)  # of 5xx the client would try again for minutes
            if repository == "someone/private":
                return self.answer(401, X_Error_Code="RepoNotFound")
            if repository == "someone/token":
                said = "Invalid credentials in Authorization header"
                return self.answer(401, X_Error_Message=said)
            if repository == "someone/forbidden":
                return self.answer(403)
            if repository not in state.repositories:
                return self.answer(404, X_Error_Code="RepoNotFound")
            files = state.repositories[repository]
            revision = parts[3] if parts[2:3] in (["revision"], ["resolve"], ["tree"]) else "main"
            if revision == "nosuch":
                return self.answer(404, X_Error_Code="RevisionNotFound")
            commit = OTHER_COMMIT if revision in ("v2", OTHER_COMMIT) else COMMIT
            if path.startswith("api/models/"):
                if parts[2:3] == ["tree"]:
                    entries = [
                        {
                            "type": "file",
                            "path": file,
                            "size": len(state.content(repository, file)),
                            "oid": hashlib.sha1(file.encode()).hexdigest(),
                        }
                        for file in files
                    ]
                    return self.json(entries)
                siblings = [
                    {
                        "rfilename": file,
                        "size": state.size(repository, file),
                        "lfs": {
                            "sha256": state.sha256(repository, file),
                            "size": 0,
                            "pointerSize": 0,
                        },
                    }
                    for file in files
                ]
                return self.json({"id": repository, "sha": commit, "siblings": siblings})
            file = "/".join(parts[4:])
            if repository == "someone/gated":
                return self.answer(403, X_Error_Code="GatedRepo")
            if parts[2] != "resolve" or file not in files:
                return self.answer(404, X_Error_Code="EntryNotFound")
            if self.command == "HEAD" or "Range" not in self.headers:
                content = state.content(repository, file)
                if self.command == "GET":
                    state.fetched.append(f"{repository}/{file}")
                etag = hashlib.sha256(content).hexdigest()
                return self.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=commit)
            if state.busy:
                state.busy -= 1
                return self.noted(429, Retry_After=state.retry_after)
            if state.stores:
                return self.noted(302, Location=f"{state.url}/storage/{repository}/{file}")
            return self.send_file(repository, file)

        def send_file(self, repository: str, file: str) -> None:
            """Answer with the wanted part of a file."""
            if not state.ranges:
                return self.noted(200, state.content(repository, file))
            start, end = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            size = state.size(repository, file)
            body = state.part(repository, file, start, min(size, end + 1))
            said = f"bytes {start}-{end}/{size}"
            if body.endswith(CUT):
                self.send_response(206)
                self.send_header("Content-Length", str(end + 1 - start))
                self.send_header("Content-Range", said)
                self.end_headers()
                self.wfile.write(body.removesuffix(CUT))
                self.close_connection = True
                return
            return self.noted(206, body, Content_Range=said)

        def noted(self, status: int, body: bytes = b"", **headers: str) -> None:
            token = "Authorization" in self.headers
            state.asked.append((self.path, self.headers["Range"], token, status))
            self.answer(status, body, **headers)

        do_HEAD = do_GET

        def json(self, value: Any) -> None:
            self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{http.server_address[1]}"
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield state
    http.shutdown()
    http.server_close()
