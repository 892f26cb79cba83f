"""GGUFs that belong to a model beside its own: projectors and a draft model.

They hold no edited weight. An output in GGUF gets a copy of each beside it, so that it takes
pictures and sound as the source does.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from abl_mlx.inputs.sources import Source
from convert.gguf import projector
from convert.gguf.file import metadata
from convert.ollama.description import Beside


@dataclass(frozen=True)
class FurtherFiles:
    """Where the further files of a model are.

    Attributes:
        projectors: files that turn pictures or sound into tokens.
        draft: a small model for speculative decoding, if there is one.
        undecided: projectors beside a GGUF that all fit it, so that none is taken.
    """

    projectors: tuple[Path, ...] = ()
    draft: Path | None = None
    undecided: tuple[Path, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of all files that are copied."""
        files = [*self.projectors, *([self.draft] if self.draft else [])]
        return sum(file.stat().st_size for file in files)

    def names(self, output: Path) -> Beside:
        """The names of the copies beside an output, such as ``mmproj-edited.gguf``."""
        numbers = range(1, len(self.projectors) + 1)
        return Beside(
            tuple(_beside("mmproj" if n == 1 else f"mmproj{n}", output) for n in numbers),
            _beside("draft", output) if self.draft else None,
        )

    def copy(self, output: Path, folder: Path) -> Beside:
        """Copy the files into a folder, under the names that they have beside an output."""
        names = self.names(output)
        for name, file in zip(names.projectors, self.projectors, strict=True):
            shutil.copyfile(file, folder / name)
        if self.draft is not None and names.draft is not None:
            shutil.copyfile(self.draft, folder / names.draft)
        return names

    def places(self, outputs: Sequence[Path]) -> list[Path]:
        """The paths of all copies for these outputs in GGUF."""
        found = []
        for output in outputs:
            names = self.names(output)
            listed = [*names.projectors, *([names.draft] if names.draft else [])]
            found += [output.with_name(name) for name in listed]
        return found


def of_source(source: Source) -> FurtherFiles:
    """The further files of a source: as Ollama's store has them, or the projector beside a GGUF.

    Raises:
        UserError: when the source is a GGUF that cannot be read.
    """
    if source.ollama is not None:
        return FurtherFiles(source.ollama.projectors, source.ollama.draft)
    if not source.is_gguf:
        return FurtherFiles()
    keys = metadata(source.path)
    width = keys.get(f"{keys.get('general.architecture')}.embedding_length", 0)
    found = tuple(projector.beside(source.path, width)) if isinstance(width, int) else ()
    return FurtherFiles(found) if len(found) == 1 else FurtherFiles(undecided=found)


def _beside(what: str, output: Path) -> str:
    return f"{what}-{output.stem}.gguf"
