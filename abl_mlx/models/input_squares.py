"""Squares of the inputs of a model's matrices, summed while prompts run: an importance matrix.

llama.cpp's quantizers weight the error of a matrix's column by the mean square of its inputs. The
sums are taken in the forward passes that measure a direction. These then run whole prompts, in
batches of one length, so that no padding and no shared prefix enters the sums unevenly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.hooks import around
from abl_mlx.models.shortcuts import Shortcuts
from abl_mlx.support import ranks
from abl_mlx.support.arrays import numpy_of
from convert.architectures.weights import Weight
from convert.base.errors import UserError
from convert.gguf import imatrix, mix

# Prefixes that mlx-lm's models of text and pictures put before the paths of the text model.
_PREFIXES = ("", "language_model.", "language_model.model.")


@dataclass(frozen=True)
class Matrices:
    """The matrices of a model and the GGUF tensors that hold them.

    Attributes:
        weights: path of a parameter of mlx-lm's model -> the GGUF tensors that hold its values.
        shapes: GGUF tensor -> its shape in NumPy's order.
        architecture: the GGUF's general.architecture.
    """

    weights: Mapping[str, Weight]
    shapes: Mapping[str, tuple[int, ...]]
    architecture: str

    def inputs(self, path: str) -> dict[str, np.ndarray | None]:
        """GGUF tensors of a parameter -> the tensor's column of each column; None for the same.

        Tensors that no quantizer weights by importance are left out.
        """
        facts = mix.Facts(self.architecture, layers=0)
        return {
            piece.tensor: piece.columns
            for piece in self.weights[path].pieces
            if piece.tensor.startswith("blk.")
            and mix.quantizable(piece.tensor, self.shapes[piece.tensor], facts)
        }


class InputSquares:
    """Sums of squared inputs, taken from a model while `recording` is entered.

    Attributes:
        tokens: the number of tokens that were run.
    """

    def __init__(self, model: nn.Module, matrices: Matrices):
        self.tokens = 0
        self._matrices = matrices
        self._sums: dict[str, np.ndarray] = {}
        self._counts: dict[str, np.ndarray] = {}
        self._seen: set[tuple[int, ...]] = set()
        modules = dict(model.named_modules())
        self._modules: dict[str, nn.Module] = {}
        for path in matrices.weights:
            name = path.removesuffix(".weight")
            found = next((one + name for one in _PREFIXES if one + name in modules), None)
            if found is not None and path.endswith(".weight") and matrices.inputs(path):
                self._modules[path] = modules[found]

    def shortcuts(self, how: Shortcuts) -> Shortcuts:
        """The shortcuts with which every token of every prompt is run, and nothing else."""
        return replace(how, padded=False, prefix=False)

    def are_new(self, sequences: Sequence[Sequence[int]]) -> bool:
        """Whether these prompts are not counted yet; they are then taken as counted."""
        new = [key for one in sequences if (key := tuple(one)) not in self._seen]
        self._seen.update(new)
        return len(new) == len(sequences)

    @contextmanager
    def recording(self, tokens: Callable[[], int]) -> Iterator[None]:
        """Context manager in which the inputs of every call of a matrix are added.

        Args:
            tokens: called at the end: the number of tokens that were run.
        """
        with around([(module, self._keep(path)) for path, module in self._modules.items()]):
            yield
        self.tokens += tokens()

    def _keep(self, path: str) -> Any:
        def wrapper(call: Any, x: mx.array, *args: Any, **kwargs: Any) -> Any:
            experts = args[0] if args and isinstance(args[0], mx.array) else None
            weight = self._modules[path]["weight"]
            self._add(path, *_squares(x, experts, weight))
            return call(x, *args, **kwargs)

        return wrapper

    def _add(self, path: str, sums: mx.array, counts: mx.array) -> None:
        # Evaluated at once, so that the inputs of all matrices are not in memory together.
        mx.eval(sums, counts)
        more = numpy_of(sums).astype(np.float64)
        if path in self._sums:
            self._sums[path] += more
            self._counts[path] += numpy_of(counts)
        else:
            self._sums[path] = more
            self._counts[path] = numpy_of(counts).astype(np.float64)

    def write(self, path: Path, datasets: Sequence[str]) -> int:
        """Write an importance matrix, and return the number of its tensors.

        Raises:
            UserError: when no matrix of the model was called as a module.
        """
        self._share()
        sums: dict[str, np.ndarray] = {}
        counts: dict[str, np.ndarray] = {}
        for parameter, found in self._sums.items():
            for tensor, columns in self._matrices.inputs(parameter).items():
                shape = self._matrices.shapes[tensor]
                experts = shape[0] if len(shape) > 2 else 1
                if found.shape != (experts, shape[-1]) or tensor in sums:
                    continue
                sums[tensor] = found if columns is None else _moved(found, columns)
                counts[tensor] = self._counts[parameter]
        if not sums:
            raise UserError(
                f"--imatrix: no matrix of this model ({self._matrices.architecture}) is called in "
                "a way that shows its inputs: use llama-imatrix on a GGUF of it."
            )
        imatrix.write(path, sums, counts, datasets, self.tokens)
        return len(sums)

    def _share(self) -> None:
        """Add up what every rank has seen."""
        if ranks.size() == 1:
            return
        self.tokens = sum(ranks.gathered("tokens of the importance matrix", self.tokens))
        for mine in (self._sums, self._counts):
            for parameter in self._modules:
                own = mine.get(parameter, np.zeros(0))
                found = [one for one in ranks.arrays(parameter, own) if one.size]
                if found:
                    mine[parameter] = sum(found[1:], found[0])


@contextmanager
def recorded(chat: ChatModel, squares: InputSquares | None) -> Iterator[None]:
    """Context manager in which `abl_mlx.models.capture` adds the prompts that it runs."""
    if squares is None:
        yield
        return
    vars(chat)["_input_squares"] = squares
    try:
        yield
    finally:
        del vars(chat)["_input_squares"]


def of(chat: ChatModel) -> InputSquares | None:
    """What `recorded` has set for this model."""
    found: InputSquares | None = vars(chat).get("_input_squares")
    return found


def _squares(x: mx.array, experts: mx.array | None, weight: mx.array) -> tuple[mx.array, mx.array]:
    """Sums of squared inputs (E, n) and their number (E,), for one call of a matrix.

    Args:
        x: the inputs: (..., n); for experts (..., 1, n), one for each of ``experts`` or one for
            several of them; for a matrix for each head, (B, H, T, n).
        experts: the expert of each input; None if the matrix has none.
        weight: the matrix as stored, possibly packed: (out, ...) or (E, out, ...).
    """
    squares = mx.square(x.astype(mx.float32))
    n = x.shape[-1]
    if experts is not None:
        each = mx.broadcast_to(squares[..., 0, :], (*experts.shape, n)).reshape(-1, n)
        which = experts.reshape(-1)
        sums = mx.zeros((weight.shape[0], n)).at[which].add(each)
        return sums, mx.zeros((weight.shape[0],)).at[which].add(mx.ones(which.shape))
    if weight.ndim == 3:
        axes = tuple(axis for axis in range(x.ndim) if axis not in (x.ndim - 3, x.ndim - 1))
        return squares.sum(axis=axes), mx.full((weight.shape[0],), x.size // n // weight.shape[0])
    rows = squares.reshape(-1, n)
    return rows.sum(axis=0)[None], mx.array([float(rows.shape[0])])


def _moved(values: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Values of a parameter's columns in the order of the tensor's."""
    moved = np.empty_like(values)
    moved[:, columns] = values
    return moved
