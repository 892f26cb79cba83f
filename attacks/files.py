"""Attacks on files from a user or an earlier run: directions, prompts, adapters, records."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zipfile
from pathlib import Path
from random import Random
from typing import Any

from attacks import gguf_mutations, mutations, safetensors_mutations
from attacks.base import FORCED, SHORT
from attacks.case import Case, linked, put, size_of


def _case(to: Path, path: Path, *arguments: object, out: str | None = None) -> Case:
    """A case whose command may write ``out`` in the case's folder."""
    more = () if out is None else ("-o", to / out)
    outputs = () if out is None else (to / out,)
    return Case(tuple(map(str, (*arguments, *more))), size_of(path), outputs)


def direction(base: Path, to: Path, rng: Random) -> Case:
    """A direction file in one of its formats."""
    name = rng.choice(
        ["direction.safetensors"] * 3 + ["vector.npy", "vectors.npz", "packed.npz", "control.gguf"]
    )
    raw = (base / name).read_bytes()
    path = to / name
    if path.suffix == ".safetensors":
        path.write_bytes(safetensors_mutations.mutate(rng, raw))
    elif path.suffix == ".gguf":
        path.write_bytes(gguf_mutations.mutate(rng, raw))
    else:
        path.write_bytes(_npz(rng, raw) if path.suffix == ".npz" else _npy(rng, raw))
    model = rng.choice([base / "llama", base / "model.gguf"])
    layer = ["--layer", "1"] if rng.random() < 0.3 else []
    tensor = (
        ["--tensor", rng.choice(["a", "b", "direction", "\x1b[31m"])] if rng.random() < 0.2 else []
    )
    what = rng.randrange(4)
    if what == 0:
        return _case(to, path, "show", model, "Hi", "--direction", path, *layer, *tensor)
    if what == 1:
        return _case(to, path, "audit", model, "--direction", path)
    if what == 2:
        return _case(
            to, path, "diff", base / "model.gguf", base / "model.gguf", "--direction", path
        )
    out = "out.gguf" if model.suffix else "out"
    return _case(to, path, "apply", path, model, "--max-leak", "1", *layer, *tensor, out=out)


def _npy(rng: Random, raw: bytes) -> bytes:
    if rng.random() < 0.4:
        return mutations.bytes_of(rng, raw)
    (size,) = struct.unpack_from("<H", raw, 8)
    header, data = raw[10 : 10 + size].decode("latin-1"), raw[10 + size :]
    what = rng.randrange(4)
    if what == 0:
        header = mutations.text(rng, header)
    elif what == 1:
        shape = rng.choice(
            ["(2**62,)", "(-1,)", "(64, 0)", "()", "(1000000000000,)", "(8, 8)", "(64.0,)"]
        )
        header = header.replace("(64,)", shape)
    elif what == 2:
        kind = rng.choice(
            ["|O", "<f8", "<c8", ">f4", "|S4", "<U9", "<i8", "<M8[s]", "|V4", "<f2", "|b1"]
        )
        header = header.replace("<f4", kind)
    else:
        header = rng.choice(
            ["", "{", "{}", "(" * 5000, "9" * 5000, "__import__('os')", "[" * 90000]
        )
    body = header.encode("latin-1", "replace")[:65000]
    return raw[:8] + struct.pack("<H", len(body)) + body + data


def _npz(rng: Random, raw: bytes) -> bytes:
    if rng.random() < 0.4:
        return mutations.bytes_of(rng, raw)
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(made, "w") as new:
        for one in old.namelist():
            data = _npy(rng, old.read(one)) if rng.random() < 0.5 else old.read(one)
            name = (
                one
                if rng.random() < 0.5
                else rng.choice(["../../x.npy", "/x.npy", "\x1b[2J.npy", "x", one])
            )
            how = rng.choice(
                [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
            )
            new.writestr(name, data, how)
            if rng.random() < 0.1:  # expands to a size that no memory holds
                new.writestr("bomb.npy", data[:128] + bytes(1 << 28), zipfile.ZIP_DEFLATED)
            if rng.random() < 0.1:
                new.writestr(name, data, how)
    return made.getvalue() if rng.random() < 0.7 else mutations.bytes_of(rng, made.getvalue())


def prompts(base: Path, to: Path, rng: Random) -> Case:
    """A prompt file in one of its formats."""
    source = rng.choice(sorted((base / "prompts").iterdir()))
    path = to / source.name
    raw = source.read_bytes()
    if rng.random() < 0.3:
        raw = mutations.bytes_of(rng, raw)
    elif path.suffix == ".parquet":
        raw = _parquet(rng)
    elif path.suffix == ".jsonl":
        lines = raw.splitlines()
        for _ in range(rng.choice([1, 1, 5])):
            at = rng.randrange(len(lines))
            lines[at] = mutations.json_bytes(rng, lines[at])
        raw = b"\n".join(lines)
    else:
        raw = mutations.text(rng, raw.decode()).encode("utf-8", "surrogatepass")
    path.write_bytes(raw)
    sound = base / "others.txt"
    sets = ["--harmful", path, "--harmless", sound]
    if rng.random() < 0.5:
        sets = ["--harmful", sound, "--harmless", path]
    if rng.random() < 0.7:
        return _case(to, path, "eval", base / "llama", *sets, *SHORT)
    return _case(to, path, "measure", base / "llama", *sets, "--limit", "1", *FORCED,
                 out="out.safetensors")  # fmt: skip


def _parquet(rng: Random) -> bytes:
    """A parquet file whose columns hold no prompts."""
    import pyarrow
    import pyarrow.parquet

    columns: dict[str, list[Any]] = {
        "bytes": [b"\xff\xfe", None] * 9, "numbers": list(range(18)), "lists": [["a"], []] * 9,
        "none": [None] * 18, "records": [{"a": 1}] * 18, "texts": ["a\0b", "\x1b[31m"] * 9,
        "messages": [[{"role": "user", "content": "Hi"}]] * 18, "floats": [float("nan")] * 18,
    }  # fmt: skip
    names = rng.choice([["prompt"], ["text"], ["prompt", "answer"], ["\x1b[31m"], ["a", "b"], []])
    table = pyarrow.table({name: rng.choice(list(columns.values())) for name in names})
    stream = io.BytesIO()
    pyarrow.parquet.write_table(table, stream)
    return stream.getvalue() if rng.random() < 0.7 else mutations.bytes_of(rng, stream.getvalue())


def adapter(base: Path, to: Path, rng: Random) -> Case:
    """An adapter in place of a model, or a damaged label of an edited folder."""
    what = rng.randrange(3)
    if what == 0:
        path = to / "adapter.lora.gguf"
        path.write_bytes(gguf_mutations.mutate(rng, (base / path.name).read_bytes()))
        kind = rng.choice(["inspect", "audit", "eval", "diff"])
        more = [base / "model.gguf"] if kind == "diff" else list(SHORT) if kind == "eval" else []
        return _case(to, path, kind, path, *more)
    if what == 1:
        path = linked(base / "adapter.adapter", to / "adapter.adapter")
        name = rng.choice(["adapter_config.json", "abl.json"])
        put(path / name, mutations.json_bytes(rng, (path / name).read_bytes()))
        return _case(to, path, rng.choice(["inspect", "audit", "eval"]), path)
    path = linked(base / "edited", to / "edited")
    name = rng.choice(["config.json", "abl.json"])
    put(path / name, mutations.json_bytes(rng, (path / name).read_bytes()))
    kind = rng.choice(["inspect", "audit", "convert"])
    return _case(to, path, kind, path, *([to / "out.gguf"] if kind == "convert" else []))


def undo(base: Path, to: Path, rng: Random) -> Case:
    """A damaged undo file, or a damaged label in an edited model."""
    if rng.random() < 0.4:
        path = to / "edited.gguf"
        kept = to / "edited.undo.safetensors"
        model, factors = base / path.name, base / kept.name
        changes = rng.random() < 0.5
        path.write_bytes(
            gguf_mutations.mutate(rng, model.read_bytes()) if changes else model.read_bytes()
        )
        raw = factors.read_bytes()
        kept.write_bytes(raw if changes else safetensors_mutations.mutate(rng, raw))
        return _case(to, to, "undo", path, out=rng.choice(["out.gguf", "out.lora.gguf"]))
    path = linked(base / "edited", to / "edited")
    if rng.random() < 0.5:
        raw = (path / "undo.safetensors").read_bytes()
        put(path / "undo.safetensors", safetensors_mutations.mutate(rng, raw))
    else:
        document = json.loads((path / "config.json").read_text())
        if "abl_mlx" in document and rng.random() < 0.7:
            document["abl_mlx"] = mutations.json_value(rng, document["abl_mlx"])
            put(path / "config.json", json.dumps(document).encode())
        else:
            put(path / "config.json", mutations.json_bytes(rng, json.dumps(document).encode()))
    base_model = ["--base", base / "llama"] if rng.random() < 0.2 else []
    return _case(to, path, "undo", path, *base_model, out=rng.choice(["out", "out.adapter"]))


def journal(base: Path, to: Path, rng: Random) -> Case:
    """A damaged journal of an evaluation or of a search, or a damaged record."""
    what = rng.randrange(3)
    if what == 0:
        path = to / "record.json"
        path.write_bytes(mutations.json_bytes(rng, (base / path.name).read_bytes()))
        return _case(to, path, "eval", base / "llama", *SHORT, "--max-drop-from", path)
    source, path = (
        (base / "journal.kept", to / "journal.jsonl") if what == 1
        else (base / "search.journal", to / "search.journal")
    )  # fmt: skip
    lines = source.read_bytes().splitlines(keepends=True)
    if rng.random() < 0.3:
        path.write_bytes(mutations.bytes_of(rng, source.read_bytes()))
    else:
        for _ in range(rng.choice([1, 1, 2, 5])):
            at = rng.randrange(len(lines))
            lines[at] = mutations.json_bytes(rng, lines[at]) + b"\n"
        path.write_bytes(b"".join(lines))
    if what == 1:
        return _case(to, path, "eval", base / "llama", *SHORT, "--resume", path)
    return _case(to, path, "run", base / "llama", "--limit", "4", "--max-tokens", "1", *FORCED,
                 "--search", "2", "--search-journal", path, out="out")  # fmt: skip


def ollama(base: Path, to: Path, rng: Random) -> Case:
    """A damaged manifest in Ollama's store, or a damaged blob that the manifest names."""
    store = to / "ollama"
    shutil.copytree(base / "ollama", store, copy_function=lambda a, b: Path(b).hardlink_to(a))
    manifest = next(path for path in (store / "manifests").rglob("*") if path.is_file())
    if rng.random() < 0.6:
        put(manifest, mutations.json_bytes(rng, manifest.read_bytes()))
    else:
        small = [path for path in (store / "blobs").iterdir() if path.stat().st_size < 10_000]
        path = rng.choice(sorted(small))
        raw = path.read_bytes()
        is_json = raw[:1] in (b"{", b"[")
        put(path, mutations.json_bytes(rng, raw) if is_json else mutations.bytes_of(rng, raw))
    what, out = rng.choice([("inspect", None), ("apply", "out.gguf"), ("convert", None)])
    arguments: list[object] = [what, "ollama:tiny"]
    if what == "apply":
        arguments = [what, base / "vector.npy", "ollama:tiny", "--max-leak", "1"]
    elif what == "convert":
        arguments.append(to / "out")
    case = _case(to, store, *arguments, out=out)
    return Case(case.arguments, case.size, case.outputs, {"OLLAMA_MODELS": str(store)})
