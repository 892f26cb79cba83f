"""Functions compiled by numba: the same results on every CPU, with machine code cached on disk.

numba caches machine code beside the module, or in the user's home folder. Where neither can be
written to, the cache is a private temporary folder; where that cannot be made either, each process
compiles again. Cached code serves until a file changes that holds the function, or one it calls.
Processes that need the same function wait for the one that compiles it.

No function is compiled with ``fastmath``: sums are added in the order in which they are written,
and a multiplication and an addition are rounded separately. Otherwise the quantization codes that
these functions choose could depend on the width of a CPU's registers.
"""

from __future__ import annotations

import fcntl
import gc
import os
import stat
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.dispatcher import Dispatcher

from convert.base.locks import Busy, hold


def compiled(
    *, inline: bool = False, inner: bool = False, plain: bool = False
) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: compile a function when it is first called.

    Args:
        inline: make the function a part of those that call it. That compiles faster if these are
            short and one place calls it. Any other function is compiled for itself, and optimized
            in each that calls it.
        inner: only other compiled functions call it, so that no machine code is made of it alone.
        plain: it neither makes arrays nor copies one to a part of another. So nothing counts who
            uses an array, which is a quarter of the code that numba writes. Not for short loops
            that are called within others: LLVM made these twice as slow.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        # Nobody calls from C, so the wrapper for that is left out.
        how: dict[str, Any] = {
            "error_model": "numpy", "no_cfunc_wrapper": True, "no_cpython_wrapper": inner,
            "_nrt": not plain,
        }  # fmt: skip
        if inline:
            return _noted(numba.njit(inline="always", **how)(function))
        if inner:
            return _noted(numba.njit(nogil=True, pipeline_class=_InnerCompiler, **how)(function))

        def made(cache: bool) -> Any:
            return _noted(numba.njit(nogil=True, cache=cache, **how)(function))

        def kept() -> Any:
            try:
                return made(True)
            except RuntimeError:  # numba: "cannot cache function: no locator available"
                return None

        kernel = kept()
        if kernel is None and (folder := _private_folder()) is not None:
            numba.config.CACHE_DIR = str(folder)
            kernel = kept()
        if kernel is None:
            kernel = made(False)
        else:
            _survive_a_full_disk(kernel)
            _depend_on_all_files(kernel)
            _compile_in_one_process(kernel)
        _collect_no_garbage(kernel)
        return kernel

    return decorate


class _Inner(JITCodeLibrary):
    """Code of a function for those that call it, of which no machine code is made."""

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        """There is nothing to call."""
        del name
        self._ensure_finalized()
        return 0

    @property
    def codegen(self) -> Any:
        """What numba asks to note the function's environment, of which there is none."""
        return _NoEnvironment


class _NoEnvironment:
    @staticmethod
    def set_env(*_: Any) -> None:
        """Nobody uses it."""


class _InnerCompiler(Compiler):
    """numba's compiler of functions that only other compiled functions call."""

    def compile_extra(self, func: Callable[..., Any]) -> Any:
        """Compile a function."""
        self.state.library = _Inner(self.state.targetctx.codegen(), func.__qualname__)
        return super().compile_extra(func)


def _private_folder() -> Path | None:
    """A temporary folder that no other user can write to, because its contents are executed.

    None where no such folder can be made.
    """
    folder = Path(tempfile.gettempdir()) / f"abl-mlx-numba-{os.getuid()}"
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        private = stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o077
        if private and found.st_uid == os.getuid() and os.access(folder, os.W_OK):
            return folder
    return None


# Compiled function -> the files that hold it and the functions that it calls.
_files: dict[Any, frozenset[str]] = {}


def _noted(kernel: Any) -> Any:
    """A function that numba made, after its files were noted."""
    function = kernel.py_func
    used = (function.__globals__.get(name) for name in function.__code__.co_names)
    callees = [_files[one] for one in used if isinstance(one, Dispatcher) and one in _files]
    _files[kernel] = frozenset({function.__code__.co_filename}).union(*callees)
    return kernel


def _depend_on_all_files(kernel: Any) -> None:
    """Let a function be compiled again when any of its files has changed.

    numba looks at the file of the function alone, although the machine code of the functions that
    it calls is a part of its own.
    """
    with suppress(AttributeError, OSError):
        states = [os.stat(file) for file in sorted(_files[kernel])]
        _index(kernel)._source_stamp = [(one.st_mtime, one.st_size) for one in states]


def _survive_a_full_disk(kernel: Any) -> None:
    """Let a compiled function run even if its machine code cannot be written to the cache."""
    cache: Any = getattr(kernel, "_cache", None)
    save = getattr(cache, "save_overload", None)
    if save is None:
        return

    def saving(*args: Any) -> None:
        with suppress(OSError):
            save(*args)

    with suppress(AttributeError):
        cache.save_overload = saving


# For how many seconds a process waits for another that compiles a function, and between two looks.
_PATIENCE, _LOOK = 60.0, 0.02


class _Lock:
    """A file that the process holds which compiles a function, until its code is in the cache."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def take(self) -> None:
        """Wait for it; where it cannot be had, the process compiles beside the other one."""
        with suppress(OSError):
            if self._descriptor is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
                self._descriptor = os.open(self._path, flags, 0o600)
            end = time.monotonic() + _PATIENCE
            while time.monotonic() < end:
                with suppress(Busy):
                    hold(self._descriptor)
                    return
                time.sleep(_LOOK)

    def give(self) -> None:
        """Let another process have it."""
        with suppress(OSError):
            if self._descriptor is not None:
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)


def _compile_in_one_process(kernel: Any) -> None:
    """Let other processes that need a function wait while one compiles it.

    A function waits for those that it calls, never the other way round, so no two processes wait
    for each other.
    """
    cache: Any = getattr(kernel, "_cache", None)
    with suppress(AttributeError):
        load, save = cache.load_overload, cache.save_overload
        lock = _Lock(Path(_index(kernel)._index_path).with_suffix(".lock"))

        def loading(*args: Any) -> Any:
            lock.take()
            found = load(*args)
            if found is not None:
                lock.give()
            return found

        def saving(*args: Any) -> None:
            try:
                save(*args)
            finally:
                lock.give()

        cache.load_overload, cache.save_overload = loading, saving


class _Pauses:
    """Keeps Python from looking for garbage, which takes a tenth of the time of compiling."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._enabled = False

    def __enter__(self) -> None:
        with self._lock:
            if self._count == 0:
                self._enabled = gc.isenabled()
                gc.disable()
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._count -= 1
            if self._count == 0 and self._enabled:
                gc.enable()


_pauses = _Pauses()


def _collect_no_garbage(kernel: Any) -> None:
    """Compile a function without looking for garbage meanwhile."""
    with suppress(AttributeError):
        compile_one = kernel.compile

        def compiling(*args: Any) -> Any:
            with _pauses:
                return compile_one(*args)

        kernel.compile = compiling


def _index(kernel: Any) -> Any:
    """What numba keeps of a function's machine code on disk."""
    return kernel._cache._cache_file


def first_arguments(kernel: Any) -> set[str]:
    """The types of the first argument for which a function's machine code is on disk."""
    with suppress(Exception):  # a damaged file, which numba does not load either
        return {str(signature[0]) for signature, *_ in _index(kernel)._load_index()}
    return set()
