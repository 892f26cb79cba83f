"""The matrices of a model that are in memory one layer at a time, and otherwise in their files.

A stage is a layer, or a module with a matrix outside of the layers (the embedding, the output
head). The matrices of one stage are in memory while it runs; meanwhile a thread reads those of the
next one. Vectors (norms, biases) stay in memory. A matrix that is not in memory is replaced by an
array of NaN in its shape, which takes no memory, so that what is computed with it by mistake is
noticed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import mlx.nn as nn

from abl_mlx.support import arrays
from abl_mlx.support.arrays import parameters
from convert.base.errors import UserError

#: Reads parameters, by their paths in the model, from the model's files: evaluated arrays.
Read = Callable[[Sequence[str]], Mapping[str, mx.array]]


@dataclass(frozen=True)
class Stage:
    """A part of the model that runs at a time.

    Attributes:
        name: its path in the model.
        module: the layer, or the module outside of the layers.
        places: path of a matrix in the model -> the module and the name under which it has it.
        bytes: of its matrices.
    """

    name: str
    module: nn.Module
    places: Mapping[str, tuple[nn.Module, str]]

    @cached_property
    def bytes(self) -> int:
        return sum(module[name].nbytes for module, name in self.places.values())


@dataclass
class Traffic:
    """What was read from the files so far.

    Attributes:
        bytes: bytes of matrices, in the form in which they are computed with.
        reading: seconds that reading them took, in a thread of its own.
        waiting: seconds that passes waited for them.
        since: when the first matrix was read, in seconds of `time.perf_counter`.
    """

    bytes: int = 0
    reading: float = 0.0
    waiting: float = 0.0
    since: float = 0.0

    @property
    def share_waited(self) -> float:
        """The share of the time since the first reading that passes waited."""
        return self.waiting / max(1e-9, time.perf_counter() - self.since)


class Stages:
    """The stages of a model whose matrices are in its files.

    Attributes:
        stages: all stages; embeddings come first, then the layers in order, then other modules.
        traffic: what was read so far.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], read: Read) -> None:
        """Take the matrices out of a model.

        Args:
            model: the model; its matrices may be unevaluated.
            layers: its layers.
            read: reads parameters from the files.

        Raises:
            UserError: when a layer is no module of the model.
        """
        self._model, self._read, self.traffic = model, read, Traffic()
        self.stages = _stages(model, layers)
        inside = {id(layer) for layer in layers}
        self._largest = max((one.bytes for one in self.stages), default=0)
        self._layer = max((one.bytes for one in self.stages if id(one.module) in inside), default=0)
        self._at: int | None = None
        self._coming: tuple[int, Future[Mapping[str, mx.array]]] | None = None
        self._after = {index: index + 1 for index in range(len(self.stages) - 1)}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read")
        for stage in self.stages:
            self._take_out(stage)
        _evaluate_rest(model)

    def staying(self) -> list[tuple[str, mx.array]]:
        """Pairs (path, array) of the parameters that stay in memory."""
        streamed = {path for stage in self.stages for path in stage.places}
        return [pair for pair in parameters(self._model) if pair[0] not in streamed]

    def enter(self, index: int) -> None:
        """Have the matrices of a stage in memory, and of no other; begin to read the next one's.

        Raises:
            UserError: when they cannot be read or are not finite.
        """
        if index == self._at:
            return
        if self._at is not None:
            self._after[self._at] = index
        self.leave()
        start = time.perf_counter()
        self.traffic.since = self.traffic.since or start
        if self._coming is None or self._coming[0] != index:
            self._forget()
            self._begin(index)
        assert self._coming is not None
        values = self._coming[1].result()
        self._coming = None
        self.traffic.waiting += time.perf_counter() - start
        self._put(self.stages[index], values)
        self._at = index
        following = self._after.get(index)
        if following is not None and following != index and self._both_fit(index, following):
            self._begin(following)

    def _both_fit(self, one: int, other: int) -> bool:
        """Whether two stages take no more than the larger of two layers and one stage.

        An embedding and an output head may be many times as large as a layer, so these are read
        when what was there before is dropped.
        """
        together = self.stages[one].bytes + self.stages[other].bytes
        return together <= max(2 * self._layer, self._largest)

    def leave(self) -> None:
        """Drop the matrices in memory."""
        if self._at is not None:
            self._take_out(self.stages[self._at])
            self._at = None
            arrays.trim()

    def close(self) -> None:
        """Drop what is in memory, and end the thread."""
        self.leave()
        self._forget()
        self._pool.shutdown()

    def _begin(self, index: int) -> None:
        paths = list(self.stages[index].places)
        self._coming = index, self._pool.submit(self._timed, paths)

    def _forget(self) -> None:
        if self._coming is not None:
            self._coming[1].cancel()
            self._coming = None

    def _timed(self, paths: Sequence[str]) -> Mapping[str, mx.array]:
        start = time.perf_counter()
        found = self._read(paths)
        self.traffic.reading += time.perf_counter() - start
        self.traffic.bytes += sum(value.nbytes for value in found.values())
        return found

    @staticmethod
    def _take_out(stage: Stage) -> None:
        for module, name in stage.places.values():
            module[name] = absent(module[name])

    @staticmethod
    def _put(stage: Stage, values: Mapping[str, mx.array]) -> None:
        for path, value in values.items():
            module, name = stage.places[path]
            module[name] = value


def absent(like: mx.array) -> mx.array:
    """An array of the shape and type of another one that takes no memory: NaN, or all bits set."""
    if mx.issubdtype(like.dtype, mx.floating):
        one = mx.array(mx.nan, like.dtype)
    elif like.dtype == mx.bool_:
        one = mx.array(True)
    else:
        one = ~mx.array(0, like.dtype)
    found = mx.broadcast_to(one, like.shape)
    mx.eval(found)
    return found


def _stages(model: nn.Module, layers: Sequence[nn.Module]) -> list[Stage]:
    names = {id(module): path for path, module in reversed(list(model.named_modules()))}
    before: list[Stage] = []
    after: list[Stage] = []
    inside = {id(module) for layer in layers for module in layer.modules()}
    for path, module in model.named_modules():
        if id(module) in inside or module.children():
            continue
        if places := _places(path, module):
            found = Stage(path, module, places)
            (before if isinstance(module, nn.Embedding) else after).append(found)
    among = []
    for index, layer in enumerate(layers):
        if id(layer) not in names:
            raise UserError(
                f"--stream: layer {index} is not found among the modules of the model, so its "
                "weights cannot be read when it runs: leave --stream out."
            )
        name = names[id(layer)]
        among.append(Stage(name, layer, _places(name, layer)))
    return [*before, *among, *after]


def _places(path: str, module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Path of each matrix inside a module -> the module that has it, and its name there."""
    found = {}
    for within, part in module.named_modules():
        start = ".".join(name for name in (path, within) if name)
        for name, value in part.items():
            # Names that begin with "_" are no parameters.
            if isinstance(value, mx.array) and value.ndim > 1 and not name.startswith("_"):
                found[f"{start}.{name}"] = part, name
    return found


def _evaluate_rest(model: nn.Module) -> None:
    """Evaluate all arrays of a model, because an unevaluated one belongs to the thread it is of."""
    for _, module in model.named_modules():
        for value in [*module.values(), *vars(module).values()]:
            if isinstance(value, mx.array):
                mx.eval(value)
    for _, value in parameters(model):
        mx.eval(value)


class OncePerFile:
    """Reads parameters as a function makes all of them, unevaluated.

    An unevaluated array is read from its file once; for reading it again all are made again, which
    reads the headers of the files.
    """

    def __init__(
        self,
        make: Callable[[], Mapping[str, mx.array]],
        check: Callable[[str, mx.array], None] | None,
    ) -> None:
        """
        Args:
            make: makes all parameters.
            check: called for every parameter when it is read for the first time.
        """
        self._make, self._check = make, check
        self._left: dict[str, mx.array] = {}
        self._checked: set[str] = set()
        self._lock = threading.Lock()

    def __call__(self, paths: Sequence[str]) -> dict[str, mx.array]:
        with self._lock:
            if not all(path in self._left for path in paths):
                self._left.clear()
                self._left = dict(self._make())
            found = {path: self._left.pop(path) for path in paths}
            for path, value in found.items():
                mx.eval(value)
                if self._check is not None and path not in self._checked:
                    self._check(path, value)
                    self._checked.add(path)
            return found
