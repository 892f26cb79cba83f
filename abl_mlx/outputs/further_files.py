"""GGUFs that belong to a model beside its own: projectors and a draft model.

They hold no edited weight. An output in GGUF gets a copy of each beside it, so that it takes
pictures and sound as the source does. A folder's vision tower becomes a projector beside the
output.
"""

from __future__ import annotations

import glob
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from abl_mlx.inputs import hub
from abl_mlx.inputs.sources import Source
from abl_mlx.support import notes
from convert.base.atomic import new_file
from convert.gguf import projector
from convert.gguf.file import metadata
from convert.gguf.file_types import FILE_TYPES
from convert.ollama.description import Beside
from convert.projectors import folder as towers
from convert.projectors.folder import Projector, Unwritable


@dataclass(frozen=True)
class FurtherFiles:
    """Where the further files of a model are.

    Attributes:
        projectors: files that turn pictures or sound into tokens.
        draft: a small model for speculative decoding, if there is one.
        undecided: projectors beside a GGUF that all fit it, so that none is taken.
        tower: the projector that a folder's vision tower becomes, which `write_tower` writes.
    """

    projectors: tuple[Path, ...] = ()
    draft: Path | None = None
    undecided: tuple[Path, ...] = ()
    tower: Projector | None = None

    @property
    def size(self) -> int:
        """Bytes of all files that are copied or written; of a tower, the most."""
        files = self.projectors if self.draft is None else (*self.projectors, self.draft)
        copied = sum(file.stat().st_size for file in files)
        return copied + (self.tower.size if self.tower else 0)

    def names(self, output: Path) -> Beside:
        """The names of the files beside an output, such as ``mmproj-edited.gguf``."""
        numbers = range(1, len(self.projectors) + (self.tower is not None) + 1)
        return Beside(
            tuple(_beside("mmproj" if n == 1 else f"mmproj{n}", output) for n in numbers),
            _beside("draft", output) if self.draft else None,
        )

    def copies(self, output: Path) -> dict[str, Path]:
        """Name beside an output -> the file that is copied there; a tower is no copy."""
        names = self.names(output)
        found = dict(zip(names.projectors, self.projectors, strict=False))
        if self.draft is not None and names.draft is not None:
            found[names.draft] = self.draft
        return found

    def copy(self, output: Path, folder: Path) -> Beside:
        """Copy the files into a folder, under the names that they have beside an output.

        Returns:
            The names, with that of a tower that `write_tower` has put there.
        """
        for name, file in self.copies(output).items():
            shutil.copyfile(file, folder / name)
        names = self.names(output)
        there = tuple(name for name in names.projectors if (folder / name).is_file())
        return replace(names, projectors=there)

    def place(self, output: Path) -> list[str]:
        """Copy the files beside an output that has its final name; each appears complete.

        Returns:
            The names of the copies.

        Raises:
            UserError: when one exists or cannot be written.
        """
        copies = self.copies(output)
        for name, file in copies.items():
            with new_file(output.with_name(name)) as partial:
                shutil.copyfile(file, partial)
        return list(copies)

    def filed(self, output: Path) -> list[Path]:
        """The projectors as files: the source's own, or the one beside an output."""
        if self.tower is None:
            return list(self.projectors)
        found = [output.with_name(name) for name in self.names(output).projectors]
        return [path for path in found if path.is_file()]

    def places(self, outputs: Sequence[Path]) -> list[Path]:
        """The paths of all copies for these outputs in GGUF."""
        return [output.with_name(name) for output in outputs for name in self.names(output).all]


def of_source(source: Source) -> FurtherFiles:
    """The further files of a source.

    They are those in Ollama's store, the projector beside a GGUF here or on Hugging Face, which is
    then downloaded, or what a folder's tower becomes.

    Raises:
        UserError: when the source's files cannot be read.
    """
    if source.ollama is not None:
        return FurtherFiles(source.ollama.projectors, source.ollama.draft)
    if source.gguf is None:
        return _of_folder(source.path)
    keys = metadata(source.path)
    width = keys.get(f"{keys.get('general.architecture')}.embedding_length", 0)
    if not isinstance(width, int):
        return FurtherFiles()
    if source.reference is not None:
        return _of_hub(source.reference, width)
    found = tuple(projector.beside(source.path, width))
    return FurtherFiles(found) if len(found) == 1 else FurtherFiles(undecided=found)


def projector_names(source: Source) -> list[str]:
    """The names of a GGUF's projectors. Nothing is downloaded for them."""
    if source.reference is None:
        return [file.name for file in of_source(source).projectors]
    file = hub.projector_of(source.reference)
    return [] if file is None else [file.rsplit("/", 1)[-1]]


def _of_hub(reference: hub.Reference, width: int) -> FurtherFiles:
    """The projector of a GGUF on Hugging Face, downloaded or in the cache."""
    file = hub.projector_of(reference)
    if file is None:
        return FurtherFiles()
    path = hub.downloaded(reference, [glob.escape(file)]) / file
    return FurtherFiles((path,)) if projector.fits(path, width) else FurtherFiles()


def _of_folder(folder: Path) -> FurtherFiles:
    with suppress(Unwritable):
        return FurtherFiles(tower=towers.find(folder))
    return FurtherFiles()


def write_tower(folder: Path, gguf: Path) -> str | None:
    """Write the projector of a folder beside the GGUF that was made from the folder.

    It is in F32 or BF16 where the GGUF is, else in F16.

    Args:
        folder: the model's folder.
        gguf: the written file.

    Returns:
        A note on it; None where the folder has no vision tower.
    """
    try:
        tower = towers.find(folder)
        if tower is None:
            return None
        (name,) = FurtherFiles(tower=tower).names(gguf).projectors
        keys = metadata(gguf)
        chosen = keys.get("general.file_type")
        kind = next((one for one in towers.TYPES if FILE_TYPES[one][0] == chosen), "F16")
        tower.write(gguf.with_name(name), kind, name=str(keys.get("general.name", gguf.stem)))
    except Unwritable as error:
        return notes.no_tower(error.tensors, str(error))
    return notes.tower(name, len(tower.sources))


def _beside(what: str, output: Path) -> str:
    return f"{what}-{output.stem}.gguf"
