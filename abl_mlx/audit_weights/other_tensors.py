"""Compares tensors that do not write to the residual stream between a model and its base.

`abl_mlx.audit_weights.differences` only judges residual writers; the reader of its verdict must
know if other tensors were changed as well.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from abl_mlx.outputs.model_file import ModelFile
from abl_mlx.support.console import progress
from convert.mlx.matrix import PARTS

#: The largest number of tensors that a sentence names.
_NAMED = 3


@dataclass(frozen=True)
class Others:
    """The result of the comparison.

    Attributes:
        compared: the number of compared tensors.
        changed: names of tensors whose bytes differ.
        only_one: names of tensors that only one of the two models has.
        unlike: the number of tensors with another type or shape, which were not compared.
    """

    compared: int
    changed: list[str]
    only_one: list[str]
    unlike: int

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "compared": self.compared,
            "changed": self.changed,
            "only_one": self.only_one,
            "not_compared": self.unlike,
        }

    def evidence(self) -> list[str]:
        """Sentences for a verdict's evidence; none if all tensors are the same."""
        found = []
        if self.changed:
            found.append(
                f"{len(self.changed)} of {self.compared} tensors that do not write to the residual "
                f"stream differ from the base's, on which this verdict says nothing: "
                f"{_listed(self.changed)}"
            )
        if not self.compared:
            found.append(
                "of what does not write to the residual stream nothing was compared: the two "
                "models store it in different forms"
            )
            return found
        if self.only_one:
            found.append(f"one of the two models alone has {_listed(self.only_one)}")
        if self.unlike:
            found.append(
                f"{self.unlike} tensors that do not write to the residual stream have another type "
                "or shape than the base's, and were not compared"
            )
        return found


def compare(model: ModelFile, base: ModelFile, writers: Collection[str]) -> Others:
    """Compare all tensors except the weights of residual writers, byte by byte.

    Args:
        model: the model.
        base: its base model.
        writers: names of the writers' weights in the model's files.
    """
    stems = {name.removesuffix(".weight") for name in writers}
    aside = set(writers) | {f"{stem}.{part}" for stem in stems for part in PARTS}
    after, before = model.kinds(), base.kinds()
    both = [name for name in after if name in before and name not in aside]
    alike = [name for name in both if after[name] == before[name]]
    changed = []
    with progress(len(alike), "compare the rest", "tensor") as bar:
        for name in alike:
            if not np.array_equal(model.raw(name), base.raw(name)):
                changed.append(name)
            model.release(name)
            base.release(name)
            bar.update()
    alone = sorted((set(after) ^ set(before)) - aside)
    return Others(len(alike), changed, alone, len(both) - len(alike))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"
