"""Tokenizers of folders come back from a GGUF as they were, with their chat templates."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.utils import load_tokenizer
from transformers import AutoTokenizer

from abl_mlx.behaviour.llamacpp import LlamaCpp
from convert.base.errors import UserError
from convert.gguf import file
from convert.mlx_to_gguf import write_gguf
from convert.tokenizers.from_gguf import write_tokenizer
from convert.tokenizers.pre import PRE
from convert.tokenizers.pre_names import pre_tokenizer
from convert.tokenizers.to_gguf import read_tokenizer
from tests.convert.test_gguf_to_tokenizer import all_pieces
from tests.support import tiny
from tests.support.vocabularies import SAMPLES, assigned, byte_level, written

KINDS = ["bpe-qwen2", "bpe-llama3", "bpe-gpt2", "spm-llama", "spm-gemma"]


@pytest.fixture(scope="session")
def there_and_back(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Any]]:
    """``there_and_back(kind)``: a tokenizer of `tiny`, and what comes back by way of GGUF."""
    made: dict[str, tuple[Any, Any]] = {}

    def both(kind: str) -> tuple[Any, Any]:
        if kind not in made:
            place = tmp_path_factory.mktemp(kind)
            (place / "there").mkdir()
            tiny.write_tokenizer(place / "there", kind)
            write_tokenizer(read_tokenizer(place / "there").metadata(), place / "back")
            made[kind] = (
                AutoTokenizer.from_pretrained(place / "there"),
                AutoTokenizer.from_pretrained(place / "back"),
            )
        return made[kind]

    return both


_characters = st.characters(exclude_categories=["Cs", "Cn"]).filter(
    lambda c: assigned(c) and c not in "ſ\x00"
)
_pieces = st.one_of(
    st.sampled_from(
        ["<s>", "</s>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "  ", "\n\n", "\t", "'S"]
    ),
    st.text(_characters, max_size=8),
)


@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(parts=st.lists(_pieces, max_size=8))
def test_there_and_back_is_the_same_tokenizer(
    there_and_back: Callable[[str], tuple[Any, Any]], kind: str, parts: list[str]
) -> None:
    there, back = there_and_back(kind)
    # Qwen normalizes, llama.cpp does not.
    text = unicodedata.normalize("NFC", "".join(parts))
    ids = there.encode(text)
    assert back.encode(text) == ids
    assert back.decode(ids) == there.decode(ids)
    without = back.encode(text, add_special_tokens=False)
    assert without == there.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_and_there_again_is_the_same_metadata(tmp_path: Path, kind: str) -> None:
    (tmp_path / "there").mkdir()
    tiny.write_tokenizer(tmp_path / "there", kind)
    metadata = read_tokenizer(tmp_path / "there").metadata()
    config = write_tokenizer(metadata, tmp_path / "back")
    (tmp_path / "back" / "config.json").write_text(json.dumps(config))
    again = read_tokenizer(tmp_path / "back").metadata()
    # Only the order among tokens that no merge makes is free.
    scores = [keys.pop("tokenizer.ggml.scores", []) for keys in (metadata, again)]
    assert again == metadata
    if scores[0]:
        written(metadata | {"tokenizer.ggml.scores": scores[1]}, tmp_path / "again")
        same = [(tmp_path / name / "tokenizer.json").read_text() for name in ("back", "again")]
        assert same[0] == same[1]


@pytest.mark.parametrize("name", [name for name, pre in PRE.items() if pre.byte_level])
def test_every_name_is_recognised_in_what_it_became(tmp_path: Path, name: str) -> None:
    write_tokenizer(byte_level(name, pairs=300), tmp_path)
    found = PRE[pre_tokenizer(json.loads((tmp_path / "tokenizer.json").read_text()))]
    wanted = PRE[name]
    assert found.ignore_merges == wanted.ignore_merges
    assert all_pieces(found) == all_pieces(wanted)


CHAT = [
    {"role": "user", "content": "How do I plan a garden?"},
    {"role": "assistant", "content": "Draw the paths.\n"},
    {"role": "user", "content": "And 12 roses?"},
]
THINKING = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}{{ eos_token }}"
)


@pytest.mark.parametrize("kind", [*KINDS, "thinking"])
def test_mlx_lm_and_llama_cpp_render_and_tokenize_chats_alike(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("xllamacpp")
    source = tmp_path / "source"
    style = "bpe-llama3" if kind == "thinking" else kind
    tiny.write_model(source, "llama", tokenizer=style, num_hidden_layers=1)
    if kind == "thinking":
        (source / "chat_template.jinja").write_text(THINKING)
    path = write_gguf(source, tmp_path / "model.gguf").path
    config = write_tokenizer(file.metadata(path), tmp_path / "back")
    (tmp_path / "back" / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    loaded = load_tokenizer(tmp_path / "back")
    with LlamaCpp(path, n_ctx=512, n_parallel=1, n_threads=1) as runtime:
        for thinking in (False, True):
            text = loaded.apply_chat_template(
                CHAT, add_generation_prompt=True, enable_thinking=thinking, tokenize=False
            )
            assert isinstance(text, str)
            rendered = runtime.render(CHAT, thinking="on" if thinking else None)
            adds_bos = loaded.encode("a")[0] == loaded.bos_token_id
            assert rendered == (text.removeprefix(loaded.bos_token) if adds_bos else text)
            ids = loaded.apply_chat_template(
                CHAT, add_generation_prompt=True, enable_thinking=thinking
            )
            assert ids == runtime.tokenize(rendered)
            assert ("<think>" in text) == (kind == "thinking" and not thinking)
        for text in SAMPLES[:40]:
            assert loaded.encode(text) == runtime.tokenize(text), ascii(text)


def test_several_chat_templates(tmp_path: Path) -> None:
    metadata = {
        **byte_level("gpt-2"),
        "tokenizer.chat_template": "one\n",
        "tokenizer.chat_template.tool_use": "two\r\n",
        "tokenizer.chat_templates": ["tool_use"],
    }
    write_tokenizer(metadata, tmp_path)
    assert (tmp_path / "chat_template.jinja").read_bytes() == b"one\n"
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == {"default": "one\n", "tool_use": "two\n"}
    assert read_tokenizer(tmp_path).chat_templates["tool_use"] == "two\n"
    bad = {**metadata, "tokenizer.chat_template.../../x": "three"}
    with pytest.raises(UserError, match="names a template that no file can be named after"):
        write_tokenizer(bad, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
