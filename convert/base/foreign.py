"""A call into other people's code, of which everything that can go wrong is told in one sentence.

mlx-lm and transformers build a model or a tokenizer from files without checking them, so that a
damaged file ends in whatever exception its line happens to raise. Only such calls belong in here:
around code of this project it would hide faults.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from convert.base.errors import UserError


@contextmanager
def foreign(sentence: str) -> Iterator[None]:
    """Turn what is raised inside into ``sentence``, a colon and the reason.

    Raises:
        UserError: for everything but what the user or the memory ends. Panics of Rust's tokenizers
            and the exits of some of mlx-lm's modules are no ``Exception`` and count as well.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise UserError(f"{sentence}: {reason(error)}") from error


def reason(error: BaseException, longest: int = 300) -> str:
    """What an exception says in one line; its name, too, where the words alone say little."""
    words = " ".join(str(error).split())[:longest]
    name = type(error).__name__
    if isinstance(error, (ValueError, RuntimeError, OSError)) and len(words) > 20:
        return words
    return f"{name} ({words})" if words else name
