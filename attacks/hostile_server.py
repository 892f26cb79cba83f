"""An HTTP server that acts as a hub of models and as a chat server, and answers wrongly.

``python -m attacks.hostile_server FOLDER`` prints its port, and ends when its standard input is
closed. The first part of a path chooses what it does: h3-ff is a repository with the third
misbehaviour of `attacks.network.HUB`, s3-ff a chat server with the third of `SERVER`; ff is a seed
for everything random.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any

from attacks import mutations, network

_COMMIT = "0123456789abcdef0123456789abcdef01234567"
_DEEP = b"[" * 100_000


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET

    def _answer(self) -> None:
        length = self.headers.get("Content-Length", "0")
        self.body = self.rfile.read(int(length) if length.isdigit() else 0)
        found = re.search(r"/([hs])(\d+)-([0-9a-f]+)(/.*|$)", self.path)
        if found is None:
            self.send(404, b"nothing here")
            return
        kind, how, seed, rest = found.groups()
        self.rng = Random(f"{seed} {rest} {self.command == 'POST'}")
        self.root = self.path[: found.end() - len(rest)]
        if kind == "h":
            self._hub(network.HUB[int(how)], rest)
        else:
            self._chat(network.SERVER[int(how)], rest)

    def send(self, status: int, data: bytes, kind: str = "application/json", **more: str) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(data)), **more}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _misbehave(self, how: str) -> bool:
        """Misbehaviours that do not depend on the request."""
        if how.isdigit():
            said = b'{"error": "\\u001b[31mno\\u001b[0m"}'
            more = {"X_Error_Message": "\x1b[31mno"} if self.rng.random() < 0.5 else {}
            self.send(int(how), said, **more)
        elif how == "html":
            self.send(200, b"<!DOCTYPE html><title>Sign in</title>", "text/html")
        elif how == "empty":
            self.send(200, b"")
        elif how == "bad json":
            self.send(200, b'{"id": ')
        elif how == "deep":
            self.send(200, _DEEP)
        elif how == "null":
            self.send(200, b"null")
        elif how == "list":
            self.send(200, b"[1, 2]")
        elif how == "garbage":
            self.wfile.write(self.rng.randbytes(1000))
            self.close_connection = True
        elif how == "closed":
            self.close_connection = True
        elif how == "redirect loop":
            self.send(302, b"", Location=self.path)
        elif how == "gzip":
            self.send(200, gzip.compress(bytes(1 << 28)), Content_Encoding="gzip")
        elif how == "digits":
            self.send(200, b'{"choices": ' + b"9" * 5000 + b"}")
        else:
            return False
        return True

    # --- hub ---

    def _hub(self, how: str, rest: str) -> None:
        files = {path.name: path for path in self.server.folder.iterdir() if path.is_file()}
        if "/resolve/" in self.path:
            name = self.path.partition("/resolve/")[2].partition("/")[2].partition("?")[0]
            self._file(how, files.get(name))
            return
        if how in (
            "truncated",
            "longer",
            "no length",
            "wrong etag",
            "wrong commit",
            "redirect away",
        ):
            how = "sound"
        if self._misbehave(how):
            return
        siblings: list[Any] = [{"rfilename": name} for name in files]
        if how == "traversal":
            siblings.append({"rfilename": "../../../outside.json"})
        elif how == "absolute":
            siblings.append({"rfilename": "/tmp/outside.json"})
        elif how == "control":
            siblings.append({"rfilename": "\x1b[31m.gguf"})
        elif how == "many":
            siblings += [{"rfilename": f"{n}.bin"} for n in range(100_000)]
        said: dict[str, Any] = {
            "id": self.root.partition("/api/models/")[2], "sha": _COMMIT, "siblings": siblings,
            "private": False, "tags": [],
        }  # fmt: skip
        if how == "no siblings":
            said["siblings"] = None
        if how == "mutated":
            said = mutations.json_value(self.rng, said)
        self.send(200, json.dumps(said).encode())

    def _file(self, how: str, path: Path | None) -> None:
        outside = path is None
        data = b"{}" if path is None else path.read_bytes()
        etag, length, commit = hashlib.sha256(data).hexdigest(), len(data), _COMMIT
        if outside and how not in ("traversal", "absolute", "control", "many"):
            self.send(404, b"Entry not found", X_Error_Code="EntryNotFound")
            return
        if how == "redirect away":
            self.send(302, b"", Location="http://127.0.0.1:9/nowhere")
            return
        if how not in ("wrong commit",) and self.rng.random() < 0.5 and self._misbehave(how):
            return
        if how == "mutated":
            data = mutations.bytes_of(self.rng, data)
            length = len(data)
        if how == "wrong etag":
            etag = self.rng.choice(["", "../../etag", "\x1b[31m", "x" * 5000])
        if how == "wrong commit":
            commit = self.rng.choice(["", "../../x", "main", "x" * 500])
        if how == "truncated":
            data = data[: len(data) // 2]
        if how == "longer":
            length += 10
        self.send_response(200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", commit)
        if how != "no length":
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        self.close_connection = True

    # --- chat ---

    def _chat(self, how: str, rest: str) -> None:
        if rest.endswith("/models"):
            said: Any = {"object": "list", "data": [{"id": "tiny", "object": "model"}]}
            if self.rng.random() < 0.3:
                if self._misbehave(how):
                    return
                said = mutations.json_value(self.rng, said)
            self.send(200, json.dumps(said).encode())
            return
        if self._misbehave(how):
            return
        message: dict[str, Any] = {"role": "assistant", "content": "I cannot help with that."}
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "message": message}
        said = {"object": "chat.completion", "choices": [choice]}
        changes: dict[str, Any] = {
            "content list": [{"type": "text", "text": "no"}], "content number": 5,
            "control": "\x1b[31mno\x1b[0m\x07\u202e", "surrogate": "\ud800",
            "long": "no " * 1_000_000,
        }  # fmt: skip
        if how in changes:
            message["content"] = changes[how]
        elif how == "no choices":
            said["choices"] = self.rng.choice([[], None, {}, 5])
        elif how == "no message":
            choice.pop("message")
        elif how == "mutated":
            said = mutations.json_value(self.rng, said)
        data = json.dumps(said).encode()
        if how == "half":
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif how == "slow":
            self.send_response(200)
            self.end_headers()
            for byte in data[:100]:
                self.wfile.write(bytes([byte]))
                time.sleep(0.05)
        elif how == "chunks":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"zz\r\n" + data)
            self.close_connection = True
        else:
            self.send(200, data)


class Server(ThreadingHTTPServer):
    """A server that serves the files of ``folder`` as a repository."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder

    def handle_error(self, *args: Any) -> None:
        pass  # a client that closes its connection is no fault of the server


def main() -> None:
    server = Server(Path(sys.argv[1]))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
