"""Outputs that appear under their final name whole, or not at all.

An output NAME is first written inside the folder ``.NAME.partial`` beside it. A lock file in that
folder shows that a living process is writing there. A killed process leaves the folder behind
unlocked; the next process that writes NAME empties the folder, and removes it when it has finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from convert.base.errors import OPTION, UserError
from convert.base.locks import Busy, LockFile

# Files in the folder beside an output: the lock, and the list of files that are moved together.
_LOCK, _MOVING = "lock", "moving.json"


class _Place:
    """The folder beside an output, which this process alone writes to until `close`."""

    def __init__(self, path: Path) -> None:
        """Make the folder, or take over what a killed process left of it.

        Raises:
            UserError: another process is writing the output, or the folder was not made by this
                module.
            OSError: it cannot be made.
        """
        self.path = path.absolute()
        self.folder = self.path.with_name(f".{path.name}.partial")
        self._made: list[Path] = []
        self._lock: LockFile | None = None
        _places.add(self)
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
                        f"{self.folder} is in the way of writing {path.name}: remove it, or "
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
                    f"{self.folder} exists, and its file system has no locks to tell whether "
                    f"another run is writing {path.name}: remove the folder if no other run is."
                )
            # The process that had the folder removed it meanwhile: try again.

    def _clear(self) -> None:
        """Empty the folder, and remove files that a killed process had already given their names.

        Those are the files that ``moving.json`` lists: an output of several files is complete or
        absent.
        """
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
        """Write down which files of the folder are about to be moved to their final names."""
        identities = {file.name: file.stat().st_ino for file in files}
        # A full disk that has no room for this note does not keep the files from their names.
        with suppress(OSError):
            (self.folder / _MOVING).write_text(json.dumps(identities), encoding="utf-8")

    def close(self) -> None:
        """Remove the folder with its contents, and those of its parents that are empty and new."""
        (self.folder / _MOVING).unlink(missing_ok=True)
        self._clear()
        self._leave()

    def _leave(self) -> None:
        _places.discard(self)
        if self._lock is not None:
            self._lock.close()
        for folder in (self.folder, *self._made):
            try:
                folder.rmdir()
            except OSError:
                if folder is not self.folder:
                    break


# All that were made and not closed yet.
_places: set[_Place] = set()


def abandon() -> None:
    """Remove all outputs that are not complete, for a process that is about to end at once."""
    for place in list(_places):
        with suppress(OSError):
            place.close()


# A folder for outputs that nobody keeps; None where they get their names.
_elsewhere: Path | None = None


@contextmanager
def elsewhere(folder: Path) -> Iterator[None]:
    """Context manager in which outputs are written into a folder, whatever their names say.

    This is for a process that works beside the one which keeps the outputs.
    """
    global _elsewhere
    before, _elsewhere = _elsewhere, folder
    try:
        yield
    finally:
        _elsewhere = before


def there(path: Path) -> Path:
    """Where an output is written: under its name, or inside of the folder of `elsewhere`."""
    if _elsewhere is None or _elsewhere in path.parents:
        return path
    whole = path.absolute()
    return _elsewhere / hashlib.sha256(bytes(whole.parent)).hexdigest()[:16] / whole.name


#: Outputs that a command has claimed but not yet begun to write, by absolute path.
_claimed: dict[Path, _Place] = {}
_claiming = False


@contextmanager
def claims() -> Iterator[None]:
    """Make `claim` reserve outputs inside the block; at its end unused reservations are dropped."""
    global _claiming
    before, _claiming = _claiming, True
    try:
        yield
    finally:
        _claiming = before
        while _claimed:
            _claimed.popitem()[1].close()


def claim(path: Path) -> None:
    """Check an output as `check_new` does, and inside `claims` keep other runs from writing it.

    Raises:
        UserError: as `check_new`.
    """
    path = there(path)
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
    path = there(path)
    if path.absolute() not in _claimed:
        _checked(path).close()


def _checked(path: Path) -> _Place:
    parent = path.absolute().parent
    existing = parent
    while not existing.exists():
        existing = existing.parent
    place = problem = None
    try:
        # Only a real attempt shows missing rights, read-only mounts, and root on a network share.
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
    """Open the folder beside an output; an OSError about the output becomes a UserError."""
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
        replace: whether a file that exists under this name may be replaced.

    Raises:
        UserError: when the file cannot be written, or exists and must not be replaced.
    """
    path = there(path)
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
        UserError: when the folder cannot be written, or exists already.
    """
    path = there(path)
    with _place(path) as place:
        staged = place.folder / path.name
        staged.mkdir()
        yield staged
        _name(staged, path)


@contextmanager
def new_files(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; its files go beside ``path``, together, when the block ends well.

    This is for an output of several files, such as a split GGUF; ``path`` is the file by which the
    user names it. On any exception, Ctrl-C included, none of the files appears. A kill may leave
    some of them; they are removed when ``path`` is written again.

    Raises:
        UserError: when one of the files cannot be written, or exists already.
    """
    path = there(path)
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
