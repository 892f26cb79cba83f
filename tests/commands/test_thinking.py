"""`--thinking`: a direction found with thinking off, and one that ends refusals in both modes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from abl_mlx import demo
from abl_mlx.behaviour import llamacpp, thought_figures
from abl_mlx.behaviour.llamacpp import LlamaCpp
from abl_mlx.behaviour.thought_figures import Thought
from abl_mlx.cli.main import cli
from abl_mlx.commands import first_look
from abl_mlx.commands.views import thought_end
from abl_mlx.directions import selection, trial
from abl_mlx.models.thoughts import parted
from abl_mlx.records.edits import RunRecord
from abl_mlx.records.measurements import Thoughts
from abl_mlx.reports.tables import run_table
from tests.support.command import abl_mlx, fails
from tests.support.servers import Server
from tests.support.small_models import folder

THINKER = folder("thinker")
PROMPTS = ("--harmful", THINKER / "locked.txt", "--harmless", THINKER / "allowed.txt")
SHORT = ("--thought-tokens", 64, "--max-tokens", 32)


@pytest.fixture(scope="module")
def off(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The thinker without the direction that is found with thinking off."""
    out = tmp_path_factory.mktemp("off") / "edited"
    record = abl_mlx("run", THINKER, *PROMPTS, "--max-tokens", 32, "-o", out)
    assert record["after"]["harmful_refusal_rate"] <= 0.05
    return out


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The thinker without what makes it refuse in either mode, and the record of that run."""
    out = tmp_path_factory.mktemp("both") / "edited"
    replies = out.with_name("replies.jsonl")
    record = abl_mlx(
        "run", THINKER, *PROMPTS, *SHORT, "--thinking", "both", "-o", out, "-o",
        out.with_name("edited.gguf"), "--save-replies", replies,
    )  # fmt: skip
    return out, record


def test_an_edit_found_with_thinking_off_leaves_refusals_with_it_on(off: Path) -> None:
    record = abl_mlx("eval", off, *PROMPTS, *SHORT, "--thinking", "both", "--limit", 24)
    assert record["harmful_refusal_rate"] <= 0.05
    assert record["modes"]["on"]["harmful_refusal_rate"] >= 0.2


def test_both_ends_refusals_in_both_modes(both: tuple[Path, dict[str, Any]]) -> None:
    _, record = both
    before, after = record["before"], record["after"]
    for was, now in ((before, after), (before["modes"]["on"], after["modes"]["on"])):
        assert was["harmful_refusal_rate"] == 1
        assert now["harmful_refusal_rate"] <= 0.05
        assert now["harmless_refusal_rate"] == 0
        assert now["broken_rate"] <= 0.02
    thoughts = before["modes"]["on"]["thoughts"], after["modes"]["on"]["thoughts"]
    assert thoughts[1]["words"] <= 1.2 * thoughts[0]["words"]
    assert thoughts[1]["unclosed"] == thoughts[1]["looping"] == 0
    views = {(one["thinking"], one["measured_at"]) for one in record["direction"]["views"]}
    assert ("on", "end-of-thought") in views
    assert ("off", "end-of-prompt") in views
    # What was judged by replies is on record, and no finalist of one view alone was enough.
    singles = [one for one in record["finalists"] if len(one["views"]) == 1]
    assert all(max(m["refused"] for m in one["modes"].values()) > 0.05 for one in singles)


def test_replies_are_kept_by_mode(both: tuple[Path, dict[str, Any]]) -> None:
    lines = both[0].with_name("replies.jsonl").read_text().splitlines()
    assert sum('"thinking": "on"' in line for line in lines) == len(lines) / 2


@pytest.mark.parametrize("runtime", ["mlx-lm", "llama.cpp", "server"])
def test_the_same_figures_in_every_runtime(both: tuple[Path, dict[str, Any]], runtime: str) -> None:
    pytest.importorskip("xllamacpp")
    gguf = both[0].with_name("edited.gguf")
    asked: Sequence[Any] = (*PROMPTS, *SHORT, "--thinking", "both", "--limit", 16)
    if runtime == "server":
        with LlamaCpp(gguf, n_ctx=512, n_threads=1) as server:
            record = abl_mlx("eval", server.address, *asked)
    else:
        record = abl_mlx("eval", gguf, *asked, "--runtime", runtime)
    for mode in (record, record["modes"]["on"]):
        assert mode["harmful_refusal_rate"] <= 0.03
        assert mode["harmless_refusal_rate"] <= 0.03
    assert record["modes"]["on"]["thoughts"]["n"] >= 32
    assert 10 < record["modes"]["on"]["thoughts"]["words"] < 30


def test_limits_hold_in_every_mode(off: Path) -> None:
    asked = (*PROMPTS, *SHORT, "--limit", 8)
    strict = (*asked, "--thinking", "both", "--min-refusal", 0.9)
    result = CliRunner().invoke(cli, ["eval", str(off), *map(str, strict)])
    assert result.exit_code == 3
    (said,) = [line for line in result.stderr.splitlines() if line.startswith("Not met")]
    assert "refuses 0% of 8 harmful prompts" in said
    assert "with thinking on" not in said  # where it does refuse
    longer = abl_mlx(
        "eval", off, *asked, "--thinking", "on", "--baseline", THINKER, "--max-thought-growth", 1.2
    )
    (limit,) = [one for one in longer["gate"]["checks"] if one["name"] == "max-thought-growth"]
    assert limit["passed"]
    assert 0.8 < limit["value"] < 1.2


def test_tables_and_records_name_the_mode_of_their_figures(tmp_path: Path) -> None:
    """With thinking on alone no row does it."""
    asked = ["eval", str(THINKER), *map(str, PROMPTS), "--limit", "2", "--thought-tokens", "64"]
    page = tmp_path / "page.html"
    result = CliRunner().invoke(cli, [*asked, "--thinking", "on", "--report", str(page)])
    assert "thinker (asked in mlx-lm, thinking on)" in result.stdout
    assert "asked in mlx-lm, thinking on, judged by markers" in page.read_text()
    assert "at most 64 tokens, and 64 more where the model thinks" in page.read_text()
    record = abl_mlx(*asked, "--thinking", "on")
    assert (record["thinking"], record["thought_tokens"]) == ("on", 64)
    assert not {"thinking", "thought_tokens"} & set(abl_mlx(*asked))
    swept = abl_mlx(*asked, "--thinking", "both", "--length-sweep", "16,64")
    assert "thinking" not in swept  # the first rates are those with thinking off
    assert "thought_tokens" not in swept  # what is cut has its thought in it


def test_the_line_about_one_direction_is_of_one_view(both: tuple[Path, dict[str, Any]]) -> None:
    record = RunRecord.of(both[1])
    assert len(record.direction.views or ()) > 1
    assert "one direction (" not in run_table(record)


def test_a_model_without_a_switch(tmp_path: Path) -> None:
    said = fails("measure", "demo", "--thinking", "both", "-o", tmp_path / "d.safetensors")
    assert "writes the same prompt with thinking on and off" in said
    said = fails(
        "measure", "demo", "--measured-at", "end-of-thought", "-o", tmp_path / "e.safetensors"
    )
    assert "needs a model that thinks: add --thinking on or both" in said
    said = fails("eval", "demo", "--limit", 2, "--thinking", "both")
    assert "writes the same prompt with thinking on and off" in said
    said = fails("eval", "demo", "--thinking", "7")
    assert "--thinking 7: give off, on, both, or an amount" in said


@pytest.mark.parametrize("form", ["mlx", "gguf"])
def test_an_amount_of_thinking_that_no_template_knows(tmp_path: Path, form: str) -> None:
    """A misspelt "off" does not silently stand for on."""
    model = THINKER
    if form == "gguf":
        pytest.importorskip("xllamacpp")
        model = tmp_path / "thinker.gguf"
        abl_mlx("convert", THINKER, model)
    said = fails("eval", model, *PROMPTS, "--limit", 2, "--thinking", "of")
    assert f"--thinking of: the chat template of {model.name} knows no amounts of thinking" in said


def test_an_amount_of_thinking_that_the_template_writes(tmp_path: Path) -> None:
    model = tmp_path / "amounts"
    shutil.copytree(demo.MODEL_PATH, model)
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text(
        "{% set amount = reasoning_effort | default('medium') %}"
        "{% if amount != 'medium' %}{{ amount }}{% endif %}" + template
    )
    for amount in ("medium", "high"):
        asked = ("--limit", 2, "--thought-tokens", 8, "--thinking", amount)
        assert abl_mlx("eval", model, *asked)["n_harmful"] == 2


def test_flags_about_thoughts_with_thinking_off(tmp_path: Path) -> None:
    said = fails("eval", "demo", "--limit", 2, "--baseline", "demo", "--max-thought-growth", 1.2)
    assert "--max-thought-growth 1.2 compares thoughts, and thinking is off: add --thinking" in said
    result = CliRunner().invoke(
        cli, ["measure", "demo", "--limit", "8", "-o", str(tmp_path / "d.safetensors"),
              "--thought-tokens", "64", "--max-thought-growth", "1.5"],
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "note: --thought-tokens 64 has no effect, because thinking is off" in result.stderr
    assert "note: --max-thought-growth 1.5 has no effect" in result.stderr


def test_a_server_is_checked_for_a_switch(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    gguf = tmp_path / "demo.gguf"
    abl_mlx("convert", "demo", gguf)
    with LlamaCpp(gguf, n_ctx=512, n_threads=1) as server:
        asked = ("eval", server.address, *PROMPTS, "--limit", 2, "--thinking")
        assert "writes the same prompt with thinking on and off" in fails(*asked, "both")
        assert "knows no amounts of thinking" in fails(*asked, "low")


def test_a_server_that_replies_alike_in_both_modes_is_told_of() -> None:
    with Server(lambda handler, request, number: handler.say("Take two eggs.")) as server:
        asked = ["eval", server.url, *map(str, PROMPTS), "--limit", "2"]
        result = CliRunner().invoke(cli, [*asked, "--thinking", "both"])
        assert result.exit_code == 0, result.stderr
        assert "gives the same replies with thinking on and off" in result.stderr
        alone = CliRunner().invoke(cli, [*asked, "--thinking", "on"])
        assert "the same replies" not in alone.stderr


def test_llama_cpp_loads_a_file_once_for_both_modes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp")
    abl_mlx("convert", THINKER, tmp_path / "thinker.gguf")
    loaded = []

    class Counting(LlamaCpp):
        def __init__(self, *given: Any, **named: Any) -> None:
            loaded.append(given)
            super().__init__(*given, **named)

    monkeypatch.setattr(llamacpp, "LlamaCpp", Counting)
    asked = ("--limit", 2, "--runtime", "llama.cpp", "--thinking", "both")
    record = abl_mlx("eval", tmp_path / "thinker.gguf", *PROMPTS, *SHORT, *asked)
    assert record["modes"]["on"]["harmful_refusal_rate"] == record["harmful_refusal_rate"] == 1
    assert len(loaded) == 1


def test_measured_at_does_not_go_with_a_direction_file(both: tuple[Path, dict[str, Any]]) -> None:
    said = fails(
        "run", THINKER, *PROMPTS, *SHORT, "--thinking", "on", "--measured-at", "end-of-prompt",
        "--direction", both[0].with_name("d.safetensors"), "-o", both[0].with_name("never"),
    )  # fmt: skip
    assert "--measured-at chooses how a direction is measured, and --direction gives one" in said


def test_a_demo_with_a_switch_that_it_does_not_use(tmp_path: Path) -> None:
    """Thinking on is the prompt as it was; off puts an empty thought behind it."""
    model = tmp_path / "switch"
    shutil.copytree(demo.MODEL_PATH, model)
    template = (model / "chat_template.jinja").read_text().rstrip()
    assert template.endswith("{% endif %}")
    (model / "chat_template.jinja").write_text(
        template.removesuffix("{% endif %}") + "{% if enable_thinking is false %}"
        "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
    )
    asked = ("--limit", 12, "--max-tokens", 24, "--thought-tokens", 8)
    on = abl_mlx("eval", model, *asked, "--thinking", "on")
    assert on["harmful_refusal_rate"] == 1
    assert "thoughts" not in on
    record = abl_mlx("run", model, *asked, "--thinking", "on", "-o", tmp_path / "out")
    assert record["after"]["harmful_refusal_rate"] == 0
    assert record["direction"]["measured_at"] == "end-of-prompt"


def test_replies_choose_where_first_tokens_do_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a model that opens refusals and answers alike: no opening counts as a refusal's."""
    monkeypatch.setattr(trial, "refusal_tokens", lambda harmful, harmless: [])
    monkeypatch.setattr(first_look, "told", lambda refusals, answers: selection.Told())
    record = abl_mlx("run", "demo", "--limit", 24, "--max-tokens", 32, "-o", tmp_path / "out")
    assert record["after"]["harmful_refusal_rate"] <= 0.05
    assert record["after"]["expected_answer_rate"] >= 0.8
    assert record["direction"]["chosen_by"].startswith("fewest refusals in replies")
    assert record["direction"]["judged"]["before"]["off"]["refused"] == 1


def test_whole_replies_tell_the_openings_where_first_tokens_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a model that refuses many harmless prompts: its openings are those of its refusals."""
    monkeypatch.setattr(trial, "refusal_tokens", lambda harmful, harmless: [])
    record = abl_mlx("run", "demo", "--limit", 24, "--max-tokens", 32, "-o", tmp_path / "out")
    assert record["after"]["harmful_refusal_rate"] <= 0.05
    assert record["after"]["expected_answer_rate"] >= 0.8
    assert record["direction"]["refusal_tokens"]
    assert "judged" not in record["direction"]


def test_directions_are_judged_at_full_strength(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever strength is written: directions differ most when they are removed entirely."""
    monkeypatch.setattr(trial, "refusal_tokens", lambda harmful, harmless: [])
    monkeypatch.setattr(first_look, "told", lambda refusals, answers: selection.Told())
    record = abl_mlx(
        "run", "demo", "--limit", 12, "--max-tokens", 32, "--strength", 0.01, "-o", tmp_path / "out"
    )
    assert record["direction"]["judged"]["after"]["off"]["refused"] == 0
    assert record["after"]["harmful_refusal_rate"] == 1


def test_where_a_thought_ends() -> None:
    reply = list("<think>so</think>Yes.")
    assert thought_end("".join, reply) == len("<think>so</think>")
    assert thought_end("".join, list("Yes.")) == 0
    assert thought_end("".join, list("<think>so")) is None
    # The prompt opened it.
    assert thought_end(lambda part: "<think>" + "".join(part), list("so</think>Yes")) == 10


def test_thoughts_and_their_figures() -> None:
    assert parted("<think>one two</think>\n\nYes.") == ("one two", "Yes.")
    assert parted("one two</think>Yes.") == ("one two", "Yes.")
    assert parted("<think>one two") == ("one two", None)
    assert parted("Yes.") == ("", "Yes.")
    looping = "<think>" + "I must check again. " * 30
    seen = [Thought.of(one) for one in ("<think>a b c</think>Yes.", looping, "No.")]
    assert seen[0] == Thought(3, True, False)
    assert seen[1] == Thought(120, False, True)
    figures = thought_figures.figures(seen)
    assert figures == Thoughts(n=2, words=3, unclosed=1, looping=1)
    assert thought_figures.figures([Thought.of("No.")]) is None
    assert thought_figures.growth(figures, Thoughts(n=1, words=6, unclosed=0, looping=0)) == 2
    assert thought_figures.growth(None, figures) is None


def test_a_gguf_without_a_system_role_is_told(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    model = tmp_path / "model"
    shutil.copytree(THINKER, model)
    template = model / "chat_template.jinja"
    template.write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}"
        + template.read_text()
    )
    abl_mlx("convert", model, tmp_path / "model.gguf")
    asked = ["eval", str(tmp_path / "model.gguf"), *map(str, PROMPTS), "--limit", "2"]
    result = CliRunner().invoke(cli, [*asked, "--runtime", "llama.cpp", "--system", "Be kind."])
    assert result.exit_code == 0
    assert result.stderr.count("model.gguf has no system role: the system message stands") == 1
