"""`push` lists what would be published, and uploads just that, to a small hub on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from abl_mlx.directions import direction_file
from tests.models.test_writers import random_direction
from tests.outputs.test_further_files import WIDTH, model, projector
from tests.support.command import abl_mlx, fails
from tests.support.hub_environment import hub_environment


@dataclass
class Hub:
    """What was uploaded, by repository and name."""

    url: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    refuses: int = 0


class Handler(BaseHTTPRequestHandler):
    """The part of Hugging Face that uploads need."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        whole = b""
        while size := int(self.rfile.readline(), 16):
            whole += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return whole

    def do_PUT(self) -> None:
        self.hub.blobs[self.path.rsplit("/", 1)[1]] = self.body()
        self.answer({})

    def do_GET(self) -> None:
        self.answer({"id": "x"})

    def do_POST(self) -> None:
        content, hub = self.body(), self.hub
        if hub.refuses:
            return self.answer({"error": "no"}, hub.refuses)
        if self.path == "/api/repos/create":
            asked = json.loads(content)
            name = f"{asked['organization']}/{asked['name']}"
            hub.private[name] = asked.get("private", asked.get("visibility") == "private")
            hub.files.setdefault(name, {})
            return self.answer({"url": f"{hub.url}/{name}", "name": name})
        if self.path == "/api/validate-yaml":  # the card's first lines
            assert "abl-mlx" in json.loads(content)["content"]
            return self.answer({"errors": [], "warnings": []})
        if self.path.endswith("/paths-info/main"):
            return self.answer([])
        if self.path.endswith("/preupload/main"):
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs"
                    if one["path"].endswith((".gguf", ".safetensors"))
                    else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(content)["files"]
            ]
            return self.answer({"files": files})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    **one,
                    "actions": {"upload": {"href": f"{hub.url}/blob/{one['oid']}"}},
                }
                for one in json.loads(content)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if "/commit/main" in self.path:
            name = self.path.removeprefix("/api/models/").split("/commit/")[0]
            for line in map(json.loads, content.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[name][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[name][value["path"]] = hub.blobs[value["oid"]]
            url = f"{hub.url}/{name}/commit/{'5' * 40}"
            return self.answer({"success": True, "commitOid": "5" * 40, "commitUrl": url})
        return self.answer({"error": f"no {self.path} here"}, 404)


@pytest.fixture
def hub() -> Iterator[Hub]:
    state = Hub()
    handler = type("Bound", (Handler,), {"hub": state})
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    state.url = f"http://127.0.0.1:{http.server_address[1]}"
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield state
    http.shutdown()
    http.server_close()


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an edited GGUF and its projector, an edited folder, and other files."""
    place = tmp_path_factory.mktemp("outputs")
    direction = place / "direction.safetensors"
    direction_file.save(direction, direction_file.DirectionFile(random_direction(WIDTH, 1)))
    source = model(place / "m.gguf")
    projector(place / "mmproj-m.gguf")
    bracketed = place / "b" / "e[1].gguf"
    abl_mlx("apply", direction, source, "-o", place / "e.gguf", "-o", bracketed)
    abl_mlx("apply", direction, "demo", "-o", place / "edited")
    (place / "edited" / "replies.jsonl").write_text("{}\n")
    (place / "replies.jsonl").write_text("{}\n")
    return place


OF_THE_GGUF = ["Modelfile", "README.md", "abl.json", "e.gguf", "mmproj-e.gguf"]


def push(hub: Hub, place: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`abl-mlx push`, in a new Python that takes this server for Hugging Face."""
    environment = hub_environment(hub.url, place, HF_TOKEN="hf_made_up")
    return subprocess.run(
        [sys.executable, "-m", "abl_mlx", "push", *map(str, arguments)],
        capture_output=True, text=True, env=environment, cwd=place, check=False, timeout=120,
    )  # fmt: skip


def test_without_yes_the_files_are_listed_and_nothing_is_asked(hub: Hub, outputs: Path) -> None:
    hub.refuses = 500
    done = push(hub, outputs, "e.gguf", "me/edited")
    assert done.returncode == 0, done.stderr
    assert "Nothing was uploaded: add --yes" in done.stdout
    assert hub.private == {}
    record = abl_mlx("push", outputs / "e.gguf", "me/edited")
    assert [one["name"] for one in record["files"]] == OF_THE_GGUF
    assert record["private"] is True
    assert "commit" not in record


def test_a_gguf_goes_up_with_what_belongs_to_it(hub: Hub, outputs: Path) -> None:
    done = push(hub, outputs, "e.gguf", "me/edited", "--yes", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["commit"].endswith("5" * 40)
    assert hub.private == {"me/edited": True}
    sent = hub.files["me/edited"]
    assert sorted(sent) == OF_THE_GGUF
    assert sent["e.gguf"] == (outputs / "e.gguf").read_bytes()
    assert sent["README.md"] == (outputs / "e.README.md").read_bytes()
    assert json.loads(sent["abl.json"])["format_version"] == 1


def test_a_name_with_brackets_keeps_its_projector(outputs: Path) -> None:
    record = abl_mlx("push", outputs / "b" / "e[1].gguf", "me/edited")
    names = ["Modelfile", "README.md", "abl.json", "e[1].gguf", "mmproj-e[1].gguf"]
    assert [one["name"] for one in record["files"]] == names


def test_a_folder_goes_up_without_what_is_not_the_models(hub: Hub, outputs: Path) -> None:
    done = push(hub, outputs, "edited", "me/demo", "--yes", "--public")
    assert done.returncode == 0, done.stderr
    assert "left out: replies.jsonl" in done.stderr
    assert hub.private == {"me/demo": False}
    sent = hub.files["me/demo"]
    assert "replies.jsonl" not in sent
    weights = (outputs / "edited" / "model.safetensors").read_bytes()
    assert hashlib.sha256(sent["model.safetensors"]).digest() == hashlib.sha256(weights).digest()
    assert {"README.md", "abl.json", "config.json", "tokenizer.json"} <= set(sent)


@pytest.mark.parametrize(("status", "said"), [(401, "hf auth login"), (403, "hf auth login")])
def test_what_the_hub_refuses_is_one_sentence(
    status: int, said: str, hub: Hub, outputs: Path
) -> None:
    hub.refuses = status
    done = push(hub, outputs, "e.gguf", "me/edited", "--yes")
    assert done.returncode == 1
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_bad_input_is_one_sentence(outputs: Path) -> None:
    assert "OWNER/NAME" in fails("push", outputs / "e.gguf", "edited")
    assert "is not here" in fails("push", outputs / "nosuch", "me/x")
    assert "has no README.md" in fails("push", outputs / "m.gguf", "me/x")
    assert "neither a folder nor" in fails("push", outputs / "direction.safetensors", "me/x")
