"""llama.cpp's own quantizer, `llama_model_quantize`, called in a shared library of llama.cpp.

xllamacpp's library does not have it. Others do, for instance that in the npm package
@node-llama-cpp/linux-x64 (mac-arm64-metal); `ENVIRONMENT` names it. Run this module to write anew
what it chose for `CASES`, which tests/convert/test_mix.py compares with ours::

    ABL_MLX_LIBLLAMA=package/bins/linux-x64/libllama.so python -m tests.support.llama_quantize
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from convert.gguf.file import tensor_types
from convert.gguf.file_types import FILE_TYPES

ENVIRONMENT = "ABL_MLX_LIBLLAMA"
CHOICES = Path(__file__).with_name("llama_mixes.json")


class _Params(ctypes.Structure):
    _fields_ = [
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("output_tensor_type", ctypes.c_int),
        ("token_embedding_type", ctypes.c_int),
        ("allow_requantize", ctypes.c_bool),
        ("quantize_output_tensor", ctypes.c_bool),
        ("only_copy", ctypes.c_bool),
        ("pure", ctypes.c_bool),
        ("keep_split", ctypes.c_bool),
        ("dry_run", ctypes.c_bool),
        ("imatrix", ctypes.c_void_p),
        ("kv_overrides", ctypes.c_void_p),
        ("tt_overrides", ctypes.c_void_p),
        ("prune_layers", ctypes.c_void_p),
        ("max_buf_size", ctypes.c_size_t),
    ]


class _Importance(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("data", ctypes.POINTER(ctypes.c_float)),
        ("size", ctypes.c_size_t),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library that `ENVIRONMENT` names; None if it names none."""
    path = os.environ.get(ENVIRONMENT)
    if not path:
        return None
    llama = ctypes.CDLL(path)
    llama.llama_model_quantize_default_params.restype = _Params
    llama.llama_model_quantize.argtypes = [
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.POINTER(_Params),
    ]
    llama.llama_model_quantize.restype = ctypes.c_uint32
    # It logs a line for every tensor; this discards them.
    quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    llama.quiet = quiet  # type: ignore[attr-defined]
    llama.llama_log_set(quiet, None)
    return llama


def quantize(
    source: Path,
    out: Path,
    file_type: str,
    importance: Mapping[str, np.ndarray] | None = None,
) -> bool:
    """Quantize a GGUF of floats with llama.cpp; False if it refuses.

    Args:
        source: the GGUF.
        out: the GGUF to write.
        file_type: a key of `FILE_TYPES`.
        importance: tensor name -> float32 weights of its input columns, for every expert.
    """
    llama = library()
    assert llama is not None
    params = llama.llama_model_quantize_default_params()
    assert (params.ftype, params.quantize_output_tensor) == (7, True), "other parameters"
    params.nthread, params.ftype = 1, int(FILE_TYPES[file_type][0])
    if importance is not None:
        arrays = {name: np.ascontiguousarray(one, np.float32) for name, one in importance.items()}
        entries = (_Importance * (len(arrays) + 1))()
        for entry, (name, array) in zip(entries, arrays.items(), strict=False):
            entry.name, entry.size = name.encode(), array.size
            entry.data = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = ctypes.cast(entries, ctypes.c_void_p)
    failed = llama.llama_model_quantize(str(source).encode(), str(out).encode(), params)
    return not failed


# --- models ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model with every tensor cut to few rows, which is all that the choice of types needs.

    Attributes:
        architecture: general.architecture.
        layers, heads, shared, experts: as in `convert.gguf.mix.Facts`; ``shared`` are KV heads.
        block: a tensor's name in a block -> its width.
        width: of the embedding and the output.
        tied: whether there is no output.weight.
        keys: further metadata, without the architecture's prefix.
    """

    architecture: str
    layers: int
    heads: int
    shared: int
    block: Mapping[str, int]
    width: int = 256
    experts: int = 0
    tied: bool = False
    keys: Mapping[str, Any] = field(default_factory=dict)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape in NumPy's order."""
        found: dict[str, tuple[int, ...]] = {"token_embd.weight": (2, self.width)}
        if not self.tied:
            found["output.weight"] = (2, self.width)
        for layer in range(self.layers):
            for name, width in self.block.items():
                small = "norm" in name or name.endswith(".bias")
                stacked = (self.experts,) if "_exps" in name else ()
                shape = (width,) if small else (*stacked, 2, width)
                found[f"blk.{layer}.{name}"] = shape
        return found

    def metadata(self) -> dict[str, Any]:
        """The metadata under full names, without the architecture."""
        keys = {
            "context_length": 64,
            "embedding_length": self.width,
            "block_count": self.layers,
            "feed_forward_length": 256,
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.shared,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "attention.layer_norm_epsilon": 1e-5,
            "attention.key_length": 64,
            "attention.value_length": 64,
            "rope.dimension_count": 64,
            "vocab_size": 2,
            **({"expert_count": self.experts, "expert_used_count": 1} if self.experts else {}),
            **self.keys,
        }
        return {f"{self.architecture}.{key}": value for key, value in keys.items()}

    def write(self, path: Path, seed: int = 0) -> Path:
        """Write the model in F32."""
        writer = gguf.GGUFWriter(path, self.architecture)
        for key, value in self.metadata().items():
            if isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, list):
                writer.add_array(key, value)
            else:
                writer.add_uint32(key, value)
        random = np.random.default_rng(seed)
        for name, shape in self.shapes().items():
            writer.add_tensor(name, random.standard_normal(shape, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def importance(self, seed: int = 1) -> dict[str, np.ndarray]:
        """Random importance of every tensor's input columns, for each expert."""
        random = np.random.default_rng(seed)
        return {
            name: np.exp(random.standard_normal((*shape[:-2], shape[-1]))).astype(np.float32)
            for name, shape in self.shapes().items()
            if len(shape) > 1
        }


def _dense(width: int = 256, inner: int = 256, **more: int) -> dict[str, int]:
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up")
    block = {"attn_norm.weight": width, **{f"{name}.weight": width for name in names}}
    return {**block, "ffn_down.weight": inner, **more}


def _fused(width: int = 256) -> dict[str, int]:
    names = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
    return {f"{name}.weight": width for name in names}


_ATTENTION = {f"attn_{name}.weight": 256 for name in ("norm", "q", "k", "v", "output")}
_EXPERTS = {
    "ffn_gate_inp.weight": 256,
    **{f"ffn_{name}_exps.weight": 256 for name in ("gate", "up", "down")},
}
_LATENT = {
    **{f"attn_{name}.weight": 256 for name in ("q", "kv_a_mqa", "kv_b", "k_b", "v_b", "output")},
    **_EXPERTS,
    **{f"ffn_{name}_shexp.weight": 256 for name in ("gate", "up", "down")},
}
_DELTA = {
    **{f"{name}.weight": 256 for name in ("attn_qkv", "attn_gate", "ssm_out", "ssm_conv1d")},
    **{f"ffn_{name}.weight": 256 for name in ("gate", "up", "down")},
}

CASES: dict[str, Case] = {
    "llama, 32 layers, grouped": Case("llama", 32, 32, 8, _dense()),
    "llama, 16 layers, tied": Case("llama", 16, 8, 8, _dense(), tied=True),
    "llama, 3 layers, 2 groups": Case("llama", 3, 4, 2, _dense()),
    "llama, 80 layers, grouped": Case("llama", 80, 64, 8, _dense()),
    "llama, 80 layers": Case("llama", 80, 64, 64, _dense()),
    "llama, 8 experts": Case("llama", 32, 32, 8, {**_ATTENTION, **_EXPERTS}, experts=8),
    "llama, 4 experts": Case("llama", 9, 4, 4, {**_ATTENTION, **_EXPERTS}, experts=4),
    "qwen2, width 896": Case("qwen2", 24, 14, 2, _dense(896, 4864), width=896, tied=True),
    "qwen2, 80 layers": Case("qwen2", 80, 8, 8, _dense()),
    "qwen3moe": Case("qwen3moe", 48, 32, 4, {**_ATTENTION, **_EXPERTS}, experts=16),
    "gemma3": Case("gemma3", 26, 4, 1, _dense(1152, 6912), width=1152, tied=True),
    "width 48": Case("llama", 8, 4, 2, _dense(48, 96), width=48),
    "width 40": Case("llama", 8, 4, 2, _dense(40, 40), width=40),
    "phi3": Case("phi3", 32, 32, 8, _fused()),
    "falcon": Case("falcon", 32, 71, 1, _fused()),
    "deepseek2": Case(
        "deepseek2", 27, 16, 16, _LATENT, experts=6,
        keys={"attention.kv_lora_rank": 64, "leading_dense_block_count": 1,
              "expert_feed_forward_length": 256, "expert_shared_count": 1},
    ),
    "qwen35, ssm": Case(
        "qwen35", 24, 8, 2, _DELTA, tied=True,
        keys={"ssm.conv_kernel": 4, "ssm.inner_size": 256, "ssm.state_size": 64,
              "ssm.time_step_rank": 4, "ssm.group_count": 4,
              "rope.dimension_sections": [16, 16, 0, 0]},
    ),
}  # fmt: skip


def chosen(case: Case, file_type: str, *, importance: bool, folder: Path) -> dict[str, str] | None:
    """The types that llama.cpp chooses; None if it refuses."""
    source = folder / "source.gguf"
    if not source.exists():
        case.write(source)
    out = folder / "out.gguf"
    out.unlink(missing_ok=True)
    if not quantize(source, out, file_type, case.importance() if importance else None):
        return None
    return {name: kind.name for name, kind in tensor_types(out).items()}


def grouped(types: Mapping[str, str]) -> dict[str, str]:
    """The types that a tensor has in all blocks, one after the other -> the names of such tensors.

    For instance {"2*Q6_K 4*Q4_K": "attn_v ffn_down", "1*Q6_K": "output"}. Norms are left out.
    """
    rows: dict[str, list[str]] = {}
    for name, kind in types.items():
        if "norm" in name:
            assert kind == "F32", name
            continue
        rows.setdefault(re.sub(r"^blk\.\d+\.", "", name).removesuffix(".weight"), []).append(kind)
    groups: dict[str, list[str]] = {}
    for role, kinds in sorted(rows.items()):
        groups.setdefault(_counted(kinds), []).append(role)
    return {kinds: " ".join(roles) for kinds, roles in groups.items()}


def _counted(kinds: list[str]) -> str:
    runs: list[tuple[str, int]] = []
    for kind in kinds:
        if runs and runs[-1][0] == kind:
            runs[-1] = (kind, runs[-1][1] + 1)
        else:
            runs.append((kind, 1))
    return " ".join(f"{count}*{kind}" for kind, count in runs)


def main() -> None:
    """Write `CHOICES` anew."""
    if library() is None:
        sys.exit(f"{ENVIRONMENT} names no library of llama.cpp that has llama_model_quantize.")
    found: dict[str, Any] = {}
    for title, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            for file_type in FILE_TYPES:
                for importance in (False, True):
                    types = chosen(case, file_type, importance=importance, folder=Path(folder))
                    key = f"{file_type}, imatrix" if importance else file_type
                    found.setdefault(title, {})[key] = types and grouped(types)
    lines = [
        json.dumps(title) + ": {\n" + ",\n".join(_lines(choices)) + "\n}"
        for title, choices in found.items()
    ]
    CHOICES.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _lines(choices: Mapping[str, Any]) -> list[str]:
    """A line of JSON for each choice; those with an importance matrix only where they differ."""
    return [
        f"{json.dumps(key)}: {json.dumps(value)}"
        for key, value in choices.items()
        if "," not in key or value != choices[key.split(",")[0]]
    ]


if __name__ == "__main__":
    main()
