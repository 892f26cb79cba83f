"""Finds the model that the user's text names."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from abl_mlx.inputs import hub
from convert.base.errors import UserError
from convert.base.suffixes import GGUF, ends_in, is_gguf_name, without
from convert.ollama import store
from convert.ollama.store import OllamaModel

_PART = re.compile(r"-\d{5}-of-\d{5}$")
_SHA = re.compile(r"(sha256[:-])?[0-9a-f]{40,64}", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """A model on this machine.

    Attributes:
        name: what the user typed: ``demo``, a path, a Hugging Face id, ``OWNER/REPO:TAG``,
            ``hf:OWNER/REPO/FILE.gguf`` or ``ollama:NAME``.
        path: the folder with config.json and the safetensors files, or the GGUF file (for a split
            model, any part). It is never written to.
        is_demo: whether it is the bundled demo model, which has its own prompts.
        is_repository: whether ``name`` is a Hugging Face id.
        repository: the Hugging Face id from which the folder or the GGUF comes.
        ollama: what Ollama's store has besides the weights, if the model comes from there.
    """

    name: str
    path: Path
    is_demo: bool = False
    is_repository: bool = False
    repository: str | None = None
    ollama: OllamaModel | None = None

    @property
    def is_gguf(self) -> bool:
        """Whether ``path`` is a GGUF file, by its suffix or its first bytes (Ollama's blobs)."""
        return is_gguf(self.path)

    @property
    def gguf(self) -> Path | None:
        """The GGUF file; None for a folder."""
        return self.path if self.is_gguf else None

    @property
    def loaded_by(self) -> str:
        """What a program loads it by: the Hugging Face id of a folder that has one, or the path."""
        hub_id = self.hub_id if self.gguf is None else None
        return hub_id or str(self.path)

    @property
    def hub_id(self) -> str | None:
        """The Hugging Face id from which it comes, also for a path in Hugging Face's cache."""
        return self.repository or hub.cached_id(self.path)

    @property
    def reference(self) -> hub.Reference | None:
        """What names it on Hugging Face; None for a model that was given as a path."""
        return None if self.repository is None else hub.parse(self.name)

    @property
    def title(self) -> str:
        """The model's name without owner or path, for a card or a GGUF's ``general.name``."""
        if self.is_demo:
            return self.name
        if self.ollama is not None:
            return self.ollama.name.title
        if not self.is_gguf:
            return self._bare_name
        stem = _PART.sub("", without(self.path.name, GGUF))
        # Blobs in Ollama's store and in Hugging Face's cache have hashes as names.
        return "model" if _SHA.fullmatch(stem) else stem

    @property
    def public_name(self) -> str:
        """Its origin without private paths: a Hugging Face id, or its name without a path."""
        if self.is_demo or self.ollama is not None:
            return self.name
        if self.hub_id is not None:
            return self.hub_id
        return self.path.name if self.is_gguf and self.title != "model" else self.title

    @property
    def _bare_name(self) -> str:
        """The name of the repository, or of the folder or file."""
        if self.hub_id is not None:
            return self.hub_id.split("/")[1]
        # A path such as ".." must be resolved to know the folder's name.
        return os.path.basename(os.path.abspath(os.path.expanduser(self.name))) or "model"


def is_gguf(path: Path) -> bool:
    """Whether a file exists and ends in .gguf or begins with a GGUF's first bytes.

    Raises:
        UserError: when this user may not read it.
    """
    if not _is(path, stat.S_ISREG):
        return False
    if is_gguf_name(path):
        return True
    try:
        with path.open("rb") as stream:
            return stream.read(4) == b"GGUF"
    except OSError as error:
        raise _unreadable(path, error) from None


def resolve_gguf(text: str) -> Source:
    """The GGUF file that ``text`` names in any form of `resolve`; for a split model, any part.

    Raises:
        UserError: when there is no such file, and when ``text`` names a folder or a repository.
    """
    reference = _reference(text)
    if reference is not None:
        # For a whole repository this raises an error with the choices, and downloads nothing.
        return Source(text, hub.gguf(reference), repository=reference.repository)
    source = resolve(text)
    if not source.is_gguf:
        raise UserError(f"{text} is not a file: give the path of a .gguf file.")
    return source


def resolve(text: str) -> Source:
    """Find the model that ``text`` names.

    In this order: ``demo``; a folder or a GGUF file here; ``ollama:NAME[:TAG]``, from Ollama's own
    store; ``hf:OWNER/REPO/FILE.gguf``; ``OWNER/REPO:TAG``, the GGUF of that type, such as Q4_K_M;
    ``OWNER/REPO``, a Hugging Face model. The last three may begin with ``hf:`` and may have
    ``@REVISION`` after REPO; the address of a model's or a GGUF's page on https://huggingface.co
    does as well. They are downloaded to (or found in) the usual Hugging Face cache.

    Raises:
        UserError: when there is no such model, or it cannot be downloaded.
    """
    if text == "demo":
        from abl_mlx.demo import MODEL_PATH

        return Source("demo", MODEL_PATH, is_demo=True)
    path = _path(text)
    if _is(path, stat.S_ISDIR) or is_gguf(path):
        return Source(text, path)
    if _is(path):
        raise UserError(
            f"{text} is a file, and no GGUF: name the folder of an MLX or Hugging Face model, or a "
            ".gguf file."
        )
    if text.startswith("ollama:"):
        model = store.find(text.removeprefix("ollama:"))
        return Source(text, model.gguf, ollama=model)
    reference = _reference(text)
    if reference is None:
        if ends_in(path, GGUF):
            raise UserError(
                f"{text} is not a file here: check the path, or write hf:OWNER/REPO/FILE.gguf for "
                "one on Hugging Face."
            )
        raise UserError(
            f"{text} is not a folder or a GGUF here, and not a Hugging Face id such as "
            "mlx-community/SomeModel: check the spelling."
        )
    repository = reference.repository
    if reference.is_gguf:
        return Source(text, hub.gguf(reference), repository=repository)
    folder = hub.folder(reference)
    return Source(reference.name, folder, is_repository=True, repository=repository)


def on_the_hub(text: str) -> hub.Reference | None:
    """What ``text`` names on Hugging Face; None if it names something on this machine, or nothing.

    Raises:
        UserError: as `hub.parse`.
    """
    if text == "demo" or _is(_path(text)):
        return None
    return _reference(text)


def at_revision(text: str, revision: str) -> str:
    """The text that names the same model on Hugging Face at a branch, a tag or a commit.

    Args:
        text: as for `resolve`.
        revision: the value of ``--revision``.

    Raises:
        UserError: when ``text`` names something on this machine, a server, or a revision already.
    """
    reference = None if text == "demo" else _reference(text)
    if reference is None:
        raise UserError(
            f"--revision {revision}: {text} is not a model on Hugging Face, and only those have "
            "revisions; leave the flag out."
        )
    if reference.revision is not None:
        raise UserError(
            f"--revision {revision}: {text} names the revision {reference.revision} already; leave "
            "one of the two out."
        )
    return hub.at_revision(reference, revision).text


def _reference(text: str) -> hub.Reference | None:
    """The reference to Hugging Face in ``text``; None if it names something on this machine."""
    # A text such as models/x.gguf means a file on this machine.
    elsewhere = text.startswith("hf:") or hub.is_address(text) or not text.lower().endswith(".gguf")
    if text.startswith("ollama:") or not elsewhere or _is(_path(text)):
        return None
    return hub.parse(text)


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~nobody/...
        return Path(text)


def _is(path: Path, kind: Callable[[int], bool] = lambda mode: True) -> bool:
    """Whether ``path`` exists and its mode is of this kind.

    Raises:
        UserError: when this user may not look.
    """
    try:
        return kind(path.stat().st_mode)
    except PermissionError as error:
        raise _unreadable(path, error) from None
    except (OSError, ValueError):  # a name that is too long, or that no file can have
        return False


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be read ({error.strerror}): mend its rights, or copy it.")
