"""GGUFs that are split or laid out in unusual ways, and a replacement for a tensor."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Q
from gguf import GGUFValueType as V

from convert.gguf.file import GgufSource
from convert.gguf.parts import part_paths
from convert.gguf.rewrite import Replacement
from tests.convert.test_gguf_fuzz import (
    entry,
    gguf_bytes,
    pair,
    string,
)


def split(path: Path, out: Path, tensors: int, *, first_empty: bool = False) -> list[Path]:
    """Split a file as llama-gguf-split does: metadata in the first part, split.* in all."""
    reader = gguf.GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, arch, split_max_tensors=tensors, small_first_shard=first_empty)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            inner = field.types[-1] if field.types[0] == V.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    write_out(writer)
    return [out] if not writer.tensors[1:] else part_paths(out, len(writer.tensors))


def write_out(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def numbers(*values: np.ndarray) -> Callable[[], Iterator[np.ndarray]]:
    return lambda: iter(values)


def q8_0(source: GgufSource, name: str) -> Replacement:
    """The tensor in Q8_0, two rows a chunk."""
    values = source.values(name)
    rows = values.reshape(-1, values.shape[-1])

    def chunks() -> Iterator[np.ndarray]:
        for at in range(0, len(rows), 2):
            yield gguf.quants.quantize(rows[at : at + 2], Q.Q8_0)

    return Replacement(Q.Q8_0, values.shape, chunks)


def odd_files(folder: Path) -> list[Path]:
    """Whole files of unusual layout."""
    values = np.arange(8, dtype="<f4").tobytes()
    names = [pair("general.name", V.STRING, string("odd"))]
    two = [entry("late", [8], Q.F32, 96), entry("early", [3], Q.F16, 0)]
    gaps = b"123456" + b"\7" * 90 + values
    contents = {
        "no tensors": gguf_bytes(names),
        "no tensors, padded": gguf_bytes(names) + bytes(-len(gguf_bytes(names)) % 32),
        "no pairs": b"GGUF" + struct.pack("<IQQ", 3, 0, 0),
        "version 2": gguf_bytes(names, [entry("w", [8])], values, version=2),
        "unpadded end": gguf_bytes(names, [entry("w", [5])], values[:20]),
        "more behind": gguf_bytes(names, [entry("w", [8])], values + b"something else"),
        "gaps, order, padding": gguf_bytes(names, two, gaps),
        "a gap before": gguf_bytes((), [entry("w", [8], Q.F32, 64)], b"\1" * 64 + values),
        "empty tensors": gguf_bytes((), [entry("e", [0]), entry("w", [8])], values),
    }
    paths = []
    for name, content in contents.items():
        paths.append(folder / f"{name}.gguf")
        paths[-1].write_bytes(content)
    return paths
