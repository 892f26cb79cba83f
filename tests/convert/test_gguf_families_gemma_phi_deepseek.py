"""Gemma, Phi-3 and DeepSeek as MLX models: what is refused, and what is special about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from mlx.utils import tree_flatten

from abl_mlx.commands import conversion
from convert.architectures import gguf_writers
from convert.base.errors import UserError
from convert.gguf.file import GgufSource
from convert.gguf_to_mlx import Layout, layout, load
from tests.convert.test_gguf_to_mlx import PROMPT
from tests.support import tiny_gguf
from tests.support.agreement import disagreement, logprobs
from tests.support.gguf_recipes import deepseek, gemma, phi
from tests.support.tiny_gguf import Recipe

RECIPES = {**gemma.RECIPES, **phi.RECIPES, **deepseek.RECIPES}

SSF = [True, True, False]


def written(folder: Path, recipe: Recipe, file_type: str = "F16") -> Path:
    return tiny_gguf.write(folder / "tiny.gguf", recipe, GGMLQuantizationType[file_type])


def layout_of(folder: Path, recipe: Recipe) -> Layout:
    with GgufSource(written(folder, recipe)) as source:
        return layout(source)


def with_keys(recipe: Recipe, **more: Any) -> Recipe:
    """The recipe with other metadata; None takes a key out."""
    keys = recipe.keys | {key.replace("__", "."): value for key, value in more.items()}
    return replace(recipe, keys={key: value for key, value in keys.items() if value is not None})


def without(recipe: Recipe, *names: str) -> Recipe:
    kept = {name: shape for name, shape in recipe.tensors.items() if name not in names}
    return replace(recipe, tensors=kept)


def with_table(recipe: Recipe, name: str, values: list[float]) -> Recipe:
    table = np.array(values, dtype=np.float32)
    return replace(
        recipe,
        tensors={**recipe.tensors, name: table.shape},
        values=lambda tensor, _: table if tensor == name else None,
    )


# --------------------------------------------------------------------------------------------------
# All of them


@pytest.mark.parametrize("name", RECIPES)
def test_writers_lie_in_one_module_each(name: str, tmp_path: Path) -> None:
    with GgufSource(written(tmp_path, RECIPES[name])) as source:
        places = layout(source).places()
        shapes = {entry.name: entry.shape for entry in source.tensors.values()}
        writers = gguf_writers.find(source.architecture, shapes, source.metadata)
    assert len(writers) > 2
    for writer in writers:
        assert len(places[writer.name]) == 1, writer.name
        assert places[writer.name][0].endswith(".weight")


# --------------------------------------------------------------------------------------------------
# Refusals

_GEMMA2, _GEMMA3 = gemma.RECIPES["gemma2"], gemma.RECIPES["gemma3"]
_LONGROPE = phi.longrope(256)
_V2, _V3 = deepseek.deepseek2(), deepseek.deepseek2(sigmoid=True)

REFUSALS: dict[str, tuple[Callable[[], Recipe], str]] = {
    "gemma, stretched": (
        lambda: with_keys(gemma.RECIPES["gemma"], rope__scaling__factor=4.0),
        "stretches its rotary embedding",
    ),
    "gemma, partial rotary": (
        lambda: with_keys(gemma.RECIPES["gemma"], rope__dimension_count=32),
        "rotates 32 dimensions",
    ),
    "gemma, a head of its own": (
        lambda: replace(
            gemma.RECIPES["gemma"],
            tensors={**gemma.RECIPES["gemma"].tensors, "output.weight": (512, 256)},
        ),
        "no lm_head.weight",
    ),
    "gemma, damaged": (
        lambda: with_keys(gemma.RECIPES["gemma"], attention__head_count="many"),
        "attention.head_count must be a whole number",
    ),
    "gemma2, a rate for sliding layers": (
        lambda: with_keys(_GEMMA2, rope__freq_base_swa=5000.0),
        "rate of their own",
    ),
    "gemma2, damaged": (
        lambda: with_keys(_GEMMA2, attn_logit_softcapping="low"),
        "attn_logit_softcapping = 'low'",
    ),
    "gemma3, capped": (
        lambda: with_keys(_GEMMA3, final_logit_softcapping=30.0),
        "caps its logits",
    ),
    "gemma3, yarn": (
        lambda: with_keys(_GEMMA3, rope__scaling__type="yarn"),
        "by the method 'yarn'",
    ),
    "gemma3, uneven pattern": (
        lambda: with_keys(
            _GEMMA3, attention__sliding_window_pattern=[True, False, True, True, False, True, True]
        ),
        "other layers than every n-th",
    ),
    "gemma3, windows only": (
        lambda: with_keys(_GEMMA3, attention__sliding_window_pattern=[True] * 7),
        "other layers than every n-th",
    ),
    "gemma3, no length": (
        lambda: with_keys(_GEMMA3, context_length=None),
        "has no gemma3.context_length",
    ),
    "gemma4, sharing after other layers": (
        lambda: gemma.gemma4([True, False, True, True, False], shared=2),
        "not a sliding and a full one",
    ),
    "gemma4, odd widths": (
        lambda: with_keys(gemma.gemma4(SSF), feed_forward_length=[512, 1024, 512]),
        "widths [512, 1024]",
    ),
    "gemma4, other key heads with values": (
        lambda: with_keys(gemma.gemma4(SSF), attention__head_count_kv=[2, 2, 1]),
        "only where the keys are the values",
    ),
    "gemma4, values in one full layer": (
        lambda: without(gemma.gemma4([*SSF, *SSF]), "blk.2.attn_v.weight"),
        "differ in their key and value heads",
    ),
    "gemma4, a table that stretches": (
        lambda: with_table(gemma.gemma4(SSF), "rope_freqs.weight", [1.0] * 32 + [8.0] * 32),
        "more than to keep some dimensions from turning",
    ),
    "gemma4, partly rotated windows": (
        lambda: with_keys(gemma.gemma4(SSF), rope__dimension_count_swa=32),
        "first dimensions of its heads",
    ),
    "gemma4, stretched": (
        lambda: with_keys(gemma.gemma4(SSF), rope__scaling__factor=2.0),
        "no published gemma4 does",
    ),
    "gemma4, no pattern": (
        lambda: with_keys(gemma.gemma4(SSF), attention__sliding_window_pattern=None),
        "has no gemma4.attention.sliding_window_pattern",
    ),
    "gemma4, no scale of a layer": (
        lambda: without(gemma.gemma4(SSF), "blk.1.layer_output_scale.weight"),
        "lacks the tensor for model.layers.1.layer_scalar",
    ),
    "phi3, yarn": (
        lambda: with_keys(
            phi.RECIPES["phi3"], rope__scaling__type="yarn", rope__scaling__factor=4.0
        ),
        "'yarn', which mlx-lm's phi3 does not know",
    ),
    "phi3, heads of another size": (
        lambda: with_keys(phi.RECIPES["phi3"], attention__key_length=32),
        "heads of 32 dimensions",
    ),
    "phi3, another magnitude": (
        lambda: with_keys(_LONGROPE, rope__scaling__attn_factor=1.5),
        "by 1.5 (rope.scaling.attn_factor)",
    ),
    "phi3, stretched twice": (
        lambda: with_keys(_LONGROPE, rope__scaling__factor=4.0),
        "beside the tables of longrope",
    ),
    "phi3, one table": (
        lambda: without(_LONGROPE, "rope_factors_short.weight"),
        "rope_factors_short.weight",
    ),
    "phi3, short tables": (
        lambda: phi.longrope(256, rotated=32, tables=32),
        "32 values in rope_factors_short.weight where 16",
    ),
    "deepseek2, groups after a softmax": (
        lambda: deepseek.deepseek2(experts=8, groups=4),
        "sum of the two best scores",
    ),
    "deepseek2, normalized after a softmax": (
        lambda: with_keys(_V2, expert_weights_norm=True),
        "add up to one",
    ),
    "deepseek2, another gate": (
        lambda: with_keys(_V2, expert_gating_func=4),
        "expert_gating_func 4",
    ),
    "deepseek2, tied experts": (
        lambda: deepseek.deepseek2(tied=True),
        "no output head of its own",
    ),
    "deepseek2, yarn without its multiplier": (
        lambda: with_keys(deepseek.RECIPES["deepseek v2"], rope__scaling__yarn_log_multiplier=None),
        "without yarn_log_multiplier",
    ),
    "deepseek2, linear": (
        lambda: with_keys(_V3, rope__scaling__type="linear", rope__scaling__factor=4.0),
        "'linear' without yarn_log_multiplier",
    ),
    "deepseek2, yarn without experts": (
        lambda: deepseek.deepseek2(dense=2, experts=0, **deepseek.yarn(1.0)),
        "does not scale attention",
    ),
    "deepseek2, scaled by position": (
        lambda: with_keys(_V3, attention__temperature_scale=0.1),
        "attention.temperature_scale",
    ),
    "deepseek2, coarse norms": (
        lambda: with_keys(_V3, attention__layer_norm_rms_epsilon=1e-3),
        "adds 0.001 in all its norms",
    ),
    "deepseek2, no latent size": (
        lambda: with_keys(_V3, attention__kv_lora_rank=None),
        "has no deepseek2.attention.kv_lora_rank",
    ),
    "deepseek2, no keys": (
        lambda: without(_V2, "blk.1.attn_k_b.weight"),
        "blk.1.attn_k_b.weight",
    ),
    "deepseek2, no bias of a gate": (
        lambda: without(_V3, "blk.1.exp_probs_b.bias"),
        "model.layers.1.mlp.gate.e_score_correction_bias",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_say_why(name: str, tmp_path: Path) -> None:
    make, why = REFUSALS[name]
    with pytest.raises(UserError) as refusal:
        layout_of(tmp_path, make())
    assert why in str(refusal.value)
    assert "tiny.gguf" in str(refusal.value)


# --------------------------------------------------------------------------------------------------
# What is special


@pytest.mark.parametrize(
    ("make", "layers"),
    [(gemma.RECIPES["gemma2"], 46), (gemma.RECIPES["gemma3"], 62)],
    ids=["gemma2", "gemma3"],
)
def test_the_largest_gemmas_divide_queries_by_hidden_over_heads(
    make: Recipe, layers: int, tmp_path: Path
) -> None:
    width = 512
    shapes = gemma.usual_tensors(layers, width, post_norms=True, qk_norm=make is _GEMMA3)
    recipe = replace(
        with_keys(make, block_count=layers, embedding_length=width),
        tensors=shapes,
        values=_quieter,
    )
    path = written(tmp_path, recipe)
    with GgufSource(path) as source:
        loaded = load(source)
    assert loaded.config["query_pre_attn_scalar"] == width // gemma.HEADS != gemma.HEAD
    assert disagreement(loaded.model, path, PROMPT, near=0.02, n=8) < 0.02


def _quieter(name: str, noise: np.ndarray) -> np.ndarray | None:
    """Post-norms' gains that let many layers write as much as a few."""
    return (1 + 0.2 * noise) * np.float32(0.1) if "post_" in name else None


@pytest.mark.parametrize("window", [5, 16, 40])
def test_gemma2_looks_back_as_far_as_llama_cpp(window: int, tmp_path: Path) -> None:
    path = written(tmp_path, with_keys(_GEMMA2, attention__sliding_window=window))
    with GgufSource(path) as source:
        loaded = load(source)
    assert loaded.config["max_position_embeddings"] == 8192
    prompt = (PROMPT * 8)[: 3 * 16 + 1]
    assert disagreement(loaded.model, path, prompt, near=0.02) < 0.02
    # Else the model would not tell the difference.
    (tmp_path / "wide").mkdir()
    with GgufSource(written(tmp_path / "wide", _GEMMA2)) as source:
        wide = load(source)
    apart = np.abs(logprobs(loaded.model, prompt) - logprobs(wide.model, prompt)).max(axis=1)
    assert apart[:window].max() < 1e-4
    assert apart[window + 1 :].max() > 0.05


def test_a_folder_of_gemma2_says_that_mlx_lm_has_no_window(tmp_path: Path) -> None:
    path = written(tmp_path, with_keys(_GEMMA2, attention__sliding_window=16))
    record = conversion.convert(str(path), tmp_path / "folder")
    assert "attends to the last 16 tokens only" in record["note"]
    assert "mlx-lm itself attends to all" in record["note"]
    (tmp_path / "plain").mkdir()
    other = written(tmp_path / "plain", _GEMMA3)
    assert "note" not in conversion.convert(str(other), tmp_path / "other")


def test_longrope_tables_stand_in_config_as_published(tmp_path: Path) -> None:
    config = layout_of(tmp_path, _LONGROPE).config
    scaling = config["rope_scaling"]
    assert scaling["type"] == "longrope"
    assert scaling["short_factor"][0] == scaling["long_factor"][0] == 1.05
    assert scaling["short_factor"][-1] == 1.5
    assert scaling["long_factor"][-1] == 40.0
    assert config["original_max_position_embeddings"] == 256


def test_longrope_is_llama_cpps_in_long_contexts_only(tmp_path: Path) -> None:
    path = written(tmp_path, phi.longrope(512))
    with GgufSource(path) as source:
        model = load(source).model
    assert disagreement(model, path, PROMPT, near=0.02, n=8, n_ctx=513) < 0.02
    assert disagreement(model, path, PROMPT, near=9, n=8, n_ctx=512) > 0.1


def test_older_and_newer_deepseek_files_are_the_same_model(tmp_path: Path) -> None:
    """kv_b and its halves, of which the keys' is transposed, in both classes of mlx-lm."""
    for sigmoid in (False, True):
        old = deepseek.deepseek2(sigmoid=sigmoid, apart=False)
        (tmp_path / str(sigmoid)).mkdir()
        with GgufSource(written(tmp_path / str(sigmoid), old)) as source:
            joined = source.values("blk.0.attn_kv_b.weight")
            parameters = dict(tree_flatten(load(source).model.parameters()))
        attention = "model.layers.0.self_attn"
        if not sigmoid:
            np.testing.assert_array_equal(parameters[f"{attention}.kv_b_proj.weight"], joined)
            continue
        both = joined.reshape(deepseek.HEADS, deepseek.NOPE + deepseek.VALUE, deepseek.LATENT)
        np.testing.assert_array_equal(
            parameters[f"{attention}.embed_q.weight"],
            both[:, : deepseek.NOPE].swapaxes(1, 2),
        )
        np.testing.assert_array_equal(
            parameters[f"{attention}.unembed_out.weight"], both[:, deepseek.NOPE :]
        )
