"""A model that shows no refusal to remove is not edited in silence."""

import re
from functools import cache

import pytest
from click.testing import CliRunner

from abl_mlx.choices import Measuring
from abl_mlx.cli.main import cli
from abl_mlx.commands import first_look, prompt_choice
from abl_mlx.demo import MODEL_PATH
from abl_mlx.inputs import prompts
from abl_mlx.inputs.sets import Prompt, PromptSet, PromptSets, split
from abl_mlx.models import chat_model

DEMO = prompts.load_demo()


def texts(split):
    return [text for part in (split.train, split.validation, split.test) for text in part.texts]


ANSWERED, REFUSED = texts(DEMO.harmless), texts(DEMO.harmful)


@cache
def demo():
    return chat_model.load(MODEL_PATH)


def sets(harmful, harmless):
    bad, good = (PromptSet("x", tuple(map(Prompt, one))) for one in (harmful, harmless))
    return PromptSets(split(bad, 0), split(good, 0), None)


def looked(harmful, harmless, **chosen):
    how = Measuring.of(**chosen)
    encoded = prompt_choice.encoded(demo(), sets(harmful, harmless), how)
    return first_look.look(demo(), encoded[None], how)


def said(tmp_path, harmful, harmless, *command):
    for name, lines in (("bad", harmful), ("good", harmless)):
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    given = ["--harmful", tmp_path / "bad.txt", "--harmless", tmp_path / "good.txt"]
    return CliRunner().invoke(cli, [*map(str, [*command, *given])])


def test_the_chance_of_a_difference_is_fishers():
    assert first_look.chance(3, 4, 1, 4) == pytest.approx(17 / 70)  # the lady tasting tea
    assert first_look.chance(0, 12, 5, 12) == 1
    assert first_look.chance(12, 12, 0, 12) == pytest.approx(1 / 2704156)
    assert first_look.chance(0, 12, 0, 12) == 1


def test_a_model_that_declines_late_is_asked_for_longer_replies(monkeypatch):
    """As of a model that says so much first that nothing is seen in the usual length."""
    monkeypatch.setattr(first_look, "REPLY_TOKENS", 1)
    found = looked(REFUSED, ANSWERED)
    assert found.clear
    assert found.record()["harmful"] == {"asked": 12, "refused": 12}
    assert not looked(REFUSED, ANSWERED, max_tokens=1).clear


def test_a_dozen_of_each_set_tell_a_model_that_refuses():
    found = looked(REFUSED, ANSWERED)
    assert found.clear
    assert not found.swapped
    assert found.record() == {
        "harmful": {"asked": 12, "refused": 12},
        "harmless": {"asked": 12, "refused": 0},
    }


def mixed(share):
    """Prompts of which every so many-th is refused."""
    few = REFUSED[: len(ANSWERED) // share]
    return [*few, *ANSWERED[: len(few) * (share - 1)]]


def test_more_are_asked_where_a_dozen_cannot_decide():
    others = ANSWERED[::-1]
    some = looked(mixed(4), others[:60])
    assert 0 < some.refused.refused < len(some.refused.replies) / 2
    assert len(some.refused.replies) > first_look.DOZEN
    assert some.clear
    few = looked(mixed(16), others[:60])
    assert not few.clear
    assert few.refused.rate < 0.15


def test_of_a_few_prompts_the_train_part_is_asked_too():
    found = looked(REFUSED[:6], ANSWERED[:6])
    assert len(found.refused.replies) == len(found.refused.encoded) < 6
    assert found.clear


@pytest.mark.parametrize("command", ["run", "measure"])
def test_a_model_that_refuses_nothing_is_not_edited(command, tmp_path):
    out = tmp_path / ("out" if command == "run" else "d.safetensors")
    result = said(tmp_path, ANSWERED[:64], ANSWERED[64:128], command, "demo", "-o", out)
    assert result.exit_code == 1
    assert not out.exists()
    message = result.stderr.splitlines()[-1]
    assert "refuses 0 of 12 harmful prompts (0%, 95% interval 0% to 24%)" in message
    assert "no refusal to remove" in message
    for flag in ("--harmful", "--layer", "--direction", "--anyway"):
        assert flag in message
    # Of an answer to a harmful prompt no more than a few words are quoted.
    quoted = re.findall(r'"([^"]*)"', message)
    assert len(quoted) == 4
    assert len(quoted[1].removesuffix(" ...").split()) <= 4
    assert message.count("\n") == 0


def test_sets_that_look_swapped_are_told(tmp_path):
    result = said(tmp_path, ANSWERED[:64], REFUSED[:64], "run", "demo", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "12 of 12 harmless ones (100%), so the two sets look swapped" in result.stderr
    assert "sorry" in result.stderr  # a refusal may be quoted
    assert not (tmp_path / "out").exists()


def test_a_model_that_refuses_everything_has_nothing_that_sets_prompts_apart(tmp_path):
    result = said(tmp_path, REFUSED[:64], REFUSED[64:128], "run", "demo", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "no refusal sets the two apart" in result.stderr


@pytest.mark.parametrize("flags", [["--anyway"], ["--layer", "2"]])
def test_who_asks_for_it_is_warned_and_served(flags, tmp_path):
    out = tmp_path / "d.safetensors"
    result = said(
        tmp_path, ANSWERED[:40], ANSWERED[64:104], "measure", "demo", "-o", out, *flags
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "warning: this model refuses 0 of 12 harmful prompts" in result.stderr
    assert out.exists()


def test_of_over_refusal_the_borderline_prompts_are_asked(tmp_path):
    (tmp_path / "borderline.txt").write_text("\n".join(ANSWERED[:40]))
    borderline = tmp_path / "borderline.txt"
    result = said(
        tmp_path, REFUSED[:40], ANSWERED[64:104], "run", "demo", "-o", tmp_path / "out",
        "--method", "over-refusal", "--borderline", borderline,
    )  # fmt: skip
    assert result.exit_code == 1
    assert "refuses 0 of 12 borderline prompts" in result.stderr
