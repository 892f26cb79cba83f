"""The writers of a GGUF file, held against MLX models and proved in llama.cpp itself.

`tests.support.writer_proofs` is the proof.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import gguf
import numpy as np
import pytest

from convert.architectures.gguf_writers import GgufWriter, find
from convert.architectures.table import REFUSED
from convert.architectures.table import STREAMS as ARCHITECTURES
from convert.base.errors import UserError
from tests.support import tiny
from tests.support.places import ROOT
from tests.support.writer_proofs import FILES, VARIANTS
from tools.gguf_writers import document


@pytest.fixture(scope="module")
def proofs() -> dict[str, dict]:
    """What `main` prints for every variant; "error" where llama.cpp gave up."""
    pytest.importorskip("xllamacpp")
    results: dict[str, dict] = {}
    left = [name for name, (arch, *_) in VARIANTS.items() if ARCHITECTURES[arch].proved]
    left += FILES
    while left:
        run = subprocess.run(
            [sys.executable, "-m", "tests.support.writer_proofs", *left],
            cwd=ROOT,
            # gdb, where there is one, would take seconds to print a failed assertion.
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        started = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
        if not started:
            raise RuntimeError(run.stderr)
        for line in started:
            results[line["variant"]] = line if len(line) > 1 else {"error": run.stderr[-500:]}
        left = left[len({line["variant"] for line in started}) :]
    return results


# --------------------------------------------------------------------------------------------------
# Tests


@pytest.mark.parametrize("variant", VARIANTS)
def test_editing_the_writers_empties_the_direction_in_llama_cpp(variant, proofs):
    architecture, *_ = VARIANTS[variant]
    if not ARCHITECTURES[architecture].proved:
        pytest.skip("listed in the table as not proved")
    proof = proofs[variant]
    assert "error" not in proof, proof["error"]
    assert proof["before"] > 1e-2
    assert proof["after"] < 1e-5
    # Every writer counts, so that the table names no tensor in vain.
    for name, left in proof["without"].items():
        experts = re.sub(r"ffn_down\.weight", "ffn_down_exps.weight", name)
        if experts != name and experts in proof["without"]:
            continue  # a made model has both, and runs one of them
        assert left > 1e-4, f"{name} does not write to the stream"
    # Every gain counts.
    assert proof["plain"] is None or proof["plain"] > 1e-3


@pytest.mark.parametrize("variant", FILES)
def test_editing_the_writers_of_a_file_without_every_tensor(variant, proofs):
    proof = proofs[variant]
    assert "error" not in proof, proof["error"]
    assert proof["before"] > 1e-2
    assert proof["after"] < 1e-5
    assert ("blk.2.ffn_down_exps.weight" in proof["without"]) == ("nemotron" in variant)


@pytest.mark.parametrize("arch", sorted(tiny.ARCHITECTURES))
def test_writers_are_those_that_mlx_shows(arch, tiny_folder, tmp_path):
    """The table against the writers probed in the forward pass of the same model in MLX."""
    from abl_mlx.models.chat_model import load
    from abl_mlx.models.writers import find_writers
    from convert.mlx_to_gguf import write_gguf

    folder = tiny_folder(arch, tokenizer="native")
    report = write_gguf(folder, tmp_path / "model.gguf", file_type="F32")
    reader = gguf.GGUFReader(report.path)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    architecture = reader.fields["general.architecture"].contents()
    shapes = {name: values.shape for name, values in tensors.items()}
    found = {writer.name: writer for writer in find(architecture, shapes)}
    assert set(find(architecture, list(shapes))) == set(found.values())

    probed = {}
    for writer in find_writers(load(folder)):
        source = f"{writer.path}.weight".replace(".switch_mlp.", ".experts.0.")
        probed[report.tensors[source]] = writer
    assert set(found) == set(probed)
    for name, writer in found.items():
        other = probed[name]
        assert (writer.kind, writer.layer) == (other.kind, other.layer)
        assert (writer.bias is not None) == other.has_bias
        assert writer.tied == other.tied
        assert (writer.gain is None) == (other.gain is None)
        if writer.gain is not None:
            gain = tensors[writer.gain] / np.linalg.norm(tensors[writer.gain])
            wanted = np.array(other.gain) / np.linalg.norm(np.array(other.gain))
            np.testing.assert_allclose(gain, wanted, atol=1e-5)


LLAMA = [
    "token_embd.weight",
    "output_norm.weight",
    "blk.0.attn_q.weight",
    "blk.0.attn_output.weight",
    "blk.0.attn_output.bias",
    "blk.0.ffn_down.weight",
    "blk.1.attn_output.weight",
    "blk.1.ffn_down_exps.weight",
]


def test_writers_in_order_with_bias_and_tied_embedding():
    assert find("llama", LLAMA) == [
        GgufWriter("token_embd.weight", "embedding", -1, tied=True),
        GgufWriter("blk.0.attn_output.weight", "linear", 0, bias="blk.0.attn_output.bias"),
        GgufWriter("blk.0.ffn_down.weight", "linear", 0),
        GgufWriter("blk.1.attn_output.weight", "linear", 1),
        GgufWriter("blk.1.ffn_down_exps.weight", "experts", 1),
    ]
    assert not find("llama", [*LLAMA, "output.weight"])[0].tied


def test_the_same_name_plays_different_parts():
    names = ["token_embd.weight", "blk.0.attn_output.weight", "blk.0.post_attention_norm.weight"]
    assert find("gemma2", names)[1].gain == "blk.0.post_attention_norm.weight"
    assert find("glm4moe", names)[1].gain is None
    with pytest.raises(UserError, match=r"not known: blk\.0\.post_attention_norm\.weight\."):
        find("llama", names)
    with pytest.raises(UserError, match="damaged"):
        find("gemma2", names[:2])
    with pytest.raises(UserError, match=r"known: blk\.0\.post_attention_norm\.bias"):
        find("gemma2", [*names, "blk.0.post_attention_norm.bias"])


def test_blocks_that_draft_are_left_alone():
    extra = ["blk.2.nextn.eh_proj.weight", "blk.2.attn_output.weight", "blk.2.odd.weight"]
    assert find("glm4moe", LLAMA + extra) == find("glm4moe", LLAMA)
    keys = {"glm4moe.block_count": 3, "glm4moe.nextn_predict_layers": 1}
    assert find("glm4moe", LLAMA + extra[1:], keys) == find("glm4moe", LLAMA)
    with pytest.raises(UserError, match=r"blk\.2\.odd\.weight"):
        find("glm4moe", LLAMA + extra[1:])


def test_tensors_without_a_place_are_refused_by_name():
    odd = [f"blk.{layer}.side_channel.weight" for layer in range(12)]
    with pytest.raises(
        UserError, match=r"blk\.7\.side_channel.* and 4 more.*tensors REGEX"
    ) as caught:
        find("llama", LLAMA + odd)
    assert "blk.8." not in str(caught.value)
    # A bias whose weight is missing.
    with pytest.raises(UserError, match=r"blk\.1\.ffn_down\.bias"):
        find("llama", [*LLAMA, "blk.1.ffn_down.bias"])


def test_a_file_without_an_embedding_is_refused():
    with pytest.raises(UserError, match=r"token_embd\.weight"):
        find("llama", LLAMA[1:])


def test_unknown_architecture_lists_likely_writers():
    with pytest.raises(
        UserError, match=r"newarch.*blk\.0\.attn_output\.weight.*tensors REGEX"
    ) as said:
        find("newarch", LLAMA)
    assert "attn_q" not in str(said.value)


@pytest.mark.parametrize("architecture", sorted(REFUSED))
def test_refused_architectures_give_their_reason(architecture):
    with pytest.raises(UserError, match="Use tensors REGEX") as caught:
        find(architecture, LLAMA)
    assert REFUSED[architecture] in str(caught.value)
    assert find(architecture, LLAMA, pattern="attn_output")


def test_pattern_names_the_writers_of_any_file():
    found = find("newarch", LLAMA, pattern=r"token_embd|blk\.\d+\.(attn_output|ffn_down_exps)")
    assert found == [writer for writer in find("llama", LLAMA) if ".ffn_down." not in writer.name]
    shapes = dict.fromkeys(LLAMA, (64, 64)) | {
        "output_norm.weight": (64,),
        "blk.0.attn_output.bias": (64,),
        "blk.1.ffn_down_exps.weight": (4, 64, 64),
        "blk.1.odd": (4, 64, 32),
    }
    assert find("newarch", shapes, pattern="attn_output|ffn_down_exps") == found[1:]
    assert find("newarch", shapes, pattern="odd")[0].kind == "experts"
    assert [one.name for one in find("newarch", shapes, pattern="norm|attn_q")] == [
        "blk.0.attn_q.weight"
    ]


@pytest.mark.parametrize("pattern", ["(", "nothing_like_it", "output_norm", r"\.bias$"])
def test_patterns_that_name_nothing_are_refused(pattern):
    with pytest.raises(UserError, match="tensors"):
        find("llama", LLAMA, pattern=pattern)


def test_shapes_that_do_not_write_to_the_stream_are_refused():
    shapes = dict.fromkeys(LLAMA, (64, 32)) | {"blk.1.ffn_down_exps.weight": (4, 64, 32)}
    shapes["token_embd.weight"] = (100, 64)
    assert find("llama", shapes) == find("llama", LLAMA)
    with pytest.raises(UserError, match=r"attn_output.*128 dimensions|128 dimensions"):
        find("llama", shapes, {"llama.embedding_length": 128})
    with pytest.raises(UserError, match=r"blk\.1\.ffn_down_exps"):
        find("llama", shapes | {"blk.1.ffn_down_exps.weight": (64, 32)})
    with pytest.raises(UserError, match=r"attn_q"):
        find("llama", shapes | {"blk.0.attn_q.weight": (32, 64)}, pattern="attn_q")


def test_every_architecture_has_one_answer():
    assert not set(ARCHITECTURES) & set(REFUSED)
    for facts in ARCHITECTURES.values():
        assert facts.proved or facts.note
        assert not facts.reads & set(facts.writers)
    for reason in REFUSED.values():
        assert reason.endswith(".")


def test_the_table_in_the_documentation_is_current():
    assert (ROOT / "docs" / "gguf-writers.md").read_text() == document()
