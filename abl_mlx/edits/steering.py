"""Runtime interventions on a loaded model, without changing its weights.

`ablation` is the weight edit at runtime: the output of every residual writer is projected, so the
logits are those of the edited weights. `steering` changes the residual stream itself, after chosen
layers and at chosen tokens: it ablates, pins, or adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from abl_mlx.edits.edit import Edit, orthonormal
from abl_mlx.edits.update import Update
from abl_mlx.edits.weight_edit import WeightEdit
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.hooks import Around, around, around_method
from abl_mlx.models.residuals import replaced, residual
from abl_mlx.models.writers import READERS, Writer
from convert.base.errors import UserError

# --- the weight edit at runtime ----------------------------------------------------------------


@contextmanager
def ablation(
    writers: Sequence[Writer], edit: WeightEdit, strengths: Mapping[str, mx.array] | None = None
) -> Iterator[None]:
    """Context manager that applies a weight edit to the outputs of the writers that it edits.

    Of readers it is the inputs. Because both are linear, their outputs, and so the logits, are
    those of the edited weights and biases to float precision. A tied output head is included.

    Args:
        writers: the model's residual writers.
        edit: the edit.
        strengths: for ``attention`` and ``mlp`` writers, (L,), by which the edit is multiplied;
            logits can be differentiated with respect to them.

    Raises:
        UserError: when the edit keeps norms, which is not a linear function of a writer's output.
    """
    if edit.norm != "none":
        raise UserError(f"--norm {edit.norm} can be applied to weights only, not at runtime.")
    chosen = edit.chosen(writers)
    if isinstance(edit, Edit):
        mx.eval(edit.directions, edit.pin)  # a pass may run in another thread than this one
    if isinstance(edit, Update):
        with around([(writer.module, _added(edit, writer, strengths)) for writer in chosen]):
            yield
        return
    with ExitStack() as stack:
        stack.enter_context(
            around([(one.module, _wrapped(edit, one, strengths)) for one in chosen])
        )
        for writer in chosen:
            if writer.tied and isinstance(edit, Edit):
                stack.enter_context(
                    around_method(writer.module, "as_linear", _projected_head(edit, writer))
                )
        yield


def _added(edit: Update, writer: Writer, strengths: Mapping[str, mx.array] | None = None) -> Around:
    found = edit.factors[writer.layer]
    left, right = mx.array(edit.strength * found.left), mx.array(found.right)
    scaled = (strengths or {}).get(writer.component)

    def wrapper(call: Any, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        output = call(x, *args, **kwargs)
        more = (x.astype(mx.float32) @ right.T) @ left.T
        if scaled is not None:
            more = scaled[writer.layer] * more
        return output + more.astype(output.dtype)

    return wrapper


def _wrapped(
    edit: WeightEdit, writer: Writer, strengths: Mapping[str, mx.array] | None = None
) -> Around:
    """A call of a writer whose output is projected, or of a reader whose input is."""
    basis = edit.basis(writer)
    mx.eval(basis)
    scaled = (strengths or {}).get(writer.component)
    if isinstance(edit, Edit) and edit.by_parts:
        some = _some_experts if writer.kind == "experts" else _some_heads
        return some(edit, writer)

    def projected(states: mx.array) -> mx.array:
        unit = basis.astype(states.dtype)
        taken = edit.taken(writer, states @ unit.T, -1)
        if scaled is not None:
            taken = scaled[writer.layer] * taken
        return states - taken.astype(states.dtype) @ unit

    def writing(call: Any, *args: Any, **kwargs: Any) -> Any:
        return projected(call(*args, **kwargs))

    def reading(call: Any, states: mx.array, *args: Any, **kwargs: Any) -> Any:
        return call(projected(states), *args, **kwargs)

    return reading if writer.kind in READERS else writing


def _some_heads(edit: Edit, writer: Writer) -> Around:
    """A call whose output is projected as far as some heads wrote it."""
    basis = edit.basis(writer)
    share = mx.array(edit.share(writer, (), -2).astype(np.float32))

    def wrapper(call: Any, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        output = call(x, *args, **kwargs)
        written = call(x * share.astype(x.dtype), *args, **kwargs)
        if writer.has_bias:
            written = written - writer.module["bias"].astype(output.dtype)
        unit = basis.astype(output.dtype)
        return output - edit.strength_of(writer) * (written @ unit.T) @ unit

    return wrapper


def _some_experts(edit: Edit, writer: Writer) -> Around:
    """A call of a stack of experts in which the outputs of some are projected."""
    basis = edit.basis(writer)
    share = mx.array(edit.share(writer, (writer.parts,), -1).astype(np.float32))

    def wrapper(call: Any, x: mx.array, indices: mx.array, *args: Any, **kwargs: Any) -> Any:
        output = call(x, indices, *args, **kwargs)
        unit = basis.astype(output.dtype)
        along = output @ unit.T
        chosen = share[indices].reshape(*along.shape[:-1], 1).astype(output.dtype)
        return output - edit.strength_of(writer) * (chosen * along) @ unit

    return wrapper


def _projected_head(edit: Edit, writer: Writer) -> Around:
    # A head (E − α (E Uᵀ − c) U) of h is the head E of h − α Uᵀ U h, and α c·U h on every logit.
    basis = edit.basis(writer)

    def wrapper(call: Any, states: mx.array) -> Any:
        unit = basis.astype(states.dtype)
        along = edit.strength_of(writer) * (states @ unit.T)
        logits = call(states - along @ unit)
        if edit.pin is not None:
            logits = logits + along @ edit.pin.astype(states.dtype)[:, None]
        return logits

    return wrapper


# --- the residual stream -----------------------------------------------------------------------


@dataclass(frozen=True)
class Intervention:
    """A change of the residual stream at the output of a layer.

    Attributes:
        action: ``ablate`` removes the component along the directions, ``pin`` sets it to ``value``,
            ``add`` adds the directions in their own length.
        directions: (k, d).
        strength: for an ablation or a pin, the share of the change that is made; for ``add``, a
            factor of the directions.
        value: the component that a pin sets: one number, or (k,) for orthonormal directions.
        layers: the layers after which the stream is changed, -1 being the embedding; None for the
            embedding and all layers.
        positions: the tokens of each call of the model whose states are changed, negative numbers
            counted from the end; None for all. While a reply is generated with a cache, each call
            has one token.
    """

    action: Literal["ablate", "pin", "add"]
    directions: mx.array
    strength: float = 1.0
    value: float | mx.array = 0.0
    layers: frozenset[int] | None = None
    positions: Sequence[int] | None = None

    def __post_init__(self) -> None:
        mx.eval(self.directions, self.value)  # a pass may run in another thread than this one

    @cached_property
    def _basis(self) -> mx.array:
        return orthonormal(self.directions)

    def after(self, states: mx.array) -> mx.array:
        """The changed stream, (B, T, d), in the stream's own type."""
        if self.action == "add":
            change = self.strength * self.directions.sum(axis=0)
            change = mx.broadcast_to(change, states.shape)
        else:
            held = mx.array(self.value, mx.float32) if self.action == "pin" else mx.array(0.0)
            along = states.astype(mx.float32) @ self._basis.T
            change = self.strength * ((held - along) @ self._basis)
        if self.positions is not None:
            tokens = states.shape[1]
            inside = [p % tokens for p in self.positions if -tokens <= p < tokens]
            mask = mx.zeros((tokens, 1))
            if inside:
                mask[mx.array(inside)] = 1.0
            change = change * mask
        return (states.astype(mx.float32) + change).astype(states.dtype)


def adding(vector: mx.array, layer: int, strength: float = 1.0) -> Intervention:
    """The intervention that adds ``strength`` times a vector (d,) after a layer, at every token."""
    return Intervention("add", vector[None], strength, layers=frozenset({layer}))


@dataclass(frozen=True)
class Induction:
    """A vector that is added to the residual stream after a layer, at every token.

    Attributes:
        vector: (d,) float32, strength included.
        layer: the layer after which it is added, counted from 0.
        summary: how it was chosen, as JSON values.
    """

    vector: mx.array
    layer: int
    summary: dict[str, Any]

    @property
    def intervention(self) -> Intervention:
        """The intervention that adds the vector at runtime."""
        return adding(self.vector, self.layer)


@contextmanager
def steering(chat: ChatModel, *interventions: Intervention) -> Iterator[None]:
    """Context manager that applies interventions to the residual stream, in the order given.

    Ablating after every layer differs from the weight edit, which is `ablation`: inside a layer the
    MLP still gets the unprojected output of the attention.

    Raises:
        UserError: when the model has no such layer, or its width is not that of a direction.
    """
    count = len(chat.layers)
    for one in interventions:
        if one.directions.ndim != 2 or one.directions.shape[1] != chat.width:
            raise UserError(
                f"a direction of the shape {tuple(one.directions.shape)} does not fit a residual "
                f"stream of {chat.width} dimensions."
            )
        wrong = [layer for layer in one.layers or () if not -1 <= layer < count]
        if wrong:
            raise UserError(f"there is no layer {wrong[0]}: the model has layers 0 to {count - 1}.")

    def at(layer: int) -> list[Intervention]:
        return [one for one in interventions if one.layers is None or layer in one.layers]

    pairs = [
        (module, _after_layer(chat, layer, at(layer)))
        for layer, module in enumerate(chat.layers)
        if at(layer)
    ]
    with ExitStack() as stack:
        if at(-1):
            stack.enter_context(first_input(chat, _all_of(at(-1))))
        stack.enter_context(around(pairs))
        yield


def _all_of(chosen: Sequence[Intervention]) -> Callable[[mx.array], mx.array]:
    def changed(states: mx.array) -> mx.array:
        for one in chosen:
            states = one.after(states)
        return states

    return changed


def _after_layer(chat: ChatModel, layer: int, chosen: Sequence[Intervention]) -> Around:
    change = _all_of(chosen)

    def wrapper(call: Any, *args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        return replaced(output, change(residual(output, layer, chat.width)))

    return wrapper


@contextmanager
def first_input(chat: ChatModel, change: Callable[[mx.array], mx.array]) -> Iterator[None]:
    """Context manager in which the first layer's input is ``change(stream)`` instead of the stream.

    Raises:
        UserError: when the model runs, if the input of its first layer is no stream (B, T, d).
    """

    def is_stream(value: Any) -> bool:
        return isinstance(value, mx.array) and value.ndim == 3 and value.shape[-1] == chat.width

    def wrapper(call: Any, *args: Any, **kwargs: Any) -> Any:
        where = next((i for i, value in enumerate(args) if is_stream(value)), None)
        if where is not None:
            return call(*args[:where], change(args[where]), *args[where + 1 :], **kwargs)
        name = next((key for key, value in kwargs.items() if is_stream(value)), None)
        if name is None:
            raise UserError(f"{chat.model_type} hands its first layer no residual stream to steer.")
        return call(*args, **{**kwargs, name: change(kwargs[name])})

    with around([(chat.layers[0], wrapper)]):
        yield
