"""Forward passes of a model in which random numbers replace the products with weight matrices.

How a writer's output reaches the residual stream depends on what lies between the two (additions,
constants, norms), but not on the values of the weights. So every module with a matrix returns
random numbers in the shape of its product, the same in every run. No matrix is ever read, and a
pass costs only its small operations. So the real model can be probed, at its real size and with its
real norms, even if its weights are still in the files (`chat_model.load_lazily`). The result does
not depend on how weights are stored, or on which experts a prompt would choose.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from abl_mlx.models import sweeps
from abl_mlx.models.hooks import around, around_method
from abl_mlx.support.arrays import parameters
from convert.base.errors import UserError
from convert.mlx.packed import Packed, PackedEmbedding

# The number of tokens of a pass: enough for every mask, window and router to have an effect.
_TOKENS = 16


@dataclass
class Leaf:
    """A module with parameters and no modules inside it.

    Attributes:
        path: its path in the model.
        module: the module.
        layer: the number of its layer; None outside of all layers.
        norm: whether it is a norm, which computes as usual.
        stub: whether it holds a matrix and so returns random numbers.
        called: whether the forward pass called it.
        widths: the sizes of the last axis of its outputs, as far as these are arrays.
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
    """The arguments and the output of a call of a layer; of a tuple only the first element."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    def arrays(self, width: int) -> list[mx.array]:
        """All arrays of this width among the arguments and the output, each as (N, width)."""
        given = [*self.args, *self.kwargs.values()]
        return [
            one.reshape(-1, width).astype(mx.float32)
            for one in [*given, self.output]
            if isinstance(one, mx.array) and one.ndim > 2 and one.shape[-1] == width
        ]


class Probe:
    """Probing passes of one model; a context manager in which the model must not be used otherwise.

    Args:
        model: mlx-lm's model. Its weights may be unevaluated, and stay so.
        layers: its layers, in order.
        width: d, the width of the residual stream.
        seed: the seed of the random numbers.

    Attributes:
        leaves: all modules that may hold a matrix or a norm.
        calls: the calls of each layer in the last whole run.
        heads: indices of the leaves whose weight was used as the output head.
        tilt: unit vector (d,) along which all random outputs of width d have a large component, so
            that a writer whose output is not projected is noticed.
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
        self._read: dict[int, list[mx.array]] | None = None
        self._behind: mx.array | None = None
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
            # Float32 avoids rounding errors. MLX is lazy, so this computes nothing yet.
            self.model.update(tree_map(_widen, originals))
            self.model.train(False)
            with ExitStack() as stack:
                stack.enter_context(sweeps.asleep(self.model))
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
        """Hold MLX's norms at the scale of the previous run while shifts are measured."""
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

        # Arrays inside compiled functions could not be kept.
        mx.disable_compile()
        mx.fast.rms_norm, mx.fast.layer_norm = frozen_rms, frozen_layer
        try:
            yield
        finally:
            mx.fast.rms_norm, mx.fast.layer_norm = rms_norm, layer_norm
            if "MLX_DISABLE_COMPILE" not in os.environ:
                mx.enable_compile()

    def _before(self, x: mx.array) -> mx.array | None:
        """The input of this call of a norm in the previous run; None if that run is going on."""
        self._norms += 1
        if self._held:
            return self._normed[self._norms - 1]
        self._normed.append(x)
        return None

    # --- runs ----------------------------------------------------------------------------------

    def run(self) -> list[mx.array]:
        """Run the whole model with its norms: the stream after every layer, (N, d) each.

        A layer that is run several times is in the list several times.

        Raises:
            UserError: when a layer was not called, or its output has another width.
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
        """Run the model with norms held at the scale of the last `run` and one output shifted.

        Args:
            leaf: the index of the leaf.
            shift: added to its output, (d,).

        Returns:
            The `Call.arrays` of all calls of all layers.
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
        """The `Call.arrays` of all calls in the last `run`."""
        return [
            array for calls in self.calls for call in calls for array in call.arrays(self.width)
        ]

    def run_layer(self, index: int, shifts: dict[int, mx.array] | None = None) -> mx.array:
        """Call one layer as in the last `run`, and return its output, (N, d).

        Args:
            index: the number of the layer.
            shifts: index of a leaf -> what is added to its output, (d,). If there are any, norms
                are held at the scale that they had in this layer's last run without shifts.
        """
        self._start(held=shifts is not None, shifts=shifts)
        states = self._again(index)
        mx.eval(states)
        return states

    def reads(
        self, index: int, shift: mx.array | None = None
    ) -> tuple[mx.array, dict[int, mx.array]]:
        """Call one layer as in the last `run`, and see what its matrices get.

        Args:
            index: the number of the layer.
            shift: added to the stream that the layer gets, (d,), while norms are held at the scale
                that they had in this layer's last call without a shift.

        Returns:
            The layer's output, (N, d), and index of a leaf with a matrix -> its input, (N, n).
        """
        self._start(held=shift is not None)
        with self._reading() as read:
            output = self._again(index, shift)
        found = _joined(read)
        mx.eval(output, found)
        return output, found

    def reads_behind(self, shift: mx.array | None = None) -> dict[int, mx.array]:
        """Run the model, and see what matrices behind its layers get: the output head.

        Args:
            shift: added to the stream behind the last layer, (d,), while norms are held at the
                scale of the last run without a shift.

        Returns:
            Index of a leaf with a matrix, outside of the layers -> its input, (N, n).
        """
        self._start(held=shift is not None)
        with self._reading(behind=shift) as read:
            self.model(self._tokens())
        outside = {which: one for which, one in read.items() if self.leaves[which].layer is None}
        found = _joined(outside)
        mx.eval(found)
        return found

    def run_projected(self, bases: dict[int, mx.array]) -> list[mx.array]:
        """Run the model as `run` does, with directions projected out of the outputs of some leaves.

        Args:
            bases: index of a leaf -> the orthonormal directions, (k, d).
        """
        self._bases = bases
        try:
            return self.run()
        finally:
            self._bases = {}

    def states(self, output: Any, layer: int) -> mx.array:
        """A layer's output as (N, d), where N counts tokens, and streams if there are several."""
        found = output[0] if isinstance(output, tuple | list) else output
        if not isinstance(found, mx.array) or found.shape[-1] != self.width:
            form = found.shape if isinstance(found, mx.array) else type(found).__name__
            raise UserError(
                f"the output of layer {layer} has the form {form} instead of (batch, tokens, "
                f"{self.width}): this architecture has no residual stream to read."
            )
        return found.reshape(-1, self.width).astype(mx.float32)

    def _again(self, index: int, shift: mx.array | None = None) -> mx.array:
        """The output of a layer that gets what it got in the last `run`, its stream shifted."""
        call = self.calls[index][0]
        args = [_snapshot(one) for one in call.args]
        kwargs = {name: _snapshot(value) for name, value in call.kwargs.items()}
        if shift is not None:
            _shift_stream([args, kwargs], shift)
        return self.states(self.layers[index](*args, **kwargs), index)

    @contextmanager
    def _reading(self, behind: mx.array | None = None) -> Iterator[dict[int, list[mx.array]]]:
        """Keep what matrices get, by the index of their leaf; shift the stream behind the layers.

        Args:
            behind: the shift, (d,), if there is one.
        """
        self._read, self._behind = {}, behind
        try:
            yield self._read
        finally:
            self._read = self._behind = None

    def _tokens(self) -> mx.array:
        return mx.arange(1, _TOKENS + 1, dtype=mx.int32)[None]

    def _start(self, held: bool, shifts: dict[int, mx.array] | None = None) -> None:
        self._held, self._shifts, self._count, self._norms = held, shifts or {}, {}, 0
        if not held:
            self._kept, self._normed = {}, []

    # --- replacements of the modules' calls ----------------------------------------------------

    def _record(self, index: int) -> Callable[..., Any]:
        def wrapper(call: Any, *args: Any, **kwargs: Any) -> Any:
            # Copies, because a model may write into arrays that were passed to it.
            given = tuple(map(_snapshot, args)), {k: _snapshot(v) for k, v in kwargs.items()}
            output = call(*args, **kwargs)
            if self._recording:
                whole = output[0] if isinstance(output, tuple | list) else output
                self.calls[index].append(Call(*given, _snapshot(whole)))
            if self._behind is not None and index == len(self.layers) - 1:
                if isinstance(output, tuple | list):
                    return type(output)([output[0] + self._behind, *output[1:]])
                return output + self._behind
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
            if self._read is not None:
                self._note_input(index, [*args, *kwargs.values()])
            if isinstance(leaf.module, Packed):
                return self._noise(index, nth, _packed_shape(leaf.module, args))
            # The output is never evaluated; only its shape is used.
            output = call(*args, **kwargs)
            if not isinstance(output, mx.array) or not mx.issubdtype(output.dtype, mx.floating):
                # This is a router that itself chooses experts.
                kept = self._kept.setdefault((index, nth), (None, output))
                return kept[1]
            return self._noise(index, nth, output.shape)

        return wrapper

    def _note_input(self, index: int, given: Sequence[Any]) -> None:
        """Keep the first array of floats that a leaf is called with."""
        assert self._read is not None
        for one in given:
            if isinstance(one, mx.array) and mx.issubdtype(one.dtype, mx.floating):
                self._read.setdefault(index, []).append(one.astype(mx.float32))
                return

    def _head(self, index: int) -> Callable[..., Any]:
        def wrapper(call: Any, states: mx.array) -> mx.array:
            self.heads.add(index)
            if self._read is not None:
                self._note_input(index, [states])
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
            # This norm computes its scale itself. With a second array (a gate), its whole output
            # is kept from the previous run.
            plain = len(args) == 1 and not kwargs
            self._kept[index, nth] = (args[0] if plain else None, output)
        return output


def _joined(read: dict[int, list[mx.array]]) -> dict[int, mx.array]:
    """The inputs of each leaf, of all its calls: (N, n)."""
    return {
        which: mx.concatenate([one.reshape(-1, one.shape[-1]) for one in inputs])
        for which, inputs in read.items()
    }


def _shift_stream(given: Sequence[Any], shift: mx.array) -> None:
    """Add a shift (d,) to the first argument of a layer that can be its stream, (B, T, d)."""
    for values in given:
        for key in range(len(values)) if isinstance(values, list) else list(values):
            one = values[key]
            if isinstance(one, mx.array) and one.ndim == 3 and one.shape[-1] == shift.size:
                values[key] = one + shift.astype(one.dtype)
                return


def _packed_shape(module: Packed, args: tuple[Any, ...]) -> tuple[int, ...]:
    """The shape of the module's output, without a call, which would compute it at once."""
    first = tuple(args[0].shape)
    if isinstance(module, PackedEmbedding):
        return (*first, module.shape[-1])
    if len(module.shape) == 3:
        batch = np.broadcast_shapes(first[:-2], tuple(args[1].shape))
        return (*batch, first[-2], module.shape[-2])
    return (*first[:-1], module.shape[-2])


def _frozen_norm(call: Callable[..., Any], before: mx.array, now: mx.array) -> mx.array:
    """The output of an RMS norm for ``now``, with the scale that it has for ``before``."""
    scale = mx.rsqrt(mx.mean(before * before, axis=-1, keepdims=True) + 1e-6)
    # The gain g is the norm's output for ones, whose root mean square is 1.
    gain = call(mx.ones((1, 1, now.shape[-1]), mx.float32))
    return (now - before) * scale * gain.reshape(-1)


def _snapshot(value: Any) -> Any:
    """A copy of a value, because arrays and objects that hold them may be changed later."""
    if isinstance(value, mx.array):
        return value.reshape(value.shape)
    return value if value is None or isinstance(value, nn.Module) else copy.copy(value)


def _widen(value: Any) -> Any:
    if isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating):
        return value.astype(mx.float32)
    return value
