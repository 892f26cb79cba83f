"""The processes that ``mlx.launch`` starts together: what each of them does, and what they tell.

Every process (a *rank*, numbered from 0) runs the same command and goes the same way. Work on many
prompts or edits is shared out; the results are exchanged, so that all ranks have all of them, bit
for bit the same, and take the same decisions. Only rank 0 keeps its outputs and prints.

Where ``mlx.launch`` started one process only, or none, every function here does nothing.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from abl_mlx.support import console, interrupts, lost_ranks
from convert.base import atomic, scratch
from convert.base.errors import UserError

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy as np

T = TypeVar("T")

#: Bytes that are exchanged at once.
_PIECE = 1 << 26

# Seconds between two looks for a signal while other ranks are waited for.
_LOOK = 0.1

# Seconds for which a rank of a split model waits for others to hear of its error: they may be in
# the model, where they hear of nothing but its end.
_PATIENCE = 30.0

# States of a rank in what it exchanges.
_RUNS, _ENDED = 0, 1


class _Ended(UserError):
    """Another rank ended with an error, or cannot be reached any more."""


class _Group:
    """The ranks, as MLX connects them. Arrays are exchanged by a thread of its own.

    While native code waits for other ranks Python handles no signals, so the main thread only waits
    for that thread.

    Attributes:
        rank, size: of this process, and of all.
        over: whether a rank ended with an error, after which nothing is exchanged.
        lost: whether another rank cannot be reached any more.
        watch: ends this process if native code waits for a rank that is lost.
        patience: the seconds after which others count as lost; None to wait for them.
    """

    def __init__(self) -> None:
        self.over = self.lost = False
        self.patience: float | None = None
        self._asked: SimpleQueue[Callable[[], Any]] = SimpleQueue()
        self._told: SimpleQueue[tuple[Any, Exception | None]] = SimpleQueue()
        threading.Thread(target=self._work, name="ranks", daemon=True).start()
        before = lost_ranks.sockets()
        self._group = self._call(_joined)
        self.rank, self.size = self._group.rank(), self._group.size()
        self.watch = lost_ranks.Watch(lost_ranks.sockets() - before, _LOST, atomic.abandon)

    def gather(self, data: np.ndarray) -> np.ndarray:
        """An array of this form from every rank, (size, *data.shape).

        Raises:
            RuntimeError: when a rank cannot be reached.
        """
        return self._call(lambda: _gathered(self._group, data))

    def _work(self) -> None:
        while True:
            work = self._asked.get()
            try:
                self._told.put((work(), None))
            except Exception as error:  # it is raised again by `_call`
                self._told.put((None, error))

    def _call(self, work: Callable[[], T]) -> T:
        self._asked.put(work)
        begun = time.monotonic()
        while True:
            if self.patience is not None and time.monotonic() - begun > self.patience:
                raise RuntimeError("no other process answers")
            try:
                interrupts.check()
                with suppress(Empty):
                    found, error = self._told.get(timeout=_LOOK)
                    break
            except BaseException:
                self.over = self.lost = True  # the answer will come, and belong to no question
                raise
        if error is not None:
            raise error
        return found


def _joined() -> mx.distributed.Group:
    import mlx.core as mx

    return mx.distributed.init()


def _gathered(group: mx.distributed.Group, data: np.ndarray) -> np.ndarray:
    import mlx.core as mx
    import numpy as np

    found = mx.distributed.all_gather(mx.array(data)[None], group=group, stream=mx.cpu)
    mx.eval(found)
    return np.array(found, data.dtype)


_group: _Group | None = None
_alone = _lockstep = False


def launched() -> bool:
    """Whether ``mlx.launch`` (or ``mpirun``, which it calls) started this process beside others."""
    hosts = os.environ.get("MLX_HOSTFILE")
    with suppress(OSError):
        if hosts is not None and not Path(hosts).read_text(encoding="utf-8").strip():
            return False  # it started one process, for which MLX has no group
    return "MLX_RANK" in os.environ or "OMPI_COMM_WORLD_SIZE" in os.environ


def size() -> int:
    """The number of processes that share the work; 1 inside of `alone` and after `in_lockstep`."""
    return 1 if _alone or _lockstep else everyone()


def everyone() -> int:
    """The number of processes, whatever they share."""
    return 1 if _group is None else _group.size


def in_lockstep() -> None:
    """Share out nothing from now on: every rank runs every prompt, together with all others."""
    global _lockstep
    _lockstep = True
    if _group is not None:
        _group.watch.start()


def lockstep() -> bool:
    """Whether `in_lockstep` was called."""
    return _lockstep


def rank() -> int:
    """The number of this process among them, from 0."""
    return 0 if _group is None or _alone or _lockstep else _group.rank


@contextmanager
def alone() -> Iterator[None]:
    """Context manager in which this process shares out nothing and asks no other."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


# --- a command from its begin to its end ---------------------------------------------------------


@contextmanager
def together() -> Iterator[None]:
    """Context manager of a whole command: joins the ranks, and ends on all of them or on none.

    If one rank ends with an error, all end with it, and rank 0 shows it.

    Raises:
        UserError: when the ranks cannot be connected.
        UserError: another rank ended.
        SystemExit: on other ranks than 0, instead of the error that rank 0 shows.
    """
    global _group, _lockstep
    if not launched():
        yield
        return
    try:
        _group = _Group()
    except RuntimeError as error:
        raise UserError(
            f"MLX cannot connect the processes that mlx.launch started: {error}."
        ) from None
    try:
        if _group.size == 1:
            _group.watch.stop()
            _group = None
            yield
            return
        with _member(_group):
            yield
    finally:
        if _group is not None:
            _group.watch.stop()
        _group, _lockstep = None, False


@contextmanager
def _member(group: _Group) -> Iterator[None]:
    if group.rank == 0:
        with _ended(group):
            yield
            agree("the end of the command")
        return
    console.hush()
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.close(silent)
    with scratch.scratch() as folder, atomic.elsewhere(folder), _ended(group):
        yield
        agree("the end of the command")


@contextmanager
def _ended(group: _Group) -> Iterator[None]:
    """Tell the other ranks of an error that ends this one, and say it on rank 0 only."""
    try:
        yield
    except Exception as error:
        if isinstance(error, RuntimeError) and "[ring]" in str(error):
            group.over = group.lost = True  # a part of a split model was lost
            raise _Ended(_LOST) from None
        code = getattr(error, "exit_code", 1)
        if code == 0:  # click ends a command in this way
            raise
        group.watch.stop()  # this rank ends by itself
        if _lockstep:
            group.patience = _PATIENCE
        if not group.over:
            told = error.format_message() if hasattr(error, "format_message") else str(error)
            with suppress(_Ended):
                _exchange(_ENDED, "an error", told.encode())
        if group.rank and not group.lost:
            raise SystemExit(code) from None
        raise


# --- what is exchanged ---------------------------------------------------------------------------


_LOST = (
    "the connection to another process of mlx.launch was lost, so this one ended, too, and nothing "
    "was written: read what that process printed."
)


def _exchange(state: int, label: str, data: bytes) -> list[bytes]:
    """The data of every rank, in their order.

    Raises:
        UserError: a rank ended or cannot be reached.
        UserError: the ranks do not do the same.
    """
    import numpy as np

    assert _group is not None
    if _group.over:
        raise _Ended(_LOST)
    head = np.array([state, zlib.crc32(label.encode()), len(data)], np.int64)
    try:
        heads = _group.gather(head)
        if (heads[:, 0] == _RUNS).all() and (heads[:, 1] != head[1]).any():
            labels = _padded(_group, label.encode(), None)
            _group.over = True
            told = ", ".join(f"rank {n}: {one.decode()}" for n, one in enumerate(labels))
            raise UserError(f"the processes of mlx.launch do not go the same way ({told}).")
        found = _padded(_group, data, [int(one) for one in heads[:, 2]])
    except RuntimeError:
        _group.over = _group.lost = True
        raise _Ended(_LOST) from None
    ended = [number for number, one in enumerate(heads[:, 0]) if one == _ENDED]
    if ended:
        _group.over = True
        raise _Ended(_of(_group, ended[0], found[ended[0]].decode()))
    return found


def _of(group: _Group, number: int, message: str) -> str:
    """An error's message, with the rank that it comes from in front if it is another one."""
    return message if number == group.rank else f"rank {number} of {group.size}: {message}"


def _padded(group: _Group, data: bytes, lengths: Sequence[int] | None) -> list[bytes]:
    """Data of several lengths, in pieces of one length, as MLX exchanges them."""
    import numpy as np

    if lengths is None:
        lengths = [int(one) for one in group.gather(np.array([len(data)], np.int64))[:, 0]]
    longest, parts = max(lengths), []
    for start in range(0, longest, _PIECE):
        piece = np.zeros(min(_PIECE, longest - start), np.uint8)
        mine = np.frombuffer(data[start : start + _PIECE], np.uint8)
        piece[: len(mine)] = mine
        parts.append(group.gather(piece))
    whole = np.concatenate(parts, axis=1) if parts else np.zeros((len(lengths), 0), np.uint8)
    return [row[:length].tobytes() for row, length in zip(whole, lengths, strict=True)]


def agree(label: str) -> None:
    """Wait until every rank is here.

    Raises:
        UserError: a rank ended.
    """
    if everyone() > 1 and not _alone:
        _exchange(_RUNS, label, b"")


def gathered(label: str, value: Any) -> list[Any]:
    """The values of every rank, in their order; each is made of what JSON has.

    Raises:
        UserError: a rank ended.
    """
    return [value] if size() == 1 else _gathered_of_all(label, value)


def _gathered_of_all(label: str, value: Any) -> list[Any]:
    return [json.loads(one) for one in _exchange(_RUNS, label, json.dumps(value).encode())]


def first(label: str, value: T) -> T:
    """The first value of a rank that is not empty, on all of them; a value is what JSON has."""
    found: list[T] = gathered(label, value)
    return next(filter(None, found), value)


def arrays(label: str, array: np.ndarray) -> list[np.ndarray]:
    """The arrays of every rank, in their order; their types and shapes may differ.

    Raises:
        UserError: a rank ended.
    """
    if size() == 1:
        return [array]
    import numpy as np

    forms = gathered(f"{label}: forms", [array.dtype.str, list(array.shape)])
    found = _exchange(_RUNS, label, array.tobytes())
    return [
        np.frombuffer(one, kind).reshape(shape)
        for one, (kind, shape) in zip(found, forms, strict=True)
    ]


# --- shared work ---------------------------------------------------------------------------------


def shares(costs: Sequence[float]) -> list[list[int]]:
    """Numbers of pieces of work, for each rank; their costs add up to about the same everywhere.

    Args:
        costs: of each piece, in any unit.
    """
    parts: list[list[int]] = [[] for _ in range(size())]
    sums = [0.0] * len(parts)
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        least = min(range(len(parts)), key=sums.__getitem__)
        parts[least].append(number)
        sums[least] += costs[number]
    return [sorted(part) for part in parts]


def each(label: str, items: Sequence[T], work: Callable[[T], Any]) -> list[Any]:
    """The results of work on every item, in order; every rank does some of the items, alone.

    Args:
        label: what is done, for messages.
        items: the same on every rank.
        work: gives what JSON has.
    """
    if size() == 1:
        return [work(item) for item in items]
    parts = shares([1] * len(items))
    mine = parts[rank()]
    with alone():
        found = [work(items[number]) for number in mine]
    return joined(parts, gathered(label, found))


def in_turn(
    label: str, items: Sequence[T], work: Callable[[T], np.ndarray]
) -> Iterator[np.ndarray]:
    """Yield the arrays that work makes of every item, in order; ranks take turns.

    Memory holds as many arrays as there are ranks.

    Args:
        label: what is done, for messages.
        items: the same on every rank.
        work: makes an array of an item; it is called when the array is wanted.
    """
    if size() == 1:
        yield from map(work, items)
        return
    import numpy as np

    for start in range(0, len(items), size()):
        some, turn = items[start : start + size()], rank()
        with alone():
            mine = work(some[turn]) if turn < len(some) else np.zeros(0)
        yield from arrays(label, mine)[: len(some)]


def joined(parts: Sequence[Sequence[int]], found: Sequence[Sequence[T]]) -> list[T]:
    """The results of pieces of work in the order of their numbers.

    Args:
        parts: from `shares`.
        found: each rank's results.
    """
    by_number = {
        number: value
        for part, values in zip(parts, found, strict=True)
        for number, value in zip(part, values, strict=True)
    }
    return [by_number[number] for number in range(len(by_number))]


def check_same(facts: Mapping[str, str]) -> None:
    """Check that all ranks work on the same things.

    Args:
        facts: what, such as "the model", and its hash or version.

    Raises:
        UserError: naming the first difference, and the rank that has it.
    """
    if everyone() == 1:
        return
    told = _gathered_of_all("what is worked on", {"host": socket.gethostname(), **facts})
    for what, here in told[0].items():
        for number, other in enumerate(told):
            if what != "host" and other[what] != here:
                raise UserError(
                    f"{what} of rank {number} ({other['host']}) is not that of rank 0 "
                    f"({told[0]['host']}): {other[what][:12]} instead of {here[:12]}; give every "
                    "process the same files and the same versions."
                )
