"""A low-rank change of some MLPs: exact values, rounding that keeps it, its leak and adapters."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from abl_mlx.edits import projection, slabs
from abl_mlx.edits.edit import exact, leak, rounded
from abl_mlx.edits.update import Factors, Update
from abl_mlx.models.writers import Writer
from abl_mlx.outputs import adapter
from abl_mlx.outputs.gguf_plan import TensorPlan, edit_slab, read, values_of
from convert.base.errors import UserError
from convert.gguf import ggml_types

RNG = np.random.default_rng(0)
D, N = 64, 1024


def writer(path="blk.2.ffn_down.weight", kind="linear", layer=2):
    return Writer(path, kind, layer, None, True, nn.Module())


def update(k=2, m=1, size=0.3, **others):
    factors = Factors(
        RNG.normal(size=(D, k)).astype(np.float32) * size,
        RNG.normal(size=(k, N)).astype(np.float32) / N**0.5,
        RNG.normal(size=(m, N)).astype(np.float32),
    )
    return Update({2: factors}, **others)


def change_of(edit):
    one = edit.factors[2]
    return edit.strength * one.left.astype(np.float64) @ one.right.astype(np.float64)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_exact_values_are_the_weights_and_the_change(strength):
    edit, values = update(strength=strength), RNG.normal(size=(D, N)).astype(np.float32)
    wanted = values + change_of(edit)
    assert np.abs(exact(edit, writer(), "weight", values) - wanted).max() < 1e-5
    rows = slice(16, 40)
    part = exact(edit.of_slab(rows, slice(None)), writer(), "weight", values[rows])
    assert np.array_equal(part, exact(edit, writer(), "weight", values)[rows])


def test_a_profile_multiplies_each_layers_change():
    edit = Update({2: update().factors[2], 3: update().factors[2]})
    other = edit.with_profile({"attention": [1.0] * 4, "mlp": [1.0, 1.0, 0.25, 0.0]})
    assert sorted(other.factors) == [2]
    assert np.allclose(change_of(other), 0.25 * change_of(edit), atol=1e-6)


def test_only_the_named_layers_weight_is_edited():
    edit = update()
    attention = writer("blk.2.attn_output.weight")
    assert [w.path for w in edit.chosen([attention, writer()])] == ["blk.2.ffn_down.weight"]
    assert edit.parameters(writer()) == ("weight",)
    with pytest.raises(UserError, match="layer 2's MLP, and the model has none there"):
        edit.chosen([attention])
    with pytest.raises(UserError, match="experts"):
        edit.chosen([writer(kind="experts")])


@pytest.mark.parametrize("kind", ["Q4_K", "Q2_K", "Q4_0", "Q8_0"])
@pytest.mark.parametrize(("k", "m", "most"), [(1, 0, 0.01), (2, 1, 0.15)])
def test_quantized_rows_keep_what_they_do_to_the_keys(kind, k, m, most):
    """Σ_j W'_ij k_j of every row i is that of the exact edit, though the change of a weight is far
    below a quantization step."""
    kind, rng = GGMLQuantizationType[kind], np.random.default_rng(1)
    edit = update(k, m)
    source = ggml_types.fresh(rng.normal(size=(D, N)).astype(np.float32), kind, None)
    raw = ggml_types.codec(kind).encode(source)
    plan = TensorPlan("blk.2.ffn_down.weight", edit, writer(), "weight", kind, kind)
    slab = slabs.Slab(slice(0, D), slice(0, N))
    before = values_of(read(raw, kind, slab))
    after = {
        plain: values_of(
            read(edit_slab(plan, read(raw, kind, slab), "own", plain=plain), kind, slab)
        )
        for plain in (True, False)
    }
    keys = np.concatenate([edit.factors[2].right, edit.factors[2].keys]).astype(np.float64)
    wanted = change_of(edit) @ keys.T

    def off(values):
        error = (values - before.astype(np.float64)) @ keys.T - wanted
        return np.linalg.norm(error) / np.linalg.norm(wanted)

    assert off(after[False]) < most
    if kind != GGMLQuantizationType.Q8_0:
        assert off(after[True]) > 0.1
    found = leak(plan.edit, plan.writer, plan.parameter, before, after[False])
    assert found.value < most
    assert found.value == pytest.approx(
        leak(edit, writer(), "weight", mx.array(before), mx.array(after[False])).value, abs=1e-4
    )


def test_floats_keep_it_too():
    edit, values = update(size=0.1), RNG.normal(size=(D, N)).astype(np.float32)
    source = mx.array(values).astype(mx.bfloat16).astype(mx.float32)
    wanted = mx.array(exact(edit, writer(), "weight", np.array(source)))
    written = rounded(edit, writer(), "weight", wanted, mx.bfloat16)
    assert leak(edit, writer(), "weight", source, written.astype(mx.float32)).value < 0.01


def test_the_adapter_is_the_factors():
    edit, values = update(strength=0.5), RNG.normal(size=(D, N)).astype(np.float32)
    parts = [((rows, slice(0, N)), mx.array(values[rows])) for rows in (slice(0, 20), slice(20, D))]
    found = adapter.components(edit, writer(), (D, N), parts)
    basis = edit.factors[2].basis
    assert np.allclose(found.along, projection.along(basis, values, -1))
    one = adapter.change(edit, writer(), found.along)
    assert np.array_equal(one.left @ one.right, edit.factors[2].left @ edit.factors[2].right)
    whole = adapter.leak_of(edit, writer(), found, edit.strength, one)
    assert whole.value < 1e-6
    half = adapter.leak_of(edit, writer(), found, edit.strength / 2, one)
    assert half.value == pytest.approx(0.5, abs=1e-5)
    target = values + change_of(edit)
    assert half.target2 == pytest.approx((target**2).sum(), rel=1e-4)
    assert half.error2 == pytest.approx((change_of(edit) ** 2).sum() / 4, rel=1e-4)
