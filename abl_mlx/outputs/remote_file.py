"""A model on Hugging Face of which only the bytes that are used are read.

A `Mirror` has the files with holes; the weights of `stream_weights` fetch their bytes before they
are decoded. Whatever else needs a tensor's data, such as running the model, needs a download.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from abl_mlx.edits.slabs import Slab
from abl_mlx.inputs import hub, sources
from abl_mlx.inputs.mirror import Mirror, Span
from abl_mlx.inputs.sources import Source
from abl_mlx.outputs.folder import FolderFile
from abl_mlx.outputs.gguf import GgufFile
from abl_mlx.outputs.model_file import ModelFile, find_model
from abl_mlx.outputs.stream_weights import StreamWeight, StreamWeights
from abl_mlx.records.looks import PartRead
from abl_mlx.support import ranks
from abl_mlx.support.console import say
from abl_mlx.support.units import in_bytes
from convert.architectures import gguf_writers
from convert.base.errors import UserError
from convert.gguf.header import read_part
from convert.mlx.matrix import PARTS
from convert.mlx.safetensors_files import INDEX

#: Bytes of a safetensors file that are fetched first, and of a GGUF, whose header has the
#: vocabulary; more are fetched as needed, twice as many each time.
_FIRST, _FIRST_GGUF = 1 << 17, 1 << 20

#: No header is longer than this.
_LONGEST = 1 << 27


@dataclass(frozen=True)
class Place:
    """Where a tensor lies.

    Attributes:
        file: the path of its file in the repository.
        offset, nbytes: its first byte in the file, and its length.
        rows: into how many equal parts it may be cut.
    """

    file: str
    offset: int
    nbytes: int
    rows: int

    def span(self, first: int, last: int) -> Span:
        """The bytes of the rows from ``first`` to ``last``, which is not included."""
        each = self.nbytes // self.rows
        return self.offset + first * each, self.offset + last * each


class RemoteFile:
    """What the two formats share: a mirror, and the weights that fetch what they decode."""

    mirror: Mirror
    weight_files: tuple[str, ...]

    @property
    def total(self) -> int:
        """Bytes of all files that hold weights."""
        return sum(self.mirror.files[file].size for file in self.weight_files)

    def part_read(self) -> PartRead:
        """How much was read of it so far."""
        mirror = self.mirror
        return PartRead(
            model=mirror.reference.text,
            commit=mirror.commit,
            read=mirror.fetched,
            kept=mirror.kept,
            total=self.total,
            share=(mirror.fetched + mirror.kept) / max(self.total, 1),
        )

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every file that holds weights, as Hugging Face says it."""
        listed = {file: self.mirror.files[file].sha256 for file in self.weight_files}
        return {file: sha256 for file, sha256 in listed.items() if sha256 is not None}

    def places(self, tensor: str) -> list[Place]:
        """Where a tensor lies, and what else is needed to decode it."""
        raise NotImplementedError

    def fetch_rows(self, tensors: Iterable[str], first: int, last: int) -> None:
        """Fetch some rows of tensors (counted through all dimensions but the last)."""
        wanted: dict[str, list[Span]] = {}
        for tensor in tensors:
            for place in self.places(tensor):
                part = (first, last) if last <= place.rows else (0, place.rows)
                wanted.setdefault(place.file, []).append(place.span(*part))
        self.mirror.need(wanted, "read")

    def _fetching(self, weights: StreamWeights) -> StreamWeights:
        """The same weights, which fetch their bytes before they are decoded."""
        return replace(weights, writers=[self._one_fetching(one) for one in weights.writers])

    def _one_fetching(self, one: StreamWeight) -> StreamWeight:
        rows = math.prod(one.shape[:-1])

        def read(slab: Slab) -> np.ndarray:
            # Rows of a slab are rows of the file if one tensor holds the weight as it is.
            whole = len(one.tensors) > 1 or self.places(one.tensors[0])[0].rows != rows
            first, last = (0, 1 << 62) if whole else (slab.rows.start, slab.rows.stop)
            self.fetch_rows(one.tensors, first, last)
            return one.read(slab)

        return replace(one, read=read)


class RemoteFolder(RemoteFile, FolderFile):
    """A repository with safetensors as a `ModelFile`."""

    def __init__(self, source: Source, mirror: Mirror, weight_files: tuple[str, ...]) -> None:
        FolderFile.__init__(self, source)
        self.mirror, self.weight_files = mirror, weight_files

    def places(self, tensor: str) -> list[Place]:
        stem = tensor.removesuffix("weight")
        parts = [f"{stem}{part}" for part in PARTS] if f"{stem}scales" in self.files else [tensor]
        found = []
        for name in (one for one in parts if one in self.files):
            info = self.files.info(name)
            rows = math.prod(info.shape[:-1]) or 1
            found.append(Place(info.file.name, info.offset, info.nbytes, rows))
        return found

    @cached_property
    def _stream_weights(self) -> StreamWeights:
        # Norms may be gains behind the writers, and are read when those are found.
        self.fetch_rows(
            (name for name in self.files.names if len(self.files.info(name).shape) < 2), 0, 1
        )
        return self._fetching(super()._stream_weights)


class RemoteGguf(RemoteFile, GgufFile):
    """A GGUF of a repository as a `ModelFile`."""

    def __init__(self, source: Source, mirror: Mirror, weight_files: tuple[str, ...]) -> None:
        GgufFile.__init__(self, source)
        self.mirror, self.weight_files = mirror, weight_files

    def places(self, tensor: str) -> list[Place]:
        entry = self.gguf.tensor(tensor)
        return [Place(self.weight_files[entry.part], entry.offset, entry.nbytes, entry.rows or 1)]

    @cached_property
    def _stream_weights(self) -> StreamWeights:
        gguf = self.gguf
        named = gguf_writers.find(gguf.architecture, gguf.shapes, gguf.metadata)
        self.fetch_rows((gain for one in named for gain in one.gains), 0, 1)
        return self._fetching(super()._stream_weights)


def find_in_parts(text: str) -> ModelFile:
    """The files of the model that ``text`` names; of one on Hugging Face only parts are read.

    With several processes it is downloaded, as by `find_model`.

    Raises:
        UserError: when there is no such model, or it cannot be read.
    """
    remote = find_remote(text) if ranks.everyone() == 1 else None
    return remote or find_model(text)


def read_of(models: Iterable[ModelFile]) -> list[PartRead] | None:
    """How much was read of those of some models of which parts were read; None if of none."""
    return [one.part_read() for one in models if isinstance(one, RemoteFile)] or None


def find_remote(text: str) -> ModelFile | None:
    """The model on Hugging Face that ``text`` names, of which nothing but the headers is read.

    Returns:
        The model; None if ``text`` names something on this machine, or a model whose files are all
        in Hugging Face's cache, or Hugging Face is not to be asked (``HF_HUB_OFFLINE``).

    Raises:
        UserError: when there is no such model, or it cannot be read.
    """
    from huggingface_hub import constants

    reference = sources.on_the_hub(text)
    if reference is None or constants.HF_HUB_OFFLINE:
        return None
    mirror = Mirror(reference)
    files = hub.gguf_files(reference) if reference.is_gguf else _weight_files(mirror)
    if all(_cached(mirror, file) for file in files):
        return None
    total = sum(mirror.files[file].size for file in files)
    say(f"reading parts of {text}, which has {in_bytes(total)} of weights")
    if reference.is_gguf:
        for index, file in enumerate(files):
            _fetch_gguf_header(mirror, file, index)
        source = Source(text, mirror.path(files[0]), repository=reference.repository)
        return RemoteGguf(source, mirror, files)
    for file in ("config.json", INDEX, "README.md"):
        if file in mirror.files:
            mirror.fetch(file)
    for file in files:
        _fetch_header(mirror, file)
    source = Source(
        reference.name, mirror.folder, is_repository=True, repository=reference.repository
    )
    return RemoteFolder(source, mirror, files)


def _weight_files(mirror: Mirror) -> tuple[str, ...]:
    """The safetensors files of a model, as mlx-lm loads them."""
    found = sorted(one for one in mirror.files if Path(one).match("model*.safetensors"))
    files = tuple(one for one in found if "/" not in one)
    if not files:
        hub.check_no_ggufs(mirror.reference)
    if not files or "config.json" not in mirror.files:
        lacks = "config.json" if files else "model*.safetensors"
        raise UserError(
            f"{mirror.reference.name} has no {lacks}: name a repository that holds a model in "
            "safetensors, or one of its GGUFs."
        )
    return files


def _cached(mirror: Mirror, file: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(mirror.reference.repository, file, revision=mirror.commit)
    return isinstance(found, str)


def _fetch_header(mirror: Mirror, file: str) -> None:
    """Fetch the header of a safetensors file; whether it is sound is found when it is opened."""
    size = mirror.files[file].size
    mirror.need({file: [(0, min(size, _FIRST))]}, "headers")
    with mirror.path(file).open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    mirror.need({file: [(0, min(size, 8 + length, _LONGEST))]}, "headers")


def _fetch_gguf_header(mirror: Mirror, file: str, index: int) -> None:
    """Fetch the header of a GGUF, whose length is known when it has been read.

    Raises:
        UserError: when it is damaged.
    """
    size, have = mirror.files[file].size, _FIRST_GGUF
    while True:
        have = min(size, have, _LONGEST)
        mirror.need({file: [(0, have)]}, "headers")
        with mirror.path(file).open("rb") as stream:
            try:
                end = read_part(mirror.path(file), stream.fileno(), index).data_start
            except UserError:  # which the missing bytes may cause, which are zeros
                if have in (size, _LONGEST):
                    raise
                end = 2 * have
        if end <= have:
            return
        have = max(end, have + 1)
