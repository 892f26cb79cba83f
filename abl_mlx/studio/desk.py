"""One thread that owns the model, and takes a step of each piece of work in turn.

MLX evaluates an array in the thread that made it, and an edit changes the whole model while it is
on. So all work with the model is done by one thread, as generators: between two steps the model is
unedited for other work, and replies with and without an edit grow side by side.
"""

from __future__ import annotations

import queue
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from abl_mlx.support.flags import said
from convert.base.errors import UserError

if TYPE_CHECKING:  # the page is served before these heavy imports
    from abl_mlx.commands.session import Steered

#: What a piece of work yields: values for JSON.
Event = dict[str, Any]

#: Work of a request: takes the model and the request.
Work = Callable[["Steered", Mapping[str, Any]], Iterator[Event]]


@dataclass(frozen=True)
class Loaded:
    """A model, and what can be done with it.

    Attributes:
        works: name -> work.
    """

    steered: Steered
    works: Mapping[str, Work]


class Job:
    """A piece of work, and where its events go."""

    def __init__(
        self, work: Callable[[], Iterator[Event]], tell: Callable[[Event | None], None]
    ) -> None:
        """
        Args:
            work: begins the work.
            tell: is called with each event, and with None at the end.
        """
        self.work = work
        self.tell = tell
        self.cancelled = threading.Event()


class Desk:
    """Where jobs wait for the model."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
        #: The model, once it is loaded.
        self.loaded: Loaded | None = None

    def submit(self, job: Job) -> None:
        """Add a job; any thread may call this."""
        self._waiting.put(job)

    def run(self, load: Callable[[], Loaded]) -> None:
        """Load the model and do all jobs, until an exception such as KeyboardInterrupt."""
        self.loaded = load()
        running: list[tuple[Job, Iterator[Event]]] = []
        while True:
            for job in self._new(wait=not running):
                running.append((job, job.work()))
            running = [(job, work) for job, work in running if _step(job, work)]

    def _new(self, *, wait: bool) -> Iterator[Job]:
        try:
            yield self._waiting.get(wait, 0.2)
            while True:
                yield self._waiting.get_nowait()
        except queue.Empty:
            return


def _step(job: Job, work: Iterator[Event]) -> bool:
    """Take one step; whether there are more."""
    if job.cancelled.is_set():
        return False
    try:
        job.tell(next(work))
        return True
    except StopIteration:
        pass
    except UserError as error:
        job.tell({"error": said(error)})
    except Exception as error:  # a bug, which must not end the other jobs
        traceback.print_exc(file=sys.stderr)
        job.tell({"error": f"internal error: {type(error).__name__}."})
    job.tell(None)
    return False
