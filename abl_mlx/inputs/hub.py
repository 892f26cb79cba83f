"""Models on Hugging Face: a folder of safetensors, or one GGUF chosen by its name or its type.

Downloads go to the usual Hugging Face cache. Files that are in the cache are used from there, also
without a connection (``HF_HUB_OFFLINE=1``).
"""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote

from abl_mlx.inputs.hub_errors import explained, is_connection
from convert.base.errors import UserError

# The files that a text model needs; a repository may have many others (PyTorch copies, pictures).
_PATTERNS = [
    "*.json", "model*.safetensors", "*.py", "tokenizer.model", "*.tiktoken", "tiktoken.model",
    "*.txt", "*.jsonl", "*.jinja", "LICENSE*", "README.md",
]  # fmt: skip

_REPOSITORY = r"(?P<repository>\w[\w.-]*/\w[\w.-]*)"
_REVISION = r"(?:@(?P<revision>\w[\w.{}-]*))?"
# A branch may have slashes in its name (refs/pr/1), but not if a file's path follows.
_REFERENCE = re.compile(_REPOSITORY + _REVISION.format("/") + r"(?::(?P<tag>[\w.-]+))?", re.ASCII)
_PART_OF = re.compile(
    _REPOSITORY + _REVISION.format("") + r"(?:/(?P<folder>\w[\w.-]*(?:/\w[\w.-]*)*)/?)?", re.ASCII
)
_FILE = re.compile(_REPOSITORY + _REVISION.format("") + r"/(?P<file>[^:]+)", re.ASCII)

# The address of a page on Hugging Face, as a browser shows it.
_ADDRESS = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/+(?P<path>[^?#]*).*", re.IGNORECASE
)

_PART = re.compile(r"-(\d{5})-of-(\d{5})$")

# A quantization's name at the end of a file's or a folder's name: Q4_K_M, IQ2_XXS, UD-Q4_K_XL.
_TYPE = re.compile(
    r"(?:^|[-./_])((?:UD-)?(?:I?Q\d\w*|TQ\d\w*|BF16|F16|FP16|F32|FP32|MXFP4\w*|NVFP4\w*))$",
    re.IGNORECASE | re.ASCII,
)

# GGUF files of llama.cpp that are not language models.
_NO_MODEL = re.compile(r"(?:^|[-./_])(mmproj|imatrix)(?:$|[-./_\d])", re.IGNORECASE)


@dataclass(frozen=True)
class Reference:
    """A reference to a model on Hugging Face.

    Attributes:
        repository: OWNER/NAME.
        file: path of a GGUF in the repository.
        tag: the name of a quantization, which chooses a GGUF.
        revision: a branch, a tag or a commit of the repository; None for its main branch.
    """

    repository: str
    file: str | None = None
    tag: str | None = None
    revision: str | None = None

    @property
    def is_gguf(self) -> bool:
        """Whether it names a GGUF rather than the whole repository."""
        return self.file is not None or self.tag is not None

    @property
    def name(self) -> str:
        """OWNER/NAME, with ``@REVISION`` where one is given."""
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"

    @property
    def text(self) -> str:
        """What `parse` reads as this reference."""
        if self.file is None:
            return self.name if self.tag is None else f"{self.name}:{self.tag}"
        if "/" in (self.revision or ""):  # only in an address is it clear where the file begins
            revision, file = quote(str(self.revision), safe=""), quote(self.file)
            return f"https://huggingface.co/{self.repository}/blob/{revision}/{file}"
        return f"hf:{self.name}/{self.file}"


@dataclass(frozen=True)
class _Model:
    """One GGUF model of a repository: its files in order, and its type as the name says it."""

    files: tuple[str, ...]
    whole: bool
    stem: str
    tag: str | None


@dataclass(frozen=True)
class _Repository:
    """The GGUF models of a repository, or of the part of it in the cache.

    Attributes:
        name: OWNER/NAME or OWNER/NAME@REVISION.
        projectors: paths of GGUFs that turn pictures or sound into tokens.
    """

    name: str
    models: tuple[_Model, ...]
    projectors: tuple[str, ...]
    cached: bool

    @property
    def place(self) -> str:
        """Where the models were looked for, for a message."""
        if self.cached:
            return f"what the cache has of {self.name} (Hugging Face could not be reached)"
        return self.name

    @property
    def choices(self) -> str:
        """How to name each model, for the end of a message."""
        tags = list(dict.fromkeys(one.tag for one in self.models if one.tag is not None))
        files = [f"hf:{self.name}/{one.files[0]}" for one in self.models if one.tag is None]
        if not tags:
            return ", ".join(files[:6]) + (" and others" if len(files) > 6 else "")
        more = f", or {files[0]}" if files else ""
        return f"{', '.join(tags)}, by writing {self.name}:{tags[0]}{more}"


def parse(text: str) -> Reference | None:
    """Read ``OWNER/NAME[:TAG]`` or ``hf:OWNER/NAME[:TAG]`` or ``hf:OWNER/NAME/PATH.gguf``.

    NAME may be followed by ``@REVISION``. The address of a page on Hugging Face is also accepted.

    Returns:
        The reference; None when ``text`` has none of these forms.

    Raises:
        UserError: when it begins with ``hf:`` or is an address, but continues in another form.
    """
    if is_address(text):
        return _parse_address(text)
    marked, rest = text.startswith("hf:"), text.removeprefix("hf:")
    file = _FILE.fullmatch(rest) if marked and rest.lower().endswith(".gguf") else None
    if file:  # before the other form, in which a branch may have slashes and dots
        return Reference(file["repository"], file=file["file"], revision=file["revision"])
    found = _REFERENCE.fullmatch(rest)
    if found:
        return Reference(found["repository"], tag=found["tag"], revision=found["revision"])
    if not marked:
        return None
    raise UserError(
        f"{text}: write hf:OWNER/REPO/FILE.gguf for one file of a Hugging Face repository, or "
        "OWNER/REPO:Q4_K_M for its GGUF of that type."
    )


def at_revision(reference: Reference, revision: str) -> Reference:
    """The same model at a branch, a tag or a commit.

    Raises:
        UserError: when no revision can have this name.
    """
    if re.fullmatch(r"\w[\w./-]*", revision, re.ASCII) is None:
        raise UserError(f"{revision!r} is no branch, tag or commit: check the spelling.")
    return replace(reference, revision=revision)


def is_address(text: str) -> bool:
    """Whether ``text`` is the address of something on Hugging Face, with or without https://."""
    return _ADDRESS.fullmatch(text) is not None


def _parse_address(text: str) -> Reference:
    """Read https://huggingface.co/OWNER/NAME, also with /tree/REVISION or /blob/REVISION/FILE.gguf.

    Any other page of a model (its discussions, its README.md) stands for the model.
    """
    found = _ADDRESS.fullmatch(text)
    assert found is not None
    # A branch refs/pr/1 is refs%2Fpr%2F1 in an address.
    parts = [unquote(part) for part in found["path"].split("/") if part]
    reference = _REFERENCE.fullmatch("/".join(parts[:2]))
    if reference is None or parts[0] in ("datasets", "spaces", "collections", "docs", "papers"):
        raise UserError(
            f"{text} is not the page of a model: give its address, "
            "https://huggingface.co/OWNER/REPO, or OWNER/REPO alone."
        )
    revision, file = reference["revision"], None
    if len(parts) > 3 and parts[2] in ("tree", "blob", "resolve", "raw", "commit"):
        revision = None if parts[3] == "main" else parts[3]
        path = "/".join(parts[4:])
        if path.lower().endswith(".gguf"):
            file = path
        elif path and parts[2] == "tree":
            raise UserError(
                f"{text} is a folder inside a repository: write hf:OWNER/REPO/FILE.gguf for one "
                "GGUF in it, or OWNER/REPO for the whole model."
            )
    return Reference(reference["repository"], file, reference["tag"], revision)


def cached_id(path: Path) -> str | None:
    """The id of the repository to which a path in Hugging Face's cache belongs; None elsewhere.

    The cache keeps OWNER/NAME under models--OWNER--NAME/snapshots/COMMIT; an old repository may
    have no owner.
    """
    for parts in (path.absolute().parts, path.resolve().parts):
        for part, below in zip(reversed(parts[:-1]), reversed(parts[1:]), strict=True):
            if part.startswith("models--") and below in ("snapshots", "blobs"):
                owner, _, name = part.removeprefix("models--").partition("--")
                return f"{owner}/{name}" if name else None
    return None


def folder(reference: Reference) -> Path:
    """The folder of a Hugging Face model, downloaded or in the cache.

    Raises:
        UserError: when it cannot be downloaded; or when it holds only GGUFs, with their tags.
    """
    path = downloaded(reference, _PATTERNS)
    if not any(path.glob("*.safetensors")):
        check_no_ggufs(reference)
    return path


def check_no_ggufs(reference: Reference) -> None:
    """Check that a repository without safetensors has no GGUFs either, one of which is meant.

    Raises:
        UserError: with their tags, if it has.
    """
    listed = _list(reference)
    if listed.models:
        raise UserError(
            f"{reference.name} holds GGUFs and no safetensors: pick one of {listed.choices}."
        )


def part(text: str, names: Sequence[str], flag: str) -> Path:
    """A folder inside a repository, or its top folder, with files downloaded or in the cache.

    Args:
        text: ``hf:OWNER/NAME[@REVISION][/FOLDER]``.
        names: the names of the files in it that are wanted, as far as they are there.
        flag: named in errors about the form of ``text``.

    Raises:
        UserError: when it has another form or cannot be downloaded, or there is no such folder.
    """
    found = _PART_OF.fullmatch(text.removeprefix("hf:"))
    if found is None:
        raise UserError(f"{flag} {text}: write hf:OWNER/NAME/FOLDER, or hf:OWNER/NAME.")
    reference = Reference(found["repository"], revision=found["revision"])
    inside = found["folder"] or ""
    within = f"{glob.escape(inside)}/" if inside else ""
    root = downloaded(reference, [f"{within}{glob.escape(name)}" for name in names])
    if not (root / inside).is_dir():
        raise UserError(f"{reference.name} on Hugging Face has no folder {inside}: check the path.")
    return root / inside


def gguf(reference: Reference) -> Path:
    """The GGUF that ``reference`` names, downloaded or in the cache.

    For a split model this is the first part; all parts are downloaded.

    Raises:
        UserError: when it cannot be downloaded; or when no GGUF or several fit, with the choices.
    """
    listed = _list(reference)
    model = _chosen(listed, reference)
    root = downloaded(reference, [glob.escape(file) for file in model.files])
    for file in model.files:
        if not (root / file).is_file():
            raise UserError(
                f"{file} is not in what the cache has of {listed.name}, and Hugging Face could not "
                "be reached: check the connection."
            )
    return root / model.files[0]


def gguf_files(reference: Reference) -> tuple[str, ...]:
    """The paths in its repository of the GGUF that ``reference`` names, part by part.

    Raises:
        UserError: as `gguf`.
    """
    return _chosen(_list(reference), reference).files


def _chosen(listed: _Repository, reference: Reference) -> _Model:
    """The model of a repository that a reference names."""
    if not listed.models:
        raise UserError(
            f"there is no GGUF in {listed.place}: name the repository alone if it is a model in "
            "safetensors, or else one whose name ends in -GGUF."
        )
    if reference.file is not None:
        model = _by_file(listed, reference.file)
    elif reference.tag is not None:
        model = _by_tag(listed, reference.tag)
    else:
        raise UserError(
            f"{listed.name} is a whole repository, and one GGUF is wanted: pick one of "
            f"{listed.choices}."
        )
    if not model.whole:
        raise UserError(
            f"parts of {model.files[0]} are missing in {listed.place}: pick another file, or try "
            "again later."
        )
    return model


def projector_of(reference: Reference) -> str | None:
    """The path in its repository of the file that turns pictures into a GGUF's tokens.

    It is looked for beside the GGUF, then in the folders above. Of several it is one named after
    the model, if there is such a one, and of those the one in F16, which every program runs.

    Raises:
        UserError: as `gguf` does.
    """
    listed = _list(reference)
    model = _chosen(listed, reference)
    for place in [str(one) for one in PurePosixPath(model.files[0]).parents]:
        here = [one for one in listed.projectors if str(PurePosixPath(one).parent) == place]
        if not here:
            continue
        bare = _TYPE.sub("", os.path.basename(model.stem)).lower()
        named = [one for one in here if bare in os.path.basename(one).lower()]

        def order(file: str) -> tuple[int, str]:
            kind = _tag(os.path.splitext(file)[0])
            kinds = ("F16", "FP16", "BF16", "F32", "FP32")
            rank = kinds.index(kind.upper()) if kind and kind.upper() in kinds else len(kinds)
            return rank, file

        return min(named or here, key=order)
    return None


def downloaded(reference: Reference, patterns: Sequence[str]) -> Path:
    """A repository's top folder, with the files of some patterns downloaded or in the cache."""
    from huggingface_hub import snapshot_download

    with explained(reference.repository, reference.revision):
        return Path(
            snapshot_download(
                reference.repository, revision=reference.revision, allow_patterns=list(patterns)
            )
        )


def _list(reference: Reference) -> _Repository:
    """The GGUFs of a repository; without a connection, those in the cache."""
    from huggingface_hub import HfApi, snapshot_download

    repository, revision = reference.repository, reference.revision
    with explained(reference.repository, reference.revision):
        try:
            # Without a connection, list_repo_files would retry for half a minute.
            siblings = HfApi().model_info(repository, revision=revision).siblings or []
            files = [sibling.rfilename for sibling in siblings]
            return _Repository(reference.name, _models(files), _projectors(files), cached=False)
        except Exception as error:
            if not isinstance(error, OSError) and not is_connection(error):
                raise
            try:
                # Without patterns no file can be missing, so a partly cached model is accepted.
                folder = snapshot_download(
                    repository, revision=revision, allow_patterns=[], local_files_only=True
                )
            except Exception:
                raise error from None
    root = Path(folder)
    files = [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]
    return _Repository(reference.name, _models(files), _projectors(files), cached=True)


def _projectors(files: Iterable[str]) -> tuple[str, ...]:
    found = [file for file in files if file.lower().endswith(".gguf")]
    return tuple(file for file in found if "mmproj" in os.path.basename(file).lower())


def _tag(stem: str) -> str | None:
    """The type at the end of a file's name, or of its folder's."""
    found = _TYPE.search(stem) or _TYPE.search(os.path.dirname(stem))
    return found[1] if found else None


def _models(files: Iterable[str]) -> tuple[_Model, ...]:
    """The GGUF models among the files of a repository; the parts of a split one are joined."""
    parts: dict[tuple[str, int], dict[int, str]] = {}
    for file in sorted(files):
        stem, ending = os.path.splitext(file)
        if ending.lower() != ".gguf" or _NO_MODEL.search(stem):
            continue
        split = _PART.search(stem)
        if split:
            stem = stem[: split.start()]
        number, count = (int(split[1]), int(split[2])) if split else (1, 1)
        parts.setdefault((stem, count), {})[number] = file
    models = []
    for (stem, count), numbered in parts.items():
        models.append(
            _Model(
                files=tuple(numbered[number] for number in sorted(numbered)),
                whole=sorted(numbered) == list(range(1, count + 1)),
                stem=stem,
                tag=_tag(stem),
            )
        )
    return tuple(models)


def _by_file(listed: _Repository, file: str) -> _Model:
    for model in listed.models:
        if file in model.files:
            return model
    every = [name for model in listed.models for name in model.files]
    near = difflib.get_close_matches(file, every, n=3, cutoff=0.3) or every[:3]
    names = " or ".join(f"hf:{listed.name}/{name}" for name in near)
    raise UserError(f"there is no {file} in {listed.place}: did you mean {names}?")


def _by_tag(listed: _Repository, tag: str) -> _Model:
    """The only model of this type, by the end of its name, or else by a word anywhere in it.

    Raises:
        UserError: when no model or several have this type.
    """
    # Q4_K_M is a word in x-Q4_K_M-v2, but not in Q4_K_M_L, Q4_K_M2 or IQ4_K_M.
    word = re.compile(rf"(?:^|[-./]){re.escape(tag)}(?:$|[-./])", re.IGNORECASE)
    fitting = [model for model in listed.models if (model.tag or "").lower() == tag.lower()]
    fitting = fitting or [model for model in listed.models if word.search(model.stem)]
    if not fitting:
        raise UserError(
            f"there is no GGUF of type {tag} in {listed.place}: pick one of {listed.choices}."
        )
    if len(fitting) > 1:
        names = ", ".join(f"hf:{listed.name}/{model.files[0]}" for model in fitting[:6])
        raise UserError(f"{listed.name}:{tag} fits {len(fitting)} files: name one of {names}.")
    return fitting[0]
