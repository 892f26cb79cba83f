"""A made-up store of Ollama's, a reader of Modelfiles, and the rights of a stranger."""

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np

from convert.gguf.file import metadata
from convert.gguf.projector import is_projector
from convert.ollama.capabilities import BUILT_IN, Prompting, listed

IMAGE = "application/vnd.ollama.image."


class Store:
    """Manifests and blobs, written as Ollama writes them."""

    def __init__(self, path):
        self.path = Path(path)
        (self.path / "blobs").mkdir(parents=True)

    def blob(self, content, dash="-"):
        """Keep some bytes and return their digest."""
        content = content if isinstance(content, bytes) else content.encode()
        digest = hashlib.sha256(content).hexdigest()
        (self.path / "blobs" / f"sha256{dash}{digest}").write_bytes(content)
        return f"sha256:{digest}", len(content)

    def layer(self, kind, content, dash="-"):
        digest, size = self.blob(content, dash)
        return {"mediaType": IMAGE + kind, "digest": digest, "size": size}

    def add(self, name, *more, config=None, dash="-", **layers):
        """File a model: ``model=`` bytes, texts, values that become JSON, or lists of layers."""
        entries = [*more]
        for kind, contents in layers.items():
            for content in contents if isinstance(contents, tuple) else (contents,):
                text = content if isinstance(content, (str, bytes)) else json.dumps(content)
                entries.append(self.layer(kind, text, dash))
        digest, size = self.blob(json.dumps({"model_format": "gguf", **(config or {})}), dash)
        kind = "application/vnd.docker.container.image.v1+json"
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": {"mediaType": kind, "digest": digest, "size": size},
            "layers": entries,
        }
        return self.file(name, json.dumps(manifest))

    def file(self, name, text):
        path = self.path / "manifests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path


def write_gguf(path):
    """The least file that opens as a GGUF model."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_modelfile(text):
    """The (instruction, value) pairs of a Modelfile, by Ollama's grammar.

    Words are split by blanks, values go to the end of the line. A value that opens with three
    quotes or one goes on until a line ends with as many. Quotes around it are dropped, nothing is
    unescaped, and characters that do not print are lost on the way. Lines with # are comments.
    """
    lines = "".join(c for c in text if c.isprintable() or c in "\t\n\r").split("\n")
    commands = []
    while lines:
        line = lines.pop(0).lstrip()
        if not line or line.startswith("#"):
            continue
        word, _, value = line.partition(" ")
        word = word.upper()
        assert word in (
            "FROM", "TEMPLATE", "PARAMETER", "SYSTEM", "MESSAGE", "LICENSE", "RENDERER", "PARSER",
            "REQUIRES", "DRAFT",
        ), line  # fmt: skip
        if word in ("PARAMETER", "MESSAGE"):
            key, _, value = value.lstrip().partition(" ")
            word = f"{word} {key}"
        value = value.lstrip()
        for quotes in ('"""', '"'):
            if not value.startswith(quotes):
                continue
            while not (len(value.strip()) >= 2 * len(quotes) and value.strip().endswith(quotes)):
                assert lines, f"{word} never ends"
                value += "\n" + lines.pop(0)
            value = value.strip()[len(quotes) : -len(quotes)]
            break
        else:
            value = value.strip()
        commands.append((word, value))
    assert "FROM" in dict(commands)
    return commands


@contextmanager
def open_folder():
    """A folder that every user may enter, unlike pytest's."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        for path, _, _ in os.walk(folder):
            os.chmod(path, 0o755)
        shutil.rmtree(folder)


@contextmanager
def as_a_stranger():
    """The rights of a user who is not root, also where tests run as root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def shown(modelfile):
    """The capabilities that `ollama show` lists after `ollama create -f MODELFILE` (version 0.33).

    The files that FROM names are sorted by their metadata, as Ollama sorts them.
    """
    commands = read_modelfile(Path(modelfile).read_text(encoding="utf-8"))
    folder = Path(modelfile).parent
    files = [metadata(folder / name) for word, name in commands if word == "FROM"]
    seeing = [keys for keys in files if is_projector(keys)]
    (weights,) = [keys for keys in files if not is_projector(keys)]
    for _, name in (pair for pair in commands if pair[0] == "DRAFT"):
        assert metadata(folder / name)
    said = dict(commands)
    return listed(
        prompting(weights, said.get("TEMPLATE"), said.get("PARSER"), said), weights, seeing
    )


def prompting(keys, template, parser, config):
    """What decides on the prompts of a model, as `ollama create` files it."""
    architecture = keys["general.architecture"]
    renderer = config.get("RENDERER") or config.get("renderer")
    if not renderer and not parser:
        renderer, parser = BUILT_IN.get(architecture, (None, None))
    source = keys.get("tokenizer.chat_template", "")
    return Prompting(source, template, renderer, parser, architecture)


def shown_in_store(store, name):
    """The capabilities that `ollama show` lists for a model that is in a store."""
    manifest = json.loads((Path(store) / "manifests" / name).read_text())

    def blob(layer):
        path = Path(store) / "blobs" / layer["digest"].replace(":", "-")
        content = path.read_bytes()
        assert hashlib.sha256(content).hexdigest() == layer["digest"].removeprefix("sha256:")
        assert len(content) == layer["size"]
        return path

    config = json.loads(blob(manifest["config"]).read_text())
    of_kind = {}
    for layer in manifest["layers"]:
        of_kind.setdefault(layer["mediaType"].removeprefix(IMAGE), []).append(blob(layer))
    (weights,) = map(metadata, of_kind["model"])
    template = of_kind["template"][-1].read_text() if "template" in of_kind else None
    decided = prompting(weights, template, config.get("parser"), config)
    seeing = [metadata(path) for path in of_kind.get("projector", [])]
    return listed(decided, weights, seeing, config.get("capabilities", ()))
