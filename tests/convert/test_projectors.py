"""Vision towers of folders as projectors, against llama.cpp's own converter.

What the converter makes of the same folders is recorded in tests/support/projector_record.json by
``python -m tests.support.record_projectors``, which says how to run it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from convert.gguf.file import GgufSource
from convert.projectors import folder as towers
from convert.projectors.table import FAMILIES
from tests.support import seeing
from tests.support.record_projectors import FILE_TYPES, RECORD, told

RECORDED: dict[str, dict[str, Any]] = json.loads(RECORD.read_text())["towers"]

#: Tensors that the converter leaves out, and without which llama.cpp loads no projector.
FURTHER = {name: {"v.token_embd.img_break"} for name in ("pixtral", "mistral3")}

#: Names that the converter gives to a family's tensors -> the names in llama.cpp's graph.
OTHERWISE = {
    "llama4": {f"v.blk.N.attn_post_norm.{one}": f"v.blk.N.ln2.{one}" for one in ("weight", "bias")}
}


def test_every_family_is_recorded() -> None:
    assert RECORDED.keys() == seeing.FAMILIES.keys()
    said = [one["F16"]["metadata"] for one in RECORDED.values()]
    kinds = {
        next(value[1] for key, value in one.items() if "projector_type" in key) for one in said
    }
    assert kinds == {one.kind for one in FAMILIES}
    assert all(set(one) == set(FILE_TYPES) == set(towers.TYPES) for one in RECORDED.values())


@pytest.mark.parametrize("mlx", [False, True], ids=["published", "mlx-vlm"])
@pytest.mark.parametrize("name", seeing.FAMILIES)
def test_a_tower_becomes_the_file_that_the_converter_writes(
    name: str, mlx: bool, tmp_path: Path
) -> None:
    folder = seeing.write(tmp_path / "model", name, mlx=mlx)
    found = towers.find(folder)
    assert found is not None
    for kind in FILE_TYPES:
        path = tmp_path / f"{kind}.gguf"
        found.write(path, kind)
        ours, theirs = told(path), RECORDED[name][kind]
        assert ours["metadata"] == theirs["metadata"]
        names = OTHERWISE.get(name, {})
        tensors = {names.get(one, one): hash_ for one, hash_ in theirs["tensors"].items()}
        assert ours["tensors"].keys() - tensors.keys() == FURTHER.get(name, set())
        assert {one: ours["tensors"].get(one) for one in tensors} == tensors


def _change(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    weights = dict(mx.load(str(path)))
    change(weights)
    mx.save_safetensors(str(path), weights, metadata={"format": "pt"})


def test_a_tower_with_what_llama_cpp_does_not_know_is_not_written(tmp_path: Path) -> None:
    folder = seeing.write(tmp_path / "model", "gemma3")
    stray = "vision_tower.vision_model.encoder.layers.0.gate.weight"
    _change(folder, lambda weights: weights.update({stray: mx.zeros((4, 4))}))
    with pytest.raises(towers.Unwritable, match=f"^{stray} has no place") as caught:
        towers.find(folder)
    assert stray in caught.value.tensors


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda config, weights: config.update(pooling_kernel_size=2), "pools 2 patches"),
        (
            lambda config, weights: config.update(rope_parameters={"rope_theta": 1e4}),
            "rope_theta is 10000.0, and llama.cpp's 100",
        ),
        (lambda config, weights: config.update(patch_size=7), "48|192 columns, which are no patch"),
        (
            lambda config, weights: weights.update({"model.audio_tower.x.weight": mx.zeros(4)}),
            "the tower for sound .audio_tower., which belongs into the same projector, is not",
        ),
    ],
    ids=["pooling", "positions", "patches", "sound"],
)
def test_forms_of_gemma_4_that_are_not_written(change: Any, said: str, tmp_path: Path) -> None:
    folder = seeing.write(tmp_path / "model", "gemma4")
    config = json.loads((folder / "config.json").read_text())
    _change(folder, lambda weights: change(config["vision_config"], weights))
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(towers.Unwritable, match=said):
        towers.find(folder)


def test_a_tower_in_part_is_not_written(tmp_path: Path) -> None:
    folder = seeing.write(tmp_path / "model", "gemma3")
    _change(
        folder,
        lambda weights: weights.pop("vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight"),
    )
    with pytest.raises(towers.Unwritable, match="not all tensors of the 4 blocks"):
        towers.find(folder)


def test_without_the_settings_of_pictures_nothing_is_written(tmp_path: Path) -> None:
    folder = seeing.write(tmp_path / "model", "gemma3")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(towers.Unwritable, match="there is no image_mean in preprocessor_config"):
        towers.find(folder)


@pytest.mark.parametrize(("value", "said"), [(1e6, "too large for F16"), (np.nan, "not finite")])
def test_values_that_do_not_fit_leave_no_file(value: float, said: str, tmp_path: Path) -> None:
    folder = seeing.write(tmp_path / "model", "gemma3")
    name = "vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight"

    def change(weights: dict[str, mx.array]) -> None:
        weights[name] = mx.full(weights[name].shape, value)

    _change(folder, change)
    found = towers.find(folder)
    assert found is not None
    with pytest.raises(towers.Unwritable, match=said):
        found.write(tmp_path / "mmproj.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_settings_of_transformers_5_count_as_well(tmp_path: Path) -> None:
    folder = seeing.write(tmp_path / "model", "gemma3")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    found = towers.find(folder)
    assert found is not None
    assert found.keys["clip.vision.image_mean"] == settings["image_mean"]
    assert "clip.vision.projector.scale_factor" not in found.keys


def test_a_folder_without_a_tower_has_no_projector(tmp_path: Path) -> None:
    folder = seeing.write(tmp_path / "model", "gemma3")
    _change(
        folder,
        lambda weights: [
            weights.pop(name) for name in list(weights) if not name.startswith("language_model.")
        ],
    )
    assert towers.find(folder) is None


@pytest.mark.parametrize("name", sorted(FURTHER))
def test_the_end_of_a_row_is_the_tokens_embedding(name: str, tmp_path: Path) -> None:
    folder = seeing.write(tmp_path / "model", name)
    found = towers.find(folder)
    assert found is not None
    found.write(tmp_path / "mmproj.gguf")
    weights = mx.load(str(folder / "model.safetensors"))
    with GgufSource(tmp_path / "mmproj.gguf") as source:
        values = np.frombuffer(bytes(source.raw("v.token_embd.img_break")), np.float32)
    token = json.loads((folder / "tokenizer.json").read_text())["added_tokens"][-1]
    assert token["content"] == "[IMG_BREAK]"
    wanted = np.array(weights["language_model.model.embed_tokens.weight"][token["id"]])
    np.testing.assert_array_equal(values, wanted)


def test_without_the_token_that_ends_a_row_nothing_is_written(tmp_path: Path) -> None:
    folder = seeing.write(tmp_path / "model", "pixtral")
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("[IMG_BREAK]", "[OTHER]"))
    with pytest.raises(towers.Unwritable, match=r"the tokenizer has no token \[IMG_BREAK\]"):
        towers.find(folder)


def test_full_attention_in_no_regular_pattern_is_not_written(tmp_path: Path) -> None:
    folder = seeing.write(tmp_path / "model", "qwen2.5-vl")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["vision_config"]["fullatt_block_indexes"] = [1, 2]
    path.write_text(json.dumps(config))
    with pytest.raises(towers.Unwritable, match=r"are \[1, 2\], and llama.cpp knows every n-th"):
        towers.find(folder)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("depth", None, "no num_hidden_layers|no depth"),
        ("hidden_size", "x", "no hidden_size that is a number"),
        ("deepstack_visual_indexes", [1, "x"], "deepstack_visual_indexes .* is no list of layers"),
        ("deepstack_visual_indexes", [1], "no layer among deepstack_visual_indexes"),
        ("num_position_embeddings", "x", "no image_size that is a number"),
    ],
)
def test_bad_settings_of_a_tower_are_told(key: str, value: Any, said: str, tmp_path: Path) -> None:
    folder = seeing.write(tmp_path / "model", "qwen3-vl")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["vision_config"][key] = value
    path.write_text(json.dumps(config))
    with pytest.raises(towers.Unwritable, match=said):
        towers.find(folder)


def test_a_kernel_of_another_shape_is_told(tmp_path: Path) -> None:
    folder = seeing.write(tmp_path / "model", "qwen3-vl")
    name = "model.visual.patch_embed.proj.weight"
    _change(folder, lambda weights: weights.update({name: mx.zeros((64, 3, 4, 16, 16))}))
    with pytest.raises(towers.Unwritable, match="spans 4 pictures"):
        towers.find(folder)
    _change(folder, lambda weights: weights.update({name: mx.zeros((64, 5, 2, 16, 16))}))
    with pytest.raises(towers.Unwritable, match="is no kernel for 3 colours"):
        towers.find(folder)


def test_a_quantized_tower_is_written_as_what_it_stands_for(tmp_path: Path) -> None:
    folder = seeing.write(tmp_path / "model", "gemma3")
    module = "vision_tower.vision_model.encoder.layers.1.mlp.fc1"
    codes: list[mx.array] = []

    def change(weights: dict[str, mx.array]) -> None:
        codes.extend(mx.quantize(weights[f"{module}.weight"], group_size=32, bits=8))
        for name, one in zip(("weight", "scales", "biases"), codes, strict=True):
            weights[f"{module}.{name}"] = one

    _change(folder, change)
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = {"group_size": 32, "bits": 8}
    (folder / "config.json").write_text(json.dumps(config))
    found = towers.find(folder)
    assert found is not None
    found.write(tmp_path / "mmproj.gguf", "F32")
    wanted = np.array(mx.dequantize(*codes, group_size=32, bits=8))
    with GgufSource(tmp_path / "mmproj.gguf") as source:
        values = np.frombuffer(bytes(source.raw("v.blk.1.ffn_up.weight")), np.float32)
    np.testing.assert_array_equal(values, wanted.reshape(-1))
