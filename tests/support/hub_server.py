"""A small Hugging Face on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "5" * 40
OTHER_COMMIT = "7" * 40  # of the tag v2


@dataclass
class Hub:
    """The part of Hugging Face that downloads need.

    Attributes:
        repositories: OWNER/NAME -> the paths of its files.
        files: "OWNER/NAME PATH" -> what a file holds; others hold a line of text.
    """

    repositories: dict[str, list[str]]
    files: dict[str, bytes] = field(default_factory=dict)
    url: str = ""
    fetched: list[str] = field(default_factory=list)
    broken: bool = False

    def content(self, repository: str, file: str) -> bytes:
        text = f"GGUF {repository} {file}".encode()
        return self.files.get(f"{repository} {file}", text)


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
                siblings = [{"rfilename": file} for file in files]
                return self.json({"id": repository, "sha": commit, "siblings": siblings})
            file = "/".join(parts[4:])
            if repository == "someone/gated":
                return self.answer(403, X_Error_Code="GatedRepo")
            if parts[2] != "resolve" or file not in files:
                return self.answer(404, X_Error_Code="EntryNotFound")
            content = state.content(repository, file)
            if self.command == "GET":
                state.fetched.append(f"{repository}/{file}")
            etag = hashlib.sha256(content).hexdigest()
            return self.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=commit)

        do_HEAD = do_GET

        def json(self, value: Any) -> None:
            self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{http.server_address[1]}"
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield state
    http.shutdown()
    http.server_close()
