"""The sound inputs that are mutated: tiny models and every file that belongs to one."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np

from tests.support import tiny
from tests.support.command import abl_mlx
from tests.support.ollama_tools import Store

#: Architectures that are written as folders; all other files belong to the first.
ARCHITECTURES = ("llama", "gemma2", "qwen3_moe")

#: Flags that shorten a command that asks a model.
SHORT = ("--limit", "1", "--max-tokens", "1")

#: Flags with which a command accepts a model whose replies make no sense.
FORCED = ("--anyway", "--max-kl", "1000")

_PROMPTS = [f"Write down the number {n}, and why." for n in range(40)]


def build(root: Path) -> None:
    """Write all sound inputs into ``root``; files that the tool can write, it writes."""
    for number, architecture in enumerate(ARCHITECTURES):
        folder = root / architecture
        tiny.write_model(folder, architecture)
        tiny.write_tokenizer(folder, "bpe" if number != 1 else "spm")
    model = root / "llama"
    _shard(model, root / "sharded")
    abl_mlx("convert", model, root / "model.gguf")
    abl_mlx("convert", root / "qwen3_moe", root / "moe.gguf")
    abl_mlx("convert", model, root / "quantized.gguf", "--quantize", "Q8_0")
    _quantize(model, root / "quantized")
    _directions(root)
    vector = root / "vector.npy"
    abl_mlx("apply", vector, model, "-o", root / "edited", "--keep-undo")
    abl_mlx("apply", vector, root / "model.gguf", "-o", root / "edited.gguf", "--keep-undo",
            "--max-leak", "1")  # fmt: skip
    abl_mlx("apply", vector, model, "-o", root / "adapter.adapter")
    abl_mlx("apply", vector, root / "model.gguf", "-o", root / "adapter.lora.gguf",
            "--max-leak", "1")  # fmt: skip
    _prompts(root / "prompts")
    record = abl_mlx("eval", model, *SHORT, "--resume", root / "journal.jsonl")
    (root / "record.json").write_text(json.dumps(record))
    (root / "journal.jsonl").rename(root / "journal.kept")
    abl_mlx("run", model, "-o", root / "searched", "--limit", "4", "--max-tokens", "1", *FORCED,
            "--search", "2", "--search-journal", root / "search.journal")  # fmt: skip
    store = Store(root / "ollama")
    store.add(
        "registry.ollama.ai/library/tiny/latest",
        model=(root / "model.gguf").read_bytes(),
        template="{{ .System }} {{ .Prompt }}",
        params={"stop": ["<end>"], "temperature": 0.5},
        system="Be brief.",
        license="Apache-2.0",
        messages=[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
    )


def digest(root: Path) -> str:
    """A hash of the inputs, which shows whether a command changed its source."""
    whole = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        whole.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()


def _shard(model: Path, to: Path) -> None:
    import mlx.core as mx

    shutil.copytree(model, to)
    (to / "model.safetensors").unlink()
    weights = dict(mx.load(str(model / "model.safetensors")))
    names = sorted(weights)
    places = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        mx.save_safetensors(
            str(to / file), {name: weights[name] for name in part}, {"format": "mlx"}
        )
        places |= dict.fromkeys(part, file)
    size = sum(value.nbytes for value in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (to / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _quantize(model: Path, to: Path) -> None:
    from mlx_lm.utils import load_model, quantize_model, save_model

    shutil.copytree(model, to)
    loaded, config = load_model(to)
    loaded, config = quantize_model(loaded, config, 32, 4)
    save_model(to, loaded)
    (to / "config.json").write_text(json.dumps(config, indent=1))


def _directions(root: Path) -> None:
    random = np.random.default_rng(0)
    vector = random.standard_normal(64).astype(np.float32)
    np.save(root / "vector.npy", vector)
    np.savez(root / "vectors.npz", a=vector, b=vector[::-1])
    np.savez_compressed(root / "packed.npz", a=vector)
    abl_mlx("measure", root / "llama", "-o", root / "direction.safetensors", "--limit", "2",
            *FORCED)  # fmt: skip
    _control_vector(root / "control.gguf", random)


def _control_vector(path: Path, random: np.random.Generator) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", 2)
    for layer in (1, 2):
        writer.add_tensor(f"direction.{layer}", random.standard_normal(64).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _prompts(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    rows = [{"prompt": text, "category": "numbers", "answer": "7"} for text in _PROMPTS]
    (folder / "prompts.txt").write_text("\n".join(_PROMPTS) + "\n")
    others = [text.replace("Write down", "Forget") for text in _PROMPTS]
    (folder.parent / "others.txt").write_text("\n".join(others) + "\n")
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    with (folder / "prompts.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "prompts.parquet")


if __name__ == "__main__":
    build(Path(sys.argv[1]))
