"""`--keep` and `--keep-system`: refusals that are to stay, in run, measure and eval."""

import json

import pytest
from click.testing import CliRunner

from abl_mlx.behaviour.kept_refusals import kept, sentence
from abl_mlx.cli.main import cli


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
    assert "nothing is to stay" in sentence("kept", nothing)


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
