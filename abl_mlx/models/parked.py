"""States of passes that wait in a sweep, in memory up to a bound and otherwise in files.

An array is emptied in place, so that whoever holds it (the model's own code among them) holds no
memory either; before the pass goes on it is filled again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np

from abl_mlx.support.units import in_bytes
from convert.base.errors import UserError
from convert.base.scratch import scratch

#: Bytes of states of waiting passes that stay in memory.
IN_MEMORY = 1 << 30

# Smaller arrays always stay in memory.
_SMALL = 1 << 12


class Parking:
    """Keeps the states of passes that wait."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held = 0
        self._numbers = itertools.count()

    @contextmanager
    def parked(self, arrays: Sequence[mx.array]) -> Iterator[None]:
        """Context manager during which evaluated arrays may be in files.

        Raises:
            UserError: when the disk has too little space.
        """
        # A stream has three dimensions; masks and constants may belong to several passes.
        streams = {id(one): one for one in arrays if one.ndim > 2 and one.nbytes >= _SMALL}
        large = list(streams.values())
        size = sum(one.nbytes for one in large)
        if self._held + size <= IN_MEMORY:
            self._held += size
            yield
            self._held -= size
            return
        kept = [(one, self._written(one), one.shape, one.dtype) for one in large]
        yield
        for one, path, shape, dtype in kept:
            raw = np.fromfile(path, np.uint8)
            path.unlink()
            one[...] = mx.array(raw).view(dtype).reshape(shape)
            mx.eval(one)

    def _written(self, one: mx.array) -> Path:
        """The file with the array's bytes; the array is emptied."""
        path = self._folder / f"{next(self._numbers)}"
        try:
            np.array(one.reshape(-1).view(mx.uint8), copy=False).tofile(path)
        except OSError as error:
            raise UserError(
                f"the states of prompts over {in_bytes(IN_MEMORY)} go to {self._folder}, which "
                f"cannot take them ({error.strerror or error}): free some space, set TMPDIR to a "
                "larger disk, or take fewer prompts (--limit)."
            ) from None
        one[...] = mx.array(mx.nan if mx.issubdtype(one.dtype, mx.floating) else 0, one.dtype)
        mx.eval(one)
        return path


@contextmanager
def parking() -> Iterator[Parking]:
    """Context manager with a place for states, whose files are deleted after the block."""
    with scratch() as folder:
        yield Parking(folder)
