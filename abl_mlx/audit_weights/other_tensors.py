"""Compares tensors that do not write to the residual stream between a model and its base.

`abl_mlx.audit_weights.differences` only judges residual writers; the reader of its verdict must
know if other tensors were changed as well.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from abl_mlx.outputs.model_file import ModelFile
from abl_mlx.records.looks import OtherTensors
from abl_mlx.support.console import progress
from convert.mlx.matrix import PARTS

#: The largest number of tensors that a sentence names.
_NAMED = 3


def evidence(found: OtherTensors) -> list[str]:
    """Sentences for a verdict's evidence; none if all tensors are the same."""
    said = []
    if found.changed:
        said.append(
            f"{len(found.changed)} of {found.compared} tensors that do not write to the residual "
            f"stream differ from the base's, on which this verdict says nothing: "
            f"{_listed(found.changed)}"
        )
    if not found.compared:
        said.append(
            "of what does not write to the residual stream nothing was compared: the two "
            "models store it in different forms"
        )
        return said
    if found.only_one:
        said.append(f"one of the two models alone has {_listed(found.only_one)}")
    if found.not_compared:
        said.append(
            f"{found.not_compared} tensors that do not write to the residual stream have another "
            "type or shape than the base's, and were not compared"
        )
    return said


def compare(model: ModelFile, base: ModelFile, writers: Collection[str]) -> OtherTensors:
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
    return OtherTensors(
        compared=len(alike),
        changed=changed,
        only_one=alone,
        not_compared=len(both) - len(alike),
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"
