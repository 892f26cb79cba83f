"""The refusal cliff: scores and heads in float64, a planted head found again, and the command."""

import json

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from abl_mlx.cli.main import cli
from abl_mlx.directions import cliff
from abl_mlx.directions.estimators import Probe
from abl_mlx.models.chat_model import load
from abl_mlx.models.hooks import around
from abl_mlx.models.writers import find_writers
from tests.support import small_models

FOLDER = small_models.folder("thinker")


def test_scores_are_mean_probabilities():
    rng = np.random.default_rng(0)
    states, weight = rng.normal(size=(7, 3, 5)), rng.normal(size=5)
    expected = (1 / (1 + np.exp(-(states @ weight - 0.3)))).mean(axis=0)
    np.testing.assert_allclose(cliff.scores(Probe(weight, -0.3), states), expected, atol=1e-12)


def test_suppressors_are_the_most_negative_heads():
    heads = [cliff.Head(0, n, value) for n, value in enumerate([0.5, -2.0, -0.1, -3.0])]
    assert [one.number for one in cliff.suppressors(heads, 0.5)] == [3, 1]
    assert [one.number for one in cliff.suppressors(heads, 0.01)] == [3]
    assert cliff.suppressors(heads[:1], 1.0) == []


@pytest.fixture(scope="module")
def model():
    chat = load(FOLDER)
    texts = small_models.prompt_sets("thinker").harmful.test.texts[:6]
    return chat, find_writers(chat), [chat.encode(text) for text in texts]


def test_heads_add_up_to_what_the_attention_writes(model):
    chat, writers, prompts = model
    vector = np.random.default_rng(1).normal(size=chat.width)
    heads = cliff.written(chat, writers, vector, prompts)
    assert len(heads) == 5 * 8
    attention = [one for one in writers if one.component == "attention"]
    sums = {one.path: 0.0 for one in attention}

    def seen(path):
        def wrapper(call, x):
            out = call(x)
            sums[path] += float(np.array(out[0, -1].astype(mx.float32), np.float64) @ vector)
            return out

        return wrapper

    with around([(one.module, seen(one.path)) for one in attention]):
        for tokens in prompts:
            mx.eval(chat.model(mx.array([tokens], mx.int32)))
    for one in attention:
        total = sum(head.written for head in heads if head.layer == one.layer)
        assert total == pytest.approx(sums[one.path] / len(prompts), rel=1e-2, abs=1e-2)


def test_a_planted_head_that_suppresses_is_found_first(model):
    """Head 5 of layer 3 is made to write −8 along a direction, as a change of its weights would."""
    chat, writers, prompts = model
    vector = np.random.default_rng(2).normal(size=chat.width)
    vector /= np.linalg.norm(vector)
    (writer,) = [one for one in writers if one.layer == 3 and one.component == "attention"]
    inputs = []

    def keep(call, x):
        inputs.append(np.array(x[0, -1, 5 * 32 : 6 * 32].astype(mx.float32)))
        return call(x)

    with around([(writer.module, keep)]):
        for tokens in prompts:
            mx.eval(chat.model(mx.array([tokens], mx.int32)))
    mean = np.mean(inputs, axis=0)
    reader = mx.array((mean / (mean @ mean)).astype(np.float32))
    along = mx.array((-8 * vector).astype(np.float32))

    def planted(call, x):
        share = x[..., 5 * 32 : 6 * 32].astype(mx.float32) @ reader
        return call(x) + (share[..., None] * along).astype(x.dtype)

    with around([(writer.module, planted)]):
        heads = cliff.written(chat, writers, vector, prompts)
    (first,) = cliff.suppressors(heads, 0.03)
    assert (first.layer, first.number) == (3, 5)
    assert first.written == pytest.approx(-8, abs=2)


def test_measure_tells_it_of_a_model_that_thinks(tmp_path):
    out = tmp_path / "d.safetensors"
    sets = ["--harmful", str(FOLDER / "locked.txt"), "--harmless", str(FOLDER / "allowed.txt")]
    asked = ["measure", str(FOLDER), "-o", str(out), "--refusal-cliff", "--json", *sets]
    result = CliRunner().invoke(cli, asked)
    assert result.exit_code == 2
    assert "add --thinking on" in result.stderr
    more = ["--thinking", "on", "--thought-tokens", "64", "--measured-at", "end-of-thought",
            "--limit", "16"]  # fmt: skip
    result = CliRunner().invoke(cli, [*asked, *more])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["cliff"]
    # This model decides within its thought and keeps to it: there is no cliff.
    assert found["accuracy"] >= 0.9
    assert found["final"] >= 0.7
    assert found["plateau"] - found["final"] <= 0.3
    assert found["final"] - found["harmless"][-1] >= 0.3
    assert found["positions"][-1] == -1
    assert len(found["heads"]) == 1
    assert 0 < found["suppressed"] <= 1
