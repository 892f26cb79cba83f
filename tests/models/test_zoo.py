"""Every architecture of mlx-lm is edited exactly, or refused with a reason."""

import pytest

from abl_mlx.models.writers import find_writers
from tests.support import places, zoo
from tools import mlx_architectures

DOCS = places.DOCS / "mlx-architectures.md"

REFUSED = {
    "bitnet": "three values a weight",
    "gemma3n": "altup_projections.2 writes to the residual stream through more than a gain",
    "iquestloopcoder": "was not called",
    "longcat_flash": "through more than a gain",  # its identity experts write the normed stream
    "longcat_flash_ngram": "through more than a gain",
    "muse_spark": "mlx-lm cannot run muse_spark on this machine",  # Metal kernels
    "nanbeige": "is run more than once",  # a norm stands between its loops
    "olmo": "mlx-lm cannot run olmo on this machine",  # adds a mask that is a word
    "prism_hadamard_qwen35": "rotated",
    "rwkv7": "something other than its linear weights",  # a LayerNorm behind its embedding
    "rwkv7, tied": "something other than its linear weights",
}


@pytest.mark.parametrize("name", [*zoo.architectures(), *zoo.VARIANTS])
def test_edited_exactly_or_refused(name):
    outcome = zoo.outcome(name)
    if name in REFUSED:
        assert outcome.reason is not None
        assert REFUSED[name] in outcome.reason
        return
    assert outcome.reason is None
    assert outcome.before > 1e-2
    assert outcome.after < 1e-5
    # The figure above can be wrong: any writer left out shows in it.
    assert min(outcome.without.values()) > 1e-4, outcome.without


def test_at_least_115_architectures_are_edited():
    edited = [name for name in zoo.architectures() if zoo.outcome(name).reason is None]
    assert len(edited) >= 115
    assert len(zoo.architectures()) >= 126


def test_experts_that_no_token_was_sent_to_are_edited_too():
    """The probe has 16 tokens; here each layer has 40 experts that are modules of their own."""
    writers = find_writers(zoo.chat("dbrx, more experts than tokens"))
    assert sum(".experts." in writer.path for writer in writers) == 3 * 40


@pytest.mark.parametrize(
    ("name", "head"),
    [("gpt2", "model.wte"), ("gpt_bigcode", None), ("gpt_bigcode, one key", "transformer.wte")],
)
def test_positions_are_edited_and_the_head_is_told_from_them(name, head):
    writers = find_writers(zoo.chat(name))
    embeddings = [writer.path for writer in writers if writer.kind == "embedding"]
    assert sorted(path.rpartition(".")[2] for path in embeddings) == ["wpe", "wte"]
    assert [writer.path for writer in writers if writer.tied] == ([head] if head else [])
    assert embeddings[0] == (head or embeddings[0])


def test_the_documented_table_is_true():
    assert DOCS.read_text(encoding="utf-8") == mlx_architectures.document()
