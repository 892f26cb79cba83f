"""Models made to refuse: what is chosen, where it is written, and what the written model says."""

from __future__ import annotations

import html
import json
import re
import shlex
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner

from abl_mlx.behaviour import evaluate
from abl_mlx.choices import Finding, Measuring
from abl_mlx.cli.main import cli
from abl_mlx.commands import prompt_choice
from abl_mlx.directions import induction
from abl_mlx.directions.induction import Induction
from abl_mlx.edits.steering import steering
from abl_mlx.inputs import prompts, sources
from abl_mlx.models import chat_model
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.encoded_sets import EncodedSets
from abl_mlx.models.logits import first_reply_token
from abl_mlx.models.writers import find_writers
from abl_mlx.outputs import induced
from convert.base.errors import UserError
from convert.gguf.file import metadata, tensor_types
from tests.support import small_models

REFUSAL = "I'm sorry, but I can't help with that."


@pytest.fixture(scope="module")
def chat() -> ChatModel:
    return chat_model.load(sources.resolve("demo").path)


def encoded(chat: ChatModel) -> EncodedSets:
    return prompt_choice.encoded(chat, prompts.load_demo(), Measuring())[None]


@pytest.fixture(scope="module")
def found(chat: ChatModel) -> Induction:
    return induction.choose(chat, encoded(chat), Finding(layer=1, position=-3))


@pytest.fixture(scope="module")
def asked() -> list[str]:
    return list(prompts.load_demo().harmless.test.texts[:20])


def test_allowed_prompts_are_refused_word_for_word(
    chat: ChatModel, found: Induction, asked: list[str]
) -> None:
    answer = evaluate.in_mlx(chat)
    assert REFUSAL not in answer(asked[:4], 24)
    with steering(chat, found.intervention):
        replies = answer(asked, 24)
    assert sum(reply == REFUSAL for reply in replies) >= 0.95 * len(asked)
    assert found.summary["fluent_refusals"] >= 0.95


def test_a_constant_that_is_too_large_is_no_fluent_refusal(
    chat: ChatModel, found: Induction, asked: list[str]
) -> None:
    encoded = [chat.encode(text) for text in asked[:8]]
    assert induction.fluent_share(chat, found.intervention, encoded, 1.0) >= 0.95
    loud = Induction(3 * found.vector, found.layer, {}).intervention
    assert induction.fluent_share(chat, loud, encoded, 1.0) <= 0.2


def test_strength_scales_it(chat: ChatModel, found: Induction) -> None:
    half = induction.choose(chat, encoded(chat), Finding(layer=1, position=-3), strength=0.5)
    assert mx.allclose(half.vector, 0.5 * found.vector)
    assert half.summary["multiple"] == 0.5 * found.summary["multiple"]


def test_the_folder_and_the_gguf_do_what_steering_does(
    chat: ChatModel, found: Induction, asked: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    from convert.mlx_to_gguf import write_gguf

    source = sources.resolve("demo")
    writer = induced._place(chat, find_writers(chat), found.layer)
    folder = tmp_path / "out"
    folder.mkdir()
    induced.write_folder(source, folder, chat, writer, found, {"edited": "so"})
    config = json.loads((folder / "config.json").read_text())
    assert config["mlp_bias"] is True
    assert config["abl_mlx"] == {"edited": "so"}
    same = (folder / "model.safetensors").read_bytes()
    assert same == (source.path / "model.safetensors").read_bytes()

    encoded = [chat.encode(text) for text in asked[:4]]
    with steering(chat, found.intervention):
        steered = first_reply_token(chat, encoded)
    written = first_reply_token(chat_model.load(folder), encoded)
    assert mx.abs(mx.exp(written) - mx.exp(steered)).max().item() < 0.02

    write_gguf(folder, tmp_path / "out.gguf", file_type="Q4_0")
    replies = evaluate.InLlamaCpp(tmp_path / "out.gguf")(asked[:8], 24)
    assert replies == [REFUSAL] * 8


def test_a_gguf_alone_is_made_to_refuse(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    runner = CliRunner()
    model, out = tmp_path / "demo.gguf", tmp_path / "out.gguf"
    done = runner.invoke(cli, ["convert", "demo", str(model), "--quantize", "Q4_K"])
    assert done.exit_code == 0, done.output
    chosen = ["--induce", "--layer", "1", "--position", "-3", "--limit", "12"]
    vector = tmp_path / "out.cvec.gguf"
    done = runner.invoke(
        cli, ["run", str(model), "-o", str(out), "-o", str(vector), *chosen, "--max-tokens", "24"]
    )
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "out.abl.json").read_text())
    assert record["induced"] is True
    for one in record["evaluations"]:
        assert one["after"]["harmless_refusal_rate"] >= 0.95
        assert one["after"]["broken_rate"] == 0
    assert [one["runtime"] for one in record["evaluations"]] == ["llama.cpp", "mlx-lm"]
    card = (tmp_path / "out.README.md").read_text()
    assert "made to refuse" in card
    assert "abliterated" not in card
    import gguf

    tags = gguf.GGUFReader(out).fields["general.tags"].contents()
    assert tags == induced.TAGS


def test_a_gguf_gets_the_type_that_is_asked_for(tmp_path: Path) -> None:
    model, out = tmp_path / "demo.gguf", tmp_path / "out.gguf"
    given = ["run", str(model), "-o", str(out), "--induce", "--layer", "1", "--position", "-3",
             "--limit", "12", "--max-tokens", "24"]  # fmt: skip
    for arguments in (["convert", "demo", str(model), "--quantize", "Q4_K"],
                      [*given, "--quantize", "Q8_0"]):  # fmt: skip
        done = CliRunner().invoke(cli, arguments)
        assert done.exit_code == 0, done.output
    assert metadata(out)["general.file_type"] == 7
    types = {name: kind.name for name, kind in tensor_types(out).items()}
    assert types["blk.0.attn_q.weight"] == "Q8_0"
    assert types["blk.1.ffn_down.bias"] == "F32"
    record = json.loads((tmp_path / "out.abl.json").read_text())
    assert record["evaluations"][0]["after"]["harmless_refusal_rate"] >= 0.95
    assert "lost precision again" in record["evaluations"][0]["note"]
    (tmp_path / "x").mkdir()
    given[3] = str(tmp_path / "x" / "x.gguf")
    done = CliRunner().invoke(cli, [*given, "--quantize", "Q9"])
    assert "Q9 is not a supported GGUF file type" in done.output
    assert list((tmp_path / "x").iterdir()) == []


def test_the_command_on_the_page_makes_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--induce`` is in the line: without it the same choices would remove refusals."""
    monkeypatch.chdir(tmp_path)
    chosen = ["--induce", "--layer", "1", "--position", "-3", "--limit", "8", "--max-tokens", "4"]
    done = CliRunner().invoke(cli, ["run", "demo", "-o", "out", *chosen])
    assert done.exit_code == 0, done.output
    first = {file.name: file.read_bytes() for file in Path("out").glob("*.safetensors")}
    before = json.loads(Path("out/abl.json").read_text())
    page = html.unescape(Path("out/report.html").read_text(encoding="utf-8"))
    [line] = re.findall(r"abl-mlx run demo[^<\n]*", page)
    Path("out").rename("first")
    done = CliRunner().invoke(cli, shlex.split(line)[1:])
    assert done.exit_code == 0, done.output
    assert {file.name: file.read_bytes() for file in Path("out").glob("*.safetensors")} == first
    again = json.loads(Path("out/abl.json").read_text())
    assert again["induced"] is True
    assert again["hashes"] == before["hashes"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-o", "x.adapter", "--induce"], "no adapter holds it"),
        (["-o", "x", "--induce", "--pin", "harmless"], "--pin says how a direction is removed"),
        (["-o", "x.cvec.gguf"], "removes nothing"),
        (["-o", "x.cvec.gguf", "--induce", "--layer", "0"], "--layer 0"),
        (["-o", "x", "--induce", "--layer", "4"], "layers 0 to 3"),
    ],
)
def test_what_cannot_be_is_told(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["run", "demo", "--limit", "4", *arguments])
    assert done.exit_code == 1
    assert said in done.output
    assert not list(tmp_path.iterdir())


def test_a_model_without_biases_is_pointed_at_a_control_vector(chat: ChatModel) -> None:
    writer = induced._place(chat, find_writers(chat), 1)
    config = {**chat.config, "model_type": "qwen3"}
    other = ChatModel(chat.folder, chat.model, None, config)
    with pytest.raises(UserError, match="control vector"):
        induced.biased_config(other, writer)
    key, added = induced.biased_config(chat, writer)
    assert key == "mlp_bias"
    assert f"{writer.path}.bias" in dict(added)
    assert len(added) == 3 * len(chat.layers)


def test_an_architecture_without_a_bias_is_refused_before_anything_is_asked(tmp_path):
    result = CliRunner().invoke(
        cli, ["run", str(small_models.folder("hard")), "--induce", "-o", str(tmp_path / "out")]
    )
    assert result.exit_code == 1
    assert "mlx-lm's qwen3 has no bias in" in result.stderr
    assert "find how replies open" not in result.stderr
    assert not (tmp_path / "out").exists()
