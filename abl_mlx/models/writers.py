"""Finds every residual writer of a model by probing its forward pass (docs/architecture.md).

A writer is a weight whose output is added to the residual stream. Which modules are writers, and
which gain stands between a module's output and the stream, is found from the model's behaviour and
not from a list of names. `abl_mlx.models.probe` runs the model with random numbers in place of all
products; here the output of one module after another is shifted. Only additions, constants and
norms lie between the shift and the stream, and norms are held at the scale of the first run, so a
shift v moves the stream by M v. The module is a writer if M is not zero; edits need M to be
diagonal. In the end the edit is rehearsed: the output of every writer is projected as its weight
would be. If a component of the direction is left after any layer, a writer was missed, and the
architecture is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from abl_mlx.models import split_model
from abl_mlx.models.chat_model import ChatModel, load_lazily
from abl_mlx.models.module_weights import module_shape
from abl_mlx.models.probe import Leaf, Probe
from abl_mlx.support import ranks
from abl_mlx.support.arrays import number
from convert.base.errors import UserError

# A response to a shift is a gain if every entry agrees within this share of the largest one.
_TOLERANCE = 1e-3

# The largest component that may be left in a rehearsal, which runs in float32. Rounding leaves 1e-6
# in a deep model; a missed writer leaves about 1e-2.
_REHEARSED = 1e-4


# Names of the last weights of attentions, whose input columns are the outputs of the heads.
_ATTENTION = re.compile(r"(attn|attention)(\.|_out)")

_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")

# Names of MLPs inside a layer, in MLX and in GGUF.
_MLP = re.compile(r"mlp|ffn|ff_|feed_?forward|moe|expert|dense_4h_to_h|\bfc|\bw2\b|linear_2|ffwd")


def component_of(name: str) -> str:
    """``mlp`` or ``attention``, by the name of a weight in a layer."""
    return "mlp" if _MLP.search(name) else "attention"


#: Kinds of weights whose rows read the stream.
READERS = ("reader", "expert-readers")

#: Kinds of routers (`models.routers`), by what their bias is added to: scores between 0 and 1, or
#: logits.
SCORE_ROUTER, LOGIT_ROUTER = "score-router", "logit-router"


@dataclass(frozen=True)
class Writer:
    """A module that writes to the residual stream, or one that reads it (`models.readers`).

    Attributes:
        path: its path in the model, such as ``model.layers.3.self_attn.o_proj``.
        kind: ``linear`` (weight (d, n)), ``experts`` (weight (E, d, n)) or ``embedding``
            (weight (V, d), whose rows are added to the stream); ``reader`` (weight (n, d)) or
            ``expert-readers`` ((E, n, d)), whose rows are multiplied with the normed stream.
        layer: the number of its layer; -1 for embeddings and other modules before the layers.
        gain: the elementwise gain g between its output and the stream (between the stream and the
            input of a reader), (d,) float32, up to a constant factor; None if it is the same for
            all elements (docs/architecture.md, "Post-norms").
        has_bias: whether it adds a bias, which is edited with the weight.
        module: the module.
        tied: whether the weight is the output head as well (tied embeddings).
        reads: whether it reads the stream instead of writing to it; so does a tied output head,
            whose kind is ``embedding``.
        parts: the number of attention heads whose outputs are its inputs, or of experts; 0 if it
            has neither.
        inputs: n, the number of its input columns, if it has heads; of a router, that of experts.
        centered: whether a reader gets the stream less its mean over the d elements (LayerNorm).
        router: of a router, the name of the parameter that holds its biases.
    """

    path: str
    kind: str
    layer: int
    gain: mx.array | None
    has_bias: bool
    module: nn.Module
    tied: bool = False
    reads: bool = False
    centered: bool = False
    parts: int = 0
    inputs: int = 0
    router: str = ""

    @property
    def component(self) -> str:
        """``embedding``, ``mlp`` (also experts) or ``attention`` (also other mixers of tokens).

        It is found from the module's name. Searches use it to choose strengths; whether an edit is
        exact never depends on it.
        """
        if self.layer < 0 or self.kind == "embedding":
            return "embedding"
        return "mlp" if self.kind.startswith("expert") else component_of(self.path)

    @property
    def parameters(self) -> list[str]:
        """Paths of the parameters that an edit changes."""
        if self.router:
            return [f"{self.path}.{self.router}"]
        return [f"{self.path}.weight"] + ([f"{self.path}.bias"] if self.has_bias else [])


def find_writers(chat: ChatModel) -> list[Writer]:
    """All residual writers of the model: first those before the layers, then layer by layer.

    Of several embeddings (tokens, positions) the one that is also the output head comes first.

    Only the weights of norms and routers are read, so the other weights may still be in their
    files.

    Raises:
        UserError: when something writes to the stream that an edit of weights cannot remove
            exactly, with the layer and the reason.
    """
    if ranks.lockstep():  # a part of a matrix is probed no better than the whole
        with_whole = load_lazily(chat.folder)
        return split_model.found_in(_found(with_whole), chat.model)
    return _found(chat)


def _found(chat: ChatModel) -> list[Writer]:
    _refuse_rotated(chat)
    with Probe(chat.model, chat.layers, chat.width) as probe:
        first_run(chat, probe)
        found = _before_layers(chat, probe)
        for index in range(len(chat.layers)):
            found |= _of_layer(chat, probe, index)
        writers = [
            _writer(probe.leaves[which], gain, chat, which in probe.heads)
            for which, gain in found.items()
        ]
        _rehearse(chat, probe, found)
    # Most callers want the embedding that is also the output head.
    return sorted(writers, key=lambda writer: not writer.tied)


def _refuse_rotated(chat: ChatModel) -> None:
    for path, module in chat.model.named_modules():
        name = type(module).__name__
        if name == "BitLinear" or name.startswith("Hadamard"):
            how = "as three values a weight" if name == "BitLinear" else "rotated"
            raise UserError(
                f"{chat.model_type} keeps {path} {how} ({name}), where one direction cannot be "
                "removed: edit the float model it was made from."
            )


def first_run(chat: ChatModel, probe: Probe) -> None:
    """Run a probe once, which every probing begins with.

    Raises:
        UserError: when the model has no residual stream, or cannot be run.
    """
    try:
        states = probe.run()
    except UserError as error:
        raise UserError(f"{chat.model_type} is refused: {error}") from None
    except Exception as error:  # mlx-lm's code of the architecture may raise anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"mlx-lm cannot run {chat.model_type} on this machine: {reason}") from None
    if not all(mx.isfinite(one).all().item() for one in states):
        raise UserError(
            f"{chat.model_type} is refused: noise in place of its weights does not leave its "
            "residual stream finite, so that it cannot be probed."
        )


# --- the effects of shifts ---------------------------------------------------------------------


def _before_layers(chat: ChatModel, probe: Probe) -> dict[int, mx.array | None]:
    """Writers outside of all layers: index of the leaf -> its gain, None if it is constant."""
    base = probe.arrays()
    size = max(map(root_mean_square, base))
    found: dict[int, mx.array | None] = {}
    for which, leaf in enumerate(probe.leaves):
        if leaf.layer is not None or not _candidate(leaf, chat.width):
            continue
        ones, noise = mx.ones((chat.width,)), mx.random.normal((chat.width,), key=_key(which))
        by_ones = probe.run_shifted(which, ones * size)
        by_noise = probe.run_shifted(which, noise * size)
        # The first array that moves gives the gain; the rehearsal checks that all others agree.
        for before, one, other in zip(base, by_ones, by_noise, strict=True):
            gain = _gain(leaf, (one - before) / size, (other - before) / size, noise)
            if gain is not None:
                found[which] = unless_plain(gain)
                break
    return found


def _of_layer(chat: ChatModel, probe: Probe, index: int) -> dict[int, mx.array | None]:
    """Writers inside one layer: index of the leaf -> its gain, None if it is constant."""
    base = probe.run_layer(index)
    size = root_mean_square(base)
    found: dict[int, mx.array | None] = {}
    for which, leaf in enumerate(probe.leaves):
        if leaf.layer != index or not _candidate(leaf, chat.width):
            continue
        ones, noise = mx.ones((chat.width,)), mx.random.normal((chat.width,), key=_key(which))
        by_ones, by_noise = (
            (probe.run_layer(index, {which: shift * size}) - base) / size for shift in (ones, noise)
        )
        gain = _gain(leaf, by_ones, by_noise, noise)
        if gain is not None:
            found[which] = unless_plain(gain)
    return found | _not_called(chat, probe, index, found)


def _not_called(
    chat: ChatModel, probe: Probe, index: int, found: dict[int, mx.array | None]
) -> dict[int, mx.array | None]:
    """Writers of a layer that were not called: separate experts without a token (DBRX).

    They have the gain of the other experts in their list.
    """
    gains = {pattern_of(probe.leaves[which].path): gain for which, gain in found.items()}
    called = {pattern_of(leaf.path) for leaf in probe.leaves if leaf.layer == index and leaf.called}
    more: dict[int, mx.array | None] = {}
    for which, leaf in enumerate(probe.leaves):
        if leaf.layer != index or leaf.called or not leaf.stub:
            continue
        pattern = pattern_of(leaf.path)
        weight = leaf.module.get("weight")
        if pattern in gains:
            more[which] = gains[pattern]
        elif pattern not in called and weight is not None and chat.width in weight.shape[-2:-1]:
            raise UserError(
                f"{leaf.path} could write to the residual stream, but {chat.model_type} did not "
                "use it when it was probed: this architecture is refused."
            )
    return more


def pattern_of(path: str) -> str:
    """A module's path with N for each number, which is the same for every expert of a list."""
    return re.sub(r"\.\d+(?=\.)", ".N", path)


def _candidate(leaf: Leaf, width: int) -> bool:
    return leaf.stub and leaf.widths == {width}


def _key(which: int) -> mx.array:
    return mx.random.key(10_000_019 + which)


def root_mean_square(states: mx.array) -> float:
    """The size of an entry of states; 1 if they are 0."""
    return number(mx.sqrt(mx.mean(states * states))) or 1.0


def _gain(leaf: Leaf, by_ones: mx.array, by_noise: mx.array, noise: mx.array) -> mx.array | None:
    """The gain (d,) of a leaf, up to a factor; None if the leaf does not write to the stream.

    Args:
        leaf: the leaf.
        by_ones, by_noise: (N, d), the change of the stream at each token for a shift by ones and
            for a shift by ``noise``.
        noise: (d,).

    Raises:
        UserError: when more than a gain lies between the leaf and the stream.
    """
    most = int(number(mx.abs(by_ones).max(axis=-1).argmax()))
    largest = number(mx.abs(by_ones).max())
    if max(largest, number(mx.abs(by_noise).max())) < 1e-5:
        return None
    gain = by_ones[most]
    # Tokens may differ only by a factor, such as the weights of experts.
    factor = (by_ones @ gain)[:, None] / (gain @ gain)
    error = mx.abs(by_noise - factor * gain * noise).max()
    if number(error) > _TOLERANCE * largest:
        raise UserError(
            f"{leaf.path} writes to the residual stream through more than a gain for each element, "
            "so that removing one direction from its weight would not be exact: this architecture "
            "is refused."
        )
    return gain / mx.abs(gain).max()


def unless_plain(gain: mx.array) -> mx.array | None:
    """A gain; None if it is the same for all elements."""
    return None if number(gain.max() - gain.min()) <= _TOLERANCE else gain


def _writer(leaf: Leaf, gain: mx.array | None, chat: ChatModel, tied: bool) -> Writer:
    module, width = leaf.module, chat.width
    weight = module.get("weight")
    shape = () if weight is None else tuple(weight.shape)
    if hasattr(module, "as_linear") and len(shape) == 2:
        kind = "embedding"
    elif len(shape) == 2 and shape[0] == width:
        kind = "linear"
    elif len(shape) == 3 and shape[1] == width and not isinstance(module, nn.Conv1d):
        kind = "experts"
    else:
        raise UserError(
            f"{leaf.path} ({type(module).__name__}) writes to the residual stream through a "
            f"weight of the shape {shape}, which is no linear map onto {width} dimensions: this "
            "architecture is refused."
        )
    layer = -1 if leaf.layer is None else leaf.layer
    found = Writer(leaf.path, kind, layer, gain, "bias" in module, module, tied)
    if kind == "experts":
        return replace(found, parts=shape[0])
    text = chat.config.get("text_config") or chat.config
    heads = next((text[key] for key in _HEADS if key in text), None)
    return with_heads(found, module_shape(module)[-1], heads)


def with_heads(writer: Writer, inputs: int, heads: Any) -> Writer:
    """The writer, with its heads if it is the last weight of an attention.

    Args:
        writer: the writer.
        inputs: the number of its input columns.
        heads: the model's number of attention heads, as its configuration has it.
    """
    attends = writer.kind == "linear" and _ATTENTION.search(writer.path)
    if not attends or not isinstance(heads, int) or heads < 1 or inputs % heads:
        return writer
    return replace(writer, parts=heads, inputs=inputs)


# --- the rehearsal -----------------------------------------------------------------------------


def _rehearse(chat: ChatModel, probe: Probe, found: dict[int, mx.array | None]) -> None:
    """Run the model with the outputs of all writers projected, as after an edit.

    Raises:
        UserError: when a component of the direction is left after a layer; with that layer.
    """
    bases = {}
    for which, gain in found.items():
        basis = probe.tilt if gain is None else probe.tilt * gain
        bases[which] = (basis / mx.sqrt((basis * basis).sum()))[None]
    states = probe.run_projected(bases)
    numbers = [index for index, calls in enumerate(probe.calls) for _ in calls]
    left = [
        number((mx.abs(one @ probe.tilt) / mx.sqrt((one * one).sum(axis=-1))).max())
        for one in states
    ]
    worst = next((n for n, share in enumerate(left) if not share <= _REHEARSED), None)
    if worst is None:
        return
    layer = numbers[worst]
    inside = [which for which in found if probe.leaves[which].layer == layer]
    if not inside:
        reason = "is written to the residual stream by no weight that an edit could reach"
    elif len(probe.calls[layer]) > 1:
        reason = (
            "is run more than once in a forward pass, with something between that no edit of its "
            "weights makes exact"
        )
    else:
        reason = "writes to the residual stream through something other than its linear weights"
    raise UserError(f"layer {layer} of {chat.model_type} {reason}: this architecture is refused.")
