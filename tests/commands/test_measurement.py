"""From prompts to a chosen direction: methods, positions, layers, and what one direction cannot."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from abl_mlx.behaviour import evaluate
from abl_mlx.behaviour.refusals import Verdict, classify
from abl_mlx.choices import Editing, Measuring
from abl_mlx.cli.main import cli
from abl_mlx.commands import edit_choice, find, prompt_choice
from abl_mlx.demo import MODEL_PATH
from abl_mlx.directions import direction_file, estimators, measuring
from abl_mlx.directions.variants import Tried, Variant, best
from abl_mlx.edits.edit import orthonormal
from abl_mlx.edits.steering import ablation
from abl_mlx.inputs import prompts
from abl_mlx.inputs.sets import Prompt, PromptSet, PromptSets, Split, split
from abl_mlx.models import capture, chat_model, shortcuts
from abl_mlx.models.writers import find_writers
from convert.base.errors import UserError
from tests.support import small_models


def refused(replies):
    return sum(classify(reply) is Verdict.REFUSAL for reply in replies) / len(replies)


@cache
def loaded(folder):
    chat = chat_model.load(folder)
    return chat, find_writers(chat), evaluate.in_mlx(chat, batch_size=64)


# --- models that no single direction frees -----------------------------------------------------


@pytest.mark.parametrize("name", ["hard", "spread"])
def test_the_default_goes_on_to_a_subspace_where_one_direction_fails(name):
    chat, writers, answer = loaded(small_models.folder(name))
    sets = small_models.prompt_sets(name)
    found = find.find_direction(chat, writers, sets, Measuring())
    summary, scores = found.metadata["summary"], found.metadata["scores"]
    # Rank 1 fails: of every layer at the last token, at the least a fifth still opens refusing.
    tried = [score for score in scores if "refused" in score]
    tried += [one for one in found.metadata["trials"] if "layer" in one and "rank" not in one]
    assert {score["layer"] for score in tried} == set(range(len(chat.layers)))
    assert min(score["refused"] for score in tried if "dropped" not in score) >= 0.2
    assert summary["single"]["refused"] >= 0.2
    # Racing: of all that were tried few ran all prompts. Without it 30,000 tokens at least.
    assert sum(score.get("prompts") == (32, 32) for score in scores) <= 2
    assert summary["forward_tokens"] <= 9_500
    # Rank k works: all refusals gone, allowed prompts answered as before.
    assert found.selected.shape[0] == summary["rank"] >= 2
    harmful, harmless = sets.harmful.test, sets.harmless.test
    before = answer(harmless.texts, 26)
    with ablation(writers, edit_choice.edit_of(found, Editing())):
        after = answer([*harmful.texts, *harmless.texts], 26)
    assert refused(after[: len(harmful)]) <= 0.05
    known = [a == b for a, b in zip(after, small_models.answers(harmful), strict=False)]
    assert sum(known) >= 0.8 * len(known)
    same = [a == b for a, b in zip(after[len(harmful) :], before, strict=True)]
    assert sum(same) >= 0.9 * len(same)
    # What was tried is written down, and nothing gentler works by more than KLs can tell.
    working = [
        one["kl"]
        for one in found.metadata["trials"]
        if one["refused"] <= 0.05 and "dropped" not in one
    ]
    assert summary["validation_kl"] <= min(working) + 1e-3


@pytest.mark.parametrize("search", [None, 8])
def test_a_direction_is_chosen_by_its_whole_removal_and_then_scaled(search):
    """At strength -1 the edit that leaves least refusals would be the one that does least."""
    chat, writers, answer = loaded(MODEL_PATH)
    sets = prompts.load_demo()
    whole = find.find_direction(chat, writers, sets, Measuring.of(search=search))
    turned = Measuring.of(strength=-1.0, search=search)
    found = find.find_direction(chat, writers, sets, turned)
    np.testing.assert_array_equal(np.array(found.selected), np.array(whole.selected))
    assert found.metadata["summary"] == whole.metadata["summary"]
    with ablation(writers, edit_choice.edit_of(found, turned.editing)):
        assert refused(answer(sets.harmful.test.texts, 26)) == 1
    with ablation(writers, edit_choice.edit_of(found, Editing())):
        assert refused(answer(sets.harmful.test.texts, 26)) <= 0.05


def test_beyond_two_the_component_comes_back_and_one_is_told(tiny_folder, tmp_path):
    folder = tiny_folder("llama")
    np.save(tmp_path / "row.npy", np.ones(loaded(folder)[0].width))

    def said(strength):
        place = str(tmp_path / f"out {strength}")
        given = "apply", str(tmp_path / "row.npy"), str(folder), "-o", place
        result = CliRunner().invoke(cli, [*given, "--strength", strength])
        assert result.exit_code == 0, result.output
        return result.stderr

    assert "overshoots" not in said("2")
    assert "returns reversed and longer than it was (1.5 times)" in said("2.5")


def test_only_the_best_candidates_run_all_prompts():
    chat, writers, _ = loaded(MODEL_PATH)
    found = find.find_direction(chat, writers, prompts.load_demo(), Measuring())
    tried = [score for score in found.metadata["scores"] if "prompts" in score]
    assert len(tried) == 6
    assert [score["prompts"] for score in tried].count((32, 32)) == 1
    # With all prompts for all of them, and passes of their own for states and logits: 14,000.
    assert found.metadata["summary"]["forward_tokens"] <= 3_500


def test_over_refusal_falls_and_harmful_prompts_go_on_being_refused(tmp_path):
    """ "Forget the <locked thing>. <allowed request>" sounds bad and is not: the demo refuses most
    of such prompts."""
    chat, writers, answer = loaded(MODEL_PATH)
    sets = prompts.load_demo()
    (tmp_path / "borderline.txt").write_text("\n".join(small_models.borderline(sets)))
    borderline = prompts.load(str(tmp_path / "borderline.txt"), "--borderline")
    options, sets = Measuring.of(method="over-refusal"), replace(sets, borderline=borderline)
    found = find.find_direction(chat, writers, sets, options)
    held_out = prompt_choice.borderline_part(sets, options.prompting, options.finding, "test").texts
    harmful, harmless = sets.harmful.test.texts[:32], sets.harmless.test.texts[:32]
    asked = [*held_out, *harmful, *harmless]
    before = answer(asked, 26)
    assert refused(before[: len(held_out)]) >= 0.5
    with ablation(writers, edit_choice.edit_of(found, options.editing)):
        after = answer(asked, 26)
    assert refused(after[: len(held_out)]) <= 0.3
    assert refused(after[len(held_out) : -32]) >= 0.95
    assert sum(a == b for a, b in zip(after[-32:], before[-32:], strict=True)) >= 30
    assert found.metadata["summary"]["kept_refused"] >= 0.95


def tried(rank, share, kl, refusal=0.0, dropped=""):
    return Tried(Variant(mx.ones((rank, 4)), "svd", 1, -1), refusal, share, kl, None, dropped)


def test_the_gentlest_that_works_is_taken():
    gentle, strong = tried(3, 0.0, 0.01), tried(2, 0.0, 0.05)
    weak, broken = tried(1, 0.3, 0.0), tried(2, 0.0, 0.0, dropped="KL")
    assert best([weak, strong, gentle, broken]) is gentle
    # KLs closer than can be told: fewer directions, then less refusal.
    close, closer = tried(2, 0.05, 0.0107, -3), tried(2, 0.0, 0.0105, -4)
    assert best([gentle, close, closer]) is closer
    assert best([weak, tried(2, 0.2, 0.09)]).refused == 0.2
    assert best([broken]) is None


# --- what each method and flag measures --------------------------------------------------------

TEXTS = ["Hi", "How do I plan a garden?", "What is it?", "Tell me of the river.", "Why is it so?",
         "Who are you?", "Count to seven.", "Name a town."]  # fmt: skip


def part(texts):
    return PromptSet("x", tuple(Prompt(text) for text in texts))


SETS = PromptSets(
    Split(part([f"{text} Now!" for text in TEXTS]), part(["Go now!", "Do now!"]), part(["Be!"])),
    Split(part(TEXTS), part(["Hello.", "Where to?"]), part(["Ah."])),
    part([f"Now, {text} {n}" for n in range(4) for text in TEXTS]),
)


def states(chat, split, offsets):
    found = capture.full(chat, [chat.encode(text) for text in split.train.texts], offsets)
    return np.array(found).astype(np.float64)


def found_with(folder, **chosen):
    chat, writers, _ = loaded(folder)
    return find.find_direction(chat, writers, SETS, Measuring.of(**chosen))


def by_hand(method, bad, good):
    """The methods' formulas once more, in float64; (N, d) states of one layer and token."""
    difference = bad.mean(axis=0) - good.mean(axis=0)
    if method == "winsorized-means":
        return estimators.winsorized(bad).mean(axis=0) - estimators.winsorized(good).mean(axis=0)
    if method == "median-means":
        return np.median(bad, axis=0) - np.median(good, axis=0)
    if method in ("projected", "biprojected"):
        mean = good.mean(axis=0)
        return difference - mean * (difference @ mean) / (mean @ mean)
    if method == "probe":
        return estimators.probe(bad, good).weight
    return difference


@pytest.mark.parametrize(
    "method",
    ["difference-of-means", "winsorized-means", "median-means", "projected", "probe"],
)
def test_each_method_is_its_formula_on_the_models_states(method, tiny_folder):
    folder = tiny_folder("llama")
    chat = loaded(folder)[0]
    found = found_with(folder, method=method, layer=1, position=-2)
    bad, good = (states(chat, one, [-2])[:, 1, 0] for one in (SETS.harmful, SETS.harmless))
    expected = estimators.unit(by_hand(method, bad, good))
    np.testing.assert_allclose(np.array(found.selected)[0], expected, atol=2e-5)
    assert found.metadata["summary"] | {"chosen_by": ""} == {
        "method": method, "layer": 1, "position": -2, "chosen_by": "",
    }  # fmt: skip
    for score in found.metadata["scores"]:
        assert 0 <= score["explained"] <= 1
        assert 0 <= score["auc"] <= 1
        assert score["accuracy"] in (0, 0.25, 0.5, 0.75, 1)


def test_singular_vectors_with_their_effective_rank(tiny_folder):
    folder = tiny_folder("llama")
    chat = loaded(folder)[0]
    found = found_with(folder, method="svd", rank=3, layer=2)
    bad, good = (states(chat, one, [-1])[:, 2, 0] for one in (SETS.harmful, SETS.harmless))
    _, values, vectors = np.linalg.svd(bad - good.mean(axis=0), full_matrices=False)
    selected = np.array(found.selected).astype(np.float64)
    np.testing.assert_allclose(np.abs(selected @ vectors[:3].T), np.eye(3), atol=1e-3)
    shares = values / values.sum()
    score = found.metadata["scores"][2]
    assert score["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), 1e-3)
    assert found.candidates.directions.shape == (3, 1, 3, chat.width)
    assert found.candidates.leads.shape == (3, 1, chat.width)


def test_biprojected_is_orthogonal_to_the_harmless_means_here_and_there(tiny_folder):
    folder = tiny_folder("llama")
    chat = loaded(folder)[0]
    found = found_with(folder, method="biprojected", layer=1)
    means = states(chat, SETS.harmless, [-1])[:, :, 0].mean(axis=0)  # (L, d)
    assert found.selected.shape == (3, 1, chat.width)
    for layer, row in enumerate(np.array(found.selected)[:, 0]):
        for mean in (means[1], means[layer]):
            assert abs(row @ estimators.unit(mean)) < 1e-5
        difference = states(chat, SETS.harmful, [-1])[:, 1, 0].mean(axis=0) - means[1]
        expected = estimators.unit(estimators.without(difference, means[[1, layer]]))
        np.testing.assert_allclose(row, expected, atol=1e-4)


def test_layers_between_each_its_own_and_all_together(tiny_folder):
    folder = tiny_folder("llama")
    chat = loaded(folder)[0]
    every = np.array(found_with(folder, layer=0).candidates.directions)[:, 0].astype(np.float64)
    between = found_with(folder, layer=1.25)
    expected = estimators.unit(0.75 * every[1] + 0.25 * every[2])
    np.testing.assert_allclose(np.array(between.selected)[0], expected, atol=1e-5)
    assert between.metadata["summary"]["layer"] == 1.25
    candidates = between.candidates
    np.testing.assert_allclose(np.array(candidates.each_layer(-1))[:, 0], every, atol=1e-5)
    span = np.array(candidates.across_layers(-1, 2)).astype(np.float64)
    _, _, vectors = np.linalg.svd(every, full_matrices=False)
    np.testing.assert_allclose(np.abs(span @ vectors[:2].T), np.eye(2), atol=1e-3)
    with pytest.raises(UserError, match="rank 4"):
        candidates.across_layers(-1, 4)
    with pytest.raises(UserError, match=r"--layer 2\.5"):
        found_with(folder, layer=2.5)
    assert chat.width == span.shape[1]


def test_positions_by_name_and_together(tiny_folder):
    folder = tiny_folder("llama")
    chat = loaded(folder)[0]
    end = found_with(folder, layer=1, position="instruction-end")
    offset = -chat.template_tail() - 1
    assert end.metadata["summary"]["position"] == offset
    last = [chat.tokenizer.decode([chat.encode(text)[offset]]) for text in ("Say this", "a dog")]
    assert "this".endswith(last[0].strip()) or "dog".endswith(last[1].strip())
    together = found_with(folder, layer=1, across="positions", rank=2)
    count = min(chat.template_tail(), measuring.MOST_POSITIONS)
    offsets = list(range(-count, 0))
    bad, good = (states(chat, one, offsets)[:, 1] for one in (SETS.harmful, SETS.harmless))
    rows = estimators.unit(bad.mean(axis=0) - good.mean(axis=0))
    _, _, vectors = np.linalg.svd(rows, full_matrices=False)
    selected = np.array(together.selected).astype(np.float64)
    angles = np.linalg.svd(selected @ vectors[:2].T, compute_uv=False)
    assert angles.min() > 0.999


def test_the_over_refusal_direction_on_the_models_states(tiny_folder):
    folder = tiny_folder("llama")
    chat = loaded(folder)[0]
    found = found_with(folder, method="over-refusal", layer=1)
    middle = split(SETS.borderline, 0).train.texts
    three = (
        states(chat, SETS.harmful, [-1])[:, 1, 0].mean(axis=0),
        np.array(capture.full(chat, [chat.encode(text) for text in middle])).mean(axis=0)[1, 0],
        states(chat, SETS.harmless, [-1])[:, 1, 0].mean(axis=0),
    )
    expected = estimators.unit(estimators.over_refusal(*three))
    np.testing.assert_allclose(np.array(found.selected)[0], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"rank": 2}, "--rank 2"),
        ({"per_layer": True, "across": "layers"}, "--per-layer and --across"),
        ({"method": "svd", "across": "layers"}, "--method svd and"),
        ({"per_layer": True, "layer": 1}, "--per-layer and --layer"),
        ({"across": "layers", "layer": 1}, "--across layers and --layer"),
        ({"across": "positions", "position": -1}, "--position"),
        ({"method": "biprojected", "layer": 1.5}, "between two"),
        ({"method": "biprojected", "per_layer": True}, "biprojected"),
        ({"per_layer": True, "pin": "harmless"}, "--pin"),
        ({"method": "rdo", "across": "layers"}, "--method rdo and --across layers"),
        ({"method": "rdo", "rank": 9, "max_kl": 9.0}, "--method rdo --rank 9: .* at most 4"),
        ({"method": "inlp", "kind": "reflect"}, "--method inlp and --kind reflect"),
        ({"method": "inlp", "learn_strengths": 5}, "--learn-strengths and --method inlp"),
        ({"method": "cosmic", "layer": 1.5}, "between two"),
        ({"tensor": "x"}, "--tensor"),
        ({"borderline": "x.txt"}, "--method over-refusal"),
        ({"method": "svd", "rank": 9, "layer": 1}, "--rank 9"),
        ({"direction": Path("nowhere.npy")}, "nowhere.npy"),
        ({"direction": Path("nowhere.npy"), "method": "svd"}, "--method"),
    ],
)
def test_options_that_do_not_go_together_are_refused(chosen, message, tiny_folder):
    with pytest.raises(UserError, match=message):
        found_with(tiny_folder("llama"), **chosen)


def test_states_in_a_file_are_the_states(tiny_folder, monkeypatch):
    chat = loaded(tiny_folder("llama"))[0]
    monkeypatch.setattr(shortcuts, "TOKENS_PER_BATCH", 40)
    sequences = [chat.encode(text) for text in TEXTS]
    with capture.stored(chat, sequences, [-2, -1]) as kept:
        assert isinstance(kept, np.memmap)
        assert kept.shape == (3, 2, len(TEXTS), chat.width)
        full = np.array(capture.full(chat, sequences, [-2, -1]))
        np.testing.assert_allclose(kept.transpose(2, 0, 1, 3), full, atol=1e-4)
        file = Path(kept.filename)
        assert file.is_file()
    assert not file.exists()
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(capture.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match="kB free"), capture.stored(chat, sequences):
        pass


# --- outside directions and edits that differ by layer -----------------------------------------


def test_run_takes_a_direction_from_a_file(tiny_folder, tmp_path):
    folder = tiny_folder("llama")
    rng = np.random.default_rng(0)
    np.save(tmp_path / "row.npy", rng.normal(size=loaded(folder)[0].width))
    result = CliRunner().invoke(
        cli,
        ["run", str(folder), "-o", str(tmp_path / "out"), "--direction", str(tmp_path / "row.npy"),
         "--limit", "2", "--max-tokens", "4", "--json"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "abl.json").read_text())
    assert record["direction"]["method"] == "given"
    assert record["direction"]["file"] == "row.npy"
    assert record["component"]["before"] > 1e-2
    assert record["component"]["after"] < 1e-4


def test_directions_of_each_layer_are_kept_applied_and_looked_at(tiny_folder, tmp_path):
    folder = tiny_folder("llama")
    chat, writers, _ = loaded(folder)
    found = found_with(folder, method="biprojected", layer=1)
    direction_file.save(tmp_path / "d.safetensors", found)
    back = direction_file.read(tmp_path / "d.safetensors")
    assert back.sha256 == found.sha256
    assert back.candidates.method == "biprojected"
    np.testing.assert_array_equal(
        np.array(back.candidates.directions), np.array(found.candidates.directions)
    )
    np.testing.assert_allclose(back.clouds[0], found.clouds[0], rtol=1e-6)
    direction_file.check_width(back, tmp_path, chat)
    unit, sequences = orthonormal(back.selected), [chat.encode("Hi")]
    seen = evaluate.component(chat, sequences, unit)["layers"]
    stream = np.array(capture.full(chat, sequences))[0, :, 0]
    rows = np.array(back.selected)[:, 0]
    expected = np.abs((stream * rows).sum(axis=1)) / np.linalg.norm(stream, axis=1)
    np.testing.assert_allclose(seen, expected, rtol=1e-3)
    edit = edit_choice.edit_of(back, Editing())
    with ablation(writers, edit):
        mx.eval(chat.model(mx.array(sequences)))
    fewer = direction_file.DirectionFile(back.selected[:2])
    with pytest.raises(UserError, match="2 layers"):
        direction_file.check_width(fewer, tmp_path / "d.safetensors", chat)
    with pytest.raises(UserError, match="2 layers"):
        edit_choice.edit_of(fewer, Editing()).chosen(writers)
    with pytest.raises(UserError, match="--pin"):
        edit_choice.edit_of(back, Editing(pin="1"))
