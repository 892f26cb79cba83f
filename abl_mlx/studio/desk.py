"""One thread that owns the model, and takes a step of one piece of work at a time.

MLX evaluates an array in the thread that made it, and an edit changes the whole model while it is
on. So all work with the model is done by one thread, as generators: between two steps the model is
unedited for other work, and replies with and without an edit grow side by side. The next step is
always of the work that has had the least time, so replies also grow beside a search whose steps
are long.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
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
        talks_in: the runtime in which it replies.
    """

    steered: Steered
    works: Mapping[str, Work]
    talks_in: str


@dataclass(frozen=True)
class Job:
    """A piece of work that a page asks for, and where its events go.

    Attributes:
        name: which work it is.
        body: the request.
        tell: is called with each event, and with None at the end.
        cancelled: set when nobody waits for it any more.
    """

    name: str
    body: Mapping[str, Any]
    tell: Callable[[Event | None], None]
    cancelled: threading.Event = field(default_factory=threading.Event)


class Desk:
    """Where jobs wait for the model."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
        #: The model, once it is loaded.
        self.loaded: Loaded | None = None

    def submit(self, job: Job) -> None:
        """Add a job, which waits until the model is loaded; any thread may call this."""
        self._waiting.put(job)

    def run(self, load: Callable[[], Loaded]) -> None:
        """Load the model and do all jobs, until an exception such as KeyboardInterrupt."""
        loaded = self.loaded = load()
        running: list[_Running] = []
        while True:
            for job in self._new(wait=not running):
                least = min((one.used for one in running), default=0.0)
                running.append(_Running(job, _begun(loaded, job), least))
            if running:
                one = min(running, key=lambda one: one.used)
                if not one.step():
                    running.remove(one)

    def _new(self, *, wait: bool) -> Iterator[Job]:
        try:
            yield self._waiting.get(wait, 0.2)
            while True:
                yield self._waiting.get_nowait()
        except queue.Empty:
            return


def _begun(loaded: Loaded, job: Job) -> Generator[Event, None, None]:
    work = loaded.works.get(job.name)
    if work is None:
        raise UserError("there is no such work.")
    yield from work(loaded.steered, job.body)


@dataclass(eq=False)
class _Running:
    """A job that was begun.

    Attributes:
        work: gives its events.
        used: the seconds that its steps have taken; of a new job, as many as others have had.
    """

    job: Job
    work: Generator[Event, None, None]
    used: float

    def step(self) -> bool:
        """Take one step; whether there are more."""
        if self.job.cancelled.is_set():
            self.work.close()
            return False
        start = time.perf_counter()
        try:
            self.job.tell(next(self.work))
            return True
        except StopIteration:
            pass
        except UserError as error:
            self.job.tell({"error": said(error)})
        except Exception as error:  # a bug, which must not end the other jobs
            traceback.print_exc(file=sys.stderr)
            self.job.tell({"error": f"internal error: {type(error).__name__}."})
        finally:
            self.used += time.perf_counter() - start
        self.job.tell(None)
        return False
