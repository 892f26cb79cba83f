"""Methods that look at effects, together with flags that change what is found or how it is chosen.

Each combination does what both say, or is refused in one sentence. A record names the method of
what was taken: a difference of means that such a method starts from is called by its own name.
"""

import json
from dataclasses import replace

import numpy as np
import pytest

from abl_mlx.choices import Measuring
from abl_mlx.commands.find import find_behind_openings, find_direction
from abl_mlx.directions import methods
from abl_mlx.inputs import prompts, sources
from abl_mlx.inputs.kept import with_kept, with_off_topic
from abl_mlx.inputs.sets import PromptSets
from abl_mlx.models import chat_model
from abl_mlx.models.writers import find_writers
from abl_mlx.search.space import DEFAULT
from abl_mlx.support.clock import Clock
from convert.base.errors import UserError
from tests.support import small_models

METHODS = ("rdo", "som", "cosmic", "inlp")

#: Of the methods whose constants make them long, shorter ones.
SHORT = {"rdo": {"steps": 2, "prompts": 4, "reply_tokens": 4}, "som": {"rounds": 4}}

#: What may be taken where candidates compete with those that a method starts from.
STARTS = {"rdo", "som", "cosmic"}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    table = [
        replace(one, parameters={**one.parameters, **SHORT.get(one.name, {})})
        for one in methods.TABLE
    ]
    monkeypatch.setattr(methods, "TABLE", tuple(table))


#: Of long tests one method runs in CI.
ONE_QUICKLY = [
    pytest.param(one, marks=[] if one == "inlp" else [pytest.mark.slow]) for one in METHODS
]


def few(sets: PromptSets, train: int = 16, validation: int = 12) -> PromptSets:
    parts = {}
    for name in ("harmful", "harmless", "kept", "off_topic"):
        part = getattr(sets, name)
        if part is not None:
            some, others = part.train.take(train), part.validation.take(validation)
            parts[name] = replace(part, train=some, validation=others)
    return replace(sets, **parts)


@pytest.fixture(scope="module")
def demo():
    chat = chat_model.load(sources.resolve("demo").path)
    return chat, find_writers(chat), prompts.load_demo()


def named(method: str) -> set[str]:
    return {method, "difference-of-means"} if method in STARTS else {method}


@pytest.mark.parametrize("method", METHODS)
def test_a_search_calls_each_source_by_its_method(method, demo):
    chat, writers, sets = demo
    how = Measuring.of(method=method, search=4, position=-1)
    file = find_direction(chat, writers, few(sets), how)
    trials = file.metadata["search"]["trials"]
    assert trials[0]["method"] == DEFAULT
    assert {one["method"] for one in trials} <= {DEFAULT, *named(method)}
    taken = min(
        (one for one in file.metadata["search"]["front"]), key=lambda one: one["kl"]
    )["method"]  # fmt: skip
    summary = file.metadata["summary"]
    assert summary["method"] in named(method)
    assert file.candidates.method == ("difference-of-means" if method in STARTS else method)
    if taken == DEFAULT and len(file.metadata["search"]["front"]) == 1:
        assert summary["method"] == method
    # The first trial is the method's own edit, at its own strength.
    alone = find_direction(chat, writers, few(sets), Measuring.of(method=method, position=-1))
    assert alone.metadata["summary"]["method"] == method
    strengths = alone.metadata.get("recipe", {}).get("profile")
    assert (strengths is None) == (method != "inlp")
    if strengths is not None:
        assert set(strengths["mlp"]) == {2.0}


@pytest.mark.parametrize("method", METHODS)
def test_refusals_that_are_to_stay(method, demo, capsys):
    chat, writers, sets = demo
    sets = few(with_kept(sets, "category:cloth", 0))
    file = find_direction(chat, writers, sets, Measuring.of(method=method, position=-1))
    summary = file.metadata["summary"]
    assert summary["method"] in named(method)
    assert summary["kept"]["kept"]["refused"] > 0
    if summary["method"] != method:
        # One of those that it starts from, without what the kept prompts have of their own.
        assert summary["orthogonal_to"] in ("own", "all")
    # The method's own directions competed.
    assert f"{method}," in capsys.readouterr().err
    assert ("recipe" in file.metadata) == (method == "inlp")


@pytest.mark.parametrize(
    "method",
    [pytest.param(one, marks=[pytest.mark.slow] if one == "cosmic" else []) for one in METHODS],
)
def test_protected_concepts(method, demo, tmp_path):
    chat, writers, sets = demo
    lines = [{"text": f"Say the number {n}.", "category": "numbers"} for n in range(40)]
    path = tmp_path / "protected.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    how = Measuring.of(method=method, protect=str(path), position=-1)
    if methods.named(method).refine:
        with pytest.raises(UserError, match=f"--protect and --method {method} do not go together"):
            find_direction(chat, writers, few(sets), how)
        return
    file = find_direction(chat, writers, few(sets), how)
    assert file.metadata["summary"]["method"] == method
    plain = find_direction(chat, writers, few(sets), Measuring.of(method=method, position=-1))
    layer = int(file.metadata["summary"]["layer"])
    first, second = (np.array(one.candidates.bases[layer, -1]) for one in (file, plain))
    assert np.linalg.norm(first - second) > 1e-3
    np.testing.assert_allclose(np.array(file.selected), first, atol=1e-6)


@pytest.mark.parametrize("method", ONE_QUICKLY)
def test_harmless_prompts_that_a_system_message_declines(method):
    chat, name = chat_model.load(small_models.folder("hard")), "hard"
    sets = with_off_topic(small_models.prompt_sets(name), "Only answer questions about towns.")
    how = Measuring.of(method=method, position=-1)
    file = find_direction(chat, find_writers(chat), few(sets), how)
    summary = file.metadata["summary"]
    assert summary["method"] in named(method)
    assert summary["kept"]["off_topic"]["refused"] > 0
    assert ("recipe" in file.metadata) == (method == "inlp")


@pytest.mark.parametrize("method", ONE_QUICKLY)
def test_with_thinking(method):
    name = "thinker"
    chat, sets = chat_model.load(small_models.folder(name)), small_models.prompt_sets(name)
    how = Measuring.of(
        method=method, thinking="both", thought_tokens=48, max_tokens=16, measured_at=None
    )
    sets = few(sets, 12, 6)
    file = find_behind_openings(chat, find_writers(chat), sets, how, Clock())
    summary = file.metadata["summary"]
    assert summary["method"] == method
    assert set(summary["judged"]["after"]) == {"off", "on"}
    assert ("recipe" in file.metadata) == (method == "inlp")


def test_first_tokens_that_tell_nothing_are_said(demo, monkeypatch):
    chat, writers, sets = demo
    how = Measuring.of(method="som", position=-1)
    with pytest.raises(UserError, match="--method som starts from the effects of removals"):
        find_direction(chat, writers, few(sets), how, causal=False)
    # Two sets that are answered with the same first tokens.
    same = replace(sets, harmful=sets.harmless)
    with pytest.raises(UserError, match="--method som starts from the effects of removals"):
        find_direction(chat, writers, few(same), how)
