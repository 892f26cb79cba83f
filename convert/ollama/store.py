"""Reading Ollama's store of models on this machine: names, manifests, blobs.

The layout (ollama: manifest/paths.go, types/model/name.go, server/images.go), below the folder that
``OLLAMA_MODELS`` names, or ``~/.ollama/models``, or a Linux service's own home:

    manifests/HOST/NAMESPACE/MODEL/TAG   JSON: {"config": LAYER, "layers": [LAYER, ...]}
    blobs/sha256-HEX                     the content of a layer; older versions wrote sha256:HEX

    LAYER = {"mediaType": ..., "digest": "sha256:HEX", "size": bytes}

A name is ``[[HOST/]NAMESPACE/]MODEL[:TAG]``. The defaults are ``registry.ollama.ai``, ``library``
and ``latest``; upper and lower case are the same. Nothing in the store is written, and a manifest's
contents are checked before they are used.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.base import json_text
from convert.base.errors import UserError
from convert.base.schema import Refused
from convert.ollama.settings import Settings

_HOST, _NAMESPACE, _TAG = "registry.ollama.ai", "library", "latest"

# Where Ollama keeps its models when it runs as a service of its own user: the official installer,
# then distributions' packages.
SERVICE_STORES = (Path("/usr/share/ollama/.ollama/models"), Path("/var/lib/ollama/.ollama/models"))

_IMAGE = "application/vnd.ollama.image."
_DIGEST = re.compile(r"sha256[:-]([0-9a-fA-F]{64})")
_PARAMETER = re.compile(r"[A-Za-z0-9_]+")

# Longest manifest or text layer in bytes, far above every real template or licence.
_MAX_TEXT = 16 << 20


@dataclass(frozen=True)
class OllamaName:
    """The parts of a model's name in Ollama, defaults filled in."""

    host: str
    namespace: str
    model: str
    tag: str

    @property
    def parts(self) -> tuple[str, str, str, str]:
        """Host, namespace, model and tag: the path of the manifest."""
        return (self.host, self.namespace, self.model, self.tag)

    @property
    def title(self) -> str:
        """MODEL:TAG, or MODEL if the tag is ``latest``."""
        return self.model if self.tag.lower() == _TAG else f"{self.model}:{self.tag}"

    def __str__(self) -> str:
        """The name as `ollama list` shows it: without the default host and namespace."""
        owner = f"{self.namespace}/"
        if self.host.lower() != _HOST:
            owner = f"{self.host}/{owner}"
        elif self.namespace.lower() == _NAMESPACE:
            owner = ""
        return f"{owner}{self.model}:{self.tag}"


@dataclass(frozen=True)
class OllamaModel(Settings):
    """A model in Ollama's store, with everything that a new Modelfile for it keeps.

    Attributes:
        name: its name.
        gguf: the blob with its weights, whose name has no suffix. It is never written to.
        projectors: GGUF files that turn pictures or sound into tokens; not part of ``gguf``.
        draft: a GGUF file of a small draft model for speculative decoding.
    """

    name: OllamaName
    gguf: Path
    projectors: tuple[Path, ...] = ()
    draft: Path | None = None


def parse_name(text: str) -> OllamaName:
    """Read ``[[HOST/]NAMESPACE/]MODEL[:TAG]`` by Ollama's rules.

    Raises:
        UserError: when Ollama would not accept the name. That includes every name with ``..`` or
            an empty part, so that a name cannot lead out of the store.
    """
    rest, tag = text, _TAG
    if rest.rfind(":") > rest.rfind("/"):
        rest, _, tag = rest.rpartition(":")
    *owner, model = rest.rsplit("/", 2)
    namespace = owner.pop() if owner else _NAMESPACE
    host = owner.pop() if owner else _HOST
    name = OllamaName(host, namespace, model, tag)
    # The first character of each part is a letter, a digit or an underscore.
    limits = (("-.:", 350), ("-", 80), ("-.", 80), ("-.", 80))
    for part, (more, length) in zip(name.parts, limits, strict=True):
        if len(part) > length or not re.fullmatch(rf"\w[\w{re.escape(more)}]*", part, re.ASCII):
            raise UserError(
                f"{text or repr(text)} is no name that Ollama takes: write NAME or NAME:TAG as "
                "`ollama list` shows it, such as llama3.2:3b."
            )
    return name


def stores() -> list[Path]:
    """Folders where Ollama's models may be: ``OLLAMA_MODELS`` if set, else the usual places."""
    named = os.environ.get("OLLAMA_MODELS", "").strip().strip("\"'")
    if named:
        return [Path(named)]
    return [Path.home() / ".ollama" / "models", *SERVICE_STORES]


def find(text: str) -> OllamaModel:
    """The model in Ollama's store that ``text`` names.

    Args:
        text: its name in Ollama, without ``ollama:``.

    Raises:
        UserError: when there is no such model or no store; when the store is not readable or is
            damaged; when the model cannot be edited without losing a part of it: weights in
            safetensors, an adapter, several weight files, or a model that runs on a server.
    """
    name = parse_name(text)
    unreadable: UserError | None = None
    searched = []
    for store in stores():
        try:
            manifest = manifest_path(store, name)
            if manifest is not None:
                return _read_model(store, manifest)
            if _exists(store / "manifests"):
                searched.append(store)
        except _NotReadableError as error:
            unreadable = unreadable or error
    if unreadable is not None:
        raise unreadable
    if not searched:
        raise UserError(
            f"no models of Ollama at {_listed(stores())}: `ollama pull {shlex.quote(text)}` gets "
            "this one, and the environment variable OLLAMA_MODELS says where they are if they are "
            "elsewhere."
        )
    present = [found for store in searched for found in _names(store)]
    near = ", ".join(_near(name, present) or present[:5]) or "none at all"
    raise UserError(
        f"Ollama has no model {name} in {_listed(searched)}, but {near}: check `ollama list`, or "
        f"get it with `ollama pull {shlex.quote(text)}`."
    )


def contains(name: OllamaName) -> bool:
    """Whether any store that this user can read has a model of this name."""
    for store in stores():
        try:
            if manifest_path(store, name) is not None:
                return True
        except UserError:
            continue
    return False


class _NotReadableError(UserError):
    """The store belongs to another user."""


@contextmanager
def _reading(store: Path, path: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError:
        # Only x for the folder above: it also holds Ollama's private key.
        above = f"{shlex.quote(str(store.parent.parent))} {shlex.quote(str(store.parent))}"
        raise _NotReadableError(
            f"{path} may not be read by you, because Ollama runs as another user: "
            f"`sudo chmod a+x {above} && sudo chmod -R a+rX {shlex.quote(str(store))}` lets "
            "everyone on this machine read its models."
        ) from None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): check Ollama's store, or pull the model "
            "again."
        ) from None


def _exists(path: Path) -> bool:
    """Whether ``path`` exists; an error, not False, where this user may not look."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def manifest_path(store: Path, name: OllamaName) -> Path | None:
    """The file of a model's manifest, upper and lower case being the same; None without one."""
    path = store / "manifests"
    with _reading(store, path):
        if not _exists(path):
            return None
        for part in name.parts:
            exact = path / part
            if not _exists(exact):
                others = [p for p in _entries(path) if p.name.lower() == part.lower()]
                if not others:
                    return None
                exact = others[0]
            path = exact
        return path if stat.S_ISREG(path.stat().st_mode) else None


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except NotADirectoryError:
        return []


def _names(store: Path) -> list[str]:
    """The names of all models in a store, as `ollama list` shows them."""
    root = store / "manifests"
    with _reading(store, root):
        level = [root]
        for _ in range(4):
            level = [path for folder in level for path in _entries(folder)]
    return [
        str(OllamaName(*path.relative_to(root).parts))
        for path in level
        if not path.name.startswith(".")
    ]


def _near(name: OllamaName, present: list[str]) -> list[str]:
    """Names of other tags of the model, and names with similar spelling."""
    tags: dict[str, list[str]] = {}
    for other in present:
        tags.setdefault(other.rpartition(":")[0].lower(), []).append(other)
    model, wanted = name.model.lower(), str(name).rpartition(":")[0].lower()
    same = [low for low in tags if low.rpartition("/")[2] == model]
    like = difflib.get_close_matches(wanted, tags, n=3)
    return [other for low in dict.fromkeys([*same, *like]) for other in tags[low]][:5]


@dataclass(frozen=True)
class _Layer:
    kind: str
    path: Path
    size: int


def _read_model(store: Path, manifest: Path) -> OllamaModel:
    parts = manifest.relative_to(store / "manifests").parts
    name = OllamaName(*parts)
    content = _json(store, manifest, manifest, dict)
    entries = content.get("layers")
    if not isinstance(entries, list):
        raise _damaged(manifest, "its layers are no list")
    layers = [_layer(store, manifest, entry) for entry in entries]
    config: dict[str, Any] = {}
    if content.get("config"):
        layer = _layer(store, manifest, content["config"])
        config = _json(store, manifest, _blob(store, manifest, layer), dict)
    of_kind: dict[str, list[_Layer]] = {}
    for layer in layers:
        of_kind.setdefault(layer.kind, []).append(layer)
    gguf = _weights(store, manifest, name, config, of_kind)

    def texts(*kinds: str) -> list[str]:
        found = [layer for layer in layers if layer.kind in kinds]
        return [_text(store, manifest, _blob(store, manifest, layer)) for layer in found]

    def other(kind: str) -> list[Path]:
        return [_blob(store, manifest, layer) for layer in of_kind.get(kind, ())]

    # Of several layers of one kind Ollama uses the last; only licences add up.
    template = ([None, *texts("template", "prompt")])[-1]
    system = ([None, *texts("system")])[-1]
    return OllamaModel(
        name=name,
        gguf=gguf,
        template=template,
        params=_params(store, manifest, other("params")),
        system=system,
        licenses=tuple(texts("license")),
        messages=_messages(store, manifest, other("messages")),
        renderer=_setting(manifest, config, "renderer"),
        parser=_setting(manifest, config, "parser"),
        requires=_setting(manifest, config, "requires"),
        projectors=tuple(other("projector")),
        draft=([None, *other("draft")])[-1],
        capabilities=_words(config.get("capabilities")),
    )


def _weights(
    store: Path,
    manifest: Path,
    name: OllamaName,
    config: Mapping[str, Any],
    of_kind: Mapping[str, list[_Layer]],
) -> Path:
    """The GGUF of a model.

    Raises:
        UserError: when the model is not exactly one GGUF, saying what it is.
    """
    if "adapter" in of_kind:
        raise UserError(
            f"{name} in Ollama is a model with an adapter, which the edited model would lose: "
            "merge the adapter into the weights, or name the model it was made from."
        )
    if config.get("remote_host") or config.get("remote_model"):
        raise UserError(
            f"{name} runs on {config.get('remote_host') or 'a server'}, and Ollama has no weights "
            "of it here: name a model that `ollama list` shows with a size."
        )
    if "tensor" in of_kind:
        raise UserError(
            f"{name} is kept by Ollama as single tensors (safetensors, for MLX), not as a GGUF: "
            "name the MLX or Hugging Face model it was made from."
        )
    models = of_kind.get("model", [])
    if len(models) != 1:
        found = f"{len(models)} files of weights" if models else "no weights"
        raise UserError(
            f"{name} has {found} in Ollama's manifest {manifest}, but exactly one GGUF can be "
            "edited: name the GGUF or the model it was made from."
        )
    path = _blob(store, manifest, models[0])
    with _reading(store, path), path.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise UserError(
            f"{name} is kept by Ollama as {config.get('model_format') or 'another format'}, not as "
            f"a GGUF ({path} begins with {magic!r}): name the model it was made from, or pull it "
            "again."
        )
    return path


def _layer(store: Path, manifest: Path, entry: Any) -> _Layer:
    if not isinstance(entry, dict):
        raise _damaged(manifest, "a layer is no JSON object")
    kind, digest, size = entry.get("mediaType"), entry.get("digest"), entry.get("size")
    if not isinstance(kind, str) or not isinstance(digest, str):
        raise _damaged(manifest, "a layer lacks mediaType or digest")
    matched = _DIGEST.fullmatch(digest)
    if not matched:
        # Anything else could name a file outside the folder of blobs.
        raise _damaged(manifest, f"{digest[:80]!r} is no sha256 digest")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise _damaged(manifest, f"the size of layer {digest[:19]} is {size!r}")
    blobs = store / "blobs"
    path, older = blobs / f"sha256-{matched[1]}", blobs / f"sha256:{matched[1]}"
    with _reading(store, path):
        if not _exists(path) and _exists(older):
            path = older
    return _Layer(kind.removeprefix(_IMAGE), path, size)


def _blob(store: Path, manifest: Path, layer: _Layer) -> Path:
    """The file of a layer, which must exist and have the size that the manifest says."""
    with _reading(store, layer.path):
        if not _exists(layer.path):
            raise _damaged(manifest, f"{layer.path}, its {layer.kind} layer, is not there")
        size = layer.path.stat().st_size
    if size != layer.size:
        raise _damaged(
            manifest,
            f"{layer.path}, its {layer.kind} layer, has {size} bytes instead of {layer.size}",
        )
    return layer.path


def _text(store: Path, manifest: Path, path: Path) -> str:
    with _reading(store, path):
        if path.stat().st_size > _MAX_TEXT:
            raise _damaged(manifest, f"{path} is too long for a text")
        raw = path.read_bytes()
    # As in Go, bytes that are not UTF-8 become the replacement character; old licences are Latin-1.
    return raw.decode("utf-8", errors="replace")


def _json(store: Path, manifest: Path, path: Path, kind: type) -> Any:
    text = _text(store, manifest, path)
    try:
        value = json_text.parse(text)
    except Refused as refused:
        raise _damaged(manifest, f"{path} is no JSON that can be used: {refused}") from None
    if value is None and kind is list:
        return []
    if not isinstance(value, kind):
        what = "JSON object" if kind is dict else "JSON list"
        raise _damaged(manifest, f"{path} is no {what}")
    return value


def _params(store: Path, manifest: Path, paths: list[Path]) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for path in paths:
        for key, value in _json(store, manifest, path, dict).items():
            plain = (str, int, float)
            if isinstance(value, list):
                fine = all(isinstance(item, plain) for item in value)
            else:
                fine = value is None or isinstance(value, plain)
            if not fine or not _PARAMETER.fullmatch(key):
                raise _damaged(manifest, f"the parameter {key!r} in {path} is malformed")
            if value is not None:
                params[key] = value
    return params


def _messages(store: Path, manifest: Path, paths: list[Path]) -> tuple[tuple[str, str], ...]:
    messages = []
    for path in paths[-1:]:
        for message in _json(store, manifest, path, list):
            pair = message if isinstance(message, dict) else {}
            role, content = pair.get("role"), pair.get("content", "")
            if not isinstance(role, str) or not isinstance(content, str):
                raise _damaged(manifest, f"a message in {path} lacks role or content")
            messages.append((role, content))
    return tuple(messages)


def _setting(manifest: Path, config: Mapping[str, Any], key: str) -> str | None:
    value = config.get(key)
    if not value:
        return None
    if not isinstance(value, str) or not re.fullmatch(r"[\w.+-]+", value, re.ASCII):
        raise _damaged(manifest, f"its {key} is {value!r}")
    return value


def _words(value: Any) -> tuple[str, ...]:
    """The words of a list; what is no word, in no list, says nothing."""
    listed = value if isinstance(value, list) else []
    return tuple(word for word in listed if isinstance(word, str) and re.fullmatch(r"\w+", word))


def _damaged(manifest: Path, why: str) -> UserError:
    return UserError(
        f"Ollama's manifest {manifest} cannot be used: {why}. Pull or create the model again."
    )


def _listed(paths: list[Path]) -> str:
    return ", ".join(str(path) for path in paths)
