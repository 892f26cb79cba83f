"""Forward passes of a model whose weights answer with noise instead of multiplying.

What a writer does to the residual stream is a matter of what lies between its output and the
stream: additions, constants, norms. None of it asks what the weights hold. So modules with a matrix
do not compute: they answer with random numbers of the shape their product would have, the same ones
in every run. No matrix is ever read, and a pass costs what its small operations cost. That is why
no smaller model is made to stand for a large one: this is the real model, at its real size, with
its real norms, and it may be one whose weights still lie in the files (`chat_model.load_lazily`).
It makes no difference either how the weights are stored, or which experts a prompt would choose.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from abl_mlx.models.hooks import around, around_method
from abl_mlx.support.arrays import parameters
from convert.base.errors import UserError
from convert.mlx.packed import Packed, PackedEmbedding, PackedSwitchLinear

# Enough tokens for every mask, window and router to do something, and cheap.
_TOKENS = 16


@dataclass
class Leaf:
    """A module with parameters and no modules inside.

    Attributes:
        path: in the model.
        module: itself.
        layer: the layer it stands in; None outside of all layers.
        norm: whether it is a norm, which runs as it is.
        stub: whether it answers with noise: whether it holds a matrix.
        called: whether it was called at all.
        widths: of the last axis of its outputs, as far as they are arrays.
    """

    path: str
    module: nn.Module
    layer: int | None
    norm: bool
    stub: bool
    called: bool = False
    widths: set[int] = field(default_factory=set)


@dataclass
class Call:
    """A layer's arguments and output, as the model called it; of a tuple, the first."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    def arrays(self, width: int) -> list[mx.array]:
        """What it was given of that width, and what it handed on, as (N, width)."""
        given = [*self.args, *self.kwargs.values()]
        return [
            one.reshape(-1, width).astype(mx.float32)
            for one in [*given, self.output]
            if isinstance(one, mx.array) and one.ndim > 2 and one.shape[-1] == width
        ]


class Probe:
    """Runs of one model; use as a context manager, within which the model is not to be used else.

    Args:
        model: mlx-lm's model. Its weights may be unevaluated, and stay so.
        layers: its layers, in order.
        width: d.
        seed: of the noise.

    Attributes:
        leaves: all modules that may hold a matrix or a norm.
        calls: of each layer, from the last whole run.
        heads: leaves whose weight was used as the output head.
        tilt: unit vector (d,) of which every noise of that width holds a good share, so that
            whatever writes and is not projected shows.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], width: int, seed: int = 0):
        self.model, self.layers, self.width, self.seed = model, list(layers), width, seed
        inside = {
            id(module): index for index, layer in enumerate(layers) for module in layer.modules()
        }
        self.leaves = []
        seen = set()
        for path, module in model.named_modules():
            flat = parameters(module)
            if module.children() or not flat or id(module) in seen:
                continue
            seen.add(id(module))
            norm = "norm" in type(module).__name__.lower()
            stub = not norm and any(value.ndim > 1 for _, value in flat)
            self.leaves.append(Leaf(path, module, inside.get(id(module)), norm, stub))
        self.calls: list[list[Call]] = [[] for _ in self.layers]
        self.tilt = mx.random.normal((width,), key=mx.random.key(seed))
        self.tilt = self.tilt / mx.sqrt((self.tilt * self.tilt).sum())
        self.heads: set[int] = set()
        self._recording = False
        self._held = False
        self._count: dict[int, int] = {}
        self._kept: dict[tuple[int, int], tuple[Any, Any]] = {}
        self._shifts: dict[int, mx.array] = {}
        self._bases: dict[int, mx.array] = {}
        self._norms = 0
        self._normed: list[mx.array] = []
        self._stack: Any = None

    def __enter__(self) -> Probe:
        self._stack = self._installed()
        self._stack.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @contextmanager
    def _installed(self) -> Iterator[None]:
        wrappers: list[tuple[nn.Module, Any]] = [
            (leaf.module, self._answer(index)) for index, leaf in enumerate(self.leaves)
        ]
        wrappers += [(layer, self._record(index)) for index, layer in enumerate(self.layers)]
        originals = self.model.parameters()
        training = self.model.training
        try:
            # In float32 nothing is lost to rounding. Nothing is computed yet either.
            self.model.update(tree_map(_widen, originals))
            self.model.train(False)
            with ExitStack() as stack:
                stack.enter_context(around(wrappers))
                for index, leaf in enumerate(self.leaves):
                    if hasattr(leaf.module, "as_linear"):
                        head = around_method(leaf.module, "as_linear", self._head(index))
                        stack.enter_context(head)
                stack.enter_context(self._frozen_primitives())
                yield
        finally:
            self.model.update(originals)
            self.model.train(training)

    @contextmanager
    def _frozen_primitives(self) -> Iterator[None]:
        """MLX's norms, held at the scale of the run before while shifts are looked at."""
        rms_norm, layer_norm = mx.fast.rms_norm, mx.fast.layer_norm

        def frozen_rms(x: mx.array, weight: Any, eps: float, **_: Any) -> mx.array:
            before = self._before(x)
            if before is None:
                return rms_norm(x, weight, eps)
            scale = mx.rsqrt(mx.mean(before * before, axis=-1, keepdims=True) + eps)
            return x * scale * (1.0 if weight is None else weight)

        def frozen_layer(x: mx.array, weight: Any, bias: Any, eps: float, **_: Any) -> mx.array:
            before = self._before(x)
            if before is None:
                return layer_norm(x, weight, bias, eps)
            scale = mx.rsqrt(mx.var(before, axis=-1, keepdims=True) + eps)
            y = (x - x.mean(axis=-1, keepdims=True)) * scale
            y = y * (1.0 if weight is None else weight)
            return y + (0.0 if bias is None else bias)

        # Inside a compiled function no array could be kept.
        mx.disable_compile()
        mx.fast.rms_norm, mx.fast.layer_norm = frozen_rms, frozen_layer
        try:
            yield
        finally:
            mx.fast.rms_norm, mx.fast.layer_norm = rms_norm, layer_norm
            mx.enable_compile()

    def _before(self, x: mx.array) -> mx.array | None:
        """What this call of a norm was given in the run before; None in that run itself."""
        self._norms += 1
        if self._held:
            return self._normed[self._norms - 1]
        self._normed.append(x)
        return None

    # --- runs ----------------------------------------------------------------------------------

    def run(self) -> list[mx.array]:
        """The whole model, norms as they are: the stream after every layer, (N, d) each.

        Layers that are run several times are taken as they come, so there may be more of them.

        Raises:
            UserError: when a layer was not called, or hands on something of another width.
        """
        self._start(held=False)
        self._recording, self.calls = True, [[] for _ in self.layers]
        try:
            self.model(self._tokens())
        finally:
            self._recording = False
        missing = [index for index, calls in enumerate(self.calls) if not calls]
        if missing:
            raise UserError(f"layer {missing[0]} was not called when the model ran.")
        states = [
            self.states(call.output, index)
            for index, calls in enumerate(self.calls)
            for call in calls
        ]
        mx.eval(states)
        return states

    def run_shifted(self, leaf: int, shift: mx.array) -> list[mx.array]:
        """Like `run`, with norms held at the scale of the last `run` and one leaf shifted.

        Returns:
            what `Call.arrays` gives for every call of every layer.
        """
        kept = self.calls
        self._start(held=True, shifts={leaf: shift})
        self._recording, self.calls = True, [[] for _ in self.layers]
        try:
            self.model(self._tokens())
            found = self.arrays()
        finally:
            self._recording, self.calls = False, kept
        mx.eval(found)
        return found

    def arrays(self) -> list[mx.array]:
        """What `Call.arrays` gives for every call of the last `run`."""
        return [
            array for calls in self.calls for call in calls for array in call.arrays(self.width)
        ]

    def run_layer(self, index: int, shifts: dict[int, mx.array] | None = None) -> mx.array:
        """One layer, called as in the last `run`: its output, (N, d).

        Args:
            shifts: leaf -> (d,), what is added to its output. With any, norms are held at the
                scale they had in the last run of this layer without.
        """
        self._start(held=shifts is not None, shifts=shifts)
        call = self.calls[index][0]
        args = map(_snapshot, call.args)
        kwargs = {name: _snapshot(value) for name, value in call.kwargs.items()}
        states = self.states(self.layers[index](*args, **kwargs), index)
        mx.eval(states)
        return states

    def run_projected(self, bases: dict[int, mx.array]) -> list[mx.array]:
        """Like `run`, the output of some leaves having lost its component along (k, d) bases."""
        self._bases = bases
        try:
            return self.run()
        finally:
            self._bases = {}

    def states(self, output: Any, layer: int) -> mx.array:
        """What a layer hands on, as (N, d): tokens, and streams where there are several."""
        found = output[0] if isinstance(output, tuple | list) else output
        if not isinstance(found, mx.array) or found.shape[-1] != self.width:
            form = found.shape if isinstance(found, mx.array) else type(found).__name__
            raise UserError(
                f"the output of layer {layer} has the form {form} instead of (batch, tokens, "
                f"{self.width}): this architecture has no residual stream to read."
            )
        return found.reshape(-1, self.width).astype(mx.float32)

    def _tokens(self) -> mx.array:
        return mx.arange(1, _TOKENS + 1, dtype=mx.int32)[None]

    def _start(self, held: bool, shifts: dict[int, mx.array] | None = None) -> None:
        self._held, self._shifts, self._count, self._norms = held, shifts or {}, {}, 0
        if not held:
            self._kept, self._normed = {}, []

    # --- what stands in for the modules --------------------------------------------------------

    def _record(self, index: int) -> Callable[..., Any]:
        def wrapper(call: Any, *args: Any, **kwargs: Any) -> Any:
            # Copies, because a model may write into arrays that it was handed.
            given = tuple(map(_snapshot, args)), {k: _snapshot(v) for k, v in kwargs.items()}
            output = call(*args, **kwargs)
            if self._recording:
                whole = output[0] if isinstance(output, tuple | list) else output
                self.calls[index].append(Call(*given, _snapshot(whole)))
            return output

        return wrapper

    def _answer(self, index: int) -> Callable[..., Any]:
        leaf = self.leaves[index]

        def wrapper(call: Any, *args: Any, **kwargs: Any) -> Any:
            nth = self._count.get(index, 0)
            self._count[index] = nth + 1
            leaf.called = True
            if leaf.norm:
                return self._norm(index, nth, call, args, kwargs)
            if not leaf.stub:
                return call(*args, **kwargs)
            if isinstance(leaf.module, Packed):
                return self._noise(index, nth, _packed_shape(leaf.module, args))
            # Never evaluated: what is asked of it is its shape.
            output = call(*args, **kwargs)
            if not isinstance(output, mx.array) or not mx.issubdtype(output.dtype, mx.floating):
                # A router that chooses experts itself.
                kept = self._kept.setdefault((index, nth), (None, output))
                return kept[1]
            return self._noise(index, nth, output.shape)

        return wrapper

    def _head(self, index: int) -> Callable[..., Any]:
        def wrapper(call: Any, states: mx.array) -> mx.array:
            self.heads.add(index)
            return mx.zeros((*states.shape[:-1], self.leaves[index].module["weight"].shape[0]))

        return wrapper

    def _noise(self, index: int, nth: int, shape: tuple[int, ...]) -> mx.array:
        self.leaves[index].widths.add(shape[-1])
        key = mx.random.key((self.seed * 1_000_003 + index) * 64 + nth)
        noise = mx.random.normal(shape, key=key)
        if shape[-1] == self.width:
            noise = noise + self.tilt * (0.5 * self.width**0.5)
            if index in self._bases:
                basis = self._bases[index]
                noise = noise - (noise @ basis.T) @ basis
        if index in self._shifts:
            noise = noise + self._shifts[index]
        return noise

    def _norm(self, index: int, nth: int, call: Any, args: Any, kwargs: Any) -> Any:
        started = self._norms
        if self._held and (index, nth) in self._kept:
            before, output = self._kept[index, nth]
            return output if before is None else output + _frozen_norm(call, before, args[0])
        output = call(*args, **kwargs)
        if not self._held and self._norms == started and isinstance(output, mx.array):
            # It computes its scale itself. With a second array, a gate, it is held whole.
            plain = len(args) == 1 and not kwargs
            self._kept[index, nth] = (args[0] if plain else None, output)
        return output


def _packed_shape(module: Packed, args: tuple[Any, ...]) -> tuple[int, ...]:
    """Of the module's output; a call would compute it at once."""
    first = tuple(args[0].shape)
    if isinstance(module, PackedEmbedding):
        return (*first, module.shape[-1])
    if isinstance(module, PackedSwitchLinear):
        batch = np.broadcast_shapes(first[:-2], tuple(args[1].shape))
        return (*batch, first[-2], module.shape[-2])
    return (*first[:-1], module.shape[-2])


def _frozen_norm(call: Callable[..., Any], before: mx.array, now: mx.array) -> mx.array:
    """How a root-mean-square norm's output moves when its scale stays that of ``before``."""
    scale = mx.rsqrt(mx.mean(before * before, axis=-1, keepdims=True) + 1e-6)
    # g is what the norm makes of ones, whose own scale is one.
    gain = call(mx.ones((1, 1, now.shape[-1]), mx.float32))
    return (now - before) * scale * gain.reshape(-1)


def _snapshot(value: Any) -> Any:
    """The value as it is now; arrays, and objects that collect them, may be written into."""
    if isinstance(value, mx.array):
        return value.reshape(value.shape)
    return value if value is None or isinstance(value, nn.Module) else copy.copy(value)


def _widen(value: Any) -> Any:
    if isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating):
        return value.astype(mx.float32)
    return value
