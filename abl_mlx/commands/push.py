"""`abl-mlx push`: publish an output on Hugging Face, or say what would be published."""

from __future__ import annotations

from pathlib import Path

from abl_mlx import __version__
from abl_mlx.outputs import publishing
from abl_mlx.records.edits import PushRecord, UploadedFile
from abl_mlx.support.console import say
from abl_mlx.support.units import in_bytes


def push(output: Path, repository: str, *, yes: bool, public: bool) -> PushRecord:
    """Publish an output of `run` or `apply`.

    Args:
        output: the folder or the GGUF (of a split one any part).
        repository: OWNER/NAME on Hugging Face.
        yes: upload; without it nothing leaves this machine.
        public: whether a new repository can be seen by everybody.

    Raises:
        UserError: when there is no such output, it has no card or record, or the upload fails.
    """
    publishing.check_repository(repository)
    found = publishing.files_of(output)
    if found.left_out:
        say(f"left out: {', '.join(found.left_out)}")
    commit = None
    if yes:
        say(f"upload {len(found.files)} files, {in_bytes(found.size)}, to {repository} ...")
        commit = publishing.upload(found.files, repository, private=not public)
    return PushRecord(
        abl_mlx=__version__,
        output=str(output),
        repository=repository,
        address=publishing.address(repository),
        private=not public,
        files=[UploadedFile(name=name, bytes=path.stat().st_size) for path, name in found.files],
        commit=commit,
    )
