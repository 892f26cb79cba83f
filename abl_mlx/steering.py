"""Runtime interventions on a loaded model: the weight edit without touching weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import mlx.core as mx

from abl_mlx.edits import Edit, remove
from abl_mlx.hooks import Around, around, around_method
from abl_mlx.writers import Writer


@contextmanager
def ablation(writers: Sequence[Writer], edit: Edit) -> Iterator[None]:
    """Within the block every chosen writer's output loses its component along the directions.

    By linearity this is what the edited weights and biases would put out, so the logits are those
    of the weight edit to float precision, a tied output head included.
    """
    chosen = edit.chosen(writers)
    with ExitStack() as stack:
        stack.enter_context(
            around([(w.module, _remover(edit.basis(w), edit.strength)) for w in chosen])
        )
        for writer in chosen:
            if writer.tied:
                before = _remover_before(edit.basis(writer), edit.strength)
                stack.enter_context(around_method(writer.module, "as_linear", before))
        yield


def _remover_before(basis: mx.array, strength: float) -> Around:
    # A head E − α (E r) rᵀ of h is the head E of h − α r (rᵀ h).
    def wrapper(call: Any, states: mx.array) -> mx.array:
        return call(remove(basis.astype(states.dtype), strength, states, -1))

    return wrapper


def _remover(basis: mx.array, strength: float) -> Around:
    def wrapper(call: Any, *args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        return remove(basis.astype(output.dtype), strength, output, -1)

    return wrapper
