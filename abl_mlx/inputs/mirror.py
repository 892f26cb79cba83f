"""A repository of Hugging Face on this machine, of which only parts are there.

Its files have their full lengths, but hold only the bytes that were read; the rest are holes, which
take no room on disk. So they can be opened like any model's files, once the bytes that are wanted
have been fetched. What was fetched is kept for the next time, in `folder_of`.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from abl_mlx.inputs.hub import Reference
from abl_mlx.inputs.hub_errors import explained
from abl_mlx.inputs.ranges import Ranges
from abl_mlx.support.console import progress
from convert.base.errors import UserError

#: Requests that are made at the same time.
_AT_ONCE = 4

_COMMIT = re.compile(r"[0-9a-f]{40}")

Span = tuple[int, int]


@dataclass(frozen=True)
class Listed:
    """A file of a repository: its length in bytes, and its SHA-256 if the hub says it."""

    size: int
    sha256: str | None


class Mirror:
    """Part of one repository at one commit.

    Attributes:
        reference: the repository.
        commit: the commit.
        files: path -> length and hash of every file in the repository.
        folder: the folder on this machine.
        fetched: bytes that this object fetched.
    """

    def __init__(self, reference: Reference) -> None:
        """Ask the hub for the list of files; none is read.

        Raises:
            UserError: when there is no such repository, or it cannot be reached.
        """
        from huggingface_hub import HfApi

        with explained(reference.repository, reference.revision):
            found = HfApi().model_info(
                reference.repository, revision=reference.revision, files_metadata=True
            )
            commit = str(found.sha)
            self.files = {
                one.rfilename: Listed(int(one.size or 0), getattr(one.lfs, "sha256", None))
                for one in found.siblings or []
            }
        if not _COMMIT.fullmatch(commit) or any(".." in Path(one).parts for one in self.files):
            raise UserError(
                f"{reference.name}: Hugging Face's list of its files is malformed: check for a "
                "proxy between, or try again later."
            )
        self.reference, self.commit = reference, commit
        self.folder = folder_of(reference.repository, commit)
        self.fetched = 0
        self._ranges = Ranges(reference.repository, commit, reference.name)
        self._have: dict[str, list[Span]] = {}
        self._before: dict[str, list[Span]] = {}
        self._used: dict[str, list[Span]] = {}
        self._lock = threading.Lock()

    def path(self, file: str) -> Path:
        """Where a file of the repository is on this machine, with its full length.

        Raises:
            UserError: when it cannot be created there.
        """
        path = self.folder / file
        if file not in self._have:
            with _room():
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path, "ab") as stream:
                    stream.truncate(self.files[file].size)
            self._have[file] = self._before[file] = _read_spans(_spans_of(path))
        return path

    @property
    def kept(self) -> int:
        """Bytes that were needed and were on this machine before."""
        return sum(
            _length(used) - _length(without(used, self._before[file]))
            for file, used in self._used.items()
        )

    def fetch(self, file: str, label: str | None = None) -> Path:
        """Fetch a whole file; see `need`."""
        self.need({file: [(0, self.files[file].size)]}, label)
        return self.path(file)

    def need(self, wanted: Mapping[str, Sequence[Span]], label: str | None = None) -> None:
        """Fetch some bytes of some files, as far as they are missing.

        Args:
            wanted: file -> (first byte, the one after the last) of each span.
            label: of the progress bar.

        Raises:
            UserError: when they cannot be fetched or stored.
        """
        missing = []
        for file, spans in wanted.items():
            self.path(file)
            spans = merged(spans)
            self._used[file] = merged([*self._used.get(file, []), *spans])
            missing += [(file, *gap) for gap in without(spans, self._have[file])]
        if not missing:
            return
        total = sum(end - start for _, start, end in missing)
        stopped = threading.Event()
        with progress(total, label or "read", "B") as bar, ThreadPoolExecutor(_AT_ONCE) as pool:

            def fetch(file: str, start: int, end: int) -> None:
                for chunk in self._ranges.read(file, start, end, self.files[file].size):
                    self._keep(file, start, chunk)
                    start += len(chunk)
                    bar.update(len(chunk))
                    if stopped.is_set():
                        return

            try:
                for done in [pool.submit(fetch, *one) for one in missing]:
                    done.result()
            except BaseException:
                stopped.set()
                pool.shutdown(cancel_futures=True)
                raise
            finally:
                for file in {one[0] for one in missing}:
                    self._write_spans(file)

    def _keep(self, file: str, start: int, chunk: bytes) -> None:
        path = self.folder / file
        with _room(), open(path, "r+b") as stream:
            stream.seek(start)
            stream.write(chunk)
        # An open model file must not seem to be changed while it is in use.
        os.utime(path, (0, 0))
        with self._lock:
            self._have[file] = merged([*self._have[file], (start, start + len(chunk))])
            self.fetched += len(chunk)

    def _write_spans(self, file: str) -> None:
        """Write down which bytes of a file are there, after these bytes."""
        path = self.folder / file
        with _room():
            descriptor = os.open(path, os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            new = _spans_of(path).with_suffix(f".{os.getpid()}")
            new.write_text(json.dumps(self._have[file]))
            new.replace(_spans_of(path))


def folder_of(repository: str, commit: str) -> Path:
    """Where parts of a repository are kept: ``$XDG_CACHE_HOME/abl-mlx/parts``."""
    return _home() / repository.replace("/", "--") / commit


def _home() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "abl-mlx" / "parts"


def merged(spans: Iterable[Span]) -> list[Span]:
    """Spans in order, without overlaps, and joined where they touch."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        elif start < end:
            found.append((start, end))
    return found


def without(spans: Iterable[Span], have: Sequence[Span]) -> list[Span]:
    """The parts of spans that are in none of the spans of ``have``, which are as from `merged`."""
    found = []
    for start, end in spans:
        for first, last in have:
            if last <= start or first >= end:
                continue
            if start < first:
                found.append((start, first))
            start = last
        if start < end:
            found.append((start, end))
    return found


def _length(spans: Iterable[Span]) -> int:
    return sum(end - start for start, end in spans)


def _spans_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.parts")


def _read_spans(path: Path) -> list[Span]:
    """What is written down about a file; nothing if that cannot be read."""
    with suppress(OSError, ValueError, TypeError):
        return merged((int(start), int(end)) for start, end in json.loads(path.read_text()))
    return []


@contextmanager
def _room() -> Iterator[None]:
    """Context manager that turns errors of the disk into one sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"what is read of a model cannot be kept in {_home()} ({error.strerror or error}): "
            "make room, or name another place in the environment variable XDG_CACHE_HOME."
        ) from None
