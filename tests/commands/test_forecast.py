"""What is to come is told before long work, and --quick makes less of it."""

import json
import re

import pytest
from click.testing import CliRunner

from abl_mlx import demo
from abl_mlx.behaviour.refusals import wilson
from abl_mlx.choices import Finding, Measuring, Prompting
from abl_mlx.cli.main import cli
from abl_mlx.commands import prompt_choice
from abl_mlx.commands.find import find_direction
from abl_mlx.commands.forecast import Forecast, forecast
from abl_mlx.commands.held_out import HeldOut
from abl_mlx.directions import induction
from abl_mlx.inputs import prompts
from abl_mlx.models import chat_model, logits, shortcuts
from abl_mlx.models.writers import find_writers
from abl_mlx.outputs.model_file import find_model


def test_what_is_told_is_what_comes():
    chat, sets = chat_model.load(demo.MODEL_PATH), prompts.load_demo()
    encoded = prompt_choice.encoded(chat, sets, Measuring())[None]
    asked = HeldOut({"a": sets.harmful.test, "b": sets.harmless.test}, frozenset(), 64, Prompting())
    told = forecast(chat, encoded, Measuring(), 50.0, held_out=asked, times=2)
    train = [*sets.harmful.train.texts, *sets.harmless.train.texts]
    assert told.measured == 128
    assert told.measure == pytest.approx(sum(len(chat.encode(text)) for text in train), rel=0.1)
    assert (told.asked, told.times) == (128, 2)
    assert 2 * 128 * 64 < told.ask < 2 * 128 * (64 + 40)
    found = find_direction(chat, find_writers(chat), sets, Measuring())
    assert found.metadata["summary"]["forward_tokens"] <= told.choose
    assert told.rate > 0
    assert told.memory > 100e6
    alone = forecast(chat, encoded, Measuring.of(layer=2), 50.0)
    assert alone.choose < told.choose / 3
    assert alone.ask == 0
    searched = forecast(chat, encoded, Measuring.of(search=60), 50.0)
    assert searched.choose - told.choose == pytest.approx(60 * 96 * 16, rel=0.2)
    timed = forecast(chat, encoded, Measuring.of(search=60, minutes=30.0), 50.0)
    assert timed.choose == told.choose
    assert "search (at most 30 minutes)" in str(timed)
    assert timed.minutes > 30 + told.measure / timed.rate / 60


def test_what_a_constant_takes_is_told_too(monkeypatch):
    chat = chat_model.load(demo.MODEL_PATH)
    sets = prompt_choice.encoded(chat, prompts.load_demo(), Measuring())[None]
    told = forecast(chat, sets, Measuring(), 50.0, inducing=True)
    ran = []
    whole = shortcuts.passes

    def counted(chat, sequences, *args, **more):
        ran.append(sum(map(len, sequences)))
        return whole(chat, sequences, *args, **more)

    monkeypatch.setattr(logits, "passes", counted)
    induction.choose(chat, sets, Finding())
    assert 0.2 * told.choose < sum(ran) < told.choose


def test_the_line_names_minutes_and_what_shortens_them():
    said = str(Forecast(208, 8201, 18000, 124, 2, 25000, 100.0, 40.0, 1_200_000_000))
    assert "measure 208 prompts (8,201 tokens), choose (at most 18,000)" in said
    assert "ask 124 held-out prompts 2 times (at most 25,000): about 15 minutes" in said
    assert "100 tokens a second, 1.2 GB of memory" in said
    for flag in ("--quick", "--limit", "--max-tokens"):
        assert flag in said
    assert "about 30 seconds" in str(Forecast(10, 3000, 0, 0, 0, 0, 100.0, 40.0, 10**9))


def test_quick_takes_fewer_prompts_and_its_intervals_are_those_of_the_help():
    source = find_model("demo")
    sets = prompt_choice.load(source, Prompting(quick=True))
    for split in (sets.harmful, sets.harmless):
        assert [len(part) for part in (split.train, split.validation, split.test)] == [48, 16, 24]
    fewer = prompt_choice.load(source, Prompting(quick=True, limit=8))
    assert len(fewer.harmful.train) == len(fewer.harmful.test) == 8
    assert round(100 * wilson(0, 24)[1]) == 14
    assert round(100 * wilson(0, 62)[1]) == 6
    help_text = " ".join(CliRunner().invoke(cli, ["run", "--help"]).output.split())
    assert "48 prompts of each set to measure, 16 to choose on, 24 to ask" in help_text
    assert "at most 14%" in help_text


def test_steps_are_told_with_their_seconds_where_there_is_no_terminal(tmp_path):
    out = tmp_path / "out"
    result = CliRunner().invoke(cli, ["run", "demo", "-o", str(out), "--quick", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["after"]["n_harmful"] == 24
    lines = result.stderr.splitlines()
    coming = next(i for i, line in enumerate(lines) if "to come: measure 96 prompts" in line)
    assert lines.index("· measure and choose a direction") > coming
    for step in ("load the model", "measure and choose a direction", "write"):
        assert re.search(rf"^  {step}: \d+\.\d s$", result.stderr, re.MULTILINE)
