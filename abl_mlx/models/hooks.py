"""Wrap the calls of modules inside a loaded model, and undo it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import mlx.nn as nn

#: ``around(call, *args, **kwargs)`` runs in place of ``call(*args, **kwargs)``.
Around = Callable[..., Any]

_METHODS = "_abl_methods"


class Wrappers:
    """The wrappers of one call, each with the scope in which it was entered.

    Forward passes that are run side by side (`models.sweeps`) each have a scope of their own: what
    one of them wraps, the others call as it is.
    """

    def __init__(self) -> None:
        self._entered: list[tuple[Around, object]] = []

    def __bool__(self) -> bool:
        return bool(self._entered)

    def enter(self, wrapper: Around) -> tuple[Around, object]:
        """Add a wrapper, for calls in the scope of this thread and in those inside it."""
        self._entered.append((wrapper, _scopes.inside[-1]))
        return self._entered[-1]

    def leave(self, entered: tuple[Around, object]) -> None:
        """Remove a wrapper that `enter` has added."""
        self._entered.remove(entered)

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A call with all wrappers of this thread around it, the last one outermost."""
        for wrapper, scope in self._entered:
            if scope in _scopes.inside:
                call = _bind(wrapper, call)
        return call


class _Scopes(threading.local):
    """The scopes that a thread is inside, the outermost first."""

    inside: tuple[object, ...] = (None,)


_scopes = _Scopes()


def scopes() -> tuple[object, ...]:
    """The scopes that this thread is inside, the outermost first."""
    return _scopes.inside


def enter_scopes(inside: tuple[object, ...]) -> None:
    """Let this thread be inside of these scopes."""
    _scopes.inside = inside


@contextmanager
def scope(inside: object) -> Iterator[None]:
    """Context manager in which this thread is inside of one more scope.

    What was wrapped in a scope can stay wrapped, at no cost to calls outside, and is in use again
    whenever the scope is entered again.
    """
    before = _scopes.inside
    _scopes.inside = (*before, inside)
    try:
        yield
    finally:
        _scopes.inside = before


@cache
def _wrapped_class(original: type) -> type:
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def inner(*args: Any, **kwargs: Any) -> Any:
            return original.__call__(self, *args, **kwargs)

        return self._abl_wrappers.around(inner)(*args, **kwargs)

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
    entered: list[tuple[nn.Module, tuple[Around, object]]] = []
    try:
        for module, wrapper in pairs:
            wrappers = getattr(module, "_abl_wrappers", None)
            if wrappers is None:
                wrappers = Wrappers()
                # Not through nn.Module.__setattr__, which keeps parameters.
                object.__setattr__(module, "_abl_wrappers", wrappers)
                module.__class__ = _wrapped_class(type(module))
            entered.append((module, wrappers.enter(wrapper)))
        yield
    finally:
        for module, one in reversed(entered):
            module._abl_wrappers.leave(one)
            if not module._abl_wrappers:
                module.__class__ = getattr(type(module), "_abl_original")  # noqa: B009
                object.__delattr__(module, "_abl_wrappers")


@contextmanager
def around_method(module: nn.Module, name: str, wrapper: Around) -> Iterator[None]:
    """Context manager in which ``module.name(...)`` goes through ``wrapper`` (for ``as_linear``).

    Blocks nest as those of `around` do.
    """
    methods: dict[str, Wrappers] = vars(module).setdefault(_METHODS, {})
    wrappers = methods.get(name)
    if wrappers is None:
        wrappers = methods[name] = Wrappers()
        original = getattr(module, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            return wrappers.around(original)(*args, **kwargs)

        object.__setattr__(module, name, method)
    entered = wrappers.enter(wrapper)
    try:
        yield
    finally:
        wrappers.leave(entered)
        if not wrappers:
            del methods[name]
            object.__delattr__(module, name)
