"""Forward passes side by side, for a model whose layers are in memory one at a time.

In a sweep every pass runs in a thread of its own, up to the beginning of a layer that is not in
memory. When all of them wait, the layer's weights are read (`models.stages`), all passes run
through it one after another, and its weights are dropped. So a sweep reads the model once, whatever
the number of passes. mlx-lm's own code of the architecture runs in every pass: its masks, caches
and further inputs of layers are as usual.

Only one thread runs at a time. In a pass, `each` begins further passes in the same sweep.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from abl_mlx.models.hooks import around, around_method, enter_scopes, scopes
from abl_mlx.models.parked import Parking, parking
from abl_mlx.models.stages import Stages
from convert.mlx import packed

T = TypeVar("T")
R = TypeVar("R")
K = TypeVar("K")

# Bytes of the stack of a pass's thread.
_STACK = 16 << 20


def each(model: nn.Module, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield ``work(item)`` for each item, in order; for a streamed model all in one sweep.

    With a model in memory the work on an item is done when its result is asked for.

    Args:
        model: the model that runs.
        work: runs the model, any number of times. Modules that it wraps (`hooks`) are wrapped for
            it alone. Arrays in its result are evaluated.
        items: what to do it with.
    """
    streaming = of(model)
    if streaming is None:
        yield from map(work, items)
        return
    here = _here.passing
    # An array that is not evaluated belongs to the thread that made it.
    given = list(items)
    mx.eval(list(arrays_in(given)))
    passes = [_Pass(work, item, here) for item in given]
    if here is None:
        _Sweep(streaming.stages).run(passes)
    else:
        here.children = passes
        here.stop()
        here.children = []
    for one in passes:
        if one.error is not None:
            raise one.error
    passes.reverse()
    while passes:
        yield passes.pop().result


def together(model: nn.Module, *works: Callable[[], R]) -> list[R]:
    """The results of several functions that run a model, in one sweep if it is streamed."""
    return list(each(model, lambda work: work(), works))


def once(model: nn.Module, known: dict[K, R], key: K, work: Callable[[], R]) -> R:
    """``known[key]``, and where it is not there what ``work()`` returns, which is kept there.

    Of passes side by side that ask for the same, the first does the work and the others wait.

    Args:
        model: the model that the work runs.
        known: what is known of the model.
        key: what is asked for.
        work: finds it.
    """
    if key in known:
        return known[key]
    streaming, here = of(model), _here.passing
    if streaming is None or here is None:
        known[key] = work()
        return known[key]
    asked = id(known), key
    if asked not in streaming.asked:
        streaming.asked[asked] = _Pass(lambda work: work(), work, here)
    one = streaming.asked[asked]
    here.children = [one]
    here.stop()
    here.children = []
    streaming.asked.pop(asked, None)
    if one.error is not None:
        raise one.error
    known[key] = one.result
    return known[key]


class _Stopped(BaseException):
    """Ends a pass of a sweep that failed."""


class _Here(threading.local):
    passing: _Pass | None = None


_here = _Here()


class _Pass:
    """Work that runs in a thread, until it waits for a stage or for passes that it has begun.

    Attributes:
        stage: the number of the stage that it waits for; None if it waits for none.
        children: the passes that it has begun.
        done: whether its work is at an end.
    """

    result: Any

    def __init__(self, work: Callable[[Any], Any], item: Any, parent: _Pass | None) -> None:
        self._work, self._item, self.parent = work, item, parent
        self._scopes = (*scopes(), self)
        self._room = packed.room()
        self.sweep: _Sweep
        self.stage: int | None = None
        self.children: Sequence[_Pass] = ()
        self.done = self._cancelled = False
        self.error: BaseException | None = None
        self._go, self._stops = threading.Semaphore(0), threading.Semaphore(0)
        self._thread: threading.Thread | None = None

    @property
    def ready(self) -> bool:
        """Whether it can run on, without a stage."""
        return not self.done and self.stage is None and all(one.done for one in self.children)

    def go(self) -> None:
        """Run until it stops."""
        self.stage = None
        if self._thread is None:
            self._thread = _started(self._run)
        else:
            self._go.release()
        self._stops.acquire()

    def wait(self, stage: int, states: Sequence[mx.array]) -> None:
        """Called by its own thread: wait for a stage; meanwhile its states may be in files."""
        self.stage = stage
        with self.sweep.parking.parked(states):
            self.stop()

    def stop(self) -> None:
        """Called by its own thread: let the others run until `go` is called again."""
        self._stops.release()
        self._go.acquire()
        if self._cancelled:
            raise _Stopped

    def cancel(self) -> None:
        """End it and what it has begun, without a result."""
        for one in self.children:
            one.cancel()
        if self.done:
            return
        self._cancelled = True
        if self._thread is not None:
            self._go.release()
            self._thread.join()
        self.done = True

    def _run(self) -> None:
        enter_scopes(self._scopes)
        packed.use_room(self._room)
        _here.passing = self
        try:
            self.result = self._work(self._item)
            mx.eval(list(arrays_in(self.result)))
        except _Stopped:
            pass
        except BaseException as error:  # raised again in the thread that waits for it
            self.error = error
        finally:
            self.done = True
            del self._work, self._item
            self._stops.release()


def _started(work: Callable[[], None]) -> threading.Thread:
    before = threading.stack_size(_STACK)
    try:
        thread = threading.Thread(target=work, name="pass", daemon=True)
        thread.start()
    finally:
        threading.stack_size(before)
    return thread


class _Sweep:
    """Runs passes side by side."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages
        self._passes: list[_Pass] = []
        self.parking: Parking

    def run(self, passes: Sequence[_Pass]) -> None:
        """Run passes, and those that they begin, to the end, or to the first error."""
        self._passes = list(passes)
        with parking() as self.parking:
            self._to_the_end()

    def _to_the_end(self) -> None:
        at = -1
        try:
            while self._passes:
                if ready := [one for one in self._passes if one.ready]:
                    self._go(ready)
                    continue
                waiting = {one.stage for one in self._passes if one.stage is not None}
                at = min(waiting, key=lambda stage: (stage <= at, stage))
                self._stages.enter(at)
                self._go([one for one in self._passes if one.stage == at])
        finally:
            for one in self._passes:
                one.cancel()

    def _go(self, some: Sequence[_Pass]) -> None:
        for one in some:
            if one.done:
                continue
            one.sweep = self
            one.go()
            self._passes += [child for child in one.children if child not in self._passes]
            if one.error is not None:
                for other in [other for other in self._passes if other.parent is one.parent]:
                    other.cancel()
        self._passes = [one for one in self._passes if not one.done]


# --- the layers of a streamed model --------------------------------------------------------------


class Streaming:
    """Lets the layers of a model read their matrices when they run.

    Attributes:
        stages: the stages of the model.
        asked: what `once` is asked for -> the pass that finds it.
    """

    def __init__(self, stages: Stages) -> None:
        self.stages = stages
        self.asked: dict[tuple[int, Any], _Pass] = {}
        self._asleep = 0
        self._stack = ExitStack()
        pairs: list[tuple[nn.Module, Any]] = []
        for index, stage in enumerate(stages.stages):
            pairs.append((stage.module, self._around(index)))
            if hasattr(stage.module, "as_linear"):
                self._stack.enter_context(
                    around_method(stage.module, "as_linear", self._around(index))
                )
        self._stack.enter_context(around(pairs))

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """Context manager in which no matrices are read."""
        self._asleep += 1
        try:
            yield
        finally:
            self._asleep -= 1

    def _around(self, index: int) -> Any:
        def wrapper(call: Any, *args: Any, **kwargs: Any) -> Any:
            if self._asleep:
                return call(*args, **kwargs)
            given = [*args, *kwargs.values()]
            # What is not evaluated holds the matrices that it is computed with.
            mx.eval(list(arrays_in(given)))
            here = _here.passing
            if here is None:
                self.stages.enter(index)
            else:
                here.wait(index, [one for one in given if isinstance(one, mx.array)])
            output = call(*args, **kwargs)
            mx.eval(list(arrays_in([output, given])))
            return output

        return wrapper


_NAME = "_abl_streaming"


def stream(model: nn.Module, stages: Stages) -> None:
    """Let a model, whose matrices were taken out by ``stages``, read them when it runs."""
    object.__setattr__(model, _NAME, Streaming(stages))


def of(model: nn.Module) -> Streaming | None:
    """How a model is streamed; None for a model in memory."""
    found: Streaming | None = vars(model).get(_NAME)
    return found


def asleep(model: nn.Module) -> AbstractContextManager[None]:
    """Context manager in which a streamed model reads no matrices: for probing without them."""
    streaming = of(model)
    return nullcontext() if streaming is None else streaming.asleep()


def arrays_in(value: Any) -> Iterator[mx.array]:
    """The arrays in a value: in its elements, or in the attributes of a cache or record."""
    left, seen = [value], set()
    while left:
        one = left.pop()
        if isinstance(one, mx.array):
            yield one
        elif isinstance(one, nn.Module | type | str | int | float) or callable(one):
            continue
        elif id(one) not in seen:
            seen.add(id(one))
            if isinstance(one, list | tuple):
                left += one
            elif isinstance(one, dict):
                left += one.values()
            elif hasattr(one, "__dict__"):
                left += vars(one).values()
