"""Searches with scorers: as a limit (`--scorer`), and as what is lowered (`--search-for`)."""

import json
from dataclasses import dataclass, replace
from importlib import metadata

import pytest
from click.testing import CliRunner

from abl_mlx.behaviour.refusals import Verdict, classify
from abl_mlx.behaviour.scorers import scorer
from abl_mlx.choices import Measuring
from abl_mlx.cli.main import cli
from abl_mlx.commands import prompt_choice
from abl_mlx.commands.edit_choice import edit_of
from abl_mlx.commands.find import find_direction
from abl_mlx.edits.steering import ablation
from abl_mlx.inputs import prompts, sources
from abl_mlx.models import chat_model
from abl_mlx.models.writers import find_writers
from abl_mlx.search import behaviours, loop
from abl_mlx.search.screening import Screened
from abl_mlx.search.survivors import Asked, choose
from convert.base.errors import UsageError, UserError

LOCKED = tuple(prompts.load_demo().harmful.test.texts[:8])


@dataclass(frozen=True)
class Share:
    """The share of replies with some verdict, as a package might count it."""

    name: str
    counted: Verdict
    unit: str = "of the replies"
    prompts: tuple[str, ...] = LOCKED
    max_tokens: int = 16

    def figure(self, replies):
        found = [classify(*pair) for pair in zip(replies, self.prompts, strict=True)]
        return found.count(self.counted) / len(found)


def apologies(path):
    return Share("apologies", Verdict.REFUSAL)


def answers(path):
    return Share("answers", Verdict.ANSWER)


@pytest.fixture(autouse=True)
def package(monkeypatch):
    points = [
        metadata.EntryPoint(name, f"{__name__}:{name}", scorer.GROUP)
        for name in ("apologies", "answers")
    ]
    others = metadata.entry_points

    def every(**asked):
        return points if asked.get("group") == scorer.GROUP else others(**asked)

    monkeypatch.setattr(metadata, "entry_points", every)


@pytest.fixture(scope="module")
def demo():
    chat = chat_model.load(sources.resolve("demo").path)
    sets = prompts.load_demo()
    few = {
        name: replace(split, train=split.train.take(16), validation=split.validation.take(8))
        for name, split in (("harmful", sets.harmful), ("harmless", sets.harmless))
    }
    sets = replace(sets, **few)
    writers = find_writers(chat)
    return chat, writers, sets, find_direction(chat, writers, sets, Measuring.of(position=-1))


def searched(demo, trials, journal=None, **others):
    chat, writers, sets, found = demo
    options = Measuring.of(search=trials, search_journal=journal, **others)
    encoded = prompt_choice.encoded(chat, sets, options)
    return loop.improve(chat, writers, encoded, found, options)


def test_a_search_lowers_another_figure_than_refusals(demo, tmp_path, capsys):
    chat, writers, _, _ = demo
    journal = tmp_path / "journal"
    file = searched(demo, 9, journal, search_for="apologies", target_figure=0.5)
    summary = file.metadata["summary"]["search"]
    sought = summary["figure"]
    assert (sought["scorer"], sought["before"], sought["target"]) == ("apologies", 1.0, 0.5)
    assert sought["after"] <= 0.5
    assert "refusal_rate" not in summary
    # The figure is that of the edit that is written down.
    one = apologies(None)
    with ablation(writers, edit_of(file, Measuring().editing)):
        after = behaviours._replies(chat, one, 32)[0]
    assert one.figure(after) == sought["after"]
    # Of the edits that meet the target it has the lowest KL.
    trials = file.metadata["search"]["trials"]
    good = [trial["kl"] for trial in trials if trial["refusal_score"] <= 0.5]
    assert summary["kl"] == pytest.approx(min(good))
    assert "figure" in capsys.readouterr().err
    # A journal is of the searches for the same figure.
    with pytest.raises(UserError, match="another space or options"):
        searched(demo, 9, journal)


def test_an_edit_that_raises_a_figure_is_not_chosen_if_another_meets_the_target(demo, capsys):
    # No edit ends refusals of prompts and leaves their answers as few as they were.
    file = searched(demo, 3, scorer="answers")
    summary = file.metadata["summary"]["search"]
    assert summary["scorers"]["answers"]["before"] == 0
    assert summary["scorers"]["answers"]["after"] > 0
    said = capsys.readouterr().err
    assert "raises no figure of --scorer by more than --max-rise" in said
    assert "the one that is taken raises answers" in said
    # Where it may rise so far, the target is met.
    file = searched(demo, 3, scorer="answers", max_rise=1.0)
    assert "lowest KL of those" in file.metadata["summary"]["chosen_by"]


def test_the_choice_among_edits_that_raise_figures():
    trials = [loop.Trial({}, Screened(0.0, 0.0, kl, (0.0, kl), True, 1)) for kl in (0.1, 0.2, 0.3)]
    asked = [
        Asked(trials[0], 0, 0, False, True, {}, {"a": 2.0, "b": 2.0}, ("a", "b")),
        Asked(trials[1], 0, 0, False, True, {}, {"a": 2.0, "b": 1.0}, ("a",)),
        Asked(trials[2], 1, 0, False, False, {}, {"a": 1.0, "b": 1.0}),
    ]
    assert choose(asked) is asked[1]
    met = Asked(trials[2], 0, 0, True, True, {}, {"a": 1.0, "b": 1.0})
    assert choose([*asked, met]) is met


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--search-for", "slop"], 2, "--search-for is used by a search"),
        (["--max-rise", "1"], 2, "--max-rise is used by a search"),
        (["--target-figure", "0"], 2, "--target-figure is used by a search"),
        (["--search", "2", "--target-figure", "0"], 2, "add that"),
        (["--search", "2", "--max-rise", "1"], 2, "--max-rise limits the figures of --scorer"),
        (["--search", "2", "--search-for", "slop,language"], 1, "name one scorer"),
        (["--search", "2", "--search-for", "slip"], 1, "slip is not known"),
        (["--search", "2", "--search-for", "slop", "--thinking", "on"], 1, "--thinking on"),
        (["--search", "2", "--search-for", "slop", "--method", "rdo"], 1, "--method rdo"),
        (["--scorer", "slip"], 1, "slip is not known"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path, flags, code, says):
    result = CliRunner().invoke(cli, ["run", "demo", "-o", str(tmp_path / "out"), *flags])
    assert (result.exit_code, says in result.output) == (code, True), result.output
    assert not (tmp_path / "out").exists()


def test_a_figure_of_zero_cannot_be_lowered(demo):
    with pytest.raises(UserError, match="the figure of this model is 0"):
        searched(demo, 2, search_for="answers")


def test_run_has_the_figures_before_and_after(tmp_path):
    result = CliRunner().invoke(
        cli,
        ["run", "demo", "-o", str(tmp_path / "out"), "--quick", "--layer", "2", "--limit", "8",
         "--max-tokens", "8", "--scorer", "apologies,answers", "--json"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    after = record["evaluations"][0]["scorers"]
    assert record["scorers"]["apologies"]["figure"] == 1.0
    assert after["apologies"]["figure"] == 0.0
    assert after["answers"]["figure"] == 1.0
    assert record["options"]["scorer"] == "apologies,answers"


def test_measure_looks_for_another_behaviour_without_refusals(tmp_path):
    # Harmless prompts alone, of which the model refuses none: only the scorer tells the two apart.
    for name, verb in (("bad", "Describe"), ("good", "Name")):
        lines = [f"{verb} thing number {n}." for n in range(40)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    result = CliRunner().invoke(
        cli,
        ["measure", "demo", "-o", str(tmp_path / "d.safetensors"), "--search", "2",
         "--search-for", "apologies", "--harmful", str(tmp_path / "bad.txt"),
         "--harmless", str(tmp_path / "good.txt"), "--json"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    sought = json.loads(result.stdout)["direction"]["search"]["figure"]
    assert sought["before"] == 1.0
    with pytest.raises(UsageError, match="is used by a search"):
        behaviours.check_unused(Measuring.of(search_for="apologies").scoring)
