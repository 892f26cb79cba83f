"""`abl-mlx audit`: edited models are told from others, with and without their base."""

import json
import shutil
import warnings

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten

from abl_mlx.audit_weights import gram as gram_matrix
from abl_mlx.audit_weights import spectrum
from abl_mlx.choices import ApplyOptions, MeasureOptions
from abl_mlx.cli.main import cli
from abl_mlx.commands import audit, conversion, learn, measure_apply
from abl_mlx.demo import MODEL_PATH
from abl_mlx.directions import direction_file
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.inputs import prompts
from abl_mlx.models.chat_model import load
from abl_mlx.models.writers import find_writers
from abl_mlx.outputs import stream_weights
from abl_mlx.outputs.model_file import find_model
from convert.base.errors import UserError
from tests.support import tiny

PLAIN = ApplyOptions.of(plain_rounding=True, max_leak=1e9)


# --- the mathematics ---------------------------------------------------------------------------


@pytest.mark.parametrize("d", [40, 128, 300])
def test_a_gram_matrix_is_solved_by_its_factor(d):
    random = np.random.default_rng(d)
    weight = random.standard_normal((d, 2 * d))
    gram = weight @ weight.T
    wanted = random.standard_normal((d, 5))
    shifted = gram + 1e-5 * np.median(np.diagonal(gram)) * np.eye(d)
    np.testing.assert_allclose(gram_matrix._solver(gram)(wanted), np.linalg.solve(shifted, wanted))
    # Rounding may leave an eigenvalue below 0: then a larger shift is taken.
    gram -= (np.linalg.eigvalsh(gram)[0] + 1e-3 * np.median(np.diagonal(gram))) * np.eye(d)
    found = gram_matrix._solver(gram)(wanted)
    assert np.isfinite(found).all()
    assert np.abs(gram @ found - wanted).max() > 0


def writers(seed=0, d=96, layers=4, n=128):
    """Random weights (d, n) with a spread of row norms: (role, layer, W)."""
    random = np.random.default_rng(seed)
    rows = np.exp(0.4 * random.standard_normal((d, 1)))
    found = [("embed", -1, random.standard_normal((d, 400)))]
    for layer in range(layers):
        found.append(("o", layer, random.standard_normal((d, d))))
        found.append(("down", layer, random.standard_normal((d, n))))
    return [(role, layer, rows * w) for role, layer, w in found]


def planted(models, basis, strength=1.0, layers=None):
    """W − α U(UᵀW), of the writers in some layers."""
    return [
        (role, layer, w - strength * basis @ (basis.T @ w))
        if layers is None or layer in layers
        else (role, layer, w)
        for role, layer, w in models
    ]


def unit(d, k=1, seed=9):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((d, k)))[0]


def analysed(models, reach):
    candidates = spectrum.Candidates(1 + max(layer for _, layer, _ in models))
    grams = []
    for role, layer, w in models:
        grams.append(w @ w.T)
        candidates.add(role, layer, grams[-1])
    basis, count = candidates.basis()
    return basis, spectrum.gap(spectrum.search(forms_of(grams, basis, count), reach))


def forms_of(grams, basis, count):
    small = [basis.T @ gram @ basis for gram in grams]
    return spectrum.forms(small, [np.diagonal(gram) for gram in grams], basis, count)


@pytest.mark.parametrize(
    ("strength", "layers", "k", "reach"),
    [(1, None, 1, 1.0), (1, None, 3, 1.0), (0.7, None, 1, 1.0), (1, {0, 2}, 1, 0.1)],
)
def test_a_planted_direction_stands_out_and_is_recovered(strength, layers, k, reach):
    u = unit(96, k)
    basis, found = analysed(planted(writers(), u, strength, layers), reach)
    assert found.rank == k
    assert found.ratio > 3
    recovered = np.linalg.qr(basis @ np.stack([one.direction for one in found.found], axis=1))[0]
    cosines = np.linalg.svd(recovered.T @ u, compute_uv=False)
    assert cosines.min() > (0.95 if strength < 1 else 0.9999)


@pytest.mark.parametrize("seed", range(3))
def test_nothing_stands_out_where_nothing_was_planted(seed):
    for reach, limit in ((1.0, 0.2), (0.1, 0.05)):
        _, found = analysed(writers(seed), reach)
        assert found.size < limit


def test_energies_are_what_the_weights_hold_along_the_direction():
    models = planted(writers(), unit(96), 0.5)
    candidates = spectrum.Candidates(4)
    for role, layer, w in models:
        candidates.add(role, layer, w @ w.T)
    basis, count = candidates.basis()
    columns = basis / candidates.units[:, None]
    assert np.allclose(columns.T @ columns, np.eye(basis.shape[1]), atol=1e-9)
    forms = forms_of([w @ w.T for _, _, w in models], basis, count)
    one = spectrum.search(forms, 1.0)[0]
    v = basis @ one.direction
    for energy, scale, (_, _, w) in zip(one.energies, forms.units, models, strict=True):
        # Against what independent dimensions would hold: Σ_j v_j² |row j|².
        alone = float(np.sum((v * v) @ (w * w)))
        assert energy * scale == pytest.approx(float(np.sum((v @ w) ** 2)) / alone, rel=1e-3)
    gain = np.log1p(1 / (one.energies + spectrum.FLOOR))
    assert one.score == pytest.approx((gain.sum() - gain.max()) / (len(gain) - 1))


def quieted(models, share):
    """Some dimensions are quiet in every writer, others in half of them."""
    for index, (_, _, w) in enumerate(models):
        w[[5, 17, 40]] *= share
        w[[60, 61, 62] if index % 2 else [63, 64, 65]] *= share
    return models


def test_dimensions_that_are_hardly_written_are_no_evidence():
    quiet = quieted(writers(2), 1e-3)
    for _, _, w in quiet:
        w[[80, 81]] = 0
    for reach, limit in ((1.0, 0.2), (0.1, 0.05)):
        assert analysed(quiet, reach)[1].size < limit


@pytest.mark.parametrize("towards", [0, 3])
def test_an_edit_is_seen_beside_them_and_along_few_dimensions(towards):
    u = unit(96) + towards * np.eye(96)[:, 30:31]
    u /= np.linalg.norm(u)
    basis, found = analysed(planted(quieted(writers(2), 0.1), u), 1.0)
    assert found.rank == 1
    assert found.size > 1
    v = basis @ found.found[0].direction
    assert abs(v @ u[:, 0]) / np.linalg.norm(v) > 0.99


def test_the_climb_finds_what_only_some_writers_lack():
    u = unit(96)[:, 0]
    models = planted(writers(3), u[:, None], 1, {0, 2})
    grams = np.stack([w @ w.T / np.trace(w @ w.T) * 96 for _, _, w in models])
    forms = spectrum.Forms(grams, np.stack([np.diag(np.diag(g)) for g in grams]), np.ones(9))
    start = u + 0.5 * unit(96, seed=4)[:, 0]
    start /= np.linalg.norm(start)
    assert abs(start @ u) < 0.95
    before = spectrum.gains(forms.energies(start), 0.1).mean()
    after = spectrum._climb(forms, start, 0.1)
    assert spectrum.gains(after.energies, 0.1).mean() > before + 0.2
    assert abs(after.direction @ u) > 0.9999


def test_weakest_directions_of_a_wide_matrix_come_from_inverse_iteration():
    d = 800
    assert d > gram_matrix._SMALL
    u = unit(d, 2)
    w = np.random.default_rng(0).standard_normal((d, 2 * d)).astype(np.float32)
    w -= (u @ (u.T @ w)).astype(np.float32)
    found = gram_matrix.lowest(w @ w.T, 6)
    assert np.linalg.svd(found.T @ u, compute_uv=False).min() > 0.9999
    assert np.allclose(found.T @ found, np.eye(6), atol=1e-6)


def test_dimensions_without_anything_are_no_weak_directions():
    w = np.random.default_rng(0).standard_normal((40, 200))
    w[[3, 17]] = 0
    found = gram_matrix.lowest(w @ w.T, 5)
    assert not found[[3, 17]].any()
    assert found.shape == (40, 5)


def test_the_bulk_is_not_moved_by_a_few_large_eigenvalues():
    w = np.random.default_rng(0).standard_normal((64, 640))
    w[0] *= 100
    gram = w @ w.T
    values = np.sort(np.linalg.eigvalsh(gram))[:-16]
    assert gram_matrix.bulk(gram) == pytest.approx(values.mean(), rel=0.1)
    assert gram_matrix.bulk(np.zeros((64, 64))) == 0


# --- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["gemma2", "qwen3_moe"])
def test_slabs_are_the_models_weights_behind_their_gains(tmp_path, arch):
    folder = tiny.write_model(tmp_path / "m", arch, "bfloat16")
    chat = load(folder)
    expected = {}
    for writer in find_writers(chat):
        w = np.array(writer.module["weight"].astype(mx.float32))
        stacked = {"embedding": w.T}.get(writer.kind)
        if stacked is None:
            stacked = w if w.ndim == 2 else np.concatenate(list(w), axis=1)
        gain = 1 if writer.gain is None else np.array(writer.gain.astype(mx.float32))[:, None]
        expected[f"{writer.path}.weight"] = stacked * gain
    with find_model(str(folder)) as file:
        model = file.stream_weights()
        assert {one.name for one in model.writers} == set(expected)
        assert [one.layer for one in model.writers] == sorted(one.layer for one in model.writers)
        for one in model.writers:
            found = np.concatenate(list(one.each()), axis=1)
            assert found.shape == (model.width, one.lines)
            assert np.allclose(found, expected[one.name], rtol=1e-3, atol=1e-5)
        assert any(one.gain is not None for one in model.writers) == (arch == "gemma2")


# --- without a base ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The demo's direction and the demo in 8 and 4 bits."""
    from mlx_lm import convert

    folder = tmp_path_factory.mktemp("audit")
    measure_apply.measure("demo", folder / "r.safetensors", MeasureOptions())
    for bits in (8, 4):
        convert(str(MODEL_PATH), str(folder / f"demo-{bits}"), quantize=True, q_bits=bits)
    return folder


def edited(work, out, model="demo", options=None):
    measure_apply.apply(work / "r.safetensors", model, [out], options or ApplyOptions())
    return out


VARIANTS = {
    "float": ("demo", ApplyOptions()),
    "0.7": ("demo", ApplyOptions.of(strength=0.7, max_leak=1)),
    "half": ("demo", ApplyOptions.of(layers=frozenset([0, 1]))),
    "8 naive, half": ("8", PLAIN.but(layers=frozenset([2, 3]))),
    "8 naive, 0.7": ("8", PLAIN.but(strength=0.7)),
    "4": ("4", ApplyOptions()),
    "4, half": ("4", ApplyOptions.of(layers=frozenset([1, 3]))),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_edited_models_are_told_and_their_direction_is_recovered(work, tmp_path, name):
    source, options = VARIANTS[name]
    model = "demo" if source == "demo" else str(work / f"demo-{source}")
    out = edited(work, tmp_path / "out", model, options)
    record = audit.audit(str(out), direction=work / "r.safetensors")
    weights = record["weights"]
    assert weights["verdict"] == "edited", weights
    assert record["direction_cosine"] >= (0.9 if source == "4" else 0.95)
    assert weights["layers"] == sorted(options.editing.layers or range(4))
    assert weights["embedding"] or options.editing.strength < 1
    assert weights["strength"] == pytest.approx(options.editing.strength, abs=0.15)
    assert weights["rank"] == 1


def test_two_edits_of_different_layers_are_told_apart(tmp_path):
    model, both = "demo", unit(256, 2).T.astype(np.float32)
    for row, layers in zip(both, ({0, 1}, {2, 3}), strict=True):
        out = tmp_path / f"{min(layers)}"
        options = ApplyOptions.of(layers=frozenset(layers), embedding=False)
        measure_apply.apply(DirectionFile(mx.array(row[None])), model, [out], options)
        model = str(out)
    weights = audit.audit(model).weights
    assert (weights.verdict, weights.rank, weights.layers) == ("edited", 2, [0, 1, 2, 3])
    assert weights.strength == pytest.approx(1, abs=0.02)
    (said,) = (one for one in weights.evidence if "from different layers" in one)
    assert set(said.rpartition(": ")[2].split("; ")) == {"0-1", "2-3"}


@pytest.mark.parametrize(
    ("strength", "directions", "verdict"),
    [(1.0, 1, "edited"), (0.93, 1, "cannot tell"), (0.8, 1, "not edited"), (1.0, 4, "edited")],
)
def test_one_layer_is_enough_for_a_full_removal(tmp_path, strength, directions, verdict):
    """And for full removals of each layer's own direction, which no three writers share."""
    true = unit(256, directions).T.astype(np.float32)
    layers = [2] if directions == 1 else [0, 1, 2, 3]
    chosen = mx.array(true if directions == 1 else true[:, None])
    options = ApplyOptions.of(
        strength=strength, layers=frozenset(layers), embedding=False, max_leak=1
    )
    measure_apply.apply(DirectionFile(chosen), "demo", [tmp_path / "out"], options)
    found = tmp_path / "found.safetensors"
    weights = audit.audit(str(tmp_path / "out"), output=found).weights
    assert weights.verdict == verdict
    if verdict == "not edited":
        assert weights.not_seen_below["one layer"] > strength
        return
    assert (weights.layers, weights.rank, weights.embedding) == (layers, directions, False)
    assert weights.strength == pytest.approx(strength, abs=0.02)
    recovered = np.array(direction_file.read(found).selected)
    assert np.linalg.svd(recovered @ true.T, compute_uv=False).min() > 0.98
    assert weights.evidence[0].startswith(f"in layer {layers[0]} all 2 residual writers hold")


@pytest.mark.parametrize("name", ["demo", "8", "4"])
def test_models_as_they_are_are_not_edited(work, name):
    record = audit.audit("demo" if name == "demo" else str(work / f"demo-{name}"))
    assert record["verdict"] == "not edited", record["evidence"]
    assert record["layers"] == []


def changed(out, change):
    shutil.copytree(MODEL_PATH, out)
    file = out / "model.safetensors"
    tensors = dict(mx.load(str(file)))
    for name, value in tensors.items():
        if name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight")):
            w = np.array(value.astype(mx.float32))
            turned = name.endswith("embed_tokens.weight")
            w = change(w.T if turned else w)
            tensors[name] = mx.array((w.T if turned else w).astype(np.float32)).astype(value.dtype)
    mx.eval(tensors)
    mx.save_safetensors(str(file), tensors, {"format": "mlx"})
    return out


def lora(w):
    random = np.random.default_rng(w.shape[1])
    low = random.standard_normal((w.shape[0], 4)) @ random.standard_normal((4, w.shape[1]))
    return w + 0.2 * low * np.linalg.norm(w) / np.linalg.norm(low)


def without_dimensions(w):
    w = w.copy()
    w[[3, 70, 200]] = 0
    return w


def without_most_dimensions(w):
    """Of the layers' writers; the embedding has more lines."""
    return w * (np.arange(len(w)) >= 160)[:, None] if w.shape[1] <= 512 else w


def without_the_weakest(w):
    u, s, v = np.linalg.svd(w, full_matrices=False)
    return (u[:, :-1] * s[:-1]) @ v[:-1]


CONTROLS = {
    "a merged LoRA": lora,
    "pruned dimensions": without_dimensions,
    "centred": lambda w: w - w.mean(axis=0),
    "most dimensions pruned": without_most_dimensions,
    "a null direction of each writer's own": without_the_weakest,
}


@pytest.mark.parametrize("name", CONTROLS)
def test_other_changes_are_no_edit(tmp_path, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # NumPy's, of a division by 0
        record = audit.audit(str(changed(tmp_path / "out", CONTROLS[name])))
    assert record["verdict"] == "not edited", record["evidence"]
    left_out = [line for line in record["evidence"] if line.startswith("left out")]
    assert bool(left_out) == (name == "centred")


@pytest.mark.parametrize(
    ("arch", "width"), [("llama", 64), ("qwen3_moe", 64), ("olmo2", 128), ("gemma3_text", 64)]
)
def test_random_models_are_not_edited(tmp_path, arch, width):
    size = {"hidden_size": width, "intermediate_size": 2 * width}
    folder = tiny.write_model(tmp_path / "m", arch, **size)
    assert audit.audit(str(folder))["verdict"] == "not edited"


def test_an_architecture_whose_writers_are_unknown_cannot_be_told(tmp_path, monkeypatch):
    def refuse(chat):
        raise UserError("twisted is refused: its layers write through a twist.")

    monkeypatch.setattr(stream_weights, "find_writers", refuse)
    record = audit.audit("demo")
    assert record["verdict"] == "cannot tell"
    assert "through a twist" in record["evidence"][0]


def test_a_gguf_is_audited_in_its_own_types(work, tmp_path):
    base = tmp_path / "base.gguf"
    conversion.convert("demo", base, quantize="Q4_K")
    assert audit.audit(str(base))["weights"]["verdict"] == "not edited"
    out = edited(work, tmp_path / "out.gguf", str(base))
    record = audit.audit(str(out), direction=work / "r.safetensors")
    assert record["weights"]["verdict"] == "edited"
    assert record["direction_cosine"] > 0.99
    types = {one["type"] for one in record["weights"]["writers"].values()}
    assert types == {"Q4_K", "Q6_K"}
    # Against the MLX folder in float16: noise of rounding, and the edit.
    compared = audit.audit(str(out), base="demo", direction=work / "r.safetensors")["weights"]
    assert compared["verdict"] == "edited"
    assert compared["direction_cosine"] > 0.95
    assert compared["strength"] == pytest.approx(1, abs=0.1)
    assert compared["layers"] == [0, 1, 2, 3]
    innocent = audit.audit(str(base), base="demo")["weights"]
    assert innocent["verdict"] == "not edited", innocent["evidence"]
    assert 0.01 < max(w["relative_difference"] for w in innocent["writers"].values()) < 0.2


# --- with a base -------------------------------------------------------------------------------


def test_the_base_tells_strength_layers_and_direction(work, tmp_path):
    options = ApplyOptions.of(strength=0.4, layers=frozenset([2]), embedding=False, max_leak=1)
    out = edited(work, tmp_path / "out", "demo", options)
    record = audit.audit(str(out), base="demo", direction=work / "r.safetensors")
    weights = record["weights"]
    assert weights["verdict"] == "edited"
    assert weights["layers"] == [2]
    assert not weights["embedding"]
    assert weights["strength"] == pytest.approx(0.4, abs=0.01)
    assert weights["direction_cosine"] > 0.999
    shares = {name: one for name, one in weights["writers"].items() if one["edited"]}
    assert len(shares) == 2
    assert all(one["rank_1_share"] > 0.99 for one in shares.values())


def test_a_merged_adapter_is_no_removal(tmp_path):
    out = changed(tmp_path / "out", lora)
    record = audit.audit(str(out), base="demo")
    assert record["verdict"] == "not edited", record["evidence"]
    assert "resembles what was there" in record["evidence"][0]


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory):
    """The demo after a few steps on its own prompts, all weights trained."""
    from mlx_lm import load as load_trainable

    out = tmp_path_factory.mktemp("tuned") / "model"
    shutil.copytree(MODEL_PATH, out)
    model, tokenizer = load_trainable(str(MODEL_PATH))[:2]
    model.set_dtype(mx.float32)
    texts = prompts.load_demo().harmless.train.texts
    ids = [id for text in texts for id in tokenizer.encode(text, add_special_tokens=False)]

    def loss(model, tokens):
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")

    optimizer = optim.Adam(learning_rate=1e-3)
    step = nn.value_and_grad(model, loss)
    for tokens in mx.array(np.resize(ids, 4 * 64)).reshape(4, 2, 32):
        optimizer.update(model, step(model, tokens)[1])
        mx.eval(model.parameters(), optimizer.state)
    trained = {name: value.astype(mx.float16) for name, value in tree_flatten(model.parameters())}
    mx.save_safetensors(str(out / "model.safetensors"), trained, {"format": "mlx"})
    return out


def test_a_fine_tuned_model_is_not_edited(fine_tuned):
    compared = audit.audit(str(fine_tuned), base="demo")
    # Trained this hard, an embedding may move along its own directions: no verdict is fine too.
    assert compared["verdict"] != "edited", compared["evidence"]
    changes = [one["relative_difference"] for one in compared["weights"]["writers"].values()]
    assert min(changes) > 0.02  # it was really trained
    assert audit.audit(str(fine_tuned))["verdict"] == "not edited"


def test_of_a_fine_tune_and_a_merge_no_edit_is_learned(fine_tuned, tmp_path):
    merged = tmp_path / "merged"
    shutil.copytree(fine_tuned, merged)
    tuned, demo = (mx.load(str(one / "model.safetensors")) for one in (fine_tuned, MODEL_PATH))
    mean = {name: (0.5 * (tuned[name] + one)).astype(one.dtype) for name, one in demo.items()}
    mx.save_safetensors(str(merged / "model.safetensors"), mean, {"format": "mlx"})
    for model in (fine_tuned, merged):
        found = learn.learn("demo", str(model), tmp_path / "edit.safetensors")
        # As of the audit: trained so hard, no verdict is fine too.
        assert found["verdict"] != "edited", found["evidence"]
        assert not (tmp_path / "edit.safetensors").exists()


def test_the_same_model_is_the_same():
    record = audit.audit("demo", base="demo")
    assert record["verdict"] == "not edited"
    assert "same as in the base" in record["evidence"][0]


def test_a_base_of_another_shape_is_refused(tmp_path):
    other = tiny.write_model(tmp_path / "m", "llama")
    with pytest.raises(UserError, match="not the same model"):
        audit.audit("demo", base=str(other))


# --- what the files say, and the command ---------------------------------------------------------


def test_labels_and_names_are_evidence(work, tmp_path):
    out = edited(work, tmp_path / "out", "demo", ApplyOptions.of(strength=0.2, max_leak=1))
    record = audit.audit(str(out))
    assert record["weights"]["verdict"] == "not edited"  # too weak to be seen
    assert record["verdict"] == "edited"
    assert record["label"]["strength"] == 0.2
    config = json.loads((out / "config.json").read_text())
    del config["abl_mlx"]
    (out / "config.json").write_text(json.dumps(config))
    (out / "README.md").write_text("This is Model-Abliterated-v2.")
    record = audit.audit(str(out))
    assert record["label"] is None
    assert record["verdict"] == "cannot tell"
    assert record["mentions"] == [{"place": "README.md", "text": "Abliterated"}]


def test_the_command_exits_with_3_and_keeps_the_direction(work, tmp_path):
    out = edited(work, tmp_path / "out")
    kept = tmp_path / "found.safetensors"
    direction = ["--direction", str(work / "r.safetensors")]
    arguments = ["audit", str(out), "--json", "-o", str(kept), *direction]
    result = CliRunner().invoke(cli, [*arguments, "--fail-on", "edited"])
    assert result.exit_code == 3, result.output
    record = json.loads(result.output[result.output.index("{") :])
    assert record["verdict"] == "edited"
    assert record["layers"] == [0, 1, 2, 3]
    assert record["direction_cosine"] > 0.99
    assert record["evidence"]
    assert set(record["hashes"]) == {"model.safetensors"}
    first = direction_file.read(kept).selected[0]
    assert (
        float(mx.abs((first * direction_file.read(work / "r.safetensors").selected[0]).sum()))
        > 0.99
    )
    result = CliRunner().invoke(
        cli, ["audit", str(out), "--base", "demo", "--fail-on", "cannot-tell"]
    )
    assert result.exit_code == 0
    assert f"{out} against demo: edited" in result.output
    assert record["hashes"]["model.safetensors"] in result.output


def test_bad_input_is_told(tmp_path):
    np.save(tmp_path / "r.npy", np.ones(7, dtype=np.float32))
    with pytest.raises(UserError, match="7 dimensions"):
        audit.audit("demo", direction=tmp_path / "r.npy")
    with pytest.raises(UserError, match=r"ends in \.safetensors"):
        audit.audit("demo", output=tmp_path / "r.npy")
