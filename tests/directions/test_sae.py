"""Sparse autoencoders: reading every format, and each architecture's encoder against float64."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from abl_mlx.directions import sae_features, sae_files
from abl_mlx.directions.sae import Sae
from convert.base.errors import UserError
from tests.support import saes

RECORDED = Path(__file__).parents[1] / "support" / "saelens"
CASES = sorted(path.name for path in RECORDED.iterdir())


def encoded(sae: Sae, states: np.ndarray) -> np.ndarray:
    return np.array(sae.encode(mx.array(states.astype(np.float32))))


@pytest.mark.parametrize("case", CASES)
def test_activations_are_those_that_saelens_computed(case: str) -> None:
    expected = json.loads((RECORDED / case / "expected.json").read_text())
    sae = sae_files.read(str(RECORDED / case))
    found = encoded(sae, np.array(expected["states"]))
    assert np.abs(found - np.array(expected["activations"])).max() < 1e-5
    assert np.count_nonzero(expected["activations"]) > 5
    assert (sae.layer, sae.model, sae.name) == (2, "made-up", case)


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk"])
@pytest.mark.parametrize("how", [{}, {"apply_b_dec_to_input": False},
                                 {"normalize_activations": "layer_norm"},
                                 {"normalize_activations": "constant_norm_rescale"}])  # fmt: skip
def test_each_encoder_agrees_with_float64(
    architecture: str, how: dict[str, object], tmp_path: Path
) -> None:
    weights = saes.weights(architecture, width=12, count=40, seed=3)
    folder = saes.write_saelens(tmp_path / "sae", weights, architecture, k=4, **how)
    states = np.random.default_rng(5).normal(size=(30, 12))
    wanted = saes.reference(weights, states, architecture, k=4, **how)
    found = encoded(sae_files.read(str(folder)), states)
    assert 20 < np.count_nonzero(wanted) < wanted.size
    assert np.abs(found - wanted).max() < 1e-5


def test_folders_of_earlier_versions_are_read(tmp_path: Path) -> None:
    weights = saes.weights("topk", width=12, count=40, seed=3)
    old = {
        "d_in": 12, "d_sae": 40, "hook_point": "blocks.{layer}.hook_resid_pre",
        "hook_point_layer": 5, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4},
        "normalize_activations": False, "model_name": "gpt2-small",
        "model_from_pretrained_kwargs": {"center_writing_weights": True},
    }  # fmt: skip
    folder = saes.write_folder(tmp_path / "sae", weights, old)
    sae = sae_files.read(str(folder / "sae_weights.safetensors"))
    assert (sae.layer, sae.architecture, sae.k, sae.model) == (4, "topk", 4, "gpt2-small")
    states = np.random.default_rng(5).normal(size=(30, 12)) + 3.0
    middle = states - states.mean(axis=1, keepdims=True)
    wanted = saes.reference(weights, middle, "topk", k=4)
    assert np.abs(encoded(sae, states) - wanted).max() < 1e-5


@pytest.mark.parametrize("form", ["npz", "safetensors"])
def test_gemma_scope_is_read(form: str, tmp_path: Path) -> None:
    weights = saes.weights("jumprelu", width=12, count=40, seed=4)
    folder = tmp_path / "layer_3" / "width_16k" / "average_l0_7"
    saes.write_gemma_scope(folder, weights, form)
    sae = sae_files.read(str(folder))
    assert (sae.layer, sae.architecture) == (3, "jumprelu")
    if form == "npz":
        assert sae.name == "layer_3/width_16k/average_l0_7"
    states = np.random.default_rng(5).normal(size=(30, 12))
    wanted = saes.reference(weights, states, "jumprelu", apply_b_dec_to_input=False)
    assert np.abs(encoded(sae, states) - wanted).max() < 1e-5
    rows = weights["W_dec"][[7, 2]]
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert np.abs(np.array(sae.directions((7, 2))) - rows).max() < 1e-6


def test_a_layer_can_be_given_where_no_file_tells_it(tmp_path: Path) -> None:
    weights = saes.weights("jumprelu", width=12, count=40, seed=4)
    folder = saes.write_gemma_scope(tmp_path / "sae", weights, "npz")
    with pytest.raises(UserError, match="does not say which layer it reads: give it with --layer"):
        sae_files.read(str(folder))
    assert sae_files.read(str(folder), layer=2).layer == 2


SPOILT = [
    ({"hook_name": "blocks.2.hook_mlp_out"}, "it reads blocks.2.hook_mlp_out, and only"),
    ({"hook_name": "blocks.0.hook_resid_pre"}, "the embedding; states are measured after layers"),
    ({"architecture": "temporal"}, "the architecture temporal is not known here"),
    ({"architecture": "topk"}, "does not say k, the number of features"),
    ({"architecture": "gated"}, "lacks b_gate, r_mag, b_mag"),
    ({"normalize_activations": "expected_average_only_in"}, "was not folded into the weights"),
    ({"reshape_activations": "hook_z"}, "reads the heads of attention"),
    ({"activation_fn": "tanh-relu"}, "the activation function tanh-relu is not known"),
    ({"architecture": 3}, "cannot be used"),
]


@pytest.mark.parametrize(("spoilt", "said"), SPOILT)
def test_what_cannot_be_used_is_refused_in_one_sentence(
    spoilt: dict[str, object], said: str, tmp_path: Path
) -> None:
    weights = saes.weights("standard", width=12, count=40, seed=4)
    config = {"hook_name": "blocks.2.hook_resid_post", "architecture": "standard", **spoilt}
    folder = saes.write_folder(tmp_path / "sae", weights, config)
    with pytest.raises(UserError, match=said) as caught:
        sae_files.read(str(folder))
    assert "\n" not in str(caught.value)


def test_damaged_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--sae .*nowhere does not exist"):
        sae_files.read(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="holds no sparse autoencoder"):
        sae_files.read(str(tmp_path))
    weights = saes.weights("jumprelu", width=12, count=40, seed=4)
    damaged = [
        ({"W_dec": weights["W_dec"].T}, r"W_dec must be of the shape \(40, 12\)"),
        ({"threshold": weights["threshold"] * np.nan}, "threshold holds a number that is not"),
    ]
    for number, (changed, said) in enumerate(damaged):
        folder = tmp_path / f"layer_1/{number}"
        saes.write_gemma_scope(folder, {**weights, **changed}, "npz")
        with pytest.raises(UserError, match=said):
            sae_files.read(str(folder))
    folder = saes.write_gemma_scope(tmp_path / "gemma-scope-2b-pt-att/layer_1/w", weights, "npz")
    with pytest.raises(UserError, match="reads att, and only autoencoders of the residual stream"):
        sae_files.read(str(folder))
    torn = tmp_path / "layer_2" / "params.npz"
    torn.parent.mkdir()
    torn.write_bytes(b"PK nothing")
    with pytest.raises(UserError, match="could not be read as a sparse autoencoder"):
        sae_files.read(str(torn))


@pytest.mark.parametrize("form", ["saelens", "npz", "safetensors"])
def test_spoilt_bytes_end_in_a_sentence_or_in_finite_activations(form: str, tmp_path: Path) -> None:
    weights = saes.weights("jumprelu", width=4, count=6, seed=4)
    folder = tmp_path / "layer_1"
    if form == "saelens":
        saes.write_saelens(folder, weights, "jumprelu")
    else:
        saes.write_gemma_scope(folder, weights, form)
    random = np.random.default_rng(8)
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    refused = 0
    for _ in range(120):
        path = list(whole)[random.integers(len(whole))]
        spoilt = bytearray(whole[path])
        for at in random.integers(len(spoilt), size=random.integers(1, 4)):
            spoilt[at] = random.integers(256)
        path.write_bytes(bytes(spoilt[: random.integers(len(spoilt) // 2, len(spoilt) + 1)]))
        try:
            sae = sae_files.read(str(folder))
        except UserError as error:
            refused += "\n" not in str(error)
        else:
            assert encoded(sae, np.ones((2, sae.width))).shape == (2, sae.count)
        path.write_bytes(whole[path])
    assert refused > 60


def test_one_that_does_not_fit_a_model_is_refused(tmp_path: Path) -> None:
    weights = saes.weights("standard", width=12, count=40, seed=4)
    folder = saes.write_saelens(tmp_path / "sae", weights, "standard")
    sae = sae_files.read(str(folder))
    sae.check(12, 3, "demo")
    with pytest.raises(
        UserError, match=r"of 12 dimensions, but the residual stream of demo has 16"
    ):
        sae.check(16, 3, "demo")
    with pytest.raises(UserError, match=r"after layer 2, but demo has the layers 0 to 1"):
        sae.check(12, 2, "demo")
    with pytest.raises(UserError, match=r"--feature 40: sae has the features 0 to 39"):
        sae.directions((3, 40))


def test_features_are_ranked_by_the_difference_over_the_pooled_deviation() -> None:
    random = np.random.default_rng(2)
    harmful = np.maximum(random.normal(size=(40, 6)), 0)
    harmless = np.maximum(random.normal(size=(30, 6)), 0)
    harmful[:, 4] += 3
    harmful[:, 1] += 1
    harmless[:, 2] += 2
    harmful[:, 5] = harmless[:, 5] = 0.0
    wanted = [
        (harmful[:, f].mean() - harmless[:, f].mean())
        / np.sqrt((harmful[:, f].var(ddof=1) + harmless[:, f].var(ddof=1)) / 2)
        if f != 5
        else 0.0
        for f in range(6)
    ]
    found = sae_features.differences(harmful, harmless)
    assert np.abs(found - wanted).max() < 1e-9
    ranked = sae_features.ranked(harmful, harmless, 3)
    assert ranked[:2] == [4, 1]
    assert 2 not in ranked
    one = sae_features.separation_of(harmful[:, 4], harmless[:, 4])
    pairs = harmful[:, 4][:, None] - harmless[:, 4][None]
    assert one.auc == pytest.approx((pairs > 0).mean() + (pairs == 0).mean() / 2)
    assert one.interval[0] < one.auc <= one.interval[1]
    assert one.error == pytest.approx(np.sqrt(70 / 1200 + wanted[4] ** 2 / 140))
    # The error of d is what repeated draws show, for normal values.
    draws = [
        sae_features.differences(random.normal(1, 1, (40, 1)), random.normal(0, 1, (30, 1)))[0]
        for _ in range(3000)
    ]
    assert np.std(draws) == pytest.approx(sae_features.error(1.0, 40, 30), rel=0.08)
