"""Tokenizers written to GGUF: llama.cpp and Hugging Face see the same tokens in the same text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.pre_tokenizers import Split
from transformers import AutoTokenizer

from abl_mlx.behaviour.llamacpp import LlamaCpp
from convert.base.errors import UserError
from convert.mlx_to_gguf import write_gguf
from convert.tokenizers.pre_names import PRE_TOKENIZERS, canonical_regex, pre_tokenizer
from convert.tokenizers.sentencepiece_file import read_sentencepiece
from convert.tokenizers.to_gguf import read_tokenizer
from tests.support import tiny

TEXTS = [
    "",
    "a",
    " ",
    "   x",
    "\n\n\nx\n",
    "\t\ttab",
    "Hello  World   !",
    "1 12 123 1234567890 3.14159",
    "it's IT'S we'Ll they'D o'clock don''t",
    "café naïve Ünïcödé",
    "你好，世界！こんにちは 한국어 Привет, мир",
    "😀🎉👨‍👩‍👧 \u00a0nbsp\u2003em\u200bzero",
    "a\r\nb\r\n",
    '{"k": [1, 2]}',
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "<s>[INST] hi [/INST] ok</s> <unk> <pad>",
    "<start_of_turn>user\nhi<end_of_turn>\n",
    "x<|eot_id|>y <|start_header_id|>",
    "def f(x):\n    return x+1\n\n\n",
    "!!!???...---___***",
    "ﬁ ligature ½ ² ٣ १२३ \U00020000",
    "        eight   tail   ",
    "mixed ÅÄÖ123abc_def-ghi `code` $5 <b> a^b ~x |y|",
]

KINDS = ["bpe-qwen2", "bpe-llama3", "bpe-gpt2", "spm-llama", "spm-gemma"]
CHAT = [
    {"role": "user", "content": "How do I plan a garden?"},
    {"role": "assistant", "content": "Draw the paths."},
    {"role": "user", "content": "And 12 roses?"},
]


def _small(folder: Path, kind: str) -> Path:
    return tiny.write_model(folder, "llama", tokenizer=kind, num_hidden_layers=1)


@pytest.mark.parametrize("kind", [*KINDS, "spm-llama without model", "spm-gemma without model"])
def test_llama_cpp_tokenizes_and_renders_as_hugging_face_does(tmp_path: Path, kind: str) -> None:
    kind, _, without = kind.partition(" ")
    folder = _small(tmp_path / "model", kind)
    if without:
        (folder / "tokenizer.model").unlink()
    report = write_gguf(folder, tmp_path / "model.gguf")
    reference = AutoTokenizer.from_pretrained(folder)
    with LlamaCpp(report.path, n_ctx=256, n_parallel=1, n_threads=1) as runtime:
        for text in TEXTS:
            assert runtime.tokenize(text) == reference.encode(text), text
        rendered = runtime.render(CHAT)
        wanted = reference.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
        adds_bos = reference.encode("a")[0] == reference.bos_token_id
        assert rendered == (wanted.removeprefix(reference.bos_token) if adds_bos else wanted)
        # With its special tokens in, the chat is the same ids to the last.
        ids = reference.encode(wanted, add_special_tokens=False)
        assert runtime.tokenize(rendered) == ids


def _with_splits(splits: tuple[str, ...], ignore_merges: bool) -> dict[str, Any]:
    content = json.loads(tiny._byte_level("gpt2"))
    steps: list[dict[str, Any]] = []
    for split in splits:
        if split == "punctuation":
            steps.append({"type": "Punctuation", "behavior": "Contiguous"})
        else:
            pattern = {"Regex": split}
            steps.append(
                {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
            )
    steps.append({"type": "ByteLevel", "add_prefix_space": False, "use_regex": False})
    steps[-1]["trim_offsets"] = True
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    content["model"]["ignore_merges"] = ignore_merges
    return dict(content)


@pytest.mark.parametrize(("name", "splits", "ignore_merges"), PRE_TOKENIZERS)
def test_each_pre_tokenizer_splits_in_llama_cpp_as_its_structure_says(
    tmp_path: Path, name: str, splits: tuple[str, ...], ignore_merges: bool
) -> None:
    content = _with_splits(splits, ignore_merges)
    assert pre_tokenizer(content) == name
    if name == "deepseek-llm":
        pytest.skip("known by the beginning of a very long character class")
    folder = _small(tmp_path / "model", "bpe-gpt2")
    (folder / "tokenizer.json").write_text(json.dumps(content))
    report = write_gguf(folder, tmp_path / "model.gguf")
    reference = Tokenizer.from_str(json.dumps(content))
    with LlamaCpp(report.path, n_ctx=64, n_parallel=1, n_threads=1) as runtime:
        for text in TEXTS:
            assert runtime.tokenize(text) == reference.encode(text).ids, text


def test_spellings_of_one_pattern_are_one_pre_tokenizer() -> None:
    llama3 = next(splits for name, splits, _ in PRE_TOKENIZERS if name == "llama-bpe")[0]
    spelled = llama3.replace(
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",
    )
    spelled = spelled.replace(r"\r\n\p{L}", "\r\n\\p{L}").replace(r"\p{N}]?\p{L}", r"\p{N}]?+\p{L}")
    assert spelled != llama3
    assert canonical_regex(spelled) == llama3
    # tiktoken's spelling, as converted tokenizers of GPT-4's family have it.
    tiktoken = (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
        r"|\s*[\r\n]|\s+(?!\S)|\s+"
    )
    assert canonical_regex(tiktoken) == llama3
    for text in TEXTS:
        pieces = [
            Split(Regex(regex), "isolated").pre_tokenize_str(text)
            for regex in (llama3, spelled, tiktoken)
        ]
        assert pieces[0] == pieces[1] == pieces[2]
    content = _with_splits((spelled,), True)
    content["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed", invert=True)
    assert pre_tokenizer(content) == "llama-bpe"


def test_ignored_merges_count_only_where_they_make_a_difference() -> None:
    qwen2 = next(splits for name, splits, _ in PRE_TOKENIZERS if name == "qwen2")
    content = _with_splits(qwen2, True)
    assert pre_tokenizer(content) == "qwen2"
    # A word that no merge builds is found whole only by ignoring merges.
    content["model"]["vocab"]["xyzzy"] = len(content["model"]["vocab"]) + 100
    with pytest.raises(UserError, match=r'token "xyzzy".*pass pre='):
        pre_tokenizer(content)


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "UnicodeScripts"}},
        {"normalizer": {"type": "Lowercase"}},
    ],
)
def test_an_unknown_structure_names_the_override(tmp_path: Path, change: dict[str, Any]) -> None:
    content = {**json.loads(tiny._byte_level("gpt2")), **change}
    with pytest.raises(UserError, match="pass pre="):
        pre_tokenizer(content)
    folder = _small(tmp_path / "model", "bpe-gpt2")
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert read_tokenizer(folder, pre="gpt-2").pre == "gpt-2"


@pytest.mark.parametrize("change", ["Unigram", "WordPiece"])
def test_other_tokenizer_models_are_refused(tmp_path: Path, change: str) -> None:
    folder = _small(tmp_path / "model", "bpe-gpt2")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["type"] = change
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"is a {change} tokenizer"):
        read_tokenizer(folder)


def test_special_tokens_get_roles_types_and_ends(tiny_folder: Callable[..., Path]) -> None:
    tokenizer = read_tokenizer(tiny_folder("llama", tokenizer="bpe-llama3"))
    ids = {text: token for token, text in enumerate(tokenizer.tokens)}
    assert tokenizer.special["bos"] == ids["<|begin_of_text|>"]
    assert tokenizer.special["eos"] == tokenizer.special["eot"] == ids["<|eot_id|>"]
    assert set(tokenizer.ends) == {ids["<|eot_id|>"], ids["<|end_of_text|>"]}
    assert tokenizer.types[ids["<|eot_id|>"]] == TokenType.CONTROL
    assert tokenizer.types[0] == TokenType.NORMAL
    assert (tokenizer.add_bos, tokenizer.add_eos) == (True, False)


def test_sentencepiece_types_and_spaces(tiny_folder: Callable[..., Path]) -> None:
    gemma = read_tokenizer(tiny_folder("gemma2", tokenizer="spm-gemma"))
    kinds = dict(zip(gemma.tokens, gemma.types, strict=True))
    assert kinds["<0x0A>"] == TokenType.BYTE
    # As llama.cpp's converter has every special token that tokenizer_config.json lists.
    assert kinds["<unk>"] == TokenType.CONTROL
    assert kinds["<start_of_turn>"] == TokenType.CONTROL
    # llama.cpp looks for it in raw text, where it is two spaces.
    assert kinds["  "] == TokenType.USER_DEFINED
    assert gemma.add_space_prefix is False
    llama = read_tokenizer(tiny_folder("mistral", tokenizer="spm-llama"))
    assert llama.add_space_prefix is True
    assert llama.scores is not None


def test_an_own_end_token_reaches_llama_cpp(tmp_path: Path) -> None:
    folder = _small(tmp_path / "model", "bpe-qwen2")
    names = ["config.json", "generation_config.json"]
    for name in names:
        content = json.loads((folder / name).read_text())
        content["eos_token_id"] = [511, 45]
        (folder / name).write_text(json.dumps(content))
    tokenizer = read_tokenizer(folder)
    assert tokenizer.special["eos"] == 511
    assert 45 in (tokenizer.special["eot"], tokenizer.special["eom"])


def test_a_larger_embedding_pads_the_vocabulary(tmp_path: Path) -> None:
    folder = tiny.write_model(
        tmp_path / "model", "llama", tokenizer="bpe", vocab_size=530, num_hidden_layers=1
    )
    tokenizer = read_tokenizer(folder, 530)
    assert len(tokenizer.tokens) == len(set(tokenizer.tokens)) == 530
    assert tokenizer.types[512:] == [TokenType.UNUSED] * 18
    report = write_gguf(folder, tmp_path / "model.gguf")
    with LlamaCpp(report.path, n_ctx=64, n_parallel=1, n_threads=1) as runtime:
        assert runtime.greedy("Hello", 2)


def test_two_tokens_of_one_text_are_refused(tmp_path: Path) -> None:
    # llama.cpp would abort the whole process.
    folder = _small(tmp_path / "model", "bpe-qwen2")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"][0]["content"] = content["added_tokens"][1]["content"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"are both '<\|im_start\|>'"):
        read_tokenizer(folder)


def test_special_tokens_that_swallow_white_space_do_so_in_llama_cpp(tmp_path: Path) -> None:
    # llama.cpp knows this of Phi-3 alone, by the model's name.
    folder = tiny.write_model(
        tmp_path / "model", "phi3", tokenizer="spm", vocab_size=516, num_hidden_layers=1
    )
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    names = ["<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False, rstrip=True) for name in names]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    report = write_gguf(folder, tmp_path / "model.gguf")
    with LlamaCpp(report.path, n_ctx=64, n_parallel=1, n_threads=1) as runtime:
        for text in ("<|user|>\nHi there<|end|>\n<|assistant|>\n", "a<|endoftext|> b"):
            assert runtime.tokenize(text) == tokenizer.encode(text).ids, text


def test_chat_templates_from_every_place(tmp_path: Path) -> None:
    folder = _small(tmp_path / "model", "bpe-qwen2")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "default", "template": "old"},
        {"name": "tool_use", "template": "tools"},
    ]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("new")
    keys = read_tokenizer(folder).metadata()
    assert keys["tokenizer.chat_template"] == "new"
    assert keys["tokenizer.chat_template.tool_use"] == "tools"
    assert keys["tokenizer.chat_templates"] == ["tool_use"]


def test_broken_files_are_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        read_tokenizer(empty)
    (empty / "tokenizer.model").write_bytes(b"\xff\xff\xff not a model")
    with pytest.raises(UserError, match="no SentencePiece model"):
        read_tokenizer(empty)
    (empty / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_tokenizer(empty)


def test_our_reading_of_a_sentencepiece_file_is_sentencepieces(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    for kind in ("spm-llama", "spm-gemma"):
        folder = tmp_path / kind
        folder.mkdir()
        tiny.write_tokenizer(folder, kind)
        pieces, dummy_prefix = read_sentencepiece(folder / "tokenizer.model")
        processor = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
        assert [piece.text for piece in pieces] == [
            processor.id_to_piece(i) for i in range(processor.get_piece_size())
        ]
        assert [piece.score for piece in pieces] == [
            processor.get_score(i) for i in range(processor.get_piece_size())
        ]
        assert dummy_prefix == (kind == "spm-llama")
        # Alone, without any tokenizer.json, it is enough.
        alone = tmp_path / f"{kind}-alone"
        alone.mkdir()
        shutil.copy(folder / "tokenizer.model", alone)
        whole, bare = read_tokenizer(folder), read_tokenizer(alone)
        assert bare.add_space_prefix == whole.add_space_prefix
        assert bare.add_bos is False
        assert bare.scores is not None
        assert whole.tokens == bare.tokens
