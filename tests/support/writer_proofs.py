"""Proves in llama.cpp itself which tensors of a GGUF write to the residual stream.

    python -m tests.support.writer_proofs VARIANT ...

llama.cpp makes a model of an architecture from metadata alone, with every tensor its loader can
use, and hands each to this program to fill with random values. The writers that `find` names are
edited along a random direction, and one row of the output head is that direction: its logit must
vanish, whatever the prompt. A line of JSON is printed before each variant and one after it, because
a failed assertion in llama.cpp ends the process.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import re
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

from convert.architectures.gguf_writers import GgufWriter, find
from convert.architectures.table import STREAMS as ARCHITECTURES
from convert.base.errors import UserError

# --------------------------------------------------------------------------------------------------
# Models of every architecture: metadata, under which llama.cpp's loaders and graphs run. Sizes are
# as small as the hard-coded ones among them allow.


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


WITH_EXPERTS = words(
    "llama4 cohere2moe grok qwen2moe qwen3moe qwen3next qwen3vlmoe qwen35moe phimoe dbrx olmoe "
    "arctic deepseek deepseek2 deepseek32 dots3note glm4moe glm-dsa exaone-moe bailingmoe "
    "bailingmoe2 bailingmoe3 dots1 afmoe ernie4_5-moe hunyuan-moe hy_v3 hy_v4 gpt-oss lfm2moe "
    "smallthinker llada-moe grovemoe minimax-m2 minimax-m3 rnd1 mimo2 kimi-linear step35 mistral4 "
    "mellum laguna maple nemotron_h_moe deepseek2-ocr deepseek4 glm5-next kimi-k3"
)
WITH_AND_WITHOUT = {"llama", "minicpm", "granite", "granitemoe", "granitehybrid", "jamba", "gemma4"}
LATENT_ATTENTION = words(
    "deepseek2 deepseek32 glm-dsa dots3note kimi-linear bailingmoe3 mistral4 hy_v4 "
    "glm5-next kimi-k3"
)
SOME_LAYERS_RECURRENT = words(
    "plamo2 jamba nemotron_h nemotron_h_moe granitehybrid lfm2 lfm2moe kimi-linear bailingmoe3 "
    "glm5-next kimi-k3"
)
PATTERN_PER_LAYER = words(
    "cohere2moe mimo2 step35 spark2_5 muse-glimmer granite_swa dots3note maple"
)
FINAL_NORM = {"lfm2": "token_embd_norm", "lfm2moe": "token_embd_norm"}

VARIANTS: dict[str, tuple[str, bool, dict[str, object]]] = {
    **{name: (name, name in WITH_EXPERTS, {}) for name in ARCHITECTURES},
    **{f"{name} with experts": (name, True, {}) for name in sorted(WITH_AND_WITHOUT)},
    "gemma4 without per-layer inputs": ("gemma4", True, {"embedding_length_per_layer_input": 0}),
    "gptneox in parallel": ("gptneox", False, {"use_parallel_residual": True}),
}
"""What is proved -> architecture, experts or not, metadata beyond the usual."""

FILES: dict[str, tuple[str, bool, Callable[[str], str | None]]] = {
    "llama, tied and without biases": (
        "llama",
        False,
        lambda name: None if re.search(r"^output\.weight|\.bias$|scale$", name) else name,
    ),
    "gemma3, tied": ("gemma3", False, lambda name: None if name == "output.weight" else name),
    "nemotron_h_moe without latents": (
        "nemotron_h_moe",
        True,
        lambda name: None if "latent" in name else name,
    ),
    "grok under its other name": (
        "grok",
        True,
        lambda name: name.replace("layer_output_norm", "post_ffw_norm"),
    ),
}
"""As VARIANTS, but from a real file, whose tensors are renamed or, with None, left out."""


def metadata(architecture: str, experts: bool, more: dict[str, object]) -> dict[str, object]:
    """Keys and values of a GGUF file of a few layers, 64 tokens and mostly 64 dimensions."""
    layers = {"llama4": 4, "gemma4": 5, "nemotron_h": 3, "nemotron_h_moe": 3, "deepseek4": 4}
    layers = layers.get(architecture, 2)
    heads = 1 if architecture in LATENT_ATTENTION else 2
    # DeepSeek 4's sizes are fixed in the graph.
    width = 512 if architecture == "deepseek4" else 64
    heads = {"qwen3": 4, "muse-glimmer": 4, "afmoe": 4, "deepseek4": 8}.get(architecture, heads)
    kv_heads = {"qwen3": 1, "deepseek4": 1, "muse-glimmer": 2, "afmoe": 2}.get(architecture, heads)
    head, wide = width // heads, 96
    odd = [layer % 2 for layer in range(layers)]
    even = [1 - one for one in odd]
    keys: dict[str, object] = {
        "vocab_size": 64,
        "context_length": 64,
        "embedding_length": width,
        "block_count": layers,
        "leading_dense_block_count": 1,
        "feed_forward_length": wide,
        "use_parallel_residual": False,
        "logit_scale": 1.0,
        "residual_scale": 3.5,
        "full_attention_interval": 2,
        "rope.dimension_sections": [head // 4] * 4,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.max_alibi_bias": 8.0,
        "attention.clamp_kqv": 1.0,
        "attention.layer_norm_epsilon": 1e-5,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.q_lora_rank": 512,
        "attention.kv_lora_rank": 512,
        "attention.sliding_window": 32,
        "attention.sliding_window_pattern": odd if architecture in PATTERN_PER_LAYER else 2,
        "attention.indexer.head_count": heads if architecture == "minimax-m3" else 64,
        "attention.indexer.key_length": 128,
        "attention.indexer.top_k": 131072,
        "attention.indexer.block_size": 4,
        "attention.indexer.local_blocks": 1,
        "ssm.inner_size": 256 if architecture in ("qwen3next", "qwen35", "qwen35moe") else 128,
        "ssm.conv_kernel": 4,
        "ssm.state_size": 128,
        "ssm.time_step_rank": heads,
        "ssm.group_count": 0 if architecture == "plamo2" else 2,
        "kda.head_dim": 128,
        "kda.gate_lower_bound": -5.0,
        "shortconv.l_cache": 3,
    }
    if experts:
        keys |= {
            "expert_feed_forward_length": wide,
            "expert_shared_feed_forward_length": wide // 2,
            "expert_latent_length": wide,
            "interleave_moe_layer_step": 2,
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_shared_count": 1,
            "expert_gating_func": 2,
            "expert_group_scale": 1.0,
            "experts_per_group": 1,
        }
    if architecture in SOME_LAYERS_RECURRENT:
        per_layer = [0 if layer == 1 else heads for layer in range(layers)]
        keys |= {"attention.head_count": per_layer, "attention.head_count_kv": per_layer}
    if architecture in LATENT_ATTENTION:
        keys |= {
            "attention.key_length": 576,
            "attention.value_length": 512,
            "attention.key_length_mla": 192,
            "attention.value_length_mla": 128,
            "rope.dimension_count": 64,
        }
    if architecture.startswith("nemotron_h"):
        keys["feed_forward_length"] = [0, 0, wide]
    keys |= {
        "gemma4": {
            "embedding_length_per_layer_input": 32,
            "attention.shared_kv_layers": 0,
            "attention.key_length_swa": head,
            "attention.value_length_swa": head,
            "rope.freq_base_swa": 10000.0,
            "attention.sliding_window_pattern": [True, True, True, True, False],
        },
        "dots3note": {
            "attention.kv_lora_rank_swa": 512,
            "attention.key_length_swa": 576,
            "attention.value_length_swa": 512,
            "attention.key_length_mla_swa": 192,
            "attention.value_length_mla_swa": 128,
            "rope.freq_base_swa": 10000.0,
            "attention.indexer.types": even,
        },
        "deepseek4": {
            "attention.key_length": head,
            "attention.value_length": head,
            "rope.dimension_count": head // 2,
            "attention.q_lora_rank": 64,
            "attention.output_group_count": 8,
            "attention.output_lora_rank": 32,
            "attention.compress_ratios": [0, 0, 4, 128],
            "attention.compress_rope_freq_base": 160000.0,
            "hash_layer_count": 0,
            "hyper_connection.count": 4,
            "hyper_connection.sinkhorn_iterations": 2,
            "hyper_connection.epsilon": 1e-6,
            "swiglu_clamp_exp": 10.0,
            "expert_gating_func": 4,
            "expert_weights_scale": 1.0,
            "expert_weights_norm": True,
        },
        "glm5-next": {
            "attention.head_count": heads,
            "attention.key_length": 512,
            "rope.dimension_count": 0,
            "attention.compress_ratios": [4, 4],
            "attention.indexer.kpool": 4,
            "attention.indexer.kpool_select_tail": True,
            "hyper_connection.count": 4,
            "hyper_connection.sinkhorn_iterations": 2,
            "hyper_connection.epsilon": 1e-6,
        },
        "kimi-k3": {
            "attn_res.block_size": 2,
            "activation.situ_beta": 4.0,
            "activation.situ_linear_beta": 25.0,
        },
        "hy_v4": {
            "hyper_connection.count": 4,
            "hyper_connection.epsilon": 1e-6,
            "hyper_connection.magnitude": 2.0,
            "swiglu_clamp_exp": 10.0,
            "expert_weights_scale": 1.0,
            "expert_weights_norm": True,
            "attention.indexer.types": even,
        },
        "bailingmoe3": {
            "rope.dimension_sections": [8, 12, 12, 0],
            "swiglu_clamp_exp": [0.0, 4.0],
            "swiglu_clamp_shexp": [0.0, 5.0],
        },
        "minimax-m3": {"rope.dimension_count": 32},
        "maple": {"swiglu_clamp_exp": 7.0},
    }.get(architecture, {})
    keys |= more
    return {
        **{f"{architecture}.{key}": value for key, value in keys.items()},
        **{f"xielu.{key}": 1.0 for key in ("alpha_n", "alpha_p", "beta")},
        "xielu.eps": 1e-7,
        "tokenizer.ggml.model": "test",
        "tokenizer.ggml.tokens": [f"token {index}" for index in range(64)],
        "tokenizer.ggml.scores": [0.0] * 64,
    }


def write_file(
    path: Path, architecture: str, keys: dict[str, object], tensors: dict[str, np.ndarray]
) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
        kind = gguf.GGUFValueType[kinds[type(value)]]
        inner = gguf.GGUFValueType[kinds[type(value[0])]] if isinstance(value, list) else None
        writer.add_key_value(key, value, kind, sub_type=inner)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# The direction that is removed. A final LayerNorm takes the mean away.
def direction(width: int) -> np.ndarray:
    noise = np.random.default_rng(5).standard_normal(width)
    noise -= noise.mean()
    return noise / np.linalg.norm(noise)


def random_values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if "ssm_a" in name:
        return -np.abs(noise)  # a decay
    if name.endswith("scale") or "output_scale" in name:
        return 1 + 0.1 * np.abs(noise)
    if len(shape) == 1:
        return 0.3 * noise if name.endswith("bias") else 1 + 0.3 * noise
    if name == "output.weight":
        noise[0] = direction(shape[1]) * np.sqrt(shape[1]) / 1.2
    return noise if "embd" in name else 1.2 / np.sqrt(shape[-1]) * noise


# --------------------------------------------------------------------------------------------------
# llama.cpp's C interface, in xllamacpp's shared object


class _Parameters(ctypes.Structure):
    """A structure passed by value, larger than any of llama.cpp's; its fields stay as they are."""

    _fields_ = [("bytes", ctypes.c_uint64 * 64)]


class _ModelParameters(ctypes.Structure):
    """struct llama_model_params up to what keeps the model off a GPU, where sums are rounded."""

    _fields_ = [
        ("devices", ctypes.c_void_p),
        ("buffers", ctypes.c_void_p),
        ("gpu_layers", ctypes.c_int32),
        ("bytes", ctypes.c_uint64 * 64),
    ]


class _ReadParameters(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p)]


_Fill = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_pointer, _int, _floats = ctypes.c_void_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_float)
SIGNATURES = {
    "llama_log_set": (None, Log, _pointer),
    "gguf_init_from_file": (_pointer, ctypes.c_char_p, _ReadParameters),
    "llama_model_default_params": (_ModelParameters,),
    "llama_context_default_params": (_Parameters,),
    "llama_model_init_from_user": (_pointer, _pointer, _Fill, _pointer, _ModelParameters),
    "llama_model_load_from_file": (_pointer, ctypes.c_char_p, _ModelParameters),
    "llama_init_from_model": (_pointer, _pointer, _Parameters),
    "llama_free": (None, _pointer),
    "llama_model_free": (None, _pointer),
    "llama_set_n_threads": (None, _pointer, _int, _int),
    "llama_set_embeddings": (None, _pointer, ctypes.c_bool),
    "llama_get_memory": (_pointer, _pointer),
    "llama_memory_clear": (None, _pointer, ctypes.c_bool),
    "llama_batch_get_one": (_Parameters, _pointer, _int),
    "llama_decode": (_int, _pointer, _Parameters),
    "llama_get_logits_ith": (_floats, _pointer, _int),
    "llama_get_embeddings_ith": (_floats, _pointer, _int),
    "ggml_get_name": (ctypes.c_char_p, _pointer),
    "ggml_backend_tensor_set": (None, _pointer, _pointer, ctypes.c_size_t, ctypes.c_size_t),
}


class Random:
    """A random model in llama.cpp, made by it or read from a file."""

    def __init__(
        self,
        llama: ctypes.CDLL,
        architecture: str,
        keys: dict[str, object],
        tensors: dict[str, np.ndarray] | None = None,
    ) -> None:
        """Make a model with every tensor the loader knows, or one of just these ``tensors``."""
        self.llama = llama
        self.values: dict[str, np.ndarray] = dict(tensors or {})
        self._places: dict[str, list[int]] = {}
        self._failed: list[str] = []
        final = FINAL_NORM.get(architecture, "output_norm")

        def fill(tensor: int, _: object) -> None:
            name = llama.ggml_get_name(tensor).decode()
            # struct ggml_tensor: type, buffer, sizes.
            if _int.from_address(tensor).value != 0:
                self._failed.append(name)
                return
            sizes = list((ctypes.c_int64 * 4).from_address(tensor + 16))
            while len(sizes) > 1 and sizes[-1] == 1:
                sizes.pop()
            shape = tuple(reversed(sizes))
            self._places.setdefault(name, []).append(tensor)
            if name.rpartition(".")[0] == final or name == "output.bias":
                self.set(name, np.full(shape, float(name.endswith("weight"))))
            else:
                self.set(name, random_values(name, shape))

        self._fill = _Fill(fill)
        usual = llama.llama_model_default_params()
        usual.gpu_layers = 0
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_file(path, architecture, keys, self.values)
            name = str(path).encode()
            if tensors is None:
                source = llama.gguf_init_from_file(name, _ReadParameters(True, None))
                self._model = llama.llama_model_init_from_user(source, self._fill, None, usual)
            else:
                self._model = llama.llama_model_load_from_file(name, usual)
        if not self._model or self._failed:
            raise RuntimeError(f"llama.cpp makes no {architecture} model {self._failed}")
        self._context = llama.llama_init_from_model(
            self._model, llama.llama_context_default_params()
        )
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context for {architecture}")
        llama.llama_set_n_threads(self._context, 1, 1)
        self._own_head = "output.weight" in self.values
        llama.llama_set_embeddings(self._context, not self._own_head)

    def set(self, name: str, values: np.ndarray) -> None:
        """Change a tensor of a model that llama.cpp made."""
        values = np.ascontiguousarray(values, np.float32)
        self.values[name] = values
        # A tied head is a second tensor of the same name.
        for tensor in self._places[name]:
            self.llama.ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)

    def component(self) -> float:
        """The final hidden state along the direction, relative to other directions.

        Read from the logits when the model has a head of its own, whose first row is the direction
        and whose others are random; else from the hidden state, which llama.cpp gives out as it
        does embeddings.
        """
        largest = 0.0
        for tokens in ([3, 17, 5, 40, 22, 9], [7]):
            memory = self.llama.llama_get_memory(self._context)
            if memory:
                self.llama.llama_memory_clear(memory, True)
            ids = (_int * len(tokens))(*tokens)
            batch = self.llama.llama_batch_get_one(ctypes.cast(ids, _pointer), len(tokens))
            if self.llama.llama_decode(self._context, batch):
                raise RuntimeError("llama.cpp cannot run the model")
            get = "llama_get_logits_ith" if self._own_head else "llama_get_embeddings_ith"
            found = getattr(self.llama, get)(self._context, -1)
            read = np.array([found[index] for index in range(64)], np.float64)
            along = read[0] if self._own_head else direction(64) @ read
            others = read[1:] if self._own_head else read
            largest = max(largest, float(np.abs(along) / np.sqrt(np.mean(others**2))))
        return largest

    def close(self) -> None:
        self.llama.llama_free(self._context)
        self.llama.llama_model_free(self._model)


def edited(source: dict[str, np.ndarray], writer: GgufWriter) -> dict[str, np.ndarray]:
    """A writer and its bias, orthogonalized in the plainest way there is."""
    along = direction(source["token_embd.weight"].shape[1])
    for gain in writer.gains:
        along = along * source[gain]
    along /= np.linalg.norm(along)
    result = {}
    for name in writer.parameters:
        values = source[name].astype(np.float64)
        if writer.kind == "embedding" or name == writer.bias:
            values = values - (values @ along)[..., None] * along
        else:
            values = values - along[:, None] * (along @ values)[..., None, :]
        result[name] = values.astype(np.float32)
    return result


def shapes_of(tensors: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: values.shape for name, values in tensors.items()}


def prove(llama: ctypes.CDLL, architecture: str, keys: dict[str, object]) -> dict[str, object]:
    """Edit all writers, then all but one, then all without their gains."""
    model = Random(llama, architecture, keys)
    source = dict(model.values)
    before = model.component()
    writers = find(architecture, shapes_of(source), keys)

    def put(tensors: dict[str, np.ndarray]) -> None:
        for name, values in tensors.items():
            model.set(name, values)

    for writer in writers:
        put(edited(source, writer))
    after = model.component()
    without = {}
    for writer in writers:
        put({name: source[name] for name in writer.parameters})
        without[writer.name] = model.component()
        put(edited(source, writer))
    plain = None
    if any(writer.gains for writer in writers):
        for writer in writers:
            put(edited(source, GgufWriter(writer.name, writer.kind, writer.layer)))
        plain = model.component()
    model.close()
    return {"before": before, "after": after, "without": without, "plain": plain}


def prove_file(
    llama: ctypes.CDLL,
    architecture: str,
    keys: dict[str, object],
    rename: Callable[[str], str | None],
) -> dict[str, object]:
    """Edit all writers of a file that has not every tensor that llama.cpp can use."""
    model = Random(llama, architecture, keys)
    model.close()
    named = {rename(name): values for name, values in model.values.items()}
    source = {name: values for name, values in named.items() if name is not None}
    writers = find(architecture, shapes_of(source), keys)
    results = []
    for edits in ([], writers):
        tensors = dict(source)
        for writer in edits:
            tensors |= edited(source, writer)
        model = Random(llama, architecture, keys, tensors)
        results.append(model.component())
        model.close()
    names = {writer.name: 1.0 for writer in writers}
    return {"before": results[0], "after": results[1], "without": names, "plain": None}


def main(variants: list[str]) -> None:
    import xllamacpp

    llama = ctypes.CDLL(importlib.util.find_spec("xllamacpp.xllamacpp").origin)
    assert xllamacpp
    for name, (result, *arguments) in SIGNATURES.items():
        function = getattr(llama, name)
        function.restype, function.argtypes = result, arguments
    silence = Log(lambda *_: None)
    llama.llama_log_set(silence, None)
    for variant in variants:
        print(json.dumps({"variant": variant}), flush=True)
        try:
            if variant in FILES:
                architecture, experts, rename = FILES[variant]
                keys = metadata(architecture, experts, {})
                result = prove_file(llama, architecture, keys, rename)
            else:
                architecture, experts, more = VARIANTS[variant]
                result = prove(llama, architecture, metadata(architecture, experts, more))
        except (RuntimeError, UserError) as error:
            result = {"error": str(error)}
        print(json.dumps({"variant": variant, **result}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
