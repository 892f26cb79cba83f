"""Tokenizers written from GGUF metadata: mlx-lm sees the same tokens as llama.cpp in every text.

llama.cpp itself says what is right: its test vectors, and its library, which loads vocabularies
without weights.
"""

from __future__ import annotations

import json
import random
import time
import unicodedata
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, SPMStreamingDetokenizer
from mlx_lm.utils import load_tokenizer
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from convert.base.errors import UserError
from convert.gguf import file
from convert.tokenizers.from_gguf import _pre_tokenizer, write_tokenizer
from convert.tokenizers.pre import PRE, PreTokenizer
from tests.support.fetch_llama_vocabs import Unavailable, fetch, vectors
from tests.support.vocabularies import (
    ALPHABET,
    CONTROL,
    NORMAL,
    SAMPLES,
    SENTENCES,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    add_token,
    assert_like_llama_cpp,
    assert_same,
    byte_level,
    gemma4,
    plain,
    sentencepiece,
    texts,
    write_vocabulary,
    written,
)

# --------------------------------------------------------------------------------------------------
# llama.cpp's own vocabularies

VOCABULARIES = [
    "command-r",
    "deepseek-coder",
    "deepseek-llm",
    "falcon",
    "gemma-4",
    "gpt-2",
    "llama-bpe",
    "llama-spm",
    "mpt",
    "phi-3",
    "qwen2",
    "qwen35",
    "refact",
    "starcoder",
]
# Without vectors.
OTHERS = ["aquila", "baichuan", "gpt-neox"]


@pytest.fixture(scope="session")
def vocabularies() -> Path:
    try:
        return fetch()
    except Unavailable as problem:
        pytest.skip(f"llama.cpp's vocabularies are out of reach: {problem}")


@pytest.fixture(scope="session")
def folder_of(
    vocabularies: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """``folder_of(name)``: a vocabulary's tokenizer files, written once, and what came back."""
    place = tmp_path_factory.mktemp("tokenizers")
    made: dict[str, dict[str, Any]] = {}

    def folder(name: str) -> tuple[Path, dict[str, Any]]:
        if name not in made:
            metadata = file.metadata(vocabularies / f"ggml-vocab-{name}.gguf")
            made[name] = write_tokenizer(metadata, place / name)
        return place / name, made[name]

    return folder


@pytest.mark.parametrize("name", VOCABULARIES)
def test_all_vectors_of_llama_cpp_pass(
    vocabularies: Path, folder_of: Callable[[str], tuple[Path, dict[str, Any]]], name: str
) -> None:
    tokenizer = Tokenizer.from_file(str(folder_of(name)[0] / "tokenizer.json"))
    cases = vectors(vocabularies, name)
    assert len(cases) >= 46
    assert sum(len(ids) for _, ids in cases) > 300
    for text, ids in cases:
        assert plain(tokenizer, text) == ids, ascii(text)


@pytest.mark.parametrize("name", [*VOCABULARIES, *OTHERS])
def test_vocabularies_agree_with_llama_cpp_on_random_texts(
    vocabularies: Path, folder_of: Callable[[str], tuple[Path, dict[str, Any]]], name: str
) -> None:
    pytest.importorskip("xllamacpp")
    path = vocabularies / f"ggml-vocab-{name}.gguf"
    metadata = file.metadata(path)
    folder, config = folder_of(name)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    kinds = metadata["tokenizer.ggml.token_type"]
    special = [
        text
        for text, kind in zip(metadata["tokenizer.ggml.tokens"], kinds, strict=True)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    source = random.Random(name)
    samples = texts(300, seed=len(name))
    if name == "phi-3":
        # Its special tokens swallow white space, in llama.cpp in ASCII alone.
        between = ["", " ", "\n", " \n\t x ", "Hello", " two  words "]
    else:
        between = [*samples[:50], "", " ", "\n"]
    for _ in range(200):
        parts = [source.choice(between) + source.choice([*special, ""]) for _ in range(3)]
        samples.append("".join(parts))
    undecodable = {"deepseek-coder", "deepseek-llm"}
    with Vocabulary(path) as oracle:
        for text in samples:
            ids = oracle.tokenize(text)
            assert plain(tokenizer, text) == ids, ascii(text)
            decoded = tokenizer.decode(ids, skip_special_tokens=False)
            pieces = oracle.decode(ids)
            # The space that SentencePiece puts in front is taken away again.
            if name not in undecodable:
                assert decoded in (pieces, pieces.removeprefix(" ")), ascii(text)
        assert tokenizer.encode("a b").ids == oracle.tokenize("a b", add_special=True)
        ends = config["eos_token_id"]
        assert set(ends if isinstance(ends, list) else [ends]) == oracle.ends()


LOADED = [
    ("llama-bpe", None),
    ("llama-bpe", "llama"),
    ("llama-spm", "mistral"),
    ("phi-3", "phi3"),
    ("qwen2", "qwen3"),
    ("gemma-4", "gemma3_text"),
    ("command-r", "cohere2"),
    ("starcoder", "starcoder2"),
    ("gpt-2", "nemotron"),
    ("gpt-2", "ernie4_5"),
]


@pytest.mark.parametrize(("name", "model_type"), LOADED)
def test_mlx_lm_loads_them_unaltered(
    vocabularies: Path,
    folder_of: Callable[[str], tuple[Path, dict[str, Any]]],
    name: str,
    model_type: str | None,
) -> None:
    folder, config = folder_of(name)
    stated = folder / "config.json"
    if model_type is None:
        stated.unlink(missing_ok=True)
    else:
        stated.write_text(json.dumps({"model_type": model_type, "vocab_size": 2**18, **config}))
    loaded = load_tokenizer(folder)
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert loaded._tokenizer.backend_tokenizer.to_str() == raw.to_str()
    for text, ids in vectors(vocabularies, name):
        assert loaded.encode(text, add_special_tokens=False) == ids
        assert loaded.encode(text) == raw.encode(text).ids
    spm = name in ("llama-spm", "phi-3", "gemma-4")
    wanted = SPMStreamingDetokenizer if spm else BPEStreamingDetokenizer
    assert type(loaded.detokenizer) is wanted
    for text in SENTENCES:
        ids = loaded.encode(text, add_special_tokens=False)
        assert loaded.decode(ids) == text
        detokenizer = loaded.detokenizer
        for token in ids:
            detokenizer.add_token(token)
        detokenizer.finalize()
        assert detokenizer.text == text
    first = config["eos_token_id"]
    assert loaded.eos_token_id == (first[0] if isinstance(first, list) else first)
    assert loaded.bos_token_id == config["bos_token_id"]


@pytest.mark.parametrize(("name", "model_type"), [("qwen2", "qwen2"), ("qwen35", "qwen3_5")])
def test_what_transformers_rebuilds_differs_in_normalization_alone(
    vocabularies: Path,
    folder_of: Callable[[str], tuple[Path, dict[str, Any]]],
    name: str,
    model_type: str,
) -> None:
    folder, config = folder_of(name)
    stated = {"model_type": model_type, "vocab_size": 2**18, **config}
    (folder / "config.json").write_text(json.dumps(stated))
    loaded = load_tokenizer(folder)
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert len(loaded) == raw.get_vocab_size()
    assert type(loaded.detokenizer) is BPEStreamingDetokenizer
    for text, ids in vectors(vocabularies, name):
        found = loaded.encode(text, add_special_tokens=False)
        if unicodedata.is_normalized("NFC", text):
            assert found == ids
        else:
            assert found == plain(raw, unicodedata.normalize("NFC", text))


# --------------------------------------------------------------------------------------------------
# Pre-tokenizers


@pytest.mark.parametrize("name", [name for name, pre in PRE.items() if pre.byte_level])
def test_every_name_cuts_as_llama_cpp_does(tmp_path: Path, name: str) -> None:
    first = next(other for other in PRE if PRE[other] == PRE[name])
    samples = SAMPLES if first == name else SAMPLES[:80]
    tokenizer = assert_like_llama_cpp(byte_level(name), tmp_path, samples)
    # Whether bos is added is the name's matter where the file does not say.
    assert (tokenizer.encode("a").ids[0] == 5) == PRE[name].add_bos


def _cut(pre: PreTokenizer) -> Callable[[str], Any]:
    whole = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}
    steps = {"pre_tokenizer": _pre_tokenizer(pre)}
    return Tokenizer.from_str(json.dumps({**whole, **steps})).pre_tokenizer.pre_tokenize_str


def all_pieces(pre: PreTokenizer) -> list[Any]:
    return list(map(_cut(pre), SAMPLES))


def test_the_texts_tell_all_pre_tokenizers_apart() -> None:
    different = {pre.splits: all_pieces(pre) for pre in PRE.values() if pre.byte_level}
    assert len(different) >= 28
    for (left, one), (right, other) in combinations(different.items(), 2):
        assert one != other, (left, right)


def test_a_missing_name_is_the_default(tmp_path: Path) -> None:
    metadata = byte_level(None)
    tokenizer = assert_like_llama_cpp(metadata, tmp_path / "none", SAMPLES[:50])
    named = written(byte_level("default"), tmp_path / "named")
    assert tokenizer.to_str() == named.to_str()


def test_ignored_merges_keep_whole_words(tmp_path: Path) -> None:
    ignoring, merging = byte_level("llama-bpe"), byte_level("smaug-bpe")
    word = ignoring["tokenizer.ggml.tokens"].index("ĠHello")
    assert plain(written(ignoring, tmp_path / "a"), " Hello") == [word]
    assert plain(written(merging, tmp_path / "b"), " Hello") != [word]


def test_of_two_like_merges_the_first_counts(tmp_path: Path) -> None:
    tokens = [*ALPHABET, "ab", "bc"]
    metadata = byte_level("gpt-2", tokens=tokens, token_type=[NORMAL] * len(tokens))
    metadata["tokenizer.ggml.merges"] = ["a b", "b c", "a b"]
    tokenizer = assert_like_llama_cpp(metadata, tmp_path, ["abc", "bcab"])
    assert plain(tokenizer, "abc") == [256, tokens.index("c")]


# --------------------------------------------------------------------------------------------------
# SentencePiece


@pytest.mark.parametrize("seed", range(60))
def test_merging_by_score_agrees_on_random_vocabularies(tmp_path: Path, seed: int) -> None:
    source = random.Random(seed)
    letters = source.choice(["ab", "abc", "▁a", "▁ab", "aé你"])
    words = set(letters)
    for _ in range(source.randrange(3, 40)):
        longest = source.choice([4, 8])
        words.add("".join(source.choice(letters) for _ in range(source.randrange(2, longest))))
    listed = sorted(words)
    source.shuffle(listed)
    scores = [-float(rank) for rank in range(len(listed))]
    source.shuffle(scores)
    metadata = sentencepiece(listed, scores, add_space_prefix=bool(seed % 2))
    spelled = letters.replace("▁", " ") + source.choice(["", "x\n"])
    samples = [
        "".join(source.choice(spelled) for _ in range(source.randrange(1, 30))) for _ in range(100)
    ]
    assert_like_llama_cpp(metadata, tmp_path, samples)


def test_runs_of_spaces_share_a_score_and_merge_from_the_left(tmp_path: Path) -> None:
    runs = ["▁" * length for length in range(2, 17)]
    words = ["▁", "a", "▁a", *runs]
    random.Random(1).shuffle(words)
    scores = [-1e9 if word in runs else -1.0 for word in words]
    samples = [" " * count + end for count in range(40) for end in ("", "a", "a  a")]
    tokenizer = assert_like_llama_cpp(sentencepiece(words, scores), tmp_path, samples)
    assert len(plain(tokenizer, " " * 31)) == 2


@pytest.mark.parametrize("seed", range(8))
def test_runs_of_spaces_that_are_not_all_there(tmp_path: Path, seed: int) -> None:
    source = random.Random(seed)
    lengths = {2, 3} if seed == 0 else {2, *source.sample(range(3, 12), 3)}
    words = ["▁", "a", "▁a", *("▁" * length for length in lengths)]
    source.shuffle(words)
    scores = [-1.0 if word.strip("▁") else -1e9 for word in words]
    samples = [" " * count + end for count in range(40) for end in ("", "a", "a  a")]
    assert_like_llama_cpp(sentencepiece(words, scores), tmp_path, samples)


def test_scores_that_say_nothing_are_refused(tmp_path: Path) -> None:
    words = ["a", "b", "c", "ab", "bc", "abc"]
    with pytest.raises(UserError, match=r"ggml\.scores gives 3 of 3 tokens the score -1000"):
        write_tokenizer(sentencepiece(words, [-1000.0] * 6), tmp_path)
    assert not list(tmp_path.iterdir())


def test_whole_scores_are_numbers_too(tmp_path: Path) -> None:
    metadata = sentencepiece(["a", "b", "ab", "ba"], [0.0, 0.0, -1.0, -2.0])
    whole = [int(score) for score in metadata["tokenizer.ggml.scores"]]
    same = written({**metadata, "tokenizer.ggml.scores": whole}, tmp_path / "a").to_str()
    assert same == written(metadata, tmp_path / "b").to_str()


def test_a_space_is_put_before_every_stretch_of_text(tmp_path: Path) -> None:
    words = ["▁", "a", "b", "▁a", "▁b"]
    scores = [0.0, 0.0, 0.0, -1.0, -2.0]
    samples = ["a", " a", "a<s>b", "<s>a</s> b", "", "<s>", "a\nb"]
    tokenizer = assert_like_llama_cpp(sentencepiece(words, scores), tmp_path / "on", samples)
    assert [tokenizer.id_to_token(i) for i in plain(tokenizer, "a<s>b")] == ["▁a", "<s>", "▁b"]
    assert tokenizer.decode(plain(tokenizer, "a b")) == "a b"
    off = sentencepiece(words, scores, add_space_prefix=False)
    tokenizer = assert_like_llama_cpp(off, tmp_path / "off", samples)
    assert [tokenizer.id_to_token(i) for i in plain(tokenizer, "a b")] == ["a", "▁b"]
    assert tokenizer.decode(plain(tokenizer, " a")) == " a"


def test_a_vocabulary_of_256000_tokens_is_quick(tmp_path: Path) -> None:
    source = random.Random(1)
    syllables = [a + b for a in "bcdfghklmnprstvwz" for b in "aeiou"] + ["st", "ing", "tion", "▁"]
    words = dict.fromkeys("abcdefghijklmnopqrstuvwxyz▁0123456789.,;:!?-")
    while len(words) < 256_000:
        word = "".join(source.choice(syllables) for _ in range(source.randrange(1, 5)))
        words["▁" * (source.random() < 0.4) + word] = None
    metadata = sentencepiece(list(words), [-float(rank) for rank in range(len(words))])
    start = time.process_time()
    write_tokenizer(metadata, tmp_path)
    # 3 seconds here; with a step for each pair of tokens it would be hours.
    assert time.process_time() - start < 90
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    samples = ["".join(source.choices(syllables, k=20)).replace("▁", " ") for _ in range(100)]
    assert any(len(plain(tokenizer, text)) < 12 for text in samples)
    pytest.importorskip("xllamacpp")
    with Vocabulary(write_vocabulary(tmp_path / "vocabulary.gguf", metadata)) as oracle:
        assert_same(tokenizer, oracle, samples)


# --------------------------------------------------------------------------------------------------
# Gemma 4

_BREAK = "\n"
BREAKS = [_BREAK * count for count in range(1, 6)]
WORDS = ["▁", "a", "b", "ab", "▁a", "▁ab"]
WORD_MERGES = ["a b", "▁ ab", "▁ a"]
_GEMMA_SAMPLES = ["ab a\n\nb", " ab", "é\tx", "\n \n", *(f"a{_BREAK * n}b" for n in range(12))]


def test_gemma_4_merges_runs_of_line_breaks(tmp_path: Path) -> None:
    merges = [f"{_BREAK * (n - k)} {_BREAK * k}" for n in range(5, 1, -1) for k in range(1, n)]
    metadata = gemma4([*merges, *WORD_MERGES], [*BREAKS, *WORDS])
    tokenizer = assert_like_llama_cpp(metadata, tmp_path, _GEMMA_SAMPLES)
    assert plain(tokenizer, "\n\n\n") == [tokenizer.token_to_id("\n\n\n")]


def test_gemma_4_keeps_runs_of_line_breaks_that_no_merge_makes(tmp_path: Path) -> None:
    metadata = gemma4(WORD_MERGES, [*BREAKS, *WORDS])
    samples = [text for text in _GEMMA_SAMPLES if "\n" * 6 not in text]
    tokenizer = assert_like_llama_cpp(metadata, tmp_path, samples)
    assert plain(tokenizer, "a\n\n\nb")[1] == tokenizer.token_to_id("\n\n\n")


def test_gemma_4_always_begins_with_bos(tmp_path: Path) -> None:
    metadata = gemma4(WORD_MERGES, WORDS, add_bos_token=False)
    tokenizer = assert_like_llama_cpp(metadata, tmp_path, ["a"])
    assert tokenizer.encode("a").ids[0] == 2


def test_gemma_4s_s_is_an_ordinary_word(tmp_path: Path) -> None:
    metadata = gemma4(WORD_MERGES, [*WORDS, *"</s>"])
    closing = add_token(metadata, "</s>")
    response = add_token(metadata, "<|tool_response>")
    tokenizer = assert_like_llama_cpp(metadata, tmp_path, ["a</s>b", "a<|tool_response>b"])
    assert closing not in plain(tokenizer, "a</s>b")
    assert response in plain(tokenizer, "a<|tool_response>b")


@pytest.mark.parametrize("pre", ["granite-embed-multi-311m", "sarvam-moe"])
def test_plain_text_merges_of_other_names(tmp_path: Path, pre: str) -> None:
    metadata = gemma4(WORD_MERGES, [*BREAKS, *WORDS], model="gpt2", pre=pre)
    metadata["general.architecture"] = "llama"
    samples = [text for text in _GEMMA_SAMPLES if "\n" * 6 not in text]
    assert_like_llama_cpp(metadata, tmp_path, samples)


# --------------------------------------------------------------------------------------------------
# Special tokens and flags


@pytest.mark.parametrize("add_bos", [None, True, False])
@pytest.mark.parametrize("add_eos", [None, True, False])
@pytest.mark.parametrize("kind", ["llama-bpe", "qwen2", "spm"])
def test_bos_and_eos_flags(
    tmp_path: Path, kind: str, add_bos: bool | None, add_eos: bool | None
) -> None:
    flags = {"add_bos_token": add_bos, "add_eos_token": add_eos}
    given = {key: value for key, value in flags.items() if value is not None}
    if kind == "spm":
        metadata = sentencepiece(["a", "b", "ab"], [0.0, 0.0, -1.0], **given)
    else:
        metadata = byte_level(kind, **given)
    tokenizer = assert_like_llama_cpp(metadata, tmp_path, ["", "ab"])
    loaded = load_tokenizer(tmp_path / "tokenizer")
    assert loaded.encode("ab") == tokenizer.encode("ab").ids
    by_default = 0 if kind == "qwen2" else 1
    wanted = (by_default if add_bos is None else add_bos) + bool(add_eos)
    assert len(tokenizer.encode("a").ids) - len(plain(tokenizer, "a")) == wanted
    pair = tokenizer.encode("a", "b").ids
    assert pair == tokenizer.encode("a").ids + tokenizer.encode("b").ids


def test_special_and_user_defined_tokens_are_found_in_text(tmp_path: Path) -> None:
    metadata = byte_level("llama-bpe")
    for text, kind in [
        ("<|im_start|>", CONTROL),
        ("   ", USER_DEFINED),
        ("  ", USER_DEFINED),
        ("<tool>", USER_DEFINED),
        ("<unused9>", UNUSED),
        ("[UNK]", UNKNOWN),
    ]:
        add_token(metadata, text, kind)
    source = random.Random(2)
    parts = ["<|im_start|>", "     ", "<tool>", "<unused9>", "[UNK]", "a", " b\n", "<", "1 2"]
    samples = ["".join(source.choice(parts) for _ in range(6)) for _ in range(200)]
    tokenizer = assert_like_llama_cpp(metadata, tmp_path, samples)
    ids = plain(tokenizer, "a<|im_start|><tool>")
    # Control tokens are left out of what is shown, user-defined ones are not.
    assert tokenizer.decode(ids) == "a<tool>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<|im_start|><tool>"


def test_tokens_that_end_a_reply(tmp_path: Path) -> None:
    metadata = byte_level("qwen2")
    added = {
        text: add_token(metadata, text, kind)
        for text, kind in [
            ("<|im_end|>", CONTROL),
            ("<|endoftext|>", NORMAL),
            ("<|fim_pad|>", NORMAL),
            ("<|fim_prefix|>", NORMAL),
            ("<own_eot>", CONTROL),
            ("<own_eom>", CONTROL),
        ]
    }
    metadata["tokenizer.ggml.eot_token_id"] = added["<own_eot>"]
    metadata["tokenizer.ggml.eom_token_id"] = added["<own_eom>"]
    metadata["tokenizer.ggml.padding_token_id"] = added["<|endoftext|>"]
    # Ends by name become control tokens.
    tokenizer = assert_like_llama_cpp(metadata, tmp_path, [f"a{text} b" for text in added])
    assert plain(tokenizer, "<|endoftext|>") == [added["<|endoftext|>"]]
    config = write_tokenizer(metadata, tmp_path / "again")
    assert config["bos_token_id"] == 5
    assert config["pad_token_id"] == added["<|endoftext|>"]
    assert config["eos_token_id"][0] == 6
    ends = {"<|im_end|>", "<|endoftext|>", "<|fim_pad|>", "<own_eot>", "<own_eom>"}
    assert set(config["eos_token_id"]) == {6, *(added[text] for text in ends)}
    generation = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert generation == config
    (tmp_path / "again" / "config.json").write_text('{"model_type": "llama"}')
    loaded = load_tokenizer(tmp_path / "again", eos_token_ids=config["eos_token_id"])
    assert loaded.eos_token_ids == set(config["eos_token_id"])


def test_a_named_fill_in_token_is_the_only_one(tmp_path: Path) -> None:
    metadata = byte_level("qwen2")
    named = add_token(metadata, "<my_pad>", CONTROL)
    other = add_token(metadata, "<|fim_pad|>", NORMAL)
    metadata["tokenizer.ggml.fim_pad_token_id"] = named
    tokenizer = assert_like_llama_cpp(metadata, tmp_path, ["a<|fim_pad|>", "a<my_pad>"])
    assert other not in plain(tokenizer, "a<|fim_pad|>")


def test_gpt_oss_shows_its_channels(tmp_path: Path) -> None:
    metadata = byte_level("gpt-4o")
    names = ["<|return|>", "<|call|>", "<|end|>", "<|channel|>", "<|message|>", "<|start|>"]
    added = {text: add_token(metadata, text) for text in names}
    metadata["tokenizer.ggml.eos_token_id"] = added["<|return|>"]
    tokenizer = assert_like_llama_cpp(metadata, tmp_path, [f"a{text} b" for text in names])
    ends = write_tokenizer(metadata, tmp_path / "again")["eos_token_id"]
    assert ends == [added["<|return|>"], added["<|call|>"]]
    ids = plain(tokenizer, "<|start|>a<|channel|>b<|message|>c<|end|><|return|>")
    assert tokenizer.decode(ids) == "<|start|>a<|channel|>b<|message|>c<|end|>"


def test_phi_3s_special_tokens_swallow_white_space(tmp_path: Path) -> None:
    metadata = sentencepiece(["▁", "a", "▁a"], [0.0, 0.0, -1.0])
    add_token(metadata, "<|user|>")
    add_token(metadata, "<|endoftext|>")
    samples = ["<|user|> \n a", "<|endoftext|> a", "</s> a", "<s> a", "a<|user|>\n<|user|> a"]
    without = assert_like_llama_cpp(metadata, tmp_path / "without", samples)
    metadata["general.name"] = "My Phi-3 Mini"
    tokenizer = assert_like_llama_cpp(metadata, tmp_path / "with", samples)
    assert len(plain(tokenizer, "<|user|> \n a")) == 2 < len(plain(without, "<|user|> \n a"))


def test_nameless_tokens_get_llama_cpps_name(tmp_path: Path) -> None:
    metadata = byte_level("gpt-2")
    empty = add_token(metadata, "", CONTROL)
    tokenizer = assert_like_llama_cpp(metadata, tmp_path, [f"a[EMPTY_{empty}]b"])
    assert empty in plain(tokenizer, f"a[EMPTY_{empty}]b")


def test_defaults_of_sentencepiece_and_of_nothing(tmp_path: Path) -> None:
    words, scores = ["a", "b", "ab"], [0.0, 0.0, -1.0]
    config = write_tokenizer(sentencepiece(words, scores), tmp_path / "spm")
    assert config == {"bos_token_id": 1, "eos_token_id": 2}
    none = sentencepiece(words, scores, bos_token_id=2**32 - 1, padding_token_id=2**32 - 1)
    assert_like_llama_cpp(none, tmp_path / "none", ["ab"])
    assert write_tokenizer(none, tmp_path / "none") == config
    metadata = byte_level("gpt-2")
    del metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]
    del metadata["tokenizer.ggml.token_type"]
    metadata["tokenizer.ggml.padding_token_id"] = 2**32 - 1
    assert write_tokenizer(metadata, tmp_path / "bpe") == {}
    assert not (tmp_path / "bpe" / "generation_config.json").exists()
    (tmp_path / "bpe" / "config.json").write_text('{"model_type": "qwen2"}')
    loaded = load_tokenizer(tmp_path / "bpe")
    # Nothing is made up for roles that no token has.
    assert len(loaded) == len(metadata["tokenizer.ggml.tokens"])
    assert loaded.bos_token_id is loaded.eos_token_id is loaded.pad_token_id is None


def test_context_length_and_mistrals_mistake(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metadata = {**byte_level("tekken"), "llama.context_length": 4096}
    metadata["general.architecture"] = "llama"
    write_tokenizer(metadata, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == 4096
    assert config["fix_mistral_regex"] is False
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 4096


# --------------------------------------------------------------------------------------------------
# There and back
# --------------------------------------------------------------------------------------------------
# Damage
