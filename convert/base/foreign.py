"""Calls into other libraries whose every exception becomes one sentence for the user.

mlx-lm and transformers build a model or a tokenizer from files without checking them, so a damaged
file can raise any exception. Only calls into such libraries belong inside `foreign`: around code of
this project it would hide bugs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from convert.base.errors import UserError


@contextmanager
def foreign(sentence: str) -> Iterator[None]:
    """Turn any exception raised inside into a UserError: ``sentence``, a colon and the reason.

    Raises:
        UserError: for every exception but an interrupt by the user and a lack of memory. Panics of
            the Rust tokenizers and the exits of some mlx-lm modules, which are not subclasses of
            ``Exception``, are turned into one as well.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise UserError(f"{sentence}: {reason(error)}") from error


def reason(error: BaseException, longest: int = 300) -> str:
    """An exception's message in one line, with its class where the message alone says little."""
    words = " ".join(str(error).split())[:longest]
    name = type(error).__name__
    if isinstance(error, (ValueError, RuntimeError, OSError)) and len(words) > 20:
        return words
    return f"{name} ({words})" if words else name
