"""Wrap the calls of modules inside a loaded model, and undo it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import mlx.nn as nn

#: ``around(call, *args, **kwargs)`` runs in place of ``call(*args, **kwargs)``.
Around = Callable[..., Any]


@cache
def _wrapped_class(original: type) -> type:
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def inner(*args: Any, **kwargs: Any) -> Any:
            return original.__call__(self, *args, **kwargs)

        call: Callable[..., Any] = inner
        for wrapper in self._abl_wrappers:
            call = _bind(wrapper, call)
        return call(*args, **kwargs)

    return type(original.__name__, (original,), {"__call__": __call__, "_abl_original": original})


def _bind(wrapper: Around, call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: wrapper(call, *args, **kwargs)


@contextmanager
def around(pairs: Iterable[tuple[nn.Module, Around]]) -> Iterator[None]:
    """Context manager in which calls of each module go through its wrapper.

    The module's ``__class__`` is swapped for a subclass, so its place in the model, its
    parameters and isinstance checks stay what they are (docs/architecture.md, "MLX and Metal").
    Blocks nest: the innermost block's wrapper is the outermost call.
    """
    entered: list[tuple[nn.Module, Around]] = []
    try:
        for module, wrapper in pairs:
            wrappers = getattr(module, "_abl_wrappers", None)
            if wrappers is None:
                # Not through nn.Module.__setattr__, which would make a parameter of a list.
                object.__setattr__(module, "_abl_wrappers", [wrapper])
                module.__class__ = _wrapped_class(type(module))
            else:
                wrappers.append(wrapper)
            entered.append((module, wrapper))
        yield
    finally:
        for module, wrapper in reversed(entered):
            module._abl_wrappers.remove(wrapper)
            if not module._abl_wrappers:
                module.__class__ = getattr(type(module), "_abl_original")  # noqa: B009
                object.__delattr__(module, "_abl_wrappers")


@contextmanager
def around_method(module: nn.Module, name: str, wrapper: Around) -> Iterator[None]:
    """Context manager in which ``module.name(...)`` goes through ``wrapper`` (for ``as_linear``).

    Blocks nest as those of `around` do.
    """
    outer = vars(module).get(name)
    object.__setattr__(module, name, _bind(wrapper, getattr(module, name)))
    try:
        yield
    finally:
        if outer is None:
            object.__delattr__(module, name)
        else:
            object.__setattr__(module, name, outer)
