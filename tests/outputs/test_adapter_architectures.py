"""Which writers llama.cpp applies an adapter to, architecture by architecture, proved in llama.cpp.

As in `tests.support.writer_proofs`, whose random models these are: every writer is
orthogonalized but for one, which gets an adapter of the same effect instead. Where the direction is
gone from the final hidden state, llama.cpp has applied it. Run as a script, this file is the
program that does it, because a failed assertion in llama.cpp ends the process.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert import adapters
from convert.architectures.gguf_writers import GgufWriter, find
from convert.architectures.table import STREAMS as ARCHITECTURES
from convert.base.errors import UserError
from tests.support import writer_proofs as writers
from tests.support.places import ROOT

_pointer = ctypes.c_void_p
_SIGNATURES = {
    "llama_adapter_lora_init": (_pointer, _pointer, ctypes.c_char_p),
    "llama_set_adapters_lora": (ctypes.c_int32, _pointer, _pointer, ctypes.c_size_t, _pointer),
}


def change(source: dict[str, np.ndarray], writer: GgufWriter) -> adapters.LowRank:
    """The adapter of a writer whose effect is that of `writers.edited` on its weight."""
    along = writers.direction(source["token_embd.weight"].shape[1])
    for gain in writer.gains:
        along = along * source[gain]
    along /= np.linalg.norm(along)
    values = source[writer.name].astype(np.float64)
    if writer.kind == "embedding":
        left, right = (values @ along)[:, None], -along[None]
    else:
        right = (along @ values)[..., None, :]
        left = np.broadcast_to(-along[:, None], (*values.shape[:-1], 1))
    return adapters.LowRank(writer.kind, left.astype(np.float32), right.astype(np.float32))


def prove(llama: ctypes.CDLL, architecture: str, keys: dict[str, object]) -> dict[str, Any]:
    """The component that is left with each writer edited by an adapter, all others in weights."""
    model = writers.Random(llama, architecture, keys)
    # llama.cpp's own scales of a weight, which NVFP4 files have; no adapter is written for those.
    for name, values in list(model.values.items()):
        if name.endswith(".scale"):
            model.set(name, np.ones_like(values))
    source = dict(model.values)
    before = model.component()
    found = find(architecture, writers.shapes_of(source), keys)
    for writer in found:
        for name, values in writers.edited(source, writer).items():
            model.set(name, values)
    loaded = {}
    with tempfile.TemporaryDirectory() as folder:
        for index, writer in enumerate(found):
            if writer.tied or writer.name == "position_embd.weight":
                continue
            path = Path(folder) / f"{index}.gguf"
            one = adapters.Adapter(1.0, {writer.name: change(source, writer)})
            adapters.write_gguf(path, architecture, one)
            loaded[writer] = llama.llama_adapter_lora_init(model._model, str(path).encode())
            if not loaded[writer]:
                raise RuntimeError(f"llama.cpp does not load an adapter of {writer.name}")
    # The context's graph is made large enough for the adapters that are there when it is made.
    llama.llama_free(model._context)
    model._context = llama.llama_init_from_model(model._model, llama.llama_context_default_params())
    llama.llama_set_n_threads(model._context, 1, 1)
    llama.llama_set_embeddings(model._context, not model._own_head)
    left, one = {}, (ctypes.c_float * 1)(1.0)
    for writer, adapter in loaded.items():
        model.set(writer.name, source[writer.name])
        array = (_pointer * 1)(adapter)
        without = model.component()
        llama.llama_set_adapters_lora(model._context, array, 1, one)
        left[writer.name] = (without, model.component())
        llama.llama_set_adapters_lora(model._context, None, 0, None)
        model.set(writer.name, writers.edited(source, writer)[writer.name])
    model.close()
    return {"before": before, "left": left}


def main(variants: list[str]) -> None:
    import xllamacpp

    llama = ctypes.CDLL(importlib.util.find_spec("xllamacpp.xllamacpp").origin)
    assert xllamacpp
    for name, (result, *arguments) in (writers.SIGNATURES | _SIGNATURES).items():
        function = getattr(llama, name)
        function.restype, function.argtypes = result, arguments
    silence = writers.Log(lambda *_: None)
    llama.llama_log_set(silence, None)
    for variant in variants:
        print(json.dumps({"variant": variant}), flush=True)
        try:
            architecture, experts, more = writers.VARIANTS[variant]
            result = prove(llama, architecture, writers.metadata(architecture, experts, more))
        except (RuntimeError, UserError) as error:
            result = {"error": str(error)}
        print(json.dumps({"variant": variant, **result}), flush=True)


def run(left: list[str]) -> dict[str, dict[str, Any]]:
    """What `main` prints for every variant; "error" where llama.cpp gave up."""
    results: dict[str, dict[str, Any]] = {}
    while left:
        done = subprocess.run(
            [sys.executable, "-m", "tests.outputs.test_adapter_architectures", *left],
            cwd=ROOT,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        started = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if not started:
            raise RuntimeError(done.stderr)
        for line in started:
            results[line["variant"]] = line if len(line) > 1 else {"error": done.stderr[-500:]}
        left = left[len({line["variant"] for line in started}) :]
    return results


@pytest.fixture(scope="module")
def proofs() -> dict[str, dict[str, Any]]:
    pytest.importorskip("xllamacpp")
    return run(
        [name for name, (arch, *_) in writers.VARIANTS.items() if ARCHITECTURES[arch].proved]
    )


@pytest.mark.parametrize("variant", writers.VARIANTS)
def test_llama_cpp_applies_adapters_to_every_writer_but_those_listed(
    variant: str, proofs: dict[str, dict[str, Any]]
) -> None:
    architecture, *_ = writers.VARIANTS[variant]
    if not ARCHITECTURES[architecture].proved:
        pytest.skip("listed in the table of writers as not proved")
    proof = proofs[variant]
    assert "error" not in proof, proof["error"]
    listed = adapters.ignored(architecture, proof["left"])
    for name, (_, left) in proof["left"].items():
        assert name in listed or left < 1e-5, name
    # A made model has ffn_down and ffn_down_exps in one block, and runs one of them.
    without_effect = {
        name.split(".")[2]
        for name, (without, left) in proof["left"].items()
        if without == left > 1e-5
    }
    assert without_effect == ARCHITECTURES[architecture].past_adapters


def test_llama_cpp_ends_at_an_adapter_of_a_tied_embedding(tmp_path: Path) -> None:
    """Why none is written: the head would multiply with factors that lie the other way round."""
    pytest.importorskip("xllamacpp")
    from abl_mlx.demo import MODEL_PATH
    from convert.mlx_to_gguf import write_gguf

    write_gguf(MODEL_PATH, tmp_path / "demo.gguf", file_type="F16")
    one = adapters.LowRank("embedding", np.ones((705, 1), "f4"), np.ones((1, 256), "f4"))
    lora = tmp_path / "demo.lora.gguf"
    adapters.write_gguf(lora, "llama", adapters.Adapter(1.0, {"token_embd.weight": one}))
    program = (
        "import sys, xllamacpp as x; p = x.CommonParams(); p.model.path = sys.argv[1]; "
        "p.warmup = False; p.n_ctx = 256; "
        "p.lora_adapters = [x.CommonAdapterLoraInfo(sys.argv[2], 1.0)]; x.Server(p)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "demo.gguf"), str(lora)],
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert "ggml_can_mul_mat" in done.stderr


if __name__ == "__main__":
    main(sys.argv[1:])
