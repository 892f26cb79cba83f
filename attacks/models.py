"""Attacks on the files of a model: a GGUF, or the files of a folder."""

from __future__ import annotations

from pathlib import Path
from random import Random

from attacks import gguf_mutations, mutations, safetensors_mutations, templates
from attacks.base import ARCHITECTURES, FORCED, SHORT
from attacks.case import Case, linked, put, size_of


def command(rng: Random, base: Path, model: Path, to: Path, kinds: str) -> Case:
    """A case of one of the named commands, which reads ``model``."""
    is_gguf = model.suffix == ".gguf"
    vector = base / "vector.npy"
    kind = rng.choice(kinds.split())
    out: Path | None = None
    if kind == "inspect":
        arguments: list[object] = ["inspect", model]
    elif kind == "apply":
        out = to / (
            "out.gguf" if is_gguf else rng.choice(["out", "out", "out.gguf", "out.adapter"])
        )
        arguments = ["apply", vector, model, "-o", out, "--max-leak", "1"]
    elif kind == "convert":
        out = to / ("out" if is_gguf else "out.gguf")
        arguments = ["convert", model, out]
    elif kind == "measure":
        out = to / "out.safetensors"
        arguments = ["measure", model, "-o", out, "--limit", "1", *FORCED]
    elif kind == "run":
        out = to / ("out.gguf" if is_gguf else "out")
        arguments = ["run", model, "-o", out, *SHORT, *FORCED, "--max-leak", "1"]
    elif kind == "eval":
        runtime = ["--runtime", "mlx-lm"] if is_gguf else []
        arguments = ["eval", model, *SHORT, *runtime]
    elif kind == "llama":
        arguments = ["eval", model, *SHORT, "--runtime", "llama.cpp"]
    elif kind == "show":
        arguments = ["show", model, "Hi", "--direction", vector]
    elif kind == "diff":
        arguments = ["diff", *rng.sample([model, base / "model.gguf"], 2)]
    else:
        arguments = ["audit", model]
    if rng.random() < 0.3:
        arguments.append("--json")
    return Case(tuple(map(str, arguments)), size_of(model), (out,) if out is not None else ())


def gguf(base: Path, to: Path, rng: Random) -> Case:
    """A GGUF with a mutated header, metadata, tensor entries or data."""
    source = base / rng.choice(["model.gguf", "model.gguf", "quantized.gguf", "moe.gguf"])
    model = to / "model.gguf"
    model.write_bytes(gguf_mutations.mutate(rng, source.read_bytes()))
    kinds = "inspect inspect inspect apply apply convert convert measure eval show diff audit"
    return command(rng, base, model, to, kinds if rng.random() < 0.9 else "llama")


def safetensors(base: Path, to: Path, rng: Random) -> Case:
    """The weights of a folder."""
    model = linked(base / rng.choice([*ARCHITECTURES, "quantized", "sharded"]), to / "model")
    path = rng.choice(sorted(model.glob("*.safetensors")))
    put(path, safetensors_mutations.mutate(rng, path.read_bytes()))
    return command(rng, base, model, to, "inspect inspect apply apply convert eval audit")


def _json(
    name: str, folders: tuple[str, ...], kinds: str, base: Path, to: Path, rng: Random
) -> Case:
    model = linked(base / rng.choice(folders), to / "model")
    put(model / name, mutations.json_bytes(rng, (model / name).read_bytes()))
    return command(rng, base, model, to, kinds)


def config(base: Path, to: Path, rng: Random) -> Case:
    """config.json."""
    folders = (*ARCHITECTURES, "quantized")
    return _json("config.json", folders, "inspect inspect apply convert eval audit", base, to, rng)


def tokenizer(base: Path, to: Path, rng: Random) -> Case:
    """tokenizer.json."""
    return _json(
        "tokenizer.json", ("llama", "gemma2"), "convert convert eval inspect", base, to, rng
    )


def tokenizer_config(base: Path, to: Path, rng: Random) -> Case:
    """A mutated tokenizer_config.json, or sometimes generation_config.json."""
    name = rng.choice(["tokenizer_config.json"] * 3 + ["generation_config.json"])
    return _json(name, ("llama", "gemma2"), "convert convert eval inspect", base, to, rng)


def index(base: Path, to: Path, rng: Random) -> Case:
    """The index of shards."""
    name = "model.safetensors.index.json"
    return _json(name, ("sharded",), "inspect apply convert eval audit", base, to, rng)


def template(base: Path, to: Path, rng: Random) -> Case:
    """chat_template.jinja."""
    model = linked(base / "llama", to / "model")
    path = model / "chat_template.jinja"
    sound = path.read_text()
    hostile = rng.choice(templates.HOSTILE)
    what = rng.random()
    if what < 0.05:
        data = mutations.bytes_of(rng, sound.encode())
    elif what < 0.25:  # many of these templates run until their limit of two seconds
        data = hostile.encode("utf-8", "surrogatepass")
    else:
        mixed = rng.choice([sound, sound, sound, sound, sound + hostile, hostile + sound])
        for _ in range(rng.choice([1, 2, 4])):
            mixed = mutations.text(rng, mixed)
        data = mixed.encode("utf-8", "surrogatepass")
    put(path, data)
    return command(rng, base, model, to, "inspect eval show convert apply measure")
