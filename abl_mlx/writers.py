"""Every residual writer of a model, found by probing its forward pass (DESIGN section 7).

A writer is a weight whose output is added to the residual stream. Which modules are writers, and
what gain stands between a module's output and the stream, is read off the model's behaviour, never
off a list of names: each layer is run once, then again with the outputs of all its weights held at
what they were and one of them shifted. Only additions, constants and norms then lie between the
shift and the layer's output, and norms are held at the scale of the first run. So the output moves
by M v for a shift v, and the module is a writer when M is not zero. Edits need M to be diagonal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cohere import LayerNorm2D

from abl_mlx.arrays import number
from abl_mlx.capture import residual
from abl_mlx.hooks import around, around_method
from abl_mlx.models import ChatModel
from convert.errors import UserError

# A shift is read as a gain when every entry agrees to this share of the largest.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Writer:
    """A module that writes to the residual stream.

    Attributes:
        path: its path in the model, such as ``model.layers.3.self_attn.o_proj``.
        kind: ``linear`` (weight (d, n)), ``experts`` (weight (E, d, n)) or ``embedding``
            (weight (V, d), whose rows live in the stream).
        layer: the layer it stands in; -1 for the embedding.
        gain: per-element gain g between its output and the stream, (d,) float32, up to a constant
            factor; None when it is the same for all elements (DESIGN section 5, post-norm).
        has_bias: whether it adds a bias, which is edited with the weight.
        module: the module itself.
        tied: whether the weight is the output head as well (tied embeddings).
    """

    path: str
    kind: str
    layer: int
    gain: mx.array | None
    has_bias: bool
    module: nn.Module
    tied: bool = False

    @property
    def parameters(self) -> list[str]:
        """Paths of the parameters that an edit changes."""
        return [f"{self.path}.weight"] + ([f"{self.path}.bias"] if self.has_bias else [])


def find_writers(chat: ChatModel, prompt: str = "What is a garden?") -> list[Writer]:
    """All residual writers of the model: the embedding first, then layer by layer.

    Raises:
        UserError: when something writes to the stream that a rank-1 edit of weights cannot
            reach, with the layer and the reason.
    """
    tokens = mx.array([chat.encode(prompt)], mx.int32)
    calls, embeddings, heads = _record(chat, tokens)
    writers = [_embedding_writer(chat, embeddings, heads)]
    for index, (layer, (args, kwargs)) in enumerate(zip(chat.layers, calls, strict=True)):
        writers += _layer_writers(chat, index, layer, args, kwargs)
    return writers


def _record(
    chat: ChatModel, tokens: mx.array
) -> tuple[list[tuple[tuple[Any, ...], dict[str, Any]]], dict[str, mx.array], set[str]]:
    """One forward pass.

    Returns every layer's arguments, the output of every embedding outside the layers, and the
    paths of those that were used as the output head too.
    """
    heads: set[str] = set()
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    embeddings: dict[str, mx.array] = {}

    def keep_arguments(index: int) -> Callable[..., Any]:
        def wrapper(call: Any, *args: Any, **kwargs: Any) -> Any:
            if index in calls:
                raise UserError(
                    f"layer {index} is run more than once in a forward pass: an edit of its "
                    "weights would not be exact, so this architecture is refused."
                )
            calls[index] = (args, kwargs)
            return call(*args, **kwargs)

        return wrapper

    def keep_output(path: str) -> Callable[..., Any]:
        def wrapper(call: Any, *args: Any, **kwargs: Any) -> Any:
            embeddings[path] = call(*args, **kwargs)
            return embeddings[path]

        return wrapper

    pairs: list[tuple[nn.Module, Any]] = [
        (layer, keep_arguments(index)) for index, layer in enumerate(chat.layers)
    ]
    inside = {id(module) for layer in chat.layers for module in layer.modules()}
    for path, module in chat.model.named_modules():
        if id(module) not in inside and _is_embedding(module):
            pairs.append((module, keep_output(path)))

    def keep_head(path: str) -> Callable[..., Any]:
        def wrapper(call: Any, *args: Any, **kwargs: Any) -> Any:
            heads.add(path)
            return call(*args, **kwargs)

        return wrapper

    with ExitStack() as stack:
        stack.enter_context(around(pairs))
        for path, module in chat.model.named_modules():
            if id(module) not in inside and _is_embedding(module):
                stack.enter_context(around_method(module, "as_linear", keep_head(path)))
        logits = chat.model(tokens)
    mx.eval(logits)
    missing = [index for index in range(len(chat.layers)) if index not in calls]
    if missing:
        raise UserError(f"layer {missing[0]} was not called when the model ran.")
    return [calls[index] for index in range(len(chat.layers))], embeddings, heads


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.QuantizedEmbedding)


def _embedding_writer(chat: ChatModel, embeddings: dict[str, mx.array], heads: set[str]) -> Writer:
    modules = dict(chat.model.named_modules())
    fitting = [path for path, output in embeddings.items() if output.shape[-1] == chat.width]
    if len(fitting) != 1 or len(embeddings) != 1:
        raise UserError(
            f"{chat.model_type} feeds its residual stream from {len(embeddings)} embeddings "
            f"({', '.join(sorted(embeddings)) or 'none'}) instead of one of width {chat.width}: "
            "this architecture is not supported."
        )
    path = fitting[0]
    return Writer(path, "embedding", -1, None, False, modules[path], path in heads)


# --- one layer ---------------------------------------------------------------------------------


@dataclass
class _Leaf:
    path: str
    module: nn.Module
    outputs: list[mx.array]  # of the first run, one a call
    inputs: list[Any]


class _Probe:
    """A layer in float32 whose weights' outputs are held, but for chosen shifts."""

    def __init__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.layer, self.args, self.kwargs = layer, args, kwargs
        self.leaves = [
            _Leaf(path, module, [], [])
            for path, module in layer.named_modules()
            if path and not module.children() and tree_flatten(module.parameters())
        ]
        self.shift: dict[int, mx.array] = {}
        self.hold = False
        self.calls: dict[int, int] = {}

    def run(self) -> mx.array:
        """The layer's output with leaf i's output shifted by ``shift[i]``: (1, T, d)."""
        self.calls = {}
        with around([(leaf.module, self._around(i)) for i, leaf in enumerate(self.leaves)]):
            output = self.layer(*self.args, **self.kwargs)
        states = output[0] if isinstance(output, tuple | list) else output
        mx.eval(states)
        return states

    def _around(self, index: int) -> Callable[..., Any]:
        leaf = self.leaves[index]

        def wrapper(call: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.hold:
                output = call(*args, **kwargs)
                leaf.inputs.append(args[0] if args else None)
                leaf.outputs.append(output)
                return output
            nth = self.calls.get(index, 0)
            self.calls[index] = nth + 1
            output = leaf.outputs[nth]
            if _is_norm(leaf.module):
                return output + _frozen_norm(leaf.module, leaf.inputs[nth], args[0])
            if index in self.shift:
                return output + self.shift[index]
            return output

        return wrapper


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _frozen_norm(norm: nn.Module, before: mx.array, now: mx.array) -> mx.array:
    """How the norm's output moves with its input when its scale stays that of ``before``."""
    moved = (now - before).astype(mx.float32)
    base = before.astype(mx.float32)
    if isinstance(norm, nn.LayerNorm | LayerNorm2D):
        moved = moved - moved.mean(axis=-1, keepdims=True)
        scale = mx.rsqrt(mx.var(base, axis=-1, keepdims=True) + 1e-6)
        gain = norm["weight"].astype(mx.float32) if "weight" in norm else mx.array(1.0)
        return moved * scale * gain
    scale = mx.rsqrt(mx.mean(base * base, axis=-1, keepdims=True) + 1e-6)
    # g is what the norm makes of ones, whose own scale is one. The class's own code is asked, not
    # the wrapper that stands in for it during the probe.
    original = getattr(type(norm), "_abl_original", type(norm))
    gain = original.__call__(norm, mx.ones((1, 1, now.shape[-1]), mx.float32))
    return moved * scale * gain.astype(mx.float32).reshape(-1)


@contextmanager
def _in_float32(layer: nn.Module) -> Iterator[None]:
    """The layer's floating weights widened to float32, and the originals put back."""
    originals = layer.parameters()
    try:
        layer.update(tree_map(_widen, originals))
        yield
    finally:
        layer.update(originals)


def _widen(value: Any) -> Any:
    if isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating):
        return value.astype(mx.float32)
    return value


def _layer_writers(
    chat: ChatModel, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Writer]:
    prefix = next(path for path, module in chat.model.named_modules() if module is layer)
    width = chat.width
    with _in_float32(layer):
        probe = _Probe(layer, tuple(map(_widen, args)), {k: _widen(v) for k, v in kwargs.items()})
        base = residual(probe.run(), index, width).astype(mx.float32)
        probe.hold = True
        writers = []
        for which, leaf in enumerate(probe.leaves):
            if _is_norm(leaf.module) or not leaf.outputs or not _writes_width(leaf, width):
                continue
            gain = _gain(probe, which, base, width)
            if gain is None:
                continue
            path = f"{prefix}.{leaf.path}"
            if isinstance(gain, str):
                raise UserError(f"{path} writes to the residual stream {gain}")
            writers.append(_writer(path, index, leaf.module, gain, width))
        _check_complete(chat, probe, index, prefix, writers, width)
    return writers


def _writes_width(leaf: _Leaf, width: int) -> bool:
    return all(isinstance(o, mx.array) and o.shape[-1] == width for o in leaf.outputs)


def _gain(probe: _Probe, which: int, base: mx.array, width: int) -> mx.array | str | None:
    """What a shift of one leaf does to the layer's output: nothing, a gain (d,), or a reason."""
    size = number(mx.sqrt(mx.mean(base * base))) or 1.0

    def moved(shift: mx.array) -> mx.array:
        probe.shift = {which: shift * size}
        difference = (residual(probe.run(), 0, width).astype(mx.float32) - base) / size
        probe.shift = {}
        return difference[0]  # (T, d)

    by_ones = moved(mx.ones((width,)))
    noise = mx.random.normal((width,), key=mx.random.key(which))
    by_noise = moved(noise)
    largest = max(number(mx.abs(by_ones).max()), number(mx.abs(by_noise).max()))
    if largest < 1e-5:
        return None
    # The last position: its routing and masks are those of a whole prompt.
    gain = by_ones[-1]
    error = number(mx.abs(by_noise[-1] - gain * noise).max())
    if error > _TOLERANCE * largest:
        return (
            "through more than a gain for each element, so that removing one direction from its "
            "weight would not be exact: this architecture is refused."
        )
    spread = number(gain.max() - gain.min())
    return mx.ones((width,)) if spread <= _TOLERANCE * number(mx.abs(gain).max()) else gain


def _writer(path: str, index: int, module: nn.Module, gain: mx.array, width: int) -> Writer:
    weight = module["weight"]
    has_bias = "bias" in module
    if weight.ndim == 2 and weight.shape[0] == width:
        kind = "linear"
    elif weight.ndim == 3 and weight.shape[1] == width:
        kind = "experts"
    else:
        raise UserError(
            f"{path} writes to the residual stream through a weight of the shape "
            f"{tuple(weight.shape)}, which is no linear map onto {width} dimensions: this "
            "architecture is refused."
        )
    plain = bool(mx.all(gain == 1).item())
    return Writer(path, kind, index, None if plain else gain, has_bias, module)


def _check_complete(
    chat: ChatModel,
    probe: _Probe,
    index: int,
    prefix: str,
    writers: Sequence[Writer],
    width: int,
) -> None:
    """With every writer silenced the layer must hand its input on, or a writer was missed."""
    found = {writer.path for writer in writers}
    if not found:
        raise UserError(
            f"no weight of layer {index} of {chat.model_type} was found to write to the residual "
            "stream: this architecture is not supported."
        )
    entered = next((a for a in probe.args if isinstance(a, mx.array) and a.ndim == 3), None)
    if entered is None or entered.shape[-1] != width:
        raise UserError(
            f"layer {index} of {chat.model_type} is not given the residual stream as its first "
            "argument: this architecture is not supported."
        )
    silenced = [
        (leaf.module, _silence) for leaf in probe.leaves if f"{prefix}.{leaf.path}" in found
    ]
    with around(silenced):
        output = probe.layer(*probe.args, **probe.kwargs)
    states = residual(output, index, width).astype(mx.float32)
    entered = entered.astype(mx.float32)
    # A layer may scale what it hands on; only what is not along the input was written by others.
    share = (states * entered).sum(-1, keepdims=True) / (entered * entered).sum(-1, keepdims=True)
    rest = number(mx.linalg.norm(states - share * entered, stream=mx.cpu))
    whole = number(mx.linalg.norm(entered, stream=mx.cpu))
    if rest > _TOLERANCE * whole:
        raise UserError(
            f"layer {index} of {chat.model_type} writes to the residual stream through something "
            "other than its linear weights: this architecture is refused."
        )


def _silence(call: Any, *args: Any, **kwargs: Any) -> Any:
    return mx.zeros_like(call(*args, **kwargs))
