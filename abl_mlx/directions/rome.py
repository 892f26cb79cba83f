"""Changes of MLPs after which the stream at the end of a harmful prompt is like a harmless one's.

It is Rank-One Model Editing (Meng et al. 2022, arXiv:2202.05262) in its block form (MEMIT, Meng et
al. 2023, arXiv:2210.07229). The keys are the inputs of an MLP's last matrix at the tokens that
follow the instruction, where a model decides how its reply begins. A key's value adds to the
matrix's output what moves the stream's component along the layer's refusal direction u to its mean
over harmless prompts. So the change of a layer has rank one: u times a row that tells harmful keys
from all others. The layers are changed in order, each with the keys and the stream that the layers
before leave, in one forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from abl_mlx.edits import least_squares
from abl_mlx.edits.update import Factors
from abl_mlx.models import heads
from abl_mlx.models.batches import right_padded
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.hooks import Around, around
from abl_mlx.models.prefix import Prefix
from abl_mlx.models.residuals import replaced, residual
from abl_mlx.models.shortcuts import trusted
from abl_mlx.models.writers import Writer
from abl_mlx.support.arrays import numpy_of
from convert.base.errors import UserError

#: How the change is kept away from other inputs: by their weight in the sum of squares, or exactly.
FORMS = RIDGE, NULL_SPACE = "ridge", "null-space"


@dataclass(frozen=True)
class Form:
    """One way to make the changes.

    Attributes:
        first, last: the first and the last layer that is changed.
        keep: the weight of each kept input beside a key, for the form ``ridge``.
        reach: the share of the way to the harmless mean that a value asks for; more than 1 makes
            up for what least squares do not reach.
        form: one of `FORMS`.
        ridge: ε, as a share of the mean squared length of the keys. On the keys of a real model
            (104 prompts of each set, 4864 inputs) a tenth of 1 and ten times as much both tell
            held-out prompts apart less well.
    """

    first: int
    last: int
    keep: float = 100.0
    reach: float = 1.0
    form: str = RIDGE
    ridge: float = 1.0


def mlps(writers: Sequence[Writer], layers: int) -> dict[int, Writer]:
    """Layer -> the last matrix of its MLP.

    Raises:
        UserError: when a layer has none or several.
    """
    found: dict[int, Writer] = {}
    for writer in writers:
        if writer.component != "mlp":
            continue
        if writer.kind != "linear" or writer.layer in found:
            raise UserError(
                f"--method rome changes the one matrix with which an MLP ends, and layer "
                f"{writer.layer} has experts: choose another method."
            )
        found[writer.layer] = writer
    if missing := sorted(set(range(layers)) - set(found)):
        raise UserError(
            f"--method rome: layer {missing[0]} has no MLP whose last matrix is known: choose "
            "another method."
        )
    return found


class _Way:
    """What one matrix gets and puts out in the running pass, and how that reaches the stream.

    A norm with a gain g may follow the matrix (`Writer.gain`). It is known by its input, which is
    the matrix's very output y. The stream gets z = s g ⊙ y, where the scale s differs by token.
    """

    inputs: mx.array

    def __init__(self, writer: Writer):
        self._gain = None if writer.gain is None else numpy_of(writer.gain)
        self._output: mx.array | None = None
        self._behind: mx.array | None = None
        self._norm: Any = None

    def norms(self, layer: nn.Module) -> list[nn.Module]:
        """The modules of a layer that may be the norm; none if there is no gain."""
        if self._gain is None:
            return []
        return [one for _, one in layer.named_modules() if "Norm" in type(one).__name__]

    def keep(self, call: Any, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """In place of a call of the matrix."""
        self.inputs, self._output, self._norm = x, call(x, *args, **kwargs), None
        return self._output

    def keep_norm(self, call: Any, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """In place of a call of a module that may be the norm."""
        found: mx.array = call(x, *args, **kwargs)
        if x is self._output:
            self._behind, self._norm = found, call
        return found

    def along(
        self, unit: np.ndarray, ends: tuple[np.ndarray, np.ndarray], harmful: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | float]:
        """The direction in the matrix's output, a unit vector, that moves the stream along another.

        Args:
            unit: (d,), the direction in the stream.
            ends: the places of the keys of all prompts.
            harmful: which prompts are harmful.

        Returns:
            It, and by how much an output moves for each unit of the stream: (N, P) or a number.

        Raises:
            UserError: when the norm that follows is not found.
        """
        if self._gain is None:
            return unit, 1.0
        if self._norm is None or self._behind is None or self._output is None:
            raise UserError(
                "--method rome: the norm behind an MLP's last matrix was not found: choose another "
                "method."
            )
        turned = self._gain * unit
        length = float(np.linalg.norm(turned))
        places = tuple(map(mx.array, ends))
        plain = numpy_of(self._output[places])[harmful] * self._gain
        scale = (numpy_of(self._behind[places])[harmful] * plain).sum(-1) / (plain**2).sum(-1)
        return turned / length, 1.0 / (scale * length)

    def moved(self, one: Factors) -> mx.array:
        """What a change of the matrix adds to the stream: (B, T, d)."""
        x = self.inputs.astype(mx.float32)
        more = (x @ mx.array(one.right.T)) @ mx.array(one.left.T)
        if self._norm is None or self._output is None or self._behind is None:
            return more
        changed: mx.array = self._norm((self._output + more).astype(self._output.dtype))
        return changed - self._behind


class KeyPass:
    """Harmful and harmless prompts as one batch, which is run again for each form.

    Attributes:
        tokens: how many tokens were run so far.
    """

    def __init__(
        self,
        chat: ChatModel,
        writers: Sequence[Writer],
        harmful: Sequence[Sequence[int]],
        harmless: Sequence[Sequence[int]],
        positions: Sequence[int],
    ):
        """Run what all prompts begin with, and keep the inputs of the matrices there.

        Args:
            chat: the model.
            writers: its residual writers.
            harmful, harmless: encoded prompts.
            positions: the P token positions of the keys, counted from the prompt's end.

        Raises:
            UserError: when the model cannot be changed in this way.
        """
        self._chat, self._mlps = chat, mlps(writers, len(chat.layers))
        sequences = [*harmful, *harmless]
        how = trusted(chat, sequences)
        if not (how.together and how.padded):
            raise UserError(
                f"--method rome runs its prompts in one batch, in which {chat.model_type} gives "
                "other logits: choose another method."
            )
        self._common: dict[int, list[np.ndarray]] = {layer: [] for layer in self._mlps}
        with around([(one.module, self._kept(layer)) for layer, one in self._mlps.items()]):
            self._prefix: Prefix = how.shared(chat, sequences, -min(positions))
        rest = self._prefix.rest(sequences)
        lengths = np.array([len(one) for one in rest])
        self._batch = right_padded(rest)
        self._is_harmful = np.arange(len(rest)) < len(harmful)
        self._ends = np.arange(len(rest))[:, None], lengths[:, None] + np.array([*positions])[None]
        real = np.arange(self._batch.shape[1])[None] < lengths[:, None]
        real[self._ends] = False
        self._others = real & ~self._is_harmful[:, None]
        self._each = int(lengths.sum())
        self.tokens = self._prefix.length

    def _kept(self, layer: int) -> Any:
        def wrapper(call: Any, x: mx.array, *args: Any, **kwargs: Any) -> Any:
            self._common[layer].append(numpy_of(x).reshape(-1, x.shape[-1]))
            return call(x, *args, **kwargs)

        return wrapper

    def updates(
        self, form: Form, directions: np.ndarray, harmless_mean: np.ndarray
    ) -> dict[int, Factors]:
        """The changes of the layers.

        Args:
            form: how they are made.
            directions: (L, d), unit vectors: the refusal direction after each layer.
            harmless_mean: (L, P, d), mean states of harmless prompts after each layer, at the
                positions of the keys.
        """
        self.tokens += self._each
        found: dict[int, Factors] = {}
        hooks: list[tuple[Any, Around]] = []

        def change(layer: int, way: _Way) -> Around:
            def wrapper(call: Any, *args: Any, **kwargs: Any) -> Any:
                output = call(*args, **kwargs)
                states = residual(output, layer, self._chat.width)
                unit = directions[layer]
                aim = harmless_mean[layer] @ unit
                now = numpy_of(states[tuple(map(mx.array, self._ends))]) @ unit
                wanted = form.reach * (aim[None] - now)[self._is_harmful]
                inputs = numpy_of(way.inputs)
                along, scale = way.along(unit, self._ends, self._is_harmful)
                one = self._solved(form, layer, inputs, (wanted * scale).reshape(-1, 1), along)
                found[layer] = one
                states = states + way.moved(one).astype(states.dtype)
                mx.eval(states)
                return replaced(output, states)

            return wrapper

        for layer in range(form.first, form.last + 1):
            way = _Way(self._mlps[layer])
            hooks.append((self._mlps[layer].module, way.keep))
            hooks += [(one, way.keep_norm) for one in way.norms(self._chat.layers[layer])]
            hooks.append((self._chat.layers[layer], change(layer, way)))
        with around(hooks), heads.unseen(self._chat.model):
            mx.eval(self._prefix(self._batch))
        return found

    def _solved(
        self, form: Form, layer: int, inputs: np.ndarray, wanted: np.ndarray, unit: np.ndarray
    ) -> Factors:
        """The change of one layer.

        Args:
            form, layer: which change it is.
            inputs: (B, T, n), of the layer's matrix.
            wanted: (N, 1): what is to be added along ``unit`` at each key.
            unit: (d,).
        """
        ends = inputs[self._ends]
        keys = ends[self._is_harmful].reshape(len(wanted), -1)
        same = ends[~self._is_harmful].reshape(-1, keys.shape[1])
        kept = np.concatenate([same, inputs[self._others], *self._common[layer]])
        ridge = form.ridge * float(np.mean(np.square(keys, dtype=np.float64).sum(axis=1)))
        targets = wanted @ unit[None]
        if form.form == NULL_SPACE:
            left, right = least_squares.in_null_space(keys, targets, kept, ridge)
        else:
            weights = np.full(len(kept), form.keep)
            left, right = least_squares.change(keys, targets, kept, weights, ridge)
        left, right = left.astype(np.float32), right.astype(np.float32)
        return Factors(left, right, np.zeros((0, right.shape[1]), np.float32))
