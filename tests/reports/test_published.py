"""What is written of an output and said beside it: names, records, cards, notes and tables."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from abl_mlx.behaviour import evaluate
from abl_mlx.choices import ApplyOptions, RunOptions
from abl_mlx.cli.main import cli
from abl_mlx.demo import MODEL_PATH
from abl_mlx.inputs.sources import resolve
from abl_mlx.outputs import provenance
from abl_mlx.records import edits, evaluations, looks
from abl_mlx.records.directions import Chosen
from abl_mlx.records.edits import (
    ApplyRecord,
    Component,
    Converted,
    ConvertRecord,
    EvaluatedEdit,
    Hashes,
    Leaks,
    MeasureRecord,
    PublishRecord,
    RunRecord,
    WorstLeak,
    WrittenEdit,
)
from abl_mlx.records.evaluations import Asked, Divergence, EvalRecord, Refusals
from abl_mlx.records.record import Part, kinds_of
from abl_mlx.reports import eval_tables, induce_tables, site_page, tables
from abl_mlx.support import units
from convert import adapters
from convert.base.suffixes import ends_in, is_gguf_name, without
from convert.gguf import control_vector
from convert.gguf.file import GgufSource, metadata
from convert.gguf.rewrite import rewrite
from convert.mlx_to_gguf import write_gguf
from convert.tokenizers import phi3
from tests.support import command, tiny


def printed(*arguments: object) -> str:
    result = CliRunner().invoke(cli, list(map(str, arguments)))
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.fixture
def direction(tmp_path):
    path = tmp_path / "r.npy"
    np.save(path, np.random.default_rng(0).normal(size=256).astype(np.float32))
    return path


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "secret" / "someone" / "base.gguf"
    path.parent.mkdir(parents=True)
    write_gguf(MODEL_PATH, path)
    return path


# --- names that decide a format ----------------------------------------------------------------


def test_endings_count_in_any_case():
    assert is_gguf_name(Path("a/B.GGUF"))
    assert is_gguf_name(Path("b.Gguf"))
    assert not is_gguf_name(Path("gguf"))
    assert not is_gguf_name(Path("a.gguf/b"))
    assert adapters.is_lora(Path("X.LORA.GGUF"))
    assert adapters.is_mlx(Path("x.Adapter"))
    assert control_vector.is_control_vector(Path("x.CVec.gguf"))
    assert ends_in(Path("A.SVG"), ".png", ".svg")
    assert without("X.LORA.GGUF", ".lora.gguf") == "X" == without("X", ".gguf")


def test_every_suffix_is_taken_in_upper_case(base, direction, tmp_path):
    upper = direction.rename(tmp_path / "R.NPY")
    with_lora = command.abl_mlx(
        "apply", upper, base, "-o", tmp_path / "E.GGUF", "-o", tmp_path / "E.LORA.GGUF"
    )
    assert [one["format"] for one in with_lora["written"]] == ["GGUF", "GGUF LoRA"]
    assert (tmp_path / "E.GGUF").read_bytes()[:4] == b"GGUF"
    assert (tmp_path / "E.abl.json").is_file()
    assert (tmp_path / "E.LORA.abl.json").is_file()
    record = command.abl_mlx("apply", upper, "demo", "-o", tmp_path / "X.ADAPTER")
    assert record["written"][0]["format"] == "MLX adapter"
    record = command.abl_mlx("convert", "demo", tmp_path / "C.GGUF")
    assert record["format"] == "GGUF"
    said = command.fails("apply", upper, "demo", "-o", tmp_path / "x.SAFETENSORS")
    assert "an output is a folder (MLX) or ends in .gguf" in said
    record = command.abl_mlx("audit", tmp_path / "E.GGUF", "-o", tmp_path / "Found.SafeTensors")
    again = tmp_path / "again.gguf"
    command.abl_mlx("apply", tmp_path / "Found.SafeTensors", base, "-o", again)
    assert again.is_file()


def test_a_tilde_is_the_home_folder_also_after_an_equals_sign(direction, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    command.abl_mlx("apply", "~/r.npy", "demo", "--output=~/edited", "--max-leak", "0.5")
    assert (tmp_path / "edited" / "config.json").is_file()
    assert not Path("~").exists()


# --- where it comes from -----------------------------------------------------------------------


def every_text(folder: Path) -> dict[str, str]:
    """Cards, config.json and GGUF metadata of what lies in a folder."""
    texts = {}
    for path in folder.rglob("*"):
        if path.name.endswith(("README.md", "config.json", "Modelfile")):
            texts[path.name] = path.read_text()
        if is_gguf_name(path):
            kept = {k: v for k, v in metadata(path).items() if not k.startswith("tokenizer.")}
            texts[path.name] = json.dumps(kept)
    return texts


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_no_path_is_published(kind, base, direction, tmp_path):
    source = base
    if kind == "folder":
        source = tmp_path / "secret" / "someone" / "My Model"
        shutil.copytree(MODEL_PATH, source)
    out = tmp_path / "out"
    lora = "x.lora.gguf" if kind == "gguf" else "x.adapter"
    record = command.abl_mlx(
        "apply", direction, source, "-o", out / "e.gguf", "-o", out / "e", "-o", out / lora
    )
    assert record["source"] == str(source)
    texts = every_text(out)
    assert len(texts) >= 7
    for name, text in texts.items():
        assert not [word for word in ("secret", "someone", str(tmp_path)) if word in text], name
    card = texts["e.README.md"]
    assert f"# {'base' if kind == 'gguf' else 'My Model'}, abliterated" in card
    assert "is in the record `e.abl.json`" in card
    assert (out / "e.abl.json").is_file()
    assert "is in the record `abl.json`" in (out / "e" / "README.md").read_text()
    assert metadata(out / "e.gguf")["abl_mlx.base_model"] == source.name


def test_a_path_into_hugging_faces_cache_is_its_repository(direction, tmp_path):
    cache = tmp_path / "secret" / "hub"
    snapshot = cache / "models--some-one--Small-2B" / "snapshots" / ("0123" * 10)
    shutil.copytree(MODEL_PATH, snapshot)
    for path in (snapshot, snapshot / ".." / snapshot.name):
        source = resolve(str(path))
        assert (source.hub_id, source.title) == ("some-one/Small-2B", "Small-2B")
        assert source.public_name == "some-one/Small-2B"
    out = tmp_path / "out"
    command.abl_mlx("apply", direction, snapshot, "-o", out / "e", "-o", out / "e.gguf")
    card = (out / "e" / "README.md").read_text()
    assert "base_model: some-one/Small-2B\n" in card
    assert "# Small-2B, abliterated" in card
    config = json.loads((out / "e" / "config.json").read_text())
    assert config["abl_mlx"]["base_model"] == "some-one/Small-2B"
    keys = metadata(out / "e.gguf")
    assert keys["abl_mlx.base_model"] == "some-one/Small-2B"
    assert keys["general.base_model.0.repo_url"] == "https://huggingface.co/some-one/Small-2B"
    assert keys["general.name"] == "Small-2B-abliterated"
    assert "0123" not in card
    assert "secret" not in json.dumps(every_text(out))
    # A blob is named by its hash, and still comes from there.
    blob = snapshot.parent.parent / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    write_gguf(MODEL_PATH, blob)
    assert resolve(str(blob)).public_name == "some-one/Small-2B"


def test_a_folder_that_is_named_by_dots_has_its_name(tmp_path, monkeypatch):
    model = tmp_path / "Named" / "inside"
    shutil.copytree(MODEL_PATH, model.parent)
    model.mkdir()
    monkeypatch.chdir(model)
    assert resolve("..").title == "Named" == resolve("..").public_name


def test_a_kept_record_begins_paths_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    record = {"source": str(tmp_path / "m"), "outputs": [str(tmp_path / "o")], "n": 3, "x": "/else"}
    assert provenance.without_home(record) == {
        "source": "~/m", "outputs": ["~/o"], "n": 3, "x": "/else"
    }  # fmt: skip


# --- what was left out -------------------------------------------------------------------------


def test_a_lora_for_a_tied_model_says_what_it_leaves_out(base, direction, tmp_path):
    lora = tmp_path / "x.lora.gguf"
    text = printed("apply", direction, base, "-o", lora)
    note = next(line for line in text.splitlines() if line.startswith("  note: "))
    assert "left out: token_embd.weight, which is the output head as well" in note
    record = json.loads((tmp_path / "x.lora.abl.json").read_text())
    one = record["written"][0]
    assert one["left_out"] == ["token_embd.weight"]
    assert one["embedding"] is False
    assert one["leak"]["total"] < 1e-6
    # The share of the edit that is in the embedding, from the weights themselves.
    unit = np.load(direction).astype(float)
    unit /= np.linalg.norm(unit)
    with GgufSource(base) as gguf:
        parts = {
            name: gguf.values(name).astype(float)
            for name in gguf.tensors
            if name.split(".")[-2] in ("token_embd", "attn_output", "ffn_down")
        }
    squares = {
        name: float(((w @ unit if "embd" in name else unit @ w) ** 2).sum())
        for name, w in parts.items()
    }
    share = (squares["token_embd.weight"] / sum(squares.values())) ** 0.5
    assert one["leak"]["with_left_out"] == pytest.approx(share, rel=1e-4)
    assert f"{share:.5f} with what is left out" in text
    keys = metadata(lora)
    assert keys["abl_mlx.embedding"] is False
    assert keys["abl_mlx.left_out"] == "token_embd.weight"
    card = (tmp_path / "x.lora.README.md").read_text()
    assert "embedding not edited" in card
    assert "left out: token_embd.weight" in card


def test_the_label_says_whether_an_embedding_was_edited(base, direction, tmp_path):
    for flags, edited in (
        ([], True),
        (["--no-embedding"], False),
        (["--tensors", "ffn_down"], False),
    ):
        out = tmp_path / f"{len(flags)}{flags[-1:]}.gguf"
        command.abl_mlx("apply", direction, base, "-o", out, *flags)
        assert metadata(out)["abl_mlx.embedding"] is edited
        card = out.with_name(f"{out.stem}.README.md").read_text()
        assert f"embedding {'edited' if edited else 'not edited'}" in card


# --- tables ------------------------------------------------------------------------------------

NOTE = "something to know"
_BEHAVIOUR = Refusals(
    harmful_refusal_rate=0.5, harmful_refusal_interval=[0.4, 0.6], n_harmful=1,
    harmless_refusal_rate=0.5, harmless_refusal_interval=[0.4, 0.6], n_harmless=1,
    broken_rate=0.0, categories={},
)  # fmt: skip
_OUTPUT = EvaluatedEdit(
    output="x", format="MLX", types=["F16"], runtime="mlx-lm", after=_BEHAVIOUR,
    kl=Divergence(k1=0.0, k32=0.0), component=0.0, embedding=True, note=NOTE,
    leak=Leaks(total=0.0, max=0.0, tensors={}),
)  # fmt: skip
_EDITED: dict[str, Any] = {
    "abl_mlx": "0", "source": "x", "source_is_repository": False, "base_model": "x", "seconds": {},
    "direction": Chosen(sha256="0", multiple=1, position=-1, layer=1), "outputs": ["x"],
    "hashes": Hashes(source={}, direction="0", options="0"),
}  # fmt: skip
_RUN = RunRecord(
    **_EDITED, options=RunOptions(), before=_BEHAVIOUR, after=_BEHAVIOUR, evaluations=[_OUTPUT],
    kl=Divergence(k1=0.0, k32=0.0), component=Component(before=0.0, after=0.0),
)  # fmt: skip
_APPLIED = ApplyRecord(
    **_EDITED, options=ApplyOptions(), leak=WorstLeak(total=0.0, max=0.0), written=[_OUTPUT]
)
_MEASURED = MeasureRecord(
    abl_mlx="0", source="x", outputs=["y"], direction=Chosen(sha256="0"), note=NOTE, seconds={}
)
_CONVERTED = ConvertRecord(
    abl_mlx="0", source="y", output="x", format="MLX", tensors={}, bytes=0, seconds={}, note=NOTE
)
_EVALUATED = EvalRecord(
    **{name: getattr(_BEHAVIOUR, name) for name in kinds_of(Refusals)},
    abl_mlx="0", source="x", runtime="y", judge="markers", max_tokens=1, note=NOTE, verdicts={},
    prompts={}, seconds={},
)  # fmt: skip
_PUBLISHED = PublishRecord(
    abl_mlx="0", edited="x", source="y", output="z", files=[], pictures=[], note=NOTE, seconds={}
)


@pytest.mark.parametrize(
    "text",
    [
        tables.run_table(_RUN),
        tables.apply_table(_APPLIED),
        induce_tables.table(_RUN),
        tables.measure_line(_MEASURED),
        tables.convert_table(_CONVERTED),
        eval_tables.table(_EVALUATED),
        site_page.table(_PUBLISHED),
        tables.card(_RUN, _OUTPUT, "x", "abl.json"),
        tables.card(_APPLIED, _OUTPUT, "x", "abl.json"),
        induce_tables.card(_RUN, _OUTPUT, "x", "abl.json"),
    ],
)
def test_every_table_and_card_shows_notes(text):
    assert NOTE in text


def test_these_records_and_no_others_have_notes():
    modules = (edits, evaluations, looks)
    parts = {one for module in modules for one in vars(module).values() if inspect.isclass(one)}
    noted = {one for one in parts if issubclass(one, Part) and "note" in kinds_of(one)}
    assert noted == {
        MeasureRecord, WrittenEdit, EvaluatedEdit, Converted, ConvertRecord, Asked, EvalRecord,
        PublishRecord,
    }  # fmt: skip


def test_columns_that_are_empty_are_left_out(direction, tmp_path):
    text = printed("apply", direction, "demo", "-o", tmp_path / "e")
    head = text.splitlines()[1]
    assert head.split() == ["tensor", "weight", "error", "leak"]


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (46_400, "46.4 kB"), (999_960, "1.0 MB"),
     (4_200_000, "4.2 MB"), (21_700_000_000, "21.7 GB"), (3e12, "3.0 TB"), (2e16, "20000.0 TB")],
)  # fmt: skip
def test_sizes_are_in_a_unit_that_shows_them(count, shown):
    assert units.in_bytes(count) == shown


# --- Phi-3 -------------------------------------------------------------------------------------


def test_a_name_says_phi3_as_it_did_before():
    assert phi3.named("phi3-mini-abliterated", phi3=False) == "phi 3-mini-abliterated"
    assert phi3.named("Phi-3.5-x", phi3=False) == "Phi 3.5-x"
    assert phi3.named("Phi-3.5-x", phi3=True) == "Phi-3.5-x"
    assert phi3.named("x", phi3=True) == "x (phi-3)"
    assert phi3.named("phi-4", phi3=False) == "phi-4"


def test_a_phi3_without_a_name_keeps_loading_in_llama_cpp(tmp_path):
    pytest.importorskip("xllamacpp")
    plain, base = tmp_path / "plain.gguf", tmp_path / "phi3-mini-q8.gguf"
    write_gguf(tiny.write_model(tmp_path / "model", "phi3"), plain)
    with GgufSource(plain) as gguf:
        assert not phi3.says_phi3(gguf.metadata["general.name"])
        rewrite(gguf, base, metadata={"general.name": None})
    np.save(tmp_path / "r64.npy", np.random.default_rng(0).normal(size=64).astype(np.float32))
    out = tmp_path / "phi3-edited.gguf"
    command.abl_mlx("apply", tmp_path / "r64.npy", base, "-o", out)
    assert metadata(out)["general.name"] == "phi 3-mini-q8-abliterated"
    for path in (base, out):
        assert len(evaluate.InLlamaCpp(path)(["Hello"], 4)) == 1
    # The other way around, and back to a GGUF.
    command.abl_mlx("convert", out, tmp_path / "phi3-folder")
    command.abl_mlx("convert", tmp_path / "phi3-folder", tmp_path / "phi3-again.gguf")
    assert len(evaluate.InLlamaCpp(tmp_path / "phi3-again.gguf")(["Hello"], 4)) == 1


# --- templates and tokenizers ------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{{ m['content'] }}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "lost"),
    [
        (CHATML, []),
        ("{# tools and thinking #}" + CHATML, []),
        ("{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML, ["tools"]),
        (CHATML + "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>' }}"
         "{% endif %}", ["thinking"]),
        ("{% if tools %}{{ tools | tojson }}{% endif %}{% set t = enable_thinking %}" + CHATML,
         ["tools", "thinking"]),
    ],
)  # fmt: skip
def test_a_modelfile_says_what_of_the_template_it_lacks(template, lost, direction, tmp_path):
    source = tmp_path / "model"
    shutil.copytree(MODEL_PATH, source)
    (source / "chat_template.jinja").write_text(template)
    out = tmp_path / "e.gguf"
    text = printed("apply", direction, source, "-o", out)
    written = (tmp_path / "e.Modelfile").read_text()
    assert "TEMPLATE " in written
    words = " and ".join(lost)
    assert (f"# The model's chat template also has {words}. Ollama 0.30" in written) == bool(lost)
    note = f"the Modelfile's TEMPLATE has no {' and no '.join(lost)}: Ollama before 0.30"
    assert (note in text) == bool(lost)
    assert (note in (tmp_path / "e.README.md").read_text()) == bool(lost)
    # The same from the GGUF.
    write_gguf(source, tmp_path / "base.gguf")
    again = printed("apply", direction, tmp_path / "base.gguf", "-o", tmp_path / "again.gguf")
    assert (note in again) == bool(lost)


def test_a_missing_tokenizer_is_named(tmp_path):
    source = tmp_path / "model"
    shutil.copytree(MODEL_PATH, source)
    (source / "tokenizer.json").unlink()
    for arguments in (["measure", source, "-o", tmp_path / "r.safetensors"], ["eval", source]):
        assert f"{source} has no tokenizer.json" in command.fails(*arguments)


# --- what else was changed ---------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["", ".gguf"])
def test_a_change_of_what_does_not_write_is_evidence(ending, tmp_path):
    changed, paths = tmp_path / "model", []
    shutil.copytree(MODEL_PATH, changed)
    file, name = changed / "model.safetensors", "model.layers.1.self_attn.q_proj.weight"
    weights = mx.load(str(file))
    weights[name] = (weights[name] * 1.2).astype(weights[name].dtype)
    mx.save_safetensors(str(file), weights, metadata={"format": "pt"})
    for source in (changed, MODEL_PATH):
        paths.append(source)
        if ending:
            paths[-1] = tmp_path / f"{source.parent.name}{ending}"
            write_gguf(source, paths[-1])
    record = command.abl_mlx("audit", paths[0], "--base", paths[1])
    assert record["verdict"] == "not edited"
    others = record["weights"]["others"]
    assert others["changed"] == [name if not ending else "blk.1.attn_q.weight"]
    assert any("1 of 29 tensors that do not write" in one for one in record["evidence"])
    same = command.abl_mlx("audit", paths[1], "--base", paths[1])
    assert same["weights"]["others"]["changed"] == []
    assert len(same["evidence"]) == 1


def test_an_edit_changes_writers_alone(direction, base, tmp_path):
    out = tmp_path / "e.gguf"
    command.abl_mlx("apply", direction, base, "-o", out)
    record = command.abl_mlx("audit", out, "--base", base)
    assert record["weights"]["verdict"] == "edited"
    assert record["weights"]["others"]["changed"] == []
