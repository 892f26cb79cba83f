"""The real llama.cpp with ``--control-vector``, through C functions of xllamacpp's library.

xllamacpp's CommonParams offers no control vectors, so the C function that llama.cpp's own programs
give the file's vectors to is called here, llama_set_adapter_cvec. Structures whose layout does not
matter are passed as bytes, larger than they are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xllamacpp.xllamacpp as extension

from convert import control_vector


class _Opaque(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char * 512)]


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(extension.__file__)
    pointer = ctypes.c_void_p
    for name, result, arguments in (
        ("llama_model_default_params", _Opaque, []),
        ("llama_context_default_params", _Opaque, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, _Opaque]),
        ("llama_init_from_model", pointer, [pointer, _Opaque]),
        ("llama_batch_get_one", _Opaque, [pointer, ctypes.c_int32]),
        ("llama_decode", ctypes.c_int32, [pointer, _Opaque]),
        ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [pointer, ctypes.c_int32]),
        ("llama_set_adapter_cvec", ctypes.c_int32,
         [pointer, pointer, ctypes.c_size_t, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]),
        ("llama_free", None, [pointer]),
        ("llama_model_free", None, [pointer]),
    ):  # fmt: skip
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_backend_init()
    return library


def in_one(path: Path, layers: int) -> np.ndarray:
    """The vectors of layers 1, 2, … in one array, as common_control_vector_load has them."""
    found = control_vector.read(path).layers
    width = len(next(iter(found.values())))
    none = np.zeros(width, np.float32)
    return np.stack([found.get(layer, none) for layer in range(1, layers)])


def greedy(
    gguf: Path, prompts: Sequence[Sequence[int]], n: int, vocabulary: int, layers: int,
    vector: Path | None = None,
) -> list[list[int]]:  # fmt: skip
    """Greedy continuations of encoded prompts by llama.cpp, with a control vector or without."""
    library = _library()
    model = library.llama_model_load_from_file(
        str(gguf).encode(), library.llama_model_default_params()
    )
    assert model
    replies = []
    for prompt in prompts:
        context = library.llama_init_from_model(model, library.llama_context_default_params())
        assert context
        if vector is not None:
            values = in_one(vector, layers)
            status = library.llama_set_adapter_cvec(
                context, values.ctypes.data, values.size, values.shape[1], 1, layers
            )
            assert status == 0
        reply: list[int] = []
        tokens = list(prompt)
        while len(reply) < n:
            batch = (ctypes.c_int32 * len(tokens))(*tokens)
            assert library.llama_decode(
                context, library.llama_batch_get_one(batch, len(tokens))
            ) == 0  # fmt: skip
            logits = library.llama_get_logits_ith(context, -1)
            tokens = [int(np.argmax(np.ctypeslib.as_array(logits, (vocabulary,))))]
            reply += tokens
        replies.append(reply)
        library.llama_free(context)
    library.llama_model_free(model)
    return replies
