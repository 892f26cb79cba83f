"""Tensors of a model and its base that do not write to the residual stream: are they the same?

`abl_mlx.differences` judges residual writers alone. Whoever reads its verdict has to know when
something else was changed as well.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from abl_mlx.models import progress
from abl_mlx.sources import Source
from convert.gguf_file import GgufSource
from convert.mlx_matrix import PARTS
from convert.safetensors_files import TensorFiles

#: How many tensors are named in a sentence.
_NAMED = 3


@dataclass(frozen=True)
class _Tensors:
    """The tensors of a model as they are stored.

    Attributes:
        kinds: name -> type and shape.
        read: a tensor's bytes.
        release: gives memory that reading has taken back.
    """

    kinds: dict[str, tuple[str, tuple[int, ...]]]
    read: Callable[[str], np.ndarray]
    release: Callable[[str], None]


@contextmanager
def _opened(source: Source) -> Iterator[_Tensors]:
    if source.is_gguf:
        with GgufSource(source.path) as gguf:
            kinds = {name: (one.type.name, one.shape) for name, one in gguf.tensors.items()}
            yield _Tensors(kinds, lambda name: gguf.raw(name).reshape(-1), gguf.release)
        return
    with TensorFiles(source.path) as files:
        infos = {name: files.info(name) for name in files.names}
        kinds = {name: (one.dtype, one.shape) for name, one in infos.items()}
        yield _Tensors(
            kinds, lambda name: np.frombuffer(files.bytes(name), np.uint8), files.release
        )


@dataclass(frozen=True)
class Others:
    """What the comparison found.

    Attributes:
        compared: how many tensors.
        changed: those whose bytes differ.
        only_one: those that one of the two has alone.
        unlike: how many have another type or shape, and were not compared.
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
        """Sentences for a verdict; none where everything is the same."""
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


def compare(source: Source, base: Source, writers: Collection[str]) -> Others:
    """Compare all tensors but the weights of residual writers, byte by byte.

    Args:
        writers: names of the writers' weights in the model's files.
    """
    stems = {name.removesuffix(".weight") for name in writers}
    aside = set(writers) | {f"{stem}.{part}" for stem in stems for part in PARTS}
    with _opened(source) as after, _opened(base) as before:
        both = [name for name in after.kinds if name in before.kinds and name not in aside]
        alike = [name for name in both if after.kinds[name] == before.kinds[name]]
        changed = []
        with progress(len(alike), "compare the rest", "tensor") as bar:
            for name in alike:
                if not np.array_equal(after.read(name), before.read(name)):
                    changed.append(name)
                after.release(name)
                before.release(name)
                bar.update()
        alone = sorted((set(after.kinds) ^ set(before.kinds)) - aside)
    return Others(len(alike), changed, alone, len(both) - len(alike))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"
