"""The real llama.cpp with ``--control-vector``, through C functions of xllamacpp's library.

xllamacpp's CommonParams offers no control vectors, so what llama.cpp's own programs do with the
flag is done here: common_control_vector_load reads the file, llama_set_adapter_cvec takes it.
Structures whose layout does not matter are passed as bytes, larger than they are.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xllamacpp.xllamacpp as extension


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


_LOAD = "_Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE"


def loaded(path: Path) -> np.ndarray:
    """What llama.cpp's own reader of ``--control-vector`` files makes of one: (layers, d), from 1.

    common_control_vector_load is C++: it takes a std::vector of {float strength; std::string name}
    and returns {int n_embd; std::vector<float> data} in memory that is handed to it. Wheels are
    built with either of libstdc++'s two strings: older ones are a pointer behind a header of
    {length, capacity, references}, newer ones {pointer, length, 16 bytes}.
    """
    library = ctypes.CDLL(extension.__file__)
    load = library[_LOAD]
    load.restype, load.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p]
    name = str(path).encode()
    if not hasattr(library, "_Z12string_stripRKSs"):  # a function of the older string
        text = ctypes.create_string_buffer(name)
        info = struct.pack("<f4xQQQQ", 1.0, ctypes.addressof(text), len(name), len(name), 0)
    else:
        text = ctypes.create_string_buffer(struct.pack("<QQi4x", len(name), len(name), 0) + name)
        info = struct.pack("<f4xQ", 1.0, ctypes.addressof(text) + 24)
    infos = ctypes.create_string_buffer(info, len(info))
    begin = ctypes.addressof(infos)
    vector = ctypes.create_string_buffer(struct.pack("<QQQ", begin, *(2 * [begin + len(info)])), 24)
    result = ctypes.create_string_buffer(32)
    load(ctypes.addressof(result), ctypes.addressof(vector))
    width, first, last = struct.unpack("<i4xQQ", result.raw[:24])
    assert width > 0, f"llama.cpp could not read {path}"
    values = np.ctypeslib.as_array((ctypes.c_float * ((last - first) // 4)).from_address(first))
    return values.reshape(-1, width).copy()


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
            values = loaded(vector)
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
