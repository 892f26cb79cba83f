"""What mlx-lm does not load: vision towers stay as they are, MTP blocks too but for ``--mtp``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import quantize_model

from abl_mlx.choices import ApplyOptions
from abl_mlx.cli.main import cli
from abl_mlx.commands import measure_apply
from abl_mlx.models.chat_model import load
from abl_mlx.reports import tables
from convert.base.errors import UserError
from convert.mlx.safetensors_files import TensorFiles
from tests.support import tiny, zoo

Weights = dict[str, mx.array]

WIDTH, GROUP = 32, 32
_GROUPED = {"intermediate_size": 64, "moe_intermediate_size": 32}


def noise(name: str, shape: tuple[int, ...]) -> mx.array:
    """Random values that depend on the name alone; norms about one."""
    rng = np.random.default_rng([len(name), *name.encode()])
    values = rng.normal(size=shape).astype(np.float32)
    return mx.array(1 + 0.2 * values if len(shape) == 1 else values / np.sqrt(shape[-1]))


def rename(name: str, renamed: tuple[tuple[str, str], ...]) -> str:
    for old, new in renamed:
        name = re.sub(old, new, name)
    return name


def write(
    folder: Path,
    arch: str,
    more: Callable[[Weights], Weights],
    *,
    dtype: str = "float32",
    shards: int = 1,
    bits: int | None = None,
    names: tuple[tuple[str, str], ...] = (),
    **overrides: Any,
) -> Path:
    """A folder of a random model of ``arch`` with tensors that mlx-lm drops.

    Args:
        more: those, from the model's own under the names in the file, in float32.
        bits: quantize the model, as mlx_lm.convert does, and of the rest whatever ``more`` did.
        names: (pattern, replacement) for the names.
    """
    folder.mkdir(parents=True)
    special = tiny.write_tokenizer(folder, "bpe")
    settings = {**special, **zoo.config(arch), **overrides}
    for text in [settings, *([settings["text_config"]] if "text_config" in settings else [])]:
        if "vocab_size" in text:
            text["vocab_size"] = tiny.VOCAB_SIZE
    model = zoo.build(settings)
    stacked = any("switch_mlp" in old for old, _ in names)

    def in_files(model: nn.Module) -> Weights:
        weights = dict(tree_flatten(model.parameters())) if stacked else tiny.hf_weights(model)
        return {rename(name, names): value for name, value in weights.items()}

    floats = in_files(model)
    extra = {
        name: value if value.dtype == mx.uint32 else value.astype(getattr(mx, dtype))
        for name, value in more(floats).items()
    }
    model.update(tree_map(lambda value: value.astype(getattr(mx, dtype)), model.parameters()))
    if bits is not None:
        model, settings = quantize_model(model, settings, GROUP, bits)
    weights = in_files(model)
    assert not set(weights) & set(extra)
    # In between, as shards of real repositories have them.
    every = list((weights | extra).items())
    order = [*every[1::2], *every[::2]]
    (folder / "config.json").write_text(json.dumps(settings))
    index = {}
    for shard in range(shards):
        part = dict(order[shard * len(order) // shards : (shard + 1) * len(order) // shards])
        file = "model.safetensors"
        if shards > 1:
            file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        mx.save_safetensors(str(folder / file), part, metadata={"format": "pt"})
        index.update(dict.fromkeys(part, file))
    if shards > 1:
        text = {"metadata": {}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(text))
    return folder


def changed(before: Path, after: Path) -> set[str]:
    """Names of tensors whose bytes differ; layout and everything else have to agree."""
    found = set()
    with TensorFiles(before) as old, TensorFiles(after) as new:
        assert old.names == new.names
        assert [file.name for file in old.files] == [file.name for file in new.files]
        for name in old.names:
            a, b = old.info(name), new.info(name)
            assert (a.dtype, a.shape, a.offset, a.file.name) == (
                b.dtype, b.shape, b.offset, b.file.name
            )  # fmt: skip
            if bytes(old.bytes(name)) != bytes(new.bytes(name)):
                found.add(name)
    return found


@pytest.fixture
def direction(tmp_path: Path) -> Path:
    path = tmp_path / "direction.npy"
    np.save(path, np.random.default_rng(3).normal(size=WIDTH).astype(np.float32))
    return path


def unit(direction: Path) -> np.ndarray:
    r = np.load(direction).astype(np.float64)
    return r / np.linalg.norm(r)


# --- vision ------------------------------------------------------------------------------------

TOWER = {
    # Names that look like writers of the text model, and layers beyond its last.
    "embeddings.patch_embedding.weight": (WIDTH, 4, 4, 3),
    "encoder.layers.7.self_attn.o_proj.weight": (WIDTH, WIDTH),
    "encoder.layers.7.mlp.down_proj.weight": (WIDTH, 64),
    "encoder.layers.7.mlp.fc2.bias": (WIDTH,),
}

VISION: dict[str, tuple[str, dict[str, tuple[int, ...]], tuple[tuple[str, str], ...]]] = {
    "gemma3": (
        "vision_tower.vision_model.",
        {"multi_modal_projector.mm_input_projection_weight": (WIDTH, WIDTH)},
        (),
    ),
    "qwen3_vl": (
        "model.visual.",
        {"model.visual.merger.linear_fc2.weight": (WIDTH, 48)},
        ((r"^language_model\.model\.", "model.language_model."), (r"^language_model\.", "")),
    ),
    "mistral3": (
        "vision_tower.",
        {"multi_modal_projector.linear_2.weight": (WIDTH, WIDTH)},
        (),
    ),
    "pixtral": ("vision_tower.", {"multi_modal_projector.linear_2.bias": (WIDTH,)}, ()),
    "llama4": ("vision_model.", {"multi_modal_projector.linear_1.weight": (WIDTH, 48)}, ()),
}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("arch", VISION)
def test_a_vision_tower_keeps_its_bytes(arch, bits, shards, direction, tmp_path):
    prefix, more, names = VISION[arch]
    if arch == "qwen3_vl" and shards == 1:
        prefix, more = "vision_tower.", {"vision_tower.merger.linear_fc2.weight": (WIDTH, 48)}
        names = ()  # as mlx-vlm writes it
    shapes = {f"{prefix}{name}": shape for name, shape in TOWER.items()} | more
    source = write(
        tmp_path / "source",
        arch,
        lambda _: {name: noise(name, shape) for name, shape in shapes.items()},
        dtype="bfloat16",
        shards=shards,
        bits=bits,
        names=names,
    )
    record = measure_apply.apply(direction, str(source), [tmp_path / "out"], ApplyOptions())
    assert "mtp" not in record
    touched = {name.rpartition(".")[0] for name in changed(source, tmp_path / "out")}
    writers = ("o_proj", "down_proj", "embed_tokens", "out_proj")
    if arch == "gemma3":  # whose stored copy of the tied head is edited as the embedding is
        writers += ("lm_head",)
    assert touched
    assert all(name.endswith(writers) for name in touched)
    assert not any(name.startswith(prefix) or "projector" in name for name in touched)
    mlx_lm.load(str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"--mtp: .* holds no tensors of multi-token prediction"):
        measure_apply.apply(direction, str(source), [tmp_path / "no"], ApplyOptions.of(mtp=True))


# --- multi-token prediction --------------------------------------------------------------------


def layer_of(weights: Weights, stem: str, index: int) -> Weights:
    """The tensors of a layer, by what follows its number."""
    found = {n[len(f"{stem}{index}.") :]: v for n, v in weights.items()
             if n.startswith(f"{stem}{index}.")}  # fmt: skip
    assert found
    return found


def block(
    stem: str, index: int, prefix: str, more: dict[str, tuple[int, ...]]
) -> Callable[[Weights], Weights]:
    """MTP tensors: a layer like the one at ``index`` under ``prefix``, and ``more``."""

    def made(weights: Weights) -> Weights:
        shapes = {f"{prefix}{n}": v.shape for n, v in layer_of(weights, stem, index).items()}
        return {name: noise(name, shape) for name, shape in (shapes | more).items()}

    return made


_D, _FC = (WIDTH,), (WIDTH, 2 * WIDTH)
_VOCABULARY = (tiny.VOCAB_SIZE, WIDTH)


def appended(index: int) -> dict[str, tuple[int, ...]]:
    """What DeepSeek V3 and those after it have in a further layer."""
    shapes = {
        "embed_tokens.weight": _VOCABULARY, "enorm.weight": _D, "hnorm.weight": _D,
        "eh_proj.weight": _FC, "shared_head.norm.weight": _D,
        "shared_head.head.weight": _VOCABULARY,
    }  # fmt: skip
    return {f"model.layers.{index}.{name}": shape for name, shape in shapes.items()}


def fc() -> dict[str, tuple[int, ...]]:
    """What Qwen3-Next and those after it have beside the layer."""
    shapes = {
        "fc.weight": _FC, "norm.weight": _D, "pre_fc_norm_embedding.weight": _D,
        "pre_fc_norm_hidden.weight": _D,
    }  # fmt: skip
    return {f"mtp.{name}": shape for name, shape in shapes.items()}


def experts(prefix: str, shared: str | None, count: int = 4) -> set[str]:
    names = {f"{prefix}mlp.experts.{e}.down_proj" for e in range(count)}
    return names | ({f"{prefix}mlp.{shared}.down_proj"} if shared else set())


_QWEN35_NAMES = ((r"^language_model\.model\.", "model.language_model."), (r"^language_model\.", ""))

#: Architecture -> its stem of layers, the layer that its MTP layer is like, the MTP layer's prefix,
#: what else there is, which modules have to be edited, and how names in its files differ.
FORMS: dict[str, tuple[str, int, str, dict[str, Any], set[str], tuple[tuple[str, str], ...]]] = {
    **{
        arch: (
            "model.layers.", 2, "model.layers.3.", appended(3),
            {"model.layers.3.eh_proj", "model.layers.3.embed_tokens",
             "model.layers.3.self_attn.o_proj"} | experts("model.layers.3.", "shared_experts"), (),
        )
        for arch in ("glm4_moe", "glm4_moe_lite", "deepseek_v32")
    },
    **{
        arch: (
            "model.layers.", 2, "model.layers.3.",
            {f"model.layers.3.{name}": shape for name, shape in {
                "eh_proj.weight": _FC, "enorm.weight": _D, "hnorm.weight": _D,
                "final_layernorm.weight": _D}.items()},
            {"model.layers.3.eh_proj", "model.layers.3.attention.dense"}
            | experts("model.layers.3.", "shared_experts"), (),
        )
        for arch in ("bailing_moe_v3", "bailing_hybrid")
    },
    "qwen3_next": (
        "model.layers.", 3, "mtp.layers.0.", fc(),
        {"mtp.fc", "mtp.layers.0.self_attn.o_proj"} | experts("mtp.layers.0.", "shared_expert"), (),
    ),
    "qwen3_5": (
        "model.language_model.layers.", 3, "mtp.layers.0.", fc(),
        {"mtp.fc", "mtp.layers.0.self_attn.o_proj", "mtp.layers.0.mlp.down_proj"}, _QWEN35_NAMES,
    ),
    "qwen3_5_moe": (
        "model.language_model.layers.", 3, "mtp.layers.0.", fc(),
        {"mtp.fc", "mtp.layers.0.self_attn.o_proj", "mtp.layers.0.mlp.switch_mlp.down_proj",
         "mtp.layers.0.mlp.shared_expert.down_proj"},
        (*_QWEN35_NAMES, ("switch_mlp", "switch_mlp")),
    ),
    "exaone_moe": (
        "model.layers.", 2, "mtp.layers.0.", fc(),
        {"mtp.fc", "mtp.layers.0.self_attn.o_proj"} | experts("mtp.layers.0.", "shared_experts"),
        (),
    ),
    "mimo": (
        "model.layers.", 2, "model.mtp_layers.0.",
        {f"model.mtp_layers.0.{name}": shape for name, shape in {
            "input_proj.weight": _FC, "token_layernorm.weight": _D, "hidden_layernorm.weight": _D,
            "final_layernorm.weight": _D}.items()},
        {f"model.mtp_layers.0.{name}" for name in (
            "input_proj", "self_attn.o_proj", "mlp.down_proj")}, (),
    ),
    "mimo_v2_flash": (
        "model.layers.", 2, "model.mtp.layers.0.",
        {f"model.mtp.layers.0.{name}": shape for name, shape in {
            "eh_proj.weight": _FC, "enorm.weight": _D, "hnorm.weight": _D,
            "pre_mlp_layernorm.weight": _D, "final_layernorm.weight": _D}.items()},
        {"model.mtp.layers.0.eh_proj", "model.mtp.layers.0.self_attn.o_proj"}
        | experts("model.mtp.layers.0.", "shared_experts"), (),
    ),
    "ernie4_5_moe": (
        "model.layers.", 2, "model.mtp_block.0.",
        {"model.mtp_linear_proj.0.weight": _FC, "model.mtp_linear_proj.0.bias": _D,
         "model.mtp_hidden_norm.0.weight": _D, "model.mtp_emb_norm.0.weight": _D},
        {"model.mtp_linear_proj.0", "model.mtp_block.0.self_attn.o_proj"}
        | experts("model.mtp_block.0.", "shared_experts"), (),
    ),
    "nemotron_h": (
        "backbone.layers.", 1, "mtp.layers.0.",
        {"mtp.layers.0.eh_proj.weight": _FC, "mtp.layers.0.enorm.weight": _D,
         "mtp.layers.0.hnorm.weight": _D, "mtp.layers.1.norm.weight": _D,
         "mtp.layers.1.final_layernorm.weight": _D,
         # The experts work in a space of their own; the latent projection is what writes.
         "mtp.layers.1.mixer.experts.0.down_proj.weight": (16, 24),
         "mtp.layers.1.mixer.experts.0.up_proj.weight": (24, 16),
         "mtp.layers.1.mixer.fc1_latent_proj.weight": (16, WIDTH),
         "mtp.layers.1.mixer.fc2_latent_proj.weight": (WIDTH, 16),
         "mtp.layers.1.mixer.shared_experts.up_proj.weight": (24, WIDTH),
         "mtp.layers.1.mixer.shared_experts.down_proj.weight": (WIDTH, 24)},
        {"mtp.layers.0.eh_proj", "mtp.layers.0.mixer.o_proj", "mtp.layers.1.mixer.fc2_latent_proj",
         "mtp.layers.1.mixer.shared_experts.down_proj"},
        ((r"experts\.(\d+)\.fc1", r"experts.\1.up_proj"),
         (r"experts\.(\d+)\.fc2", r"experts.\1.down_proj")),
    ),
    "step3p5": (
        # As the first layer, which is dense.
        "model.layers.", 0, "model.layers.3.",
        {f"model.layers.3.{name}": shape for name, shape in {
            "eh_proj.weight": _FC, "enorm.weight": _D, "hnorm.weight": _D,
            "transformer.shared_head.norm.weight": _D,
            "transformer.shared_head.output.weight": _VOCABULARY}.items()},
        {"model.layers.3.eh_proj", "model.layers.3.self_attn.o_proj",
         "model.layers.3.mlp.down_proj"},
        ((r"mlp\.switch_mlp", "moe"), (r"mlp\.gate\.gate", "moe.gate"),
         (r"mlp\.gate\.router_bias", "moe.router_bias"), (r"mlp\.share_expert", "share_expert")),
    ),
}  # fmt: skip


def write_mtp(folder: Path, arch: str, **options: Any) -> Path:
    stem, index, prefix, more, _, names = FORMS[arch]
    return write(folder, arch, block(stem, index, prefix, more), names=names, **options)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("arch", FORMS)
def test_the_writers_of_mtp_blocks_are_edited_on_request_alone(arch, shards, direction, tmp_path):
    source = write_mtp(tmp_path / "source", arch, shards=shards)
    alone, asked = tmp_path / "alone", tmp_path / "asked"
    without = measure_apply.apply(direction, str(source), [alone], ApplyOptions())
    record = measure_apply.apply(direction, str(source), [asked], ApplyOptions.of(mtp=True))
    plain, all_of_them = changed(source, alone), changed(source, asked)
    _, _, prefix, more, modules, _ = FORMS[arch]
    with TensorFiles(source) as files:
        predicting = [name for name in files.names if name.startswith(prefix) or name in more]
    assert without["mtp"] == {"tensors": len(predicting), "edited": []}
    edited = all_of_them - plain
    assert plain < all_of_them
    assert {name.rpartition(".")[0] for name in edited} == modules
    assert record["mtp"]["tensors"] == len(predicting)
    assert set(record["mtp"]["edited"]) == edited
    assert set(record["written"][0]["leak"]["tensors"]) == all_of_them
    assert record["leak"]["total"] < 1e-5
    r = unit(direction)
    with TensorFiles(source) as old, TensorFiles(asked) as new:
        for name in edited:
            w, v = (np.array(files.read(name)).astype(np.float64) for files in (old, new))
            exact = w - (w @ r)[..., None] * r if "embed" in name or w.ndim == 1 else (
                w - r[:, None] * np.einsum("d,...dn->...n", r, w)[..., None, :]
            )  # fmt: skip
            np.testing.assert_allclose(v, exact, atol=1e-6)
    assert "left as they are; --mtp" in tables.apply_table(without)
    assert f"{len(edited)} of {len(predicting)} tensors edited" in tables.apply_table(record)
    mlx_lm.load(str(asked))


#: Architecture -> the projection, and the two norms in front of it in the order of its columns.
JOINED = {
    "glm4_moe": ("model.layers.3.eh_proj", "model.layers.3.enorm", "model.layers.3.hnorm"),
    "qwen3_next": ("mtp.fc", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden"),
    "mimo": (
        "model.mtp_layers.0.input_proj",
        "model.mtp_layers.0.hidden_layernorm",
        "model.mtp_layers.0.token_layernorm",
    ),
}


def stream_of_block(folder: Path, arch: str) -> np.ndarray:
    """The stream behind an MTP block, run with mlx-lm's own layer: (T, d)."""
    _, index, prefix, _, _, _ = FORMS[arch]
    chat = load(folder)
    layer = chat.layers[index]
    with TensorFiles(folder) as files:
        have = {name: files.read(name) for name in files.names}
        # Everything random but what is looked at: the main model is not to help.
        one, other = (mx.random.normal((1, 6, WIDTH), key=mx.random.key(k)) for k in (1, 2))
        project, *norms = JOINED[arch]
        joined = [mx.fast.rms_norm(x, have[f"{norm}.weight"], 1e-5)
                  for x, norm in zip((one, other), norms, strict=True)]  # fmt: skip
        stream = mx.concatenate(joined, axis=-1) @ have[f"{project}.weight"].T
        inside = {n[len(prefix) :]: v for n, v in have.items() if n.startswith(prefix)}
    stacks: dict[str, list[mx.array]] = {}
    for name in sorted(inside):
        if match := re.match(r"mlp\.experts\.\d+\.(.+)", name):
            stacks.setdefault(f"mlp.switch_mlp.{match.group(1)}", []).append(inside.pop(name))
    inside |= {name: mx.stack(parts) for name, parts in stacks.items()}
    own = {name for name, _ in tree_flatten(layer.parameters())}
    assert own <= set(inside)
    layer.load_weights([(name, inside[name]) for name in own])
    return np.array(layer(stream, mask="causal", cache=None))[0].astype(np.float64)


@pytest.mark.parametrize("arch", JOINED)
def test_the_stream_of_an_edited_block_is_free_of_the_direction(arch, direction, tmp_path):
    source = write_mtp(tmp_path / "source", arch)
    alone, asked = tmp_path / "alone", tmp_path / "asked"
    measure_apply.apply(direction, str(source), [alone], ApplyOptions())
    measure_apply.apply(direction, str(source), [asked], ApplyOptions.of(mtp=True))

    def share(folder: Path) -> float:
        stream = stream_of_block(folder, arch)
        return float((np.abs(stream @ unit(direction)) / np.linalg.norm(stream, axis=1)).max())

    assert share(alone) > 0.05
    assert share(asked) < 1e-5


def test_the_extra_layer_of_deepseek_v3(direction, tmp_path):
    # mlx-lm knows it by its number alone, which is that of the 671B model.
    stem = "model.layers.61."
    more = {f"{stem}{name.split('.', 3)[3]}": shape for name, shape in appended(61).items()}
    made = block("model.layers.", 60, stem, more)
    copy = f"{stem}embed_tokens.weight"
    source = write(
        tmp_path / "source", "deepseek_v3",
        lambda weights: made(weights) | {copy: weights["model.embed_tokens.weight"]},
        shards=2, num_hidden_layers=61, first_k_dense_replace=60, dtype="bfloat16",
    )  # fmt: skip
    alone, asked = tmp_path / "alone", tmp_path / "asked"
    measure_apply.apply(direction, str(source), [alone], ApplyOptions())
    record = measure_apply.apply(direction, str(source), [asked], ApplyOptions.of(mtp=True))
    assert not any(name.startswith(stem) for name in changed(source, alone))
    edited = {name.removesuffix(".weight") for name in record["mtp"]["edited"]}
    assert edited == {f"{stem}eh_proj", f"{stem}embed_tokens", f"{stem}self_attn.o_proj"} | experts(
        stem, "shared_experts"
    )
    with TensorFiles(source) as old, TensorFiles(asked) as new:  # the copy is one still
        assert bytes(new.bytes(copy)) == bytes(new.bytes("model.embed_tokens.weight"))
        assert bytes(new.bytes(copy)) != bytes(old.bytes(copy))
    mlx_lm.load(str(asked))


def quantized_too(made: Callable[[Weights], Weights]) -> Callable[[Weights], Weights]:
    """The matrices of ``made`` as (weight, scales, biases)."""

    def wrapped(weights: Weights) -> Weights:
        found: Weights = {}
        for name, value in made(weights).items():
            if value.ndim == 1 or value.shape[-1] % GROUP:
                found[name] = value
                continue
            parts = mx.quantize(value.astype(mx.bfloat16), GROUP, 4)
            for part, one in zip(("weight", "scales", "biases"), parts, strict=True):
                found[f"{name.removesuffix('weight')}{part}"] = one
        return found

    return wrapped


@pytest.mark.parametrize("writer_bits", [None, "8"])
@pytest.mark.parametrize("arch", ["glm4_moe", "mimo"])
def test_quantized_blocks(arch, writer_bits, direction, tmp_path):
    stem, index, prefix, more, modules, _ = FORMS[arch]
    source = write(
        tmp_path / "source", arch, quantized_too(block(stem, index, prefix, more)), bits=4,
        dtype="bfloat16", shards=2, **_GROUPED,
    )  # fmt: skip
    out = tmp_path / "out"
    # In a model this narrow, bfloat16 norms and what is not quantized leave nothing to speak of.
    record = measure_apply.apply(
        direction,
        str(source),
        [out],
        ApplyOptions.of(mtp=True, writer_bits=writer_bits, max_leak=0.05),
    )
    config = json.loads((out / "config.json").read_text())
    edited = {name.removesuffix(".weight") for name in record["mtp"]["edited"]}
    assert edited == modules
    leaks = record["written"][0]["leak"]["tensors"]
    with TensorFiles(source) as old, TensorFiles(out) as new:
        for module in modules:
            assert f"{module}.scales" in old
            assert leaks[f"{module}.weight"]["leak"] < 0.02
            entry = config["quantization"].get(module)
            assert entry == (
                None if writer_bits is None
                else {"group_size": GROUP, "bits": 8, "mode": "affine"}
            )  # fmt: skip
            r = unit(direction)
            share = []
            for files, bits in ((old, 4), (new, int(writer_bits or 4))):
                values = mx.dequantize(
                    *(files.read(f"{module}.{part}") for part in ("weight", "scales", "biases")),
                    group_size=GROUP, bits=bits,
                )  # fmt: skip
                w = np.array(values.astype(mx.float32)).astype(np.float64)
                along = w @ r if "embed" in module else r @ w
                share.append(np.linalg.norm(along) / np.linalg.norm(w))
            assert share[0] > 0.05
            assert share[1] < 0.02 * share[0]
        for name in old.names:
            module = name.rpartition(".")[0]
            if (name.startswith(prefix) or name in more) and module not in modules:
                assert bytes(old.bytes(name)) == bytes(new.bytes(name))
    mlx_lm.load(str(out))


def fused(weights: Weights) -> Weights:
    """Qwen3.5's experts in one tensor each, without ``.weight``, as Hugging Face has them."""
    found = block(*FORMS["qwen3_next"][:3], fc())(weights)
    one = {n: v for n, v in found.items() if ".mlp.experts." not in n}
    stem = "mtp.layers.0.mlp.experts."
    return one | {
        f"{stem}gate_up_proj": noise("gate_up", (4, 48, WIDTH)),
        f"{stem}down_proj": noise("down", (4, WIDTH, 24)),
    }


def test_experts_in_one_tensor(direction, tmp_path):
    source = write(tmp_path / "source", "qwen3_next", fused)
    record = measure_apply.apply(
        direction, str(source), [tmp_path / "out"], ApplyOptions.of(mtp=True)
    )
    assert "mtp.layers.0.mlp.experts.down_proj" in record["mtp"]["edited"]
    with TensorFiles(tmp_path / "out") as files:
        w = np.array(files.read("mtp.layers.0.mlp.experts.down_proj")).astype(np.float64)
    assert np.abs(np.einsum("d,edn->en", unit(direction), w)).max() < 1e-6


def plus(name: str, shape: tuple[int, ...]) -> Callable[[Weights], Weights]:
    made = block(*FORMS["qwen3_next"][:3], fc())
    return lambda weights: made(weights) | {name: noise(name, shape)}


@pytest.mark.parametrize(
    ("arch", "made", "message"),
    [
        ("qwen3_next", plus("mtp.side.weight", (WIDTH, WIDTH)), r"not known: mtp\.side\.weight;"),
        ("qwen3_next", plus("mtp.layers.0.mlp.scale", (WIDTH,)), r"known: mtp\.layers\.0\.mlp\.sc"),
        (
            "qwen3_next",
            lambda _: {"mtp.layers.0.self_attn.o_proj.weight": noise("o", (WIDTH, WIDTH))},
            r"not known: mtp\.layers\.0\.self_attn\.o_proj\.weight;",
        ),
        (
            "qwen3_next",
            lambda _: {"mtp.fc.weight": noise("fc", (2 * WIDTH, 48))},
            r"mtp\.fc\.weight has the shape \(64, 48\)",
        ),
        (
            # As DeepSeek V4.1 has them, with several streams.
            "exaone_moe",
            lambda _: {"mtp.0.e_proj.weight": noise("e", (WIDTH, WIDTH)),
                       "mtp.0.hc_head_fn": noise("hc", (4, WIDTH))},
            r"not known: mtp\.0\.e_proj\.weight, mtp\.0\.hc_head_fn",
        ),
    ],
)  # fmt: skip
def test_other_forms_are_refused_and_kept(arch, made, message, direction, tmp_path):
    source = write(tmp_path / "source", arch, made)
    with pytest.raises(UserError, match=message):
        measure_apply.apply(direction, str(source), [tmp_path / "no"], ApplyOptions.of(mtp=True))
    assert not (tmp_path / "no").exists()
    record = measure_apply.apply(direction, str(source), [tmp_path / "out"], ApplyOptions())
    assert record["mtp"]["edited"] == []
    assert not any("mtp" in name for name in changed(source, tmp_path / "out"))


def test_layers_adapters_and_undo(direction, tmp_path):
    source = write_mtp(tmp_path / "source", "mimo")
    options = ApplyOptions.of(mtp=True, layers=frozenset({0, 1}))
    with pytest.raises(UserError, match="as the last layer is, 2, which this edit leaves alone"):
        measure_apply.apply(direction, str(source), [tmp_path / "no"], options)
    with pytest.raises(UserError, match="--mtp: mlx-lm applies no adapter"):
        measure_apply.apply(
            direction, str(source), [tmp_path / "no.adapter"], ApplyOptions.of(mtp=True)
        )
    half = ApplyOptions.of(mtp=True, strength=0.5, layers=frozenset({2}), embedding=False)
    measure_apply.apply(direction, str(source), [tmp_path / "half"], half)
    assert changed(source, tmp_path / "half") == {
        f"{prefix}.{name}.weight"
        for prefix in ("model.layers.2", "model.mtp_layers.0")
        for name in ("self_attn.o_proj", "mlp.down_proj")
    } | {"model.mtp_layers.0.input_proj.weight"}
    back = CliRunner().invoke(
        cli, ["undo", str(tmp_path / "half"), "-o", str(tmp_path / "back"),
              "--direction", str(direction)], catch_exceptions=False,
    )  # fmt: skip
    assert back.exit_code == 0, back.output
    with TensorFiles(source) as old, TensorFiles(tmp_path / "back") as new:
        for name in old.names:
            np.testing.assert_allclose(
                np.array(old.read(name)), np.array(new.read(name)), atol=1e-5
            )
    kept = ApplyOptions.of(mtp=True, keep_undo=True)
    measure_apply.apply(direction, str(source), [tmp_path / "whole"], kept)
    done = CliRunner().invoke(
        cli, ["undo", str(tmp_path / "whole"), "-o", str(tmp_path / "again")],
        catch_exceptions=False,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    with TensorFiles(source) as old, TensorFiles(tmp_path / "again") as new:
        name = "model.mtp_layers.0.input_proj.weight"
        np.testing.assert_allclose(np.array(old.read(name)), np.array(new.read(name)), atol=1e-5)
    said = CliRunner().invoke(cli, ["inspect", str(source)], catch_exceptions=False)
    assert "multi-token prediction: 16 tensors found and left as they are" in said.output
