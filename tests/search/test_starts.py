"""Starting a search from an earlier record and from a published model card."""

import json

import mlx.core as mx
import numpy as np
import pytest

from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.directions.measuring import Candidates
from abl_mlx.search import starts
from abl_mlx.search.space import COMPONENTS, DEFAULT, Space, kernel
from convert.base.errors import UserError

LAYERS = 12

CARD = """# Some model

| Parameter | Value |
| :-------- | :---: |
| **direction_index** | {index} |
| **attn.o_proj.max_weight** | 1.20 |
| **attn.o_proj.max_weight_position** | 6.50 |
| **attn.o_proj.min_weight** | 0.40 |
| **attn.o_proj.min_weight_distance** | 20.00 |
| **mlp.down_proj.max_weight** | 0.90 |
| **mlp.down_proj.max_weight_position** | 5.00 |
| **mlp.down_proj.min_weight** | 0.00 |
| **mlp.down_proj.min_weight_distance** | 3.00 |

| Metric | This model |
| **KL divergence** | 0.05 |
"""


def space_of(*methods, layers=LAYERS, **others):
    return Space(layers, {name: lambda *_: None for name in (DEFAULT, *methods)}, **others)


def card(folder, index="7.25", text=CARD):
    path = folder / "README.md"
    path.write_text(text.format(index=index))
    return path


def record(folder, direction, **options):
    path = folder / "abl.json"
    path.write_text(json.dumps({"format_version": 1, "direction": direction, "options": options}))
    return path


def allowed(space, parameters):
    bounds = space.distributions()
    assert parameters.keys() == bounds.keys()
    return all(
        bound._contains(bound.to_internal_repr(parameters[name])) for name, bound in bounds.items()
    )


def test_a_model_card_gives_the_strengths_of_its_formula(tmp_path, capsys):
    space = space_of("difference-of-means", "svd")
    parameters = starts.read(card(tmp_path), LAYERS).parameters(space)
    assert allowed(space, parameters)
    assert parameters["method"] == "difference-of-means"
    assert (parameters["index"], parameters["per_layer"]) == (7.25, False)
    assert not parameters["embedding"]
    made = space.recipe(parameters)["profile"]
    attention = [1.2 + (0.4 - 1.2) * abs(layer - 6.5) / 20 for layer in range(LAYERS)]
    mlp = [max(0.0, 0.9 * (1 - abs(layer - 5) / 3)) for layer in range(LAYERS)]
    np.testing.assert_allclose(made["attention"], attention, atol=0.01)
    np.testing.assert_allclose(made["mlp"], mlp, atol=0.01)
    assert "README.md: strengths within 0.0" in capsys.readouterr().err


def test_layers_beyond_the_distance_are_not_edited_and_a_difference_is_told(tmp_path, capsys):
    text = CARD.replace("20.00", "2.00").replace("3.00", "2.00").replace("6.50", "5.00")
    start = starts.read(card(tmp_path, "per layer", text), LAYERS)
    np.testing.assert_allclose(start.profile["attention"][3:8], [0.4, 0.8, 1.2, 0.8, 0.4])
    assert not any(start.profile["attention"][:3] + start.profile["attention"][8:])
    parameters = start.parameters(space_of("difference-of-means"))
    assert parameters["per_layer"]
    assert (parameters["first_layer"], parameters["last_layer"]) == (3, 7)
    # A direction beyond the deepest that is tried, and a space with a given direction alone.
    deep = starts.read(card(tmp_path, "11"), LAYERS).parameters(space_of())
    assert (deep["index"], deep["method"]) == (space_of().deepest, DEFAULT)
    told = capsys.readouterr().err
    assert f"the direction after layer {space_of().deepest} for 11" in told
    assert "the given direction in place of its own" in told


@pytest.mark.parametrize("seed", range(8))
def test_the_record_of_a_search_gives_its_own_edit_back(tmp_path, seed):
    random = np.random.default_rng(seed)
    space = space_of("difference-of-means", "svd")
    parameters = space.uniform(method="svd", index=3.25, embedding=False)
    for _ in range(6):
        parameters = space.neighbour(parameters, random)
    recipe = space.recipe(parameters)
    taken = {"method": "svd", "layer": 3.25, "recipe": recipe}
    found = starts.read(record(tmp_path, taken, strength=1.0), LAYERS).parameters(space)
    assert allowed(space, found)
    assert (found["method"], found["index"]) == ("svd", 3.25)
    assert found["embedding"] == recipe["embedding"]
    for name, strengths in recipe["profile"].items():
        np.testing.assert_allclose(space.recipe(found)["profile"][name], strengths, atol=0.02)


def test_an_even_edit_keeps_its_strength_and_its_layers(tmp_path):
    space = space_of("difference-of-means")
    path = record(tmp_path, {"method": "difference-of-means", "layer": 4}, strength=0.8,
                  layers=[2, 3, 4, 5], embedding=True)  # fmt: skip
    recipe = space.recipe(starts.read(path, LAYERS).parameters(space))
    assert recipe["embedding"]
    expected = [0.8 if 2 <= layer <= 5 else 0.0 for layer in range(LAYERS)]
    for strengths in recipe["profile"].values():
        np.testing.assert_allclose(strengths, expected, atol=1e-6)


def test_a_kernel_is_fitted_to_strengths_that_it_cannot_have():
    strengths = [0.0, 3.0, -1.0, 0.5]
    made = starts.fitted("mlp", strengths, 0, 3)
    values = kernel(4, *(made[f"mlp_{name}"] for name in ("peak", "strength", "width", "floor")))
    assert all(0 <= one <= 1.5 for one in values)
    assert starts.fitted("mlp", [0.0] * 4, 0, 3)["mlp_strength"] == 0


UPDATE = {"method": "rome", "rank": 1, "update": {"layers": [1]}}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("# A model\n\nNo table.\n", "holds no parameters of an edit"),
        (CARD.replace("1.20", "strong"), "holds no parameters of an edit"),
        (CARD.replace("3.00", "0.00"), "holds no parameters of an edit"),
        (CARD.replace("6.50", "31.50"), "names layer 31.5, and this one has 12 layers"),
        ("", "holds no parameters of an edit"),
        ("{", "is not valid JSON"),
        (json.dumps({"verdicts": {}}), "direction"),
        (json.dumps({"direction": {"method": "given"}}), "holds no parameters of an edit"),
        (json.dumps({"direction": UPDATE}), "holds no parameters of an edit"),
        (
            json.dumps({"direction": {"layer": 1}, "options": {"kind": "reflect"}}),
            "holds no parameters of an edit",
        ),
        (
            json.dumps({"direction": {"layer": 1, "recipe": {"profile": {"mlp": [1, 1]}}}}),
            "strengths of 2 layers, and this one has 12 layers",
        ),
        (json.dumps({"direction": {"layer": 14}}), "names layer 14"),
        (json.dumps({"direction": {"layer": 1, "recipe": {"profile": [1]}}}), "profile"),
    ],
    ids=range(13),
)
def test_files_without_parameters_are_refused_in_one_sentence(tmp_path, content, says):
    path = tmp_path / "file"
    path.write_text(content.replace("{index}", "4"))
    with pytest.raises(UserError) as refused:
        starts.read(path, LAYERS)
    assert says in str(refused.value)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nothing cannot be read: No such file"):
        starts.read(tmp_path / "nothing", LAYERS)


def test_layers_beside_the_chosen_one_are_tried_at_its_strength():
    means = mx.ones((LAYERS, 1, 8))
    candidates = Candidates(means, 0 * means, (-1,))

    def beside(layer, *methods):
        file = DirectionFile(means[0], candidates, {"summary": {"layer": layer}})
        profile = {name: [0.9] * LAYERS for name in COMPONENTS}
        space = space_of(*methods, profile=profile)
        found = starts.beside(file, space)
        assert all(allowed(space, one) for one in found)
        assert all(not one["per_layer"] and one["method"] == "difference-of-means" for one in found)
        return [(one["index"], one["mlp_strength"], one["attention_strength"]) for one in found]

    near = pytest.approx(0.9)
    assert beside(5, "difference-of-means") == [(4, near, near), (6, near, near)]
    assert beside(8, "difference-of-means") == [(7, near, near)]  # 8 of 12 layers is the deepest
    assert beside(None, "difference-of-means") == beside(5, "svd") == []
