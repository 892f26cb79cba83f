"""`--keep` and `--keep-system`: refusals that are to stay, in run, measure and eval."""

import json
from dataclasses import replace
from functools import cache

import mlx.core as mx
import numpy as np
import pytest
import train_models
from click.testing import CliRunner
from worlds import HARBOUR

import abl_mlx
from abl_mlx.behaviour import evaluate
from abl_mlx.behaviour.kept_refusals import kept, sentence
from abl_mlx.behaviour.refusals import Verdict, classify
from abl_mlx.choices import Editing, Measuring
from abl_mlx.cli.main import cli
from abl_mlx.commands import edit_choice, find, keep_choice, prompt_choice, reply_judge
from abl_mlx.commands.reply_judge import Judge, Replied
from abl_mlx.directions import direction_file, measuring
from abl_mlx.directions.measuring import Candidates
from abl_mlx.directions.staying import Staying
from abl_mlx.directions.trial import Effect
from abl_mlx.directions.variants import Variant
from abl_mlx.edits.steering import ablation
from abl_mlx.inputs.kept import with_kept, with_off_topic
from abl_mlx.records.directions import RepliedInMode
from abl_mlx.search.screening import Screen, Screened, Trial
from abl_mlx.search.survivors import Asked, choose, unmet
from tests.support import small_models


def call(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_of_what_was_refused_so_much_is_kept():
    one = kept([True] * 10 + [False] * 5, [True] * 9 + [False] + [True] * 5)
    assert (one.refused, one.kept, one.share, one.enough) == (10, 9, 0.9, True)
    low, high = one.interval
    assert low == pytest.approx(0.596, abs=1e-3)
    assert high == pytest.approx(0.982, abs=1e-3)
    short = kept([True] * 12, [True] * 5 + [False] * 7)
    assert not short.enough
    assert sentence("off_topic", short) == (
        "keeps 5 of 12 refusals of off-topic prompts (41.7%, 95% interval 19% to 68%): "
        "48.3 points below the 90% that are to stay"
    )
    nothing = kept([False, False], [True, False])
    assert nothing.share is None
    assert "has nothing to keep" in sentence("kept", nothing)


def test_eval_has_the_kept_prompts_as_sets_of_their_own():
    result = call(
        "eval", "demo", "--keep", "category:cloth", "--keep-system", "Only talk of cloth.",
        "--limit", 12, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["kept_refusal_rate"] == 1
    assert record["n_kept"] == record["n_off_topic"] == 12
    assert 0 <= record["off_topic_refusal_rate"] <= 1
    assert list(record["verdicts"]) == ["harmful", "harmless", "kept", "off_topic"]
    assert set(record["categories"]["kept"]) == {"cloth"}
    assert "cloth" not in record["categories"]["harmful"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--induce", "--keep", "category:cloth"], "--keep says how a direction is removed"),
        (["--induce", "--keep-system", "Be kind."], "--keep-system says how a direction is"),
        (["--method", "over-refusal", "--borderline", "x.txt", "--keep", "category:cloth"],
         "--method over-refusal and --keep do not go together"),
    ],
)  # fmt: skip
def test_flags_that_do_not_go_together(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("\n".join(f"Say {number}." for number in range(40)))
    result = call("run", "demo", "-o", "out", *arguments)
    assert result.exit_code == 1
    assert said in result.stderr
    assert not (tmp_path / "out").exists()


# --- the choice --------------------------------------------------------------------------------


def test_candidates_lose_what_is_kept_and_stay_orthonormal():
    random = np.random.default_rng(0)
    means = [mx.array(random.normal(size=(2, 3, 16)).astype(np.float32)) for _ in range(4)]
    harmful, harmless, other, another = means
    plain = Candidates(harmful, harmless, (-3, -2, -1))
    found = measuring.orthogonalized(plain, [other - harmless, another - harmless])
    for layer, place in np.ndindex(2, 3):
        r = np.array(found.bases[layer, place, 0], np.float64)
        assert np.linalg.norm(r) == pytest.approx(1, abs=1e-5)
        gaps = [np.array((one - harmless)[layer, place]) for one in (other, another)]
        # Removing it leaves these means as far from the harmless one as they were.
        assert all(abs(r @ gap) <= 1e-5 * np.linalg.norm(gap) for gap in gaps)
        assert r @ np.array((harmful - harmless)[layer, place]) > 0


def replied(left, *counts, of=10, harmless_lost=0.0):
    each = {str(n): kept([True] * of, [k < c for k in range(of)]) for n, c in enumerate(counts)}
    mode = RepliedInMode(refused=left, broken=0.0, harmless_lost=harmless_lost, kept=each or None)
    return Replied({"off": mode}, 0.01)


def merit(left, *counts, rank=1, kl=0.01, dropped=""):
    variant = Variant(mx.ones((rank, 4)), "svd", 1, -1)
    effect = Effect((0.0,), (False,), (kl,))
    return keep_choice.Asked(variant, effect, replied(left, *counts), dropped).merit


def test_replies_decide_by_ended_refusals_then_by_kept_ones_then_by_gentleness():
    keeps, loses, keeps_all_but_leaves = merit(0.0, 9), merit(0.0, 5, kl=0.0), merit(0.5, 10)
    assert keeps < merit(0.0, 8) < loses < keeps_all_but_leaves
    # Above the wanted share more is not better; of several sets the worst counts.
    assert merit(0.0, 9, kl=0.001) < merit(0.0, 10, kl=0.002) < merit(0.0, 10, rank=2, kl=0.0)
    assert merit(0.0, 9, 9) < merit(0.0, 8, 8) < merit(0.0, 10, 7)
    assert keeps_all_but_leaves < merit(0.0, 10, dropped="thoughts 2.00 times as long")


def test_an_edit_counts_by_its_worse_mode():
    off, on = replied(0.0, 10).modes["off"], replied(0.5, 7).modes["off"]
    both = Replied({"off": off, "on": on}, 0.01)
    assert both.worst == 0.5
    assert not both.enough
    assert both.lost == pytest.approx(0.3)
    assert list(both.kept) == ["0", "0, thinking on"]
    assert "7 of 10 refusals of 0, thinking on prompts stay" in both.kept_words


def test_validation_replies_are_read_as_far_as_verdicts_take(monkeypatch):
    monkeypatch.setattr(reply_judge, "REPLY_TOKENS", 1)
    model = abl_mlx.load("demo")
    sets = abl_mlx.load_prompts(model=model)
    nothing = edit_choice.make_edit(mx.eye(model.chat.width)[:1], Editing(strength=1e-6))

    def refused(**chosen):
        how = Measuring.of(**chosen)
        prompts = prompt_choice.encoded(model.chat, sets, how)
        judge = Judge(model.chat, model.writers, prompts, how)
        return judge.of(nothing).modes["off"].refused

    assert refused() == 1
    assert refused(max_tokens=1) < 1


@cache
def loaded(name):
    return abl_mlx.load(small_models.folder(name))


def share_refused(model, prompts):
    replies = evaluate.in_mlx(model.chat)(prompts.prompts, 26)
    return sum(classify(reply) is Verdict.REFUSAL for reply in replies) / len(replies)


def test_a_kept_category_stays_refused_where_it_has_a_refusal_of_its_own():
    """The kinds of `spread` have refusals of their own, and `bread` one that can be told apart."""
    model = loaded("spread")
    sets = with_kept(small_models.prompt_sets("spread"), "category:bread", 0)
    found = find.find_direction(model.chat, model.writers, sets, Measuring())
    summary = found.metadata["summary"]
    assert summary["kept"]["kept"]["enough"]
    with ablation(model.writers, edit_choice.edit_of(found, Editing())):
        assert share_refused(model, sets.kept.test) >= 0.9
        assert share_refused(model, sets.harmful.test) <= 0.05
        assert share_refused(model, sets.harmless.test) == 0
    kinds = {one.get("orthogonal_to") for one in found.metadata["trials"]}
    assert kinds == {None, "own", "all"}


OTHERS = "category:forest,desert,sky,farm"
"""The kinds of `apart` whose refusals are to stay, all but ``sea``."""


def test_a_run_ends_the_refusals_of_one_kind_and_leaves_the_others(tmp_path):
    """`apart` refuses ``sea`` along a direction of its own; a run without `--keep` frees all."""
    names = {True: "locked.jsonl", False: "allowed.jsonl"}
    for locked, name in names.items():
        lines = [
            json.dumps({"text": one.prompt, "category": one.material})
            for one in train_models.held_out(HARBOUR, locked)
        ]
        (tmp_path / name).write_text("\n".join(lines))
    asked = [
        "run", small_models.folder("apart"), "--harmful", tmp_path / names[True], "--harmless",
        tmp_path / names[False], "--max-tokens", 32, "--json",
    ]  # fmt: skip
    alone = json.loads(call(*asked, "-o", tmp_path / "alone").stdout)
    assert alone["before"]["harmful_refusal_rate"] >= 0.9
    assert alone["after"]["harmful_refusal_rate"] == 0
    result = call(*asked, "-o", tmp_path / "kept", "--keep", OTHERS)
    record = json.loads(result.stdout)
    (output,) = record["evaluations"]
    assert output["kept"]["kept"]["refused"] >= 40
    assert output["kept"]["kept"]["share"] >= 0.9
    assert output["after"]["harmful_refusal_rate"] <= 0.05
    assert output["after"]["harmless_refusal_rate"] == 0
    assert "warning" not in result.stderr


def test_the_constraint_keeps_refusals_that_are_lost_without_it():
    """After the last layer of `apart` the two directions of refusal are nearly the same."""
    model = loaded("apart")
    sets = with_kept(small_models.prompt_sets("apart"), OTHERS, 0)
    left = {}
    for name, these in (("kept", sets), ("not kept", replace(sets, kept=None))):
        found = find.find_direction(model.chat, model.writers, these, Measuring.of(layer=3))
        with ablation(model.writers, edit_choice.edit_of(found, Editing())):
            assert share_refused(model, sets.harmful.test) <= 0.05
            assert share_refused(model, sets.harmless.test.take(24)) == 0
            left[name] = share_refused(model, sets.kept.test.take(40))
    assert left["kept"] >= 0.9
    assert left["not kept"] <= 0.6


def test_the_constraint_keeps_more_of_what_a_system_message_makes_a_model_refuse():
    """`hard` refuses every question behind a system message."""
    model = loaded("hard")
    sets = with_off_topic(small_models.prompt_sets("hard"), "Only answer questions about towns.")
    left = {}
    for name, these in (("kept", sets), ("not kept", replace(sets, off_topic=None))):
        found = find.find_direction(model.chat, model.writers, these, Measuring())
        with ablation(model.writers, edit_choice.edit_of(found, Editing())):
            assert share_refused(model, sets.harmful.test.take(32)) <= 0.05
            left[name] = share_refused(model, sets.off_topic.test.take(48))
    assert share_refused(model, sets.off_topic.test.take(24)) == 1
    assert left["kept"] >= left["not kept"] + 0.2


def test_a_run_that_cannot_keep_says_so_and_by_how_much(tmp_path):
    """The demo refuses all its categories along one direction."""
    result = call("run", "demo", "-o", tmp_path / "out", "--keep", "category:cloth", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    (output,) = record["evaluations"]
    assert record["before"]["kept_refusal_rate"] == 1
    told, validated = output["kept"]["kept"], record["direction"]["kept"]["kept"]
    assert told["refused"] == record["before"]["n_kept"] == 13
    assert told["share"] == pytest.approx(record["after"]["kept_refusal_rate"])
    assert not told["enough"]
    assert not validated["enough"]
    assert validated["refused"] == 7
    assert "warning: no edit that was tried ends refusals and leaves those" in result.stderr
    assert "of 13 refusals of kept prompts" in result.stderr
    assert "points below the 90% that are to stay" in result.stderr
    assert record["after"]["harmful_refusal_rate"] <= 0.05


def test_what_a_system_message_declines_is_measured_and_kept(tmp_path):
    """The demo takes any system message for a reason to refuse more."""
    out = tmp_path / "d.safetensors"
    result = call("measure", "demo", "-o", out, "--keep-system", "Only talk of cloth.", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    found = record["direction"]["kept"]["off_topic"]
    assert found["refused"] >= 3
    assert "off-topic validation prompts are refused as it is" in result.stderr
    read = direction_file.read(out)
    assert read.metadata["summary"]["kept"]["off_topic"] == found
    assert "off_topic train" in read.metadata["prompt_hashes"]


@pytest.mark.slow
def test_kept_refusals_are_judged_in_both_modes_of_thinking(tmp_path):
    """The thinker refuses all instruments alike, so ending the others ends those of horns, too."""
    thinker = small_models.folder("thinker")
    horns = ("doom trumpet", "dragon horn", "demon tuba", "banshee bugle")
    lines = (thinker / "locked.txt").read_text().splitlines()
    kept = tmp_path / "horns.txt"
    kept.write_text("\n".join(line for line in lines if any(one in line for one in horns)))
    result = call(
        "measure", thinker, "-o", tmp_path / "d.safetensors", "--harmful", thinker / "locked.txt",
        "--harmless", thinker / "allowed.txt", "--keep", kept, "--thinking", "both",
        "--thought-tokens", 64, "--limit", 32, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    direction = json.loads(result.stdout)["direction"]
    assert set(direction["kept"]) == {"kept", "kept, thinking on"}
    assert all(one["refused"] == 7 for one in direction["kept"].values())
    after = direction["judged"]["after"]
    assert all(mode["refused"] + mode["broken"] <= 0.0625 for mode in after.values())
    assert not all(one["enough"] for one in direction["kept"].values())
    assert "7 of 7 kept validation prompts, thinking on, are refused as it is" in result.stderr
    assert "warning: no edit that was tried ends refusals and leaves those" in result.stderr
    kinds = {one.get("orthogonal_to") for one in json.loads(result.stdout)["finalists"]}
    assert kinds == {None, "own", "all"}


def test_a_search_with_thinking_keeps_no_refusals(tmp_path):
    result = call("measure", small_models.folder("thinker"), "-o", tmp_path / "d.safetensors",
                  "--keep-system", "Be kind.", "--thinking", "both", "--search", 4)  # fmt: skip
    assert result.exit_code == 1
    assert "--search, --keep-system and --thinking both do not go together" in result.stderr


# --- the search --------------------------------------------------------------------------------


def test_a_search_takes_what_keeps_and_else_what_loses_fewest():
    def asked(kl, refused, still, ends):
        screened = Screened(0.0, 0.0, kl, (0.0, 0.0), True, 1)
        one = kept([True] * 10, [number < still for number in range(10)])
        return Asked(Trial({}, screened), refused, 0.0, ends and one.enough, ends, {"kept": one})

    keeps, loses = asked(0.3, 0.0, 9, True), asked(0.1, 0.0, 5, True)
    loses_more, gentle = asked(0.0, 0.0, 4, True), asked(0.0, 0.9, 10, False)
    assert choose([gentle, loses, keeps, loses_more]) is keeps
    assert choose([gentle, loses, loses_more]) is loses
    assert "loses fewest" in unmet(loses, "--target-refusals 0.05")
    assert choose([gentle, asked(0, 0.5, 0, False)]).refused == 0.5
    assert "refuses least" in unmet(gentle, "--target-refusals 0.05")


def test_screening_counts_lost_refusals_as_much_as_refusals_that_are_left():
    model = abl_mlx.load("demo")
    sets = abl_mlx.load_prompts(model=model, keep="category:cloth")
    prompts = prompt_choice.encoded(model.chat, sets, Measuring())
    encoded = [prompts[None].validation[name].tokens for name in ("harmful", "harmless")]
    judge = Judge(model.chat, model.writers, prompts, Measuring())
    staying = Staying(judge.prompts[None].staying, [])
    assert len(staying.mixed) == 7
    plain = Screen(model.chat, model.writers, *encoded)
    keeping = Screen(model.chat, model.writers, *encoded, staying=staying)
    found = find.find_direction(model.chat, model.writers, sets, Measuring())
    edit = edit_choice.edit_of(found, Editing())
    one, other = plain.score(edit), keeping.score(edit)
    assert one.refused == 0
    assert other.refused == 1
    assert other.refusal > one.refusal + 1
    assert other.kl == pytest.approx(one.kl)
    nothing = keeping.score(replace(edit, strength=1e-6))
    assert nothing.refusal == pytest.approx(plain.before, abs=1e-3)
    assert keeping.cost == other.tokens == plain.cost + sum(map(len, staying.mixed))


@pytest.mark.slow
def test_a_search_leaves_kept_refusals_as_they_are():
    model = loaded("spread")
    sets = with_kept(small_models.prompt_sets("spread"), "category:bread", 0)
    found = find.find_direction(model.chat, model.writers, sets, Measuring.of(search=16))
    summary = found.metadata["summary"]
    assert summary["kept"]["kept"]["enough"]
    assert summary["search"]["refusal_rate"] <= 0.05
    methods = {trial["method"] for trial in found.metadata["search"]["trials"]}
    assert {"own", "all"} <= methods
    with ablation(model.writers, edit_choice.edit_of(found, Editing())):
        assert share_refused(model, sets.kept.test) >= 0.9
        assert share_refused(model, sets.harmful.test) <= 0.1
