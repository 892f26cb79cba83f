"""Every residual writer of a model, found by probing its forward pass (docs/architecture.md).

A writer is a weight whose output is added to the residual stream. Which modules are writers, and
what gain stands between a module's output and the stream, is read off the model's behaviour, never
off a list of names. `abl_mlx.models.probe` runs the model with noise in place of every product;
here one module's output after another is shifted, everything else being held. Only additions,
constants and norms then lie between the shift and the stream, and norms are held at the scale of
the first run. So the stream moves by M v for a shift v, and the module is a writer when M is not
zero. Edits need M to be diagonal. Last, all that was found is rehearsed: with every writer's noise
projected as its weight would be, nothing of the direction may be left after any layer, or something
was missed and the architecture is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.probe import Leaf, Probe
from abl_mlx.support.arrays import number
from convert.base.errors import UserError

# A shift is read as a gain when every entry agrees to this share of the largest.
_TOLERANCE = 1e-3

# The component left in a rehearsal, all of which runs in float32. Rounding leaves 1e-6 in a deep
# model; a writer that was missed, a hundredth.
_REHEARSED = 1e-4


# Names of MLPs inside a layer, in MLX and in GGUF.
_MLP = re.compile(r"mlp|ffn|ff_|feed_?forward|moe|expert|dense_4h_to_h|\bfc|\bw2\b|linear_2|ffwd")


@dataclass(frozen=True)
class Writer:
    """A module that writes to the residual stream.

    Attributes:
        path: its path in the model, such as ``model.layers.3.self_attn.o_proj``.
        kind: ``linear`` (weight (d, n)), ``experts`` (weight (E, d, n)) or ``embedding``
            (weight (V, d), whose rows live in the stream).
        layer: the layer it stands in; -1 for embeddings and what else stands before the layers.
        gain: per-element gain g between its output and the stream, (d,) float32, up to a constant
            factor; None when it is the same for all elements (docs/architecture.md, "Post-norms").
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
    def component(self) -> str:
        """``embedding``, ``mlp`` (experts too) or ``attention`` (any other mixer of tokens).

        By its name; it steers how strongly searches edit what, never whether an edit is exact.
        """
        if self.layer < 0 or self.kind == "embedding":
            return "embedding"
        return "mlp" if self.kind == "experts" or _MLP.search(self.path) else "attention"

    @property
    def parameters(self) -> list[str]:
        """Paths of the parameters that an edit changes."""
        return [f"{self.path}.weight"] + ([f"{self.path}.bias"] if self.has_bias else [])


def find_writers(chat: ChatModel) -> list[Writer]:
    """All residual writers of the model: what stands before the layers first, then layer by layer.

    Of several embeddings (tokens, positions) one that is the output head too is the first.

    No weight but those of norms and routers is read, so the model may be one whose weights are
    still in their files.

    Raises:
        UserError: when something writes to the stream that a rank-1 edit of weights cannot
            reach, with the layer and the reason.
    """
    _refuse_rotated(chat)
    with Probe(chat.model, chat.layers, chat.width) as probe:
        _first_run(chat, probe)
        found = _before_layers(chat, probe)
        for index in range(len(chat.layers)):
            found |= _of_layer(chat, probe, index)
        writers = [
            _writer(probe.leaves[which], gain, chat, which in probe.heads)
            for which, gain in found.items()
        ]
        _rehearse(chat, probe, found)
    # An embedding that is the output head too is what most callers ask for.
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


def _first_run(chat: ChatModel, probe: Probe) -> None:
    try:
        states = probe.run()
    except UserError as error:
        raise UserError(f"{chat.model_type} is refused: {error}") from None
    except Exception as error:  # whatever mlx-lm's own code of the architecture raises
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"mlx-lm cannot run {chat.model_type} on this machine: {reason}") from None
    if not all(mx.isfinite(one).all().item() for one in states):
        raise UserError(
            f"{chat.model_type} is refused: noise in place of its weights does not leave its "
            "residual stream finite, so that it cannot be probed."
        )


# --- what a shift does -------------------------------------------------------------------------


def _before_layers(chat: ChatModel, probe: Probe) -> dict[int, mx.array | None]:
    """Writers outside of all layers, by leaf, with their gains."""
    base = probe.arrays()
    size = max(map(_size, base))
    found: dict[int, mx.array | None] = {}
    for which, leaf in enumerate(probe.leaves):
        if leaf.layer is not None or not _candidate(leaf, chat.width):
            continue
        ones, noise = mx.ones((chat.width,)), mx.random.normal((chat.width,), key=_key(which))
        by_ones = probe.run_shifted(which, ones * size)
        by_noise = probe.run_shifted(which, noise * size)
        # The first that feels it tells; that all others agree is what the rehearsal asks.
        for before, one, other in zip(base, by_ones, by_noise, strict=True):
            gain = _gain(leaf, (one - before) / size, (other - before) / size, noise)
            if gain is not None:
                found[which] = _unless_plain(gain)
                break
    return found


def _of_layer(chat: ChatModel, probe: Probe, index: int) -> dict[int, mx.array | None]:
    """Writers inside one layer, by leaf, with their gains."""
    base = probe.run_layer(index)
    size = _size(base)
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
            found[which] = _unless_plain(gain)
    return found | _not_called(chat, probe, index, found)


def _not_called(
    chat: ChatModel, probe: Probe, index: int, found: dict[int, mx.array | None]
) -> dict[int, mx.array | None]:
    """Writers of a layer that no token was sent to: experts that are modules of their own (DBRX).

    They write as the other experts of their list do.
    """
    gains = {_pattern(probe.leaves[which].path): gain for which, gain in found.items()}
    called = {_pattern(leaf.path) for leaf in probe.leaves if leaf.layer == index and leaf.called}
    more: dict[int, mx.array | None] = {}
    for which, leaf in enumerate(probe.leaves):
        if leaf.layer != index or leaf.called or not leaf.stub:
            continue
        pattern = _pattern(leaf.path)
        weight = leaf.module.get("weight")
        if pattern in gains:
            more[which] = gains[pattern]
        elif pattern not in called and weight is not None and chat.width in weight.shape[-2:-1]:
            raise UserError(
                f"{leaf.path} could write to the residual stream, but {chat.model_type} did not "
                "use it when it was probed: this architecture is refused."
            )
    return more


def _pattern(path: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".N", path)


def _candidate(leaf: Leaf, width: int) -> bool:
    return leaf.stub and leaf.widths == {width}


def _key(which: int) -> mx.array:
    return mx.random.key(10_000_019 + which)


def _size(states: mx.array) -> float:
    return number(mx.sqrt(mx.mean(states * states))) or 1.0


def _gain(leaf: Leaf, by_ones: mx.array, by_noise: mx.array, noise: mx.array) -> mx.array | None:
    """The gain (d,) of a leaf, up to a factor; None when it does not write to the stream.

    Args:
        by_ones, by_noise: (N, d), how far the stream moved, at each token, for a shift by ones
            and for one by ``noise`` (d,).

    Raises:
        UserError: when it writes through more than a gain.
    """
    most = int(number(mx.abs(by_ones).max(axis=-1).argmax()))
    largest = number(mx.abs(by_ones).max())
    if max(largest, number(mx.abs(by_noise).max())) < 1e-5:
        return None
    gain = by_ones[most]
    # Tokens may differ by a factor, as the weights of experts do, and by nothing else.
    factor = (by_ones @ gain)[:, None] / (gain @ gain)
    error = mx.abs(by_noise - factor * gain * noise).max()
    if number(error) > _TOLERANCE * largest:
        raise UserError(
            f"{leaf.path} writes to the residual stream through more than a gain for each element, "
            "so that removing one direction from its weight would not be exact: this architecture "
            "is refused."
        )
    return gain / mx.abs(gain).max()


def _unless_plain(gain: mx.array) -> mx.array | None:
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
    return Writer(leaf.path, kind, layer, gain, "bias" in module, module, tied)


# --- the rehearsal -----------------------------------------------------------------------------


def _rehearse(chat: ChatModel, probe: Probe, found: dict[int, mx.array | None]) -> None:
    """Run the model as if it were edited, and refuse it when a layer is not free of the direction.

    Raises:
        UserError: with the layer.
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
