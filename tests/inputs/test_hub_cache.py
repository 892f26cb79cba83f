"""Hugging Face's cache: folders whose files are links, and downloads that are taken up again."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from abl_mlx.demo import MODEL_PATH
from convert.gguf.file import metadata
from tests.models.test_writers import random_direction
from tests.support.command import abl_mlx
from tests.support.hub_environment import hub_environment

COMMIT = "5" * 40
LARGE = b"GGUF" + bytes(range(256)) * (24 << 12)  # 24 MB: the client writes 10 MB at a time
CUT = 12 << 20


def cached(cache: Path, files: dict[str, Path]) -> Path:
    """A snapshot in a cache as the hub's client lays it out: links to blobs."""
    top = cache / "models--some-one--Small"
    snapshot = top / "snapshots" / COMMIT
    for folder in (snapshot, top / "blobs", top / "refs"):
        folder.mkdir(parents=True)
    (top / "refs" / "main").write_text(COMMIT)
    for name, file in files.items():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        (top / "blobs" / digest).write_bytes(file.read_bytes())
        (snapshot / name).symlink_to(Path("../../blobs", digest))
    return snapshot


def state(folder: Path) -> dict[str, str]:
    return {
        str(one): hashlib.sha256(one.read_bytes()).hexdigest() if one.is_file() else ""
        for one in sorted(folder.rglob("*"))
    }


@pytest.fixture
def direction(tmp_path: Path) -> Path:
    from abl_mlx.directions import direction_file

    path = tmp_path / "d.safetensors"
    direction_file.save(path, direction_file.DirectionFile(random_direction(256, 1)))
    return path


def test_a_folder_of_links_is_read_and_never_written_to(tmp_path: Path, direction: Path) -> None:
    snapshot = cached(tmp_path / "hub", {one.name: one for one in MODEL_PATH.iterdir()})
    before = state(tmp_path / "hub")
    folder, gguf, whole = tmp_path / "out", tmp_path / "out.gguf", tmp_path / "whole.gguf"
    abl_mlx("apply", direction, snapshot, "-o", folder, "--keep-undo")
    abl_mlx("apply", direction, snapshot, "-o", gguf)
    abl_mlx("convert", snapshot, whole)
    abl_mlx("undo", folder, "-o", tmp_path / "back")
    assert state(tmp_path / "hub") == before
    written = [one for one in tmp_path.rglob("*") if "hub" not in one.parts]
    assert not any(one.is_symlink() for one in written)
    for file in MODEL_PATH.glob("tokenizer*"):
        assert (folder / file.name).read_bytes() == file.read_bytes()
    assert "base_model: some-one/Small" in (folder / "README.md").read_text()
    assert metadata(whole)["general.name"] == "Small"
    url = "https://huggingface.co/some-one/Small"
    assert metadata(gguf)["general.base_model.0.repo_url"] == url


def test_a_gguf_that_is_a_link(tmp_path: Path, direction: Path) -> None:
    abl_mlx("convert", "demo", tmp_path / "Small-Q8_0.gguf", "--quantize", "Q8_0")
    file = tmp_path / "Small-Q8_0.gguf"
    snapshot = cached(tmp_path / "hub", {file.name: file})
    before = state(tmp_path / "hub")
    out = tmp_path / "out.gguf"
    abl_mlx("apply", direction, snapshot / file.name, "-o", out)
    assert not out.is_symlink()
    assert state(tmp_path / "hub") == before
    assert metadata(out)["abl_mlx.base_model"] == "some-one/Small"


FILES = {"X-Q8_0-00001-of-00002.gguf": b"GGUF, the first", "X-Q8_0-00002-of-00002.gguf": LARGE}


class Cutting(ThreadingHTTPServer):
    """A hub with a split model, the first download of whose large part stops halfway.

    Then the connection is dropped: at once, or when ``released`` is set.
    """

    def __init__(self, *, waits: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.halfway, self.released = threading.Event(), threading.Event()
        if not waits:
            self.released.set()
        self.asked: list[tuple[str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Cutting:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Cutting

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes, *, cut: bool = False, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[:CUT] if cut else body)
        if cut:
            self.wfile.flush()
            self.server.halfway.set()
            self.server.released.wait(60)
            self.close_connection = True

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        if "/resolve/" not in path:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                for name, content in FILES.items()
            ]
            named = [{"rfilename": name} for name in FILES]
            info = {"id": "someone/X", "sha": COMMIT, "siblings": named}
            said = entries if "/tree/" in path else info
            return self.answer(200, json.dumps(said).encode(), Content_Type="application/json")
        name = path.rpartition("/")[2]
        content, start = FILES[name], 0
        etag = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X_Repo_Commit": COMMIT}
        wanted = self.headers.get("Range")
        if self.command == "GET":
            self.server.asked.append((name, wanted))
        if wanted is not None:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            etag["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut = content is LARGE and self.command == "GET" and not self.server.halfway.is_set()
        self.answer(206 if start else 200, content[start:], cut=cut, **etag)

    do_HEAD = do_GET


RESOLVE = """
from abl_mlx.inputs.sources import resolve
print(resolve("someone/X:Q8_0").path)
"""

_COMMAND = [sys.executable, "-c", RESOLVE]


def downloaded(hub: Cutting, home: Path) -> dict[str, bytes]:
    done = subprocess.run(
        _COMMAND, env=hub_environment(hub.url, home), capture_output=True, text=True, check=True
    )
    folder = Path(done.stdout.strip()).parent
    return {one.name: one.read_bytes() for one in folder.iterdir()}


def test_a_dropped_connection_costs_only_what_is_left(tmp_path: Path) -> None:
    with Cutting(waits=False) as hub:
        assert downloaded(hub, tmp_path) == FILES
        (_, first), (_, second) = [one for one in hub.asked if "00002-of" in one[0]]
    assert first is None
    assert second is not None
    assert int(second.removeprefix("bytes=").rstrip("-")) >= 10 << 20


def test_after_a_kill_whole_files_are_kept(tmp_path: Path) -> None:
    with Cutting(waits=True) as hub:
        environment = hub_environment(hub.url, tmp_path)
        with subprocess.Popen(_COMMAND, env=environment, stderr=subprocess.DEVNULL) as child:
            assert hub.halfway.wait(60)
            while not list((tmp_path / "hf").rglob("X-Q8_0-00001-of-00002.gguf")):
                assert child.poll() is None
                time.sleep(0.01)
            child.kill()
        hub.released.set()
        hub.asked.clear()
        assert downloaded(hub, tmp_path) == FILES
        assert {name for name, _ in hub.asked} == {"X-Q8_0-00002-of-00002.gguf"}
