"""Filing a GGUF in Ollama's store without the program `ollama`.

Blobs are named by the hash of their content, so nothing that is there can be changed by adding one.
A manifest is written last and gets its name in one step, after everything that it names is there;
it replaces another only where that is asked for. Blobs are never removed here: those of an
interrupted filing and of a replaced model stay until Ollama starts, which removes blobs that no
manifest names, unless they are new.

What is filed is what `ollama create` would file (ollama: server/create.go, manifest/layer.go), but
for its own copy of the weights, which it runs through llama.cpp's quantizer: here the bytes stay.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gguf import LlamaFileType

from convert.base.errors import OPTION, UserError
from convert.gguf.file import GgufSource
from convert.ollama import capabilities, store
from convert.ollama.settings import Settings
from convert.ollama.store import OllamaName, parse_name

_IMAGE = "application/vnd.ollama.image."
_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
_CONFIG = "application/vnd.docker.container.image.v1+json"


def check(text: str, *, overwrite: bool = False, mend: str = "") -> OllamaName:
    """Check, before any long work, that a model can be filed under a name.

    Args:
        text: the name as the user typed it.
        overwrite: whether the model that has the name may be replaced.
        mend: a further way out where the name is taken, for the message.

    Raises:
        UserError: when Ollama does not take the name, has a model of this name, or the store is
            not there or may not be written.
    """
    name = parse_name(text)
    if store.contains(name) and not (overwrite and store.manifest_path(place(), name)):
        raise UserError(
            f"{OPTION} ollama:{text}: Ollama has a model {name} already; give another name, or "
            f"remove that one with `ollama rm {shlex.quote(text)}`{'' if overwrite else mend}.",
            option="output",
        )
    place()
    return name


def place() -> Path:
    """The store to write to: the first one that is there.

    Raises:
        UserError: when there is none, or this user may not write to it.
    """
    for found in store.stores():
        with suppress(OSError):
            if (found / "blobs").is_dir():
                if all(_writable(folder) for folder in (found, found / "blobs")):
                    return found
                raise UserError(
                    f"{OPTION} ollama:NAME: {found} may not be written by you, because Ollama runs "
                    "as another user: write -o NAME.gguf and give its Modelfile to "
                    "`ollama create`.",
                    option="output",
                )
    raise UserError(
        f"{OPTION} ollama:NAME: there are no models of Ollama at "
        f"{', '.join(map(str, store.stores()))}: the environment variable OLLAMA_MODELS says where "
        "they are if they are elsewhere; or write -o NAME.gguf.",
        option="output",
    )


def _writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def file(
    name: OllamaName,
    gguf: Path,
    settings: Settings,
    *,
    projectors: Sequence[Path] = (),
    draft: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """File a GGUF under a name; the file itself becomes the blob where both lie on one disk.

    Args:
        name: the name, which no model has yet, unless ``overwrite`` is given.
        gguf: the weights, in one file. It is gone afterwards.
        settings: what is filed beside it.
        projectors, draft: further GGUFs; these stay where they are, and blobs of them are shared.
        overwrite: replace the manifest of the model that has the name. Its blobs stay.

    Returns:
        The manifest's path.

    Raises:
        UserError: when there is no store, it may not be written, or a model of this name appeared
            meanwhile. Then ``gguf`` is still there.
    """
    root = place()
    blobs, keys = root / "blobs", _keys(gguf)
    config = _config(keys, settings)
    weights = _digest(gguf)
    layers = [_layer("model", weights, gguf.stat().st_size)]
    for kind, files in (("projector", projectors), ("draft", [draft] if draft else [])):
        for path in files:
            digest = _digest(path)
            _add(blobs, digest, path)
            layers.append(_layer(kind, digest, path.stat().st_size))
            if kind == "draft":
                architecture = _keys(path).get("general.architecture", "")
                config["draft"] = {"model_format": "gguf", "architecture": architecture}
    for kind, text in _texts(settings):
        layers.append(_layer(kind, *_add_bytes(blobs, text.encode())))
    digest, size = _add_bytes(blobs, (json.dumps(config) + "\n").encode())
    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "config": {"mediaType": _CONFIG, "digest": f"sha256:{digest}", "size": size},
        "layers": layers,
    }
    _move(gguf, blobs / f"sha256-{weights}")
    return _write_manifest(root, name, json.dumps(manifest), overwrite=overwrite)


def _write_manifest(root: Path, name: OllamaName, text: str, *, overwrite: bool) -> Path:
    path = root.joinpath("manifests", *name.parts)
    if overwrite:  # the name may be written in another case there
        path = store.manifest_path(root, name) or path
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not below manifests/: Ollama would take a file there for a model.
    handle, temporary = tempfile.mkstemp(prefix=".abl-mlx-", dir=root)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(temporary, 0o644)
        if overwrite:
            os.replace(temporary, path)
            return path
        try:
            _name(temporary, path)
        except FileExistsError:
            raise UserError(
                f"{OPTION} ollama:{name}: a model of this name appeared in Ollama meanwhile; the "
                "weights are in its store without a name, and it removes them: run again with "
                "another name.",
                option="output",
            ) from None
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def _name(temporary: str, path: Path) -> None:
    """Give a file its name in one step, unless the name is taken."""
    try:
        os.link(temporary, path)  # a rename would replace what has the name
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        with path.open("x", encoding="utf-8"):
            pass
        shutil.copyfile(temporary, path)


def _texts(settings: Settings) -> list[tuple[str, str]]:
    """The (kind, content) of each small layer."""
    found = []
    if settings.template is not None:
        found.append(("template", settings.template))
    if settings.system:
        found.append(("system", settings.system))
    found += [("license", text) for text in settings.licenses]
    if settings.params:
        found.append(("params", json.dumps(dict(settings.params))))
    if settings.messages:
        listed = [{"role": role, "content": content} for role, content in settings.messages]
        found.append(("messages", json.dumps(listed)))
    return found


def _config(keys: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    architecture = str(keys["general.architecture"])
    renderer, parser = settings.renderer, settings.parser
    if not renderer and not parser:
        renderer, parser = capabilities.BUILT_IN.get(architecture, (None, None))
    config: dict[str, Any] = {
        "model_format": "gguf",
        "model_family": architecture,
        "model_families": [architecture],
        "model_type": in_words(int(keys["parameters"])),
        "file_type": _file_type(keys.get("general.file_type")),
    }
    for key, value in (
        ("renderer", renderer),
        ("parser", parser),
        ("requires", settings.requires),
        ("capabilities", list(settings.capabilities)),
    ):
        if value:
            config[key] = value
    return {**config, "architecture": "amd64", "os": "linux"}


def _file_type(number: Any) -> str:
    """The name that `ollama show` gives a GGUF's ``general.file_type``, such as ``Q4_K_M``."""
    try:
        name = LlamaFileType(number).name
    except ValueError:
        return "unknown"
    return re.sub("^(MOSTLY|ALL)_", "", name)


def in_words(count: int) -> str:
    """A number of parameters as Ollama writes it, such as ``494.03M`` or ``7.6B``."""
    for size, sign, decimals in ((10**9, "B", 1), (10**6, "M", 2)):
        if count >= size:
            return f"{count / size:.{0 if count % size == 0 else decimals}f}{sign}"
    return f"{count / 1000:.0f}K" if count >= 1000 else str(count)


def _keys(gguf: Path) -> dict[str, Any]:
    """A GGUF's metadata, and the number of its weights under ``parameters``."""
    with GgufSource(gguf) as source:
        return {**source.metadata, "parameters": sum(map(math.prod, source.shapes.values()))}


def _layer(kind: str, digest: str, size: int) -> dict[str, Any]:
    return {"mediaType": _IMAGE + kind, "digest": f"sha256:{digest}", "size": size}


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _add_bytes(blobs: Path, content: bytes) -> tuple[str, int]:
    """Add a small blob; its digest and size."""
    digest = hashlib.sha256(content).hexdigest()
    target = blobs / f"sha256-{digest}"
    if not target.exists():
        handle, temporary = tempfile.mkstemp(prefix="sha256-", dir=blobs)
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    return digest, len(content)


def _add(blobs: Path, digest: str, path: Path) -> None:
    """Add a copy of a file, unless the blob is there."""
    target = blobs / f"sha256-{digest}"
    if target.exists():
        return
    handle, temporary = tempfile.mkstemp(prefix="sha256-", dir=blobs)
    os.close(handle)
    try:
        shutil.copyfile(path, temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def _move(path: Path, target: Path) -> None:
    """Make a file a blob: by its name on one disk, by a copy between disks."""
    if target.exists():
        path.unlink()
        return
    try:
        os.chmod(path, 0o644)
        os.replace(path, target)
    except OSError:
        _add(target.parent, target.name.removeprefix("sha256-"), path)
        path.unlink()
