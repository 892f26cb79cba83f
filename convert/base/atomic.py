"""Outputs that appear under their final name whole, or not at all.

What becomes NAME is written in the folder ``.NAME.partial`` beside it, in which a lock file says
that a living process is at it. A process that was killed leaves the folder behind without a lock;
the next one that writes NAME empties it, and removes it in the end.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from convert.base.errors import OPTION, UserError
from convert.base.locks import Busy, LockFile

# In the folder beside an output: the lock, and the files that are being named together.
_LOCK, _MOVING = "lock", "moving.json"


class _Place:
    """The folder beside an output, which this process alone writes to until `close`."""

    def __init__(self, path: Path) -> None:
        """Make the folder, or take over what a killed process left of it.

        Raises:
            UserError: another process is writing the output, or the folder is not one of ours.
            OSError: it cannot be made.
        """
        self.path = path.absolute()
        self.folder = self.path.with_name(f".{path.name}.partial")
        self._made: list[Path] = []
        self._lock: LockFile | None = None
        for parent in self.path.parents:
            if parent.exists():
                break
            self._made.append(parent)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked(path)
            self._clear()
        except BaseException:
            self._leave()
            raise

    def _locked(self, path: Path) -> LockFile:
        while True:
            with suppress(FileExistsError):
                self.folder.mkdir()
            ours = not self.folder.is_symlink() and self.folder.is_dir()
            with suppress(FileNotFoundError):
                if not ours or ((names := os.listdir(self.folder)) and _LOCK not in names):
                    raise UserError(
                        f"{self.folder} is in the way of what becomes {path.name}: remove it, or "
                        f"choose another {OPTION}.",
                        option="output",
                    )
                try:
                    lock = LockFile(self.folder / _LOCK)
                except Busy:
                    raise UserError(
                        f"{path} is being written by another run: wait for that one, or choose "
                        f"another {OPTION}.",
                        option="output",
                    ) from None
                if lock.certain or not lock.was_there:
                    return lock
                lock.close(remove=False)
                raise UserError(
                    f"{self.folder} is there, and its file system has no locks to tell whether "
                    f"another run is writing {path.name}: remove the folder if none is."
                )
            # Whoever had the folder removed it meanwhile.

    def _clear(self) -> None:
        """Remove what lies in the folder, and take back names that were given to files in part."""
        moving = self.folder / _MOVING
        with suppress(OSError, ValueError, TypeError, AttributeError):
            for name, inode in json.loads(moving.read_text(encoding="utf-8")).items():
                target = self.path.with_name(Path(name).name)
                if target.lstat().st_ino == inode:
                    target.unlink()
        for entry in os.scandir(self.folder):
            if entry.name == _LOCK:
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                with suppress(OSError):
                    os.unlink(entry.path)

    def moving(self, files: list[Path]) -> None:
        """Note files of the folder that are about to get their names, one after the other."""
        identities = {file.name: file.stat().st_ino for file in files}
        # On a disk that has just become full the names are given all the same.
        with suppress(OSError):
            (self.folder / _MOVING).write_text(json.dumps(identities), encoding="utf-8")

    def close(self) -> None:
        """Remove the folder with what is left in it, and folders that were made for nothing."""
        (self.folder / _MOVING).unlink(missing_ok=True)
        self._clear()
        self._leave()

    def _leave(self) -> None:
        if self._lock is not None:
            self._lock.close()
        for folder in (self.folder, *self._made):
            try:
                folder.rmdir()
            except OSError:
                if folder is not self.folder:
                    break


#: Outputs that a command has claimed and not yet begun to write.
_claimed: dict[Path, _Place] = {}
_claiming = False


@contextmanager
def claims() -> Iterator[None]:
    """Inside, `claim` keeps what it checked; at the end, what was not written is let go."""
    global _claiming
    before, _claiming = _claiming, True
    try:
        yield
    finally:
        _claiming = before
        while _claimed:
            _claimed.popitem()[1].close()


def claim(path: Path) -> None:
    """Like `check_new`; inside `claims` no other run may write ``path`` from here on.

    Raises:
        UserError: as `check_new`.
    """
    key = path.absolute()
    if key not in _claimed:
        place = _checked(path)
        if _claiming:
            _claimed[key] = place
        else:
            place.close()


def check_new(path: Path) -> None:
    """Refuse an output that exists or cannot be created, before any long work begins.

    Raises:
        UserError: naming the path, when it exists, when its parent is no folder, when the parent
            cannot be written to, or when another run is writing it.
    """
    if path.absolute() not in _claimed:
        _checked(path).close()


def _checked(path: Path) -> _Place:
    parent = path.absolute().parent
    existing = parent
    while not existing.exists():
        existing = existing.parent
    place = problem = None
    try:
        # A real attempt answers for rights, read-only mounts, and root on a network share.
        place = _Place(path)
    except UserError as error:
        problem = error
    except OSError as error:
        problem = UserError(
            f"{existing} cannot be written to ({error.strerror}): choose another {OPTION}.",
            option="output",
        )
    if path.exists() or path.is_symlink():
        if place is not None:
            place.close()
        raise UserError(
            f"{path} already exists: choose another {OPTION} or remove it first.", option="output"
        )
    if not existing.is_dir():
        raise UserError(f"{existing} is not a folder, so {path} cannot be written there.")
    if place is None:
        raise problem or AssertionError
    return place


@contextmanager
def _place(path: Path) -> Iterator[_Place]:
    """The folder beside an output; OSErrors in it are a sentence."""
    place = None
    try:
        place = _claimed.pop(path.absolute(), None) or _Place(path)
        yield place
    except OSError as error:
        elsewhere = error.filename and not str(error.filename).startswith(
            str(path.absolute().parent)
        )
        if elsewhere:
            raise
        raise UserError(f"{path} could not be written: {error.strerror or error}.") from error
    finally:
        if place is not None:
            place.close()


def _name(staged: Path, path: Path, *, replace: bool = False) -> None:
    if path.exists() and not replace:
        raise UserError(f"{path} appeared while it was being written: nothing was replaced.")
    os.replace(staged, path)


@contextmanager
def new_file(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; flush and rename it when the block ends well.

    On any exception, Ctrl-C included, the temporary file is removed and ``path`` never exists.

    Args:
        replace: a file that is there already.

    Raises:
        UserError: when it cannot be written, or is there already.
    """
    with _place(path) as place:
        staged = place.folder / path.name
        yield staged
        descriptor = os.open(staged, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        _name(staged, path, replace=replace)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; rename it when the block ends well.

    On any exception, Ctrl-C included, the temporary folder is removed and ``path`` never exists.

    Raises:
        UserError: when it cannot be written, or is there already.
    """
    with _place(path) as place:
        staged = place.folder / path.name
        staged.mkdir()
        yield staged
        _name(staged, path)


@contextmanager
def new_files(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; its files go beside ``path``, together, when the block ends well.

    For outputs of several files, of which ``path`` is the one that names them. On any exception,
    Ctrl-C included, none of them appears; nor after a kill, once ``path`` is written again.

    Raises:
        UserError: when one of them cannot be written, or is there already.
    """
    with _place(path) as place:
        staged = place.folder / "files"
        staged.mkdir()
        yield staged
        files = sorted(staged.iterdir())
        place.moving(files)
        moved: list[Path] = []
        try:
            for file in files:
                target = path.absolute().with_name(file.name)
                _name(file, target)
                moved.append(target)
        except BaseException:
            for target in moved:
                target.unlink(missing_ok=True)
            raise
