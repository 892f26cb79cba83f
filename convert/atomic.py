"""Outputs that appear under their final name whole, or not at all."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from convert.errors import UserError

_NUMBERS = itertools.count()


def check_new(path: Path) -> None:
    """Refuse an output that exists or cannot be created, before any long work begins.

    Raises:
        UserError: naming the path, when it exists, when its parent is no folder, or when the
            parent cannot be written to.
    """
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} already exists: choose another -o or remove it first.")
    parent = path.absolute().parent
    existing = parent
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"{existing} is not a folder, so {path} cannot be written there.")
    try:
        # os.access answers for the effective rights, and a real attempt answers for the rest
        # (read-only mounts, root on a network share).
        with tempfile.TemporaryDirectory(dir=existing, prefix=".abl-mlx-"):
            pass
    except OSError as error:
        raise UserError(
            f"{existing} cannot be written to ({error.strerror}): choose another -o."
        ) from None


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    path = path.absolute()
    made = []
    parent = path.parent
    while not parent.exists():
        made.append(parent)
        parent = parent.parent
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    done = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if path.exists():
            raise UserError(f"{path} appeared while it was being written: nothing was replaced.")
        os.rename(temporary, path)
        done = True
    except OSError as error:
        elsewhere = error.filename and not str(error.filename).startswith(str(temporary.parent))
        if elsewhere:
            raise
        raise UserError(f"{path} could not be written: {error.strerror or error}.") from error
    finally:
        if not done:
            if temporary.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink(missing_ok=True)
            for folder in made:
                try:
                    folder.rmdir()
                except OSError:
                    break


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; flush and rename it when the block ends well.

    On any exception, Ctrl-C included, the temporary file is removed and ``path`` never exists.
    """
    with _partial(path) as temporary:
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; rename it when the block ends well.

    On any exception, Ctrl-C included, the temporary folder is removed and ``path`` never exists.
    """
    with _partial(path) as temporary:
        temporary.mkdir()
        yield temporary


@contextmanager
def new_files(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder inside ``folder``; its files move up together when all is well.

    For outputs of several files. On any exception, Ctrl-C included, none of them appears.

    Raises:
        UserError: when one of them is there already.
    """
    # Several may be open at once in one folder.
    whole = folder / f"abl-mlx-parts-{next(_NUMBERS)}"
    with _partial(whole) as temporary:
        temporary.mkdir()
        yield temporary
        moved: list[Path] = []
        try:
            for file in sorted(temporary.iterdir()):
                target = folder / file.name
                if target.exists():
                    raise UserError(f"{target} appeared meanwhile: nothing was replaced.")
                os.rename(file, target)
                moved.append(target)
        except BaseException:
            for target in moved:
                target.unlink(missing_ok=True)
            raise
    whole.rmdir()
