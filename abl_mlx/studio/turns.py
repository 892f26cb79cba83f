"""Work that calls back between its steps, run as a generator beside other work with the model.

A search tells of each trial from deep inside. It runs in a thread of its own, which goes on only
while the desk waits for its next event, so one thread at a time uses the model. What the work
wraps (`models.hooks`) is wrapped for its thread alone.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

from abl_mlx.models.hooks import scope
from abl_mlx.studio.desk import Event

#: Is called by work with an event, and returns when the work has its next turn.
Tell = Callable[[Event], None]

#: Seconds in which a search that is left comes to the end of its trial, when the studio ends.
_LEAVING = 60.0


class _Left(BaseException):
    """Ends work whose page has gone."""


class _End:
    """The end of work, and how it failed if it did."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def in_turns(work: Callable[[Tell], None]) -> Iterator[Event]:
    """Yield what work tells. Arrays that it leaves behind for others must be evaluated."""
    turn = threading.Semaphore(0)
    told: queue.SimpleQueue[Event | _End] = queue.SimpleQueue()
    left = threading.Event()

    def tell(event: Event) -> None:
        told.put(event)
        turn.acquire()
        if left.is_set():
            raise _Left

    def run() -> None:
        turn.acquire()
        try:
            with scope(object()):
                work(tell)
        except BaseException as error:
            told.put(_End(error))
        else:
            told.put(_End(None))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            turn.release()
            found = told.get()
            if not isinstance(found, _End):
                yield found
            elif found.error is None:
                return
            else:
                raise found.error
    finally:
        left.set()
        turn.release()
        thread.join(_LEAVING)
