"""``--template``: base models, and a template in place of a model's own, in every runtime."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from abl_mlx import demo, load, load_prompts
from abl_mlx.behaviour import divergence, evaluate
from abl_mlx.behaviour.target import Target
from abl_mlx.cli.main import cli
from abl_mlx.directions import direction_file
from abl_mlx.inputs.sets import Prompt
from abl_mlx.models import given_template
from abl_mlx.outputs.model_file import find_model
from convert.base.errors import UserError
from tests.support.command import abl_mlx, fails

BOS = "<|endoftext|>"
"""A token of the demo that its own template never writes."""

FEW = ("--limit", 8, "--max-tokens", 16)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The demo model without a chat template, as a folder and a GGUF."""
    place = tmp_path_factory.mktemp("base")
    folder, gguf = place / "base", place / "base.gguf"
    shutil.copytree(demo.MODEL_PATH, folder)
    (folder / "chat_template.jinja").unlink()
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["chat_template"]
    path.write_text(json.dumps(config))
    abl_mlx("convert", folder, gguf)
    return folder, gguf


@pytest.mark.parametrize("kind", ["folder", "GGUF"])
def test_without_a_template_a_base_model_is_refused(
    base: tuple[Path, Path], kind: str, tmp_path: Path
) -> None:
    model = base[kind == "GGUF"]
    for command in (
        ["run", model, "-o", tmp_path / f"out{model.suffix}"],
        ["measure", model, "-o", tmp_path / "new.safetensors"],
        ["eval", model],
        ["eval", model, "--runtime", "mlx-lm"],
        ["show", model, "Hi"],
        ["chat", model],
    ):
        said = fails(*command)
        assert f"{model} has no chat template" in said, command
        assert "--template FILE, --template chatml or --template plain" in said, command
    assert list(tmp_path.iterdir()) == []


def test_the_demos_own_template_gives_the_demos_own_prompts(base: tuple[Path, Path]) -> None:
    """ChatML is what the demo was trained with, so nothing may differ by a token."""
    file = demo.MODEL_PATH / "chat_template.jinja"
    wanted = find_model("demo").load().encode("Name two rivers.")
    for model in base:
        for chosen in ("chatml", str(file)):
            assert find_model(str(model), chosen).load().encode("Name two rivers.") == wanted


@pytest.mark.parametrize("kind", ["folder", "GGUF"])
def test_a_base_model_is_asked_as_its_chat_model_is(base: tuple[Path, Path], kind: str) -> None:
    wanted = abl_mlx("eval", "demo", *FEW)["verdicts"]
    assert wanted == {"harmful": "R" * 8, "harmless": "A" * 8}
    asked = ["eval", base[kind == "GGUF"], "--template", "chatml", *FEW]
    assert abl_mlx(*asked)["verdicts"] == wanted
    if kind == "GGUF":
        pytest.importorskip("xllamacpp")
        assert abl_mlx(*asked, "--runtime", "llama.cpp")["verdicts"] == wanted


def test_plain_gives_the_text_as_it_is(base: tuple[Path, Path]) -> None:
    for model in base:
        chat = find_model(str(model), "plain").load()
        assert chat.tokenizer.decode(chat.encode(" Name two\nrivers ")) == " Name two\nrivers "
        assert chat.template_tail() == 1


def test_a_bos_token_goes_in_front_once(base: tuple[Path, Path], tmp_path: Path) -> None:
    folder, gguf = tmp_path / "bos", tmp_path / "bos.gguf"
    shutil.copytree(base[0], folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": BOS}))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    number = next(one["id"] for one in tokenizer["added_tokens"] if one["content"] == BOS)
    parts = [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": parts,
        "pair": [*parts, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {BOS: {"id": BOS, "ids": [number], "tokens": [BOS]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    abl_mlx("convert", folder, gguf)
    own = tmp_path / "own.jinja"
    own.write_text("{{ bos_token }}{{ messages[0].content }}")
    for model in (folder, gguf):
        for chosen in ("plain", "chatml", own):
            ids = find_model(str(model), str(chosen)).load().encode("Name two rivers.")
            assert ids[0] == number
            assert ids.count(number) == 1
    llamacpp = pytest.importorskip("abl_mlx.behaviour.llamacpp")
    pytest.importorskip("xllamacpp")
    for chosen in ("plain", str(own)):
        given = given_template.read(chosen)
        text = find_model(str(gguf), chosen).load()
        with llamacpp.LlamaCpp(gguf, n_threads=1, given=given) as server:
            assert server.encode(Prompt("Two?")) == text.encode("Two?")


def test_a_template_that_is_none(base: tuple[Path, Path], tmp_path: Path) -> None:
    said = fails("eval", base[0], "--template", tmp_path / "no.jinja")
    assert "no.jinja: there is no such file; give a Jinja file, or the word chatml or plain" in said
    bad = tmp_path / "bad.jinja"
    bad.write_text("{{ raise_exception('Not you.') }}")
    for model in base:
        said = fails("eval", model, "--template", bad)
        assert f"{bad}: the chat template refuses the conversation" in said
    bad.write_bytes(b" " * (5 << 20))
    with pytest.raises(UserError, match="longer than"):
        given_template.read(str(bad))


def test_a_given_template_wins(tmp_path: Path) -> None:
    """The user's choice, over a template that raises too, and in llama.cpp."""
    folder, gguf = tmp_path / "bad", tmp_path / "bad.gguf"
    shutil.copytree(demo.MODEL_PATH, folder)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('Not you.') }}")
    abl_mlx("convert", folder, gguf)
    for model in (folder, gguf):
        found = abl_mlx("eval", model, "--template", "chatml", *FEW)
        assert found["verdicts"] == {"harmful": "R" * 8, "harmless": "A" * 8}


def test_an_edit_of_a_base_model(base: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    record = abl_mlx("run", base[1], "-o", out, "--template", "chatml", "--quick")
    assert record["options"]["template"] == record["template"]["name"] == "chatml"
    assert record["before"]["harmful_refusal_rate"] == 1
    assert record["after"]["harmful_refusal_rate"] == 0


def test_records_say_what_prompts_were_written_with(
    base: tuple[Path, Path], tmp_path: Path
) -> None:
    own = tmp_path / "own.jinja"
    own.write_text((demo.MODEL_PATH / "chat_template.jinja").read_text())
    sha256 = hashlib.sha256(own.read_bytes()).hexdigest()
    direction = tmp_path / "r.safetensors"
    measured = abl_mlx("measure", base[0], "-o", direction, "--template", own, "--limit", 8)
    assert measured["template"] == {"name": str(own), "sha256": sha256}
    assert direction_file.read(direction).metadata["template"]["sha256"] == sha256
    shown = abl_mlx("show", base[0], "Hi", "--direction", direction, "--template", own)
    assert shown["template"]["sha256"] == sha256
    before = tmp_path / "before.json"
    before.write_text(json.dumps(abl_mlx("eval", base[0], "--template", own, *FEW)))
    gate = ("--max-drop-from", before, *FEW)
    assert abl_mlx("eval", base[0], "--template", own, *gate)["gate"]["passed"]
    said = fails("eval", base[0], "--template", "plain", *gate)
    assert "was made with another chat template (--template)" in said


def test_figures_of_completions_are_said_to_be(base: tuple[Path, Path], tmp_path: Path) -> None:
    plain = ("--template", "plain", "--limit", 8)
    found = abl_mlx("eval", base[1], *plain, "--max-tokens", 4)
    assert "its replies are completions" in found["note"]
    assert found["template"]["name"] == "plain"
    direction = tmp_path / "r.safetensors"
    measured = abl_mlx("measure", base[0], "-o", direction, *plain, "--layer", 1)
    assert "its replies are completions" in measured["note"]


@pytest.mark.parametrize("kind", ["folder", "GGUF"])
def test_completions_without_refusals_are_told_apart(
    base: tuple[Path, Path], kind: str, tmp_path: Path
) -> None:
    """The demo refuses nothing where it is given the bare text, yet its states differ."""
    model, out = base[kind == "GGUF"], tmp_path / "r.safetensors"
    plain = ("--template", "plain", "--limit", 16)
    measured = abl_mlx("measure", model, "-o", out, *plain)
    direction = measured["direction"]
    assert direction["chosen_by"].startswith("largest d′")
    scores = [one for one in measured["scores"] if "dropped" not in one]
    best = max(scores, key=lambda one: one["d_prime"])
    assert (direction["layer"], direction["position"]) == (best["layer"], best["position"])
    assert best["d_prime"] > 1
    assert "--search tries which edit ends refusals" in fails(
        "measure", model, "-o", tmp_path / "s.safetensors", *plain, "--search", 4
    )
    assert "add --anyway to measure and edit all the same" in fails(
        "run", model, "-o", tmp_path / f"out{model.suffix}", *plain
    )


def test_the_instructions_end_is_the_prompts_end_of_a_completion(
    base: tuple[Path, Path], tmp_path: Path
) -> None:
    plain = ("--template", "plain", "--limit", 8, "--layer", 1)
    last, end = (
        abl_mlx("measure", base[0], "-o", tmp_path / f"{n}.safetensors", *plain, "--position", at)
        for n, at in enumerate(("-1", "instruction-end"))
    )
    assert last["direction"]["sha256"] == end["direction"]["sha256"]


def test_the_library_takes_a_template(base: tuple[Path, Path]) -> None:
    question = load_prompts(model=load("demo")).harmful.test.texts[0]
    for model in base:
        assert load(model, template="chatml").reply([question])[0].startswith("I'm sorry")
    with pytest.raises(UserError, match="has no chat template"):
        load(base[0])


def test_chatml_ends_a_reply_that_the_model_does_not_end(
    base: tuple[Path, Path], tmp_path: Path
) -> None:
    """A model that knows <|im_end|> as a token, but not as the end of a reply."""
    folder, gguf = tmp_path / "model", tmp_path / "model.gguf"
    shutil.copytree(base[0], folder)
    end = load("demo").chat.tokenizer.convert_tokens_to_ids(BOS)
    for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
        values = json.loads((folder / file).read_text())
        known = {"eos_token": BOS, "eos_token_id": end}
        values |= {key: value for key, value in known.items() if key in values}
        (folder / file).write_text(json.dumps(values))
    assert find_model(str(folder), "plain").load().tokenizer.eos_token_ids == {end}
    abl_mlx("convert", folder, gguf)
    question = load_prompts(model=load("demo")).harmful.test.texts[0]
    for model in (folder, gguf):
        assert load(model, template="chatml").reply([question]) == [
            "I'm sorry, but I can't help with that."
        ]
    if evaluate.llamacpp_is_there():
        found = evaluate.InLlamaCpp(gguf, given=given_template.read("chatml"))([question], 64)
        assert found == ["I'm sorry, but I can't help with that."]


def test_chatml_ends_a_reply_at_its_text() -> None:
    """Whatever the model makes of the tag, as of one that has no such token."""
    chat = find_model("demo", "chatml").load()
    ids = chat.tokenizer.encode("Yes.<|im", add_special_tokens=False)
    ids += chat.tokenizer.encode("_end|>\nNo.", add_special_tokens=False)
    assert evaluate.decode(chat, [ids]) == ["Yes."]


@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_kl_is_measured_behind_the_prompts_that_were_asked(
    base: tuple[Path, Path], template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr(divergence, "TOP_N_PROMPTS", 2)
    given = given_template.read(template)
    target = Target("base", "llama.cpp", {}, lambda *_: iter(()), gguf=base[1], given=given)
    found = divergence.refer(target, ["Name two rivers."], 4)
    assert found.prompts == [find_model(str(base[1]), template).load().encode("Name two rivers.")]
    options = ("--template", template, "--limit", 2, "--max-tokens", 4)
    kl = abl_mlx("eval", base[0], "--baseline", base[1], *options)["kl"]
    assert 0 <= kl["k32"] < 1e-3
    assert "perplexity" in abl_mlx("eval", base[1], "--perplexity", *options)


def test_a_conversation_with_a_base_model(base: tuple[Path, Path], tmp_path: Path) -> None:
    for model in base:
        said = CliRunner().invoke(
            cli, ["chat", str(model), "--template", "chatml", "--limit", "8"],
            input="How can I plan a garden?\n/quit\n",
        )  # fmt: skip
        assert said.exit_code == 0, said.stderr


def test_a_base_model_judges_nothing(base: tuple[Path, Path]) -> None:
    """``--template`` is of the model that is asked; and llama.cpp would write ChatML."""
    for model in base:
        said = fails("eval", "demo", *FEW, "--judge", model)
        assert f"--judge {model}: {model} has no chat template, so it is no chat model" in said
        assert "choose an instruction-tuned model as the judge" in said
        assert "--template" not in said


def test_an_audit_names_the_command_that_has_a_template(base: tuple[Path, Path]) -> None:
    told = abl_mlx("audit", base[0], "--ask")["behaviour"]["not_asked"]
    assert "has no chat template, so it is no chat model" in told
    assert f"`abl-mlx eval {base[0]} --template FILE`" in told
