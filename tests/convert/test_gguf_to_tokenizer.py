"""Tokenizers written from GGUF metadata: mlx-lm sees the same tokens as llama.cpp in every text.

llama.cpp itself says what is right: its test vectors, and its library, which loads vocabularies
without weights.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import random
import re
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, SPMStreamingDetokenizer
from mlx_lm.utils import load_tokenizer
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

from abl_mlx.behaviour.llamacpp import LlamaCpp
from convert.base.errors import UserError
from convert.gguf import file
from convert.mlx_to_gguf import write_gguf
from convert.tokenizers.from_gguf import _pre_tokenizer, write_tokenizer
from convert.tokenizers.pre import PRE, PreTokenizer
from convert.tokenizers.pre_names import pre_tokenizer
from convert.tokenizers.to_gguf import read_tokenizer
from tests.support import tiny
from tests.support.fetch_llama_vocabs import Unavailable, fetch, vectors

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# --------------------------------------------------------------------------------------------------
# Texts


def _assigned(text: str) -> str:
    """Without what Unicode 3.2 does not know: llama.cpp's tables and Oniguruma's differ in age."""
    return "".join(c for c in text if c in "\n\r\t" or unicodedata.ucd_3_2_0.category(c) != "Cn")


POOLS = [
    "abcdefghij klmnop",
    "   \t\n\r",
    "0123456789",
    "ABCdef'sStTreRElLvVmMdD",
    "!?.,;:-_/\\|()[]{}<>@#$%^&*+=~`\"'",
    "éàüßñçøåÉÀſKǅʼõ÷",
    "你好世界一龥中文字",
    "こんにちはカタカナ",
    "안녕하세요",
    "приветМИР",
    "\u0301\u0300\u0308\u20e3",
    "\u00a0\u2003\u3000\u200b\u2028\u0085\ufeff",
    "😀🎉👨\u200d👩",
    "½²٣१๓Ⅷ",
    "กขคงนี่",
    "हिन्दीবাংলা",
    "\x01\x7f\x1c\x1f\x0b\x0c",
    "。、！？「」…—“”",
    "\U00020000\ufa0e\uf900\u3400",
    "▁▂Ġ",
    "IMGZ<sentinel:1>",
]
SENTENCES = [
    "Hello World!  How's it going?\n\n  I'll be there, they'RE not. 12345.67 1,000,000\r\n",
    "def f(x):\n\n\n\treturn  x+1  # 2024-01-01\n    \n        pass\n",
    "我想在apple工作1314151天～ Cửa Việt 3333333 IMGIMGABCZ <sentinel:12> caféé e\u0301\n \n",
    "it'ſa 'ſſ We'Ve a'lL 'MX x'dy\u3000、 \u3000\u2003。 a  12 1½2 12345½67 a\u0301B\u0308c",
]


def random_text(source: random.Random, longest: int = 60) -> str:
    if source.random() < 0.25:
        sentence = source.choice(SENTENCES)
        start = source.randrange(len(sentence))
        return sentence[start : start + source.randrange(1, longest)]
    if source.random() < 0.2:
        points = (source.choice([0x3000, 0xD800, 0x3000]) for _ in range(source.randrange(1, 12)))
        return _assigned("".join(chr(source.randrange(32, top)) for top in points))
    pools = (source.choice(POOLS) for _ in range(source.randrange(1, 9)))
    return "".join(source.choice(p) for p in pools for _ in range(source.randrange(1, 6)))


def texts(count: int, seed: int = 0) -> list[str]:
    source = random.Random(seed)
    return ["", *SENTENCES, *(random_text(source) for _ in range(count))]


_SAMPLES = texts(400, seed=7)


# --------------------------------------------------------------------------------------------------
# llama.cpp's C interface, in xllamacpp's shared object


class _Parameters(ctypes.Structure):
    """struct llama_model_params, passed by value; larger than it has ever been."""

    _fields_ = [("bytes", ctypes.c_uint8 * 512)]


_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_silence = _Log(lambda *_: None)
_pointer, _int, _bool = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool
_SIGNATURES = {
    "llama_log_set": (None, _Log, _pointer),
    "llama_model_default_params": (_Parameters,),
    "llama_model_load_from_file": (_pointer, ctypes.c_char_p, _Parameters),
    "llama_model_free": (None, _pointer),
    "llama_model_get_vocab": (_pointer, _pointer),
    "llama_tokenize": (_int, _pointer, ctypes.c_char_p, _int, _pointer, _int, _bool, _bool),
    "llama_token_to_piece": (_int, _pointer, _int, ctypes.c_char_p, _int, _int, _bool),
    "llama_vocab_is_eog": (_bool, _pointer, _int),
    "llama_vocab_n_tokens": (_int, _pointer),
}


class Vocabulary:
    """A GGUF's vocabulary in llama.cpp. A context manager."""

    def __init__(self, path: Path) -> None:
        import xllamacpp

        assert xllamacpp
        found = importlib.util.find_spec("xllamacpp.xllamacpp")
        assert found is not None
        assert found.origin is not None
        self.llama = ctypes.CDLL(found.origin)
        for name, (result, *arguments) in _SIGNATURES.items():
            function = getattr(self.llama, name)
            function.restype, function.argtypes = result, arguments
        self.llama.llama_log_set(_silence, None)
        parameters = self.llama.llama_model_default_params()
        # After numbers and pointers come the flags; vocab_only is the first of them.
        flags = next(
            at
            for at in range(40, 128, 8)
            if 1 in parameters.bytes[at : at + 8] and set(parameters.bytes[at : at + 8]) <= {0, 1}
        )
        parameters.bytes[flags] = 1
        self.model = self.llama.llama_model_load_from_file(str(path).encode(), parameters)
        assert self.model, f"llama.cpp cannot load {path}"
        self.vocabulary = self.llama.llama_model_get_vocab(self.model)

    def tokenize(self, text: str, add_special: bool = False) -> list[int]:
        data = text.encode()
        room = len(data) + 8
        ids = (_int * room)()
        count = self.llama.llama_tokenize(
            self.vocabulary, data, len(data), ids, room, add_special, True
        )
        assert count >= 0
        return list(ids[:count])

    def decode(self, ids: Sequence[int]) -> str:
        """The pieces in a row: what a server answers, before any cleaning."""
        pieces = b""
        for token in ids:
            piece = ctypes.create_string_buffer(1024)
            length = self.llama.llama_token_to_piece(
                self.vocabulary, token, piece, len(piece), 0, True
            )
            assert length >= 0
            pieces += piece.raw[:length]
        return pieces.decode("utf-8", "replace")

    def ends(self) -> set[int]:
        count = self.llama.llama_vocab_n_tokens(self.vocabulary)
        return {i for i in range(count) if self.llama.llama_vocab_is_eog(self.vocabulary, i)}

    def __enter__(self) -> Vocabulary:
        return self

    def __exit__(self, *_: object) -> None:
        self.llama.llama_model_free(self.model)


def write_vocabulary(path: Path, metadata: Mapping[str, Any]) -> Path:
    """A GGUF of a vocabulary alone."""
    architecture = str(metadata.get("general.architecture", "llama"))
    writer = gguf.GGUFWriter(path, architecture)
    sizes = ("block_count", "context_length", "embedding_length", "feed_forward_length")
    for size in (*sizes, "attention.head_count"):
        writer.add_uint32(f"{architecture}.{size}", 8)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, list):
            item = {int: "INT32", **kinds}[type(value[0])]
            item = "INT32" if item == "UINT32" else item
            inner = gguf.GGUFValueType[item]
            writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, sub_type=inner)
        else:
            writer.add_key_value(key, value, gguf.GGUFValueType[kinds[type(value)]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def written(metadata: Mapping[str, Any], folder: Path) -> Tokenizer:
    write_tokenizer(metadata, folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def assert_same(tokenizer: Tokenizer, oracle: Vocabulary, samples: Sequence[str]) -> None:
    for text in samples:
        assert plain(tokenizer, text) == oracle.tokenize(text), ascii(text)


def assert_like_llama_cpp(
    metadata: Mapping[str, Any], folder: Path, samples: Sequence[str]
) -> Tokenizer:
    """Write ``metadata`` both ways and compare ids, with and without bos and eos, and ends."""
    pytest.importorskip("xllamacpp")
    folder.mkdir(exist_ok=True)
    config = write_tokenizer(metadata, folder / "tokenizer")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    with Vocabulary(write_vocabulary(folder / "vocabulary.gguf", metadata)) as oracle:
        assert_same(tokenizer, oracle, samples)
        assert tokenizer.encode("a b").ids == oracle.tokenize("a b", add_special=True)
        ends = config.get("eos_token_id", [])
        assert set(ends if isinstance(ends, list) else [ends]) == oracle.ends()
    return tokenizer


# --------------------------------------------------------------------------------------------------
# Vocabularies made up here

_ALPHABET = sorted(ByteLevel.alphabet())


def _byte_pairs() -> list[tuple[str, str]]:
    """Every two bytes that follow each other in the samples, spelled in GPT-2's alphabet."""
    spell = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    spelled = [word for text in _SAMPLES for word, _ in spell(text)]
    return sorted({(a, b) for word in spelled for a, b in pairwise(word)})


def byte_level(pre: str | None, pairs: int | None = None, **more: Any) -> dict[str, Any]:
    """A vocabulary of bytes and of pairs of bytes in a random order of merging.

    Where a text is cut decides which bytes can pair, so that a wrong cut shows.
    """
    source = random.Random(3)
    chosen = _byte_pairs()
    source.shuffle(chosen)
    chosen = chosen[:pairs]
    tokens = [*_ALPHABET, *dict.fromkeys(a + b for a, b in chosen)]
    # Words that only a pre-tokenizer which ignores merges finds.
    tokens += ["ĠHello", "return", "Việt"]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [NORMAL] * len(tokens),
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in chosen],
        "tokenizer.ggml.bos_token_id": 5,
        "tokenizer.ggml.eos_token_id": 6,
    }
    if pre is not None:
        metadata["tokenizer.ggml.pre"] = pre
    return {**metadata, **{f"tokenizer.ggml.{key}": value for key, value in more.items()}}


def add_token(metadata: dict[str, Any], text: str, kind: int = CONTROL) -> int:
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], text]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], kind]
    if "tokenizer.ggml.scores" in metadata:
        metadata["tokenizer.ggml.scores"] = [*metadata["tokenizer.ggml.scores"], -1000.0]
    return len(metadata["tokenizer.ggml.tokens"]) - 1


def sentencepiece(words: Sequence[str], scores: Sequence[float], **more: Any) -> dict[str, Any]:
    base = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*base, *words],
        "tokenizer.ggml.scores": [*([0.0] * len(base)), *scores],
        "tokenizer.ggml.token_type": [
            UNKNOWN,
            CONTROL,
            CONTROL,
            *([BYTE] * 256),
            *([NORMAL] * len(words)),
        ],
    }
    return {**metadata, **{f"tokenizer.ggml.{key}": value for key, value in more.items()}}


def gemma4(merges: Sequence[str], words: Sequence[str], **more: Any) -> dict[str, Any]:
    base = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = [*base, *words]
    metadata = {
        "general.architecture": "gemma4",
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL] * 4 + [BYTE] * 256 + [NORMAL] * len(words),
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
    }
    return {**metadata, **{f"tokenizer.ggml.{key}": value for key, value in more.items()}}


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
    samples = _SAMPLES if first == name else _SAMPLES[:80]
    tokenizer = assert_like_llama_cpp(byte_level(name), tmp_path, samples)
    # Whether bos is added is the name's matter where the file does not say.
    assert (tokenizer.encode("a").ids[0] == 5) == PRE[name].add_bos


def _cut(pre: PreTokenizer) -> Callable[[str], Any]:
    whole = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}
    steps = {"pre_tokenizer": _pre_tokenizer(pre)}
    return Tokenizer.from_str(json.dumps({**whole, **steps})).pre_tokenizer.pre_tokenize_str


def _all_pieces(pre: PreTokenizer) -> list[Any]:
    return list(map(_cut(pre), _SAMPLES))


def test_the_texts_tell_all_pre_tokenizers_apart() -> None:
    different = {pre.splits: _all_pieces(pre) for pre in PRE.values() if pre.byte_level}
    assert len(different) >= 28
    for (left, one), (right, other) in combinations(different.items(), 2):
        assert one != other, (left, right)


def test_a_missing_name_is_the_default(tmp_path: Path) -> None:
    metadata = byte_level(None)
    tokenizer = assert_like_llama_cpp(metadata, tmp_path / "none", _SAMPLES[:50])
    named = written(byte_level("default"), tmp_path / "named")
    assert tokenizer.to_str() == named.to_str()


def test_ignored_merges_keep_whole_words(tmp_path: Path) -> None:
    ignoring, merging = byte_level("llama-bpe"), byte_level("smaug-bpe")
    word = ignoring["tokenizer.ggml.tokens"].index("ĠHello")
    assert plain(written(ignoring, tmp_path / "a"), " Hello") == [word]
    assert plain(written(merging, tmp_path / "b"), " Hello") != [word]


def test_of_two_like_merges_the_first_counts(tmp_path: Path) -> None:
    tokens = [*_ALPHABET, "ab", "bc"]
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
    # 3 seconds here.
    assert time.process_time() - start < 10
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    samples = ["".join(source.choices(syllables, k=20)).replace("▁", " ") for _ in range(100)]
    assert any(len(plain(tokenizer, text)) < 12 for text in samples)
    pytest.importorskip("xllamacpp")
    with Vocabulary(write_vocabulary(tmp_path / "vocabulary.gguf", metadata)) as oracle:
        assert_same(tokenizer, oracle, samples)


# --------------------------------------------------------------------------------------------------
# Gemma 4

_BREAK = "\n"
_BREAKS = [_BREAK * count for count in range(1, 6)]
_WORDS = ["▁", "a", "b", "ab", "▁a", "▁ab"]
_WORD_MERGES = ["a b", "▁ ab", "▁ a"]
_GEMMA_SAMPLES = ["ab a\n\nb", " ab", "é\tx", "\n \n", *(f"a{_BREAK * n}b" for n in range(12))]


def test_gemma_4_merges_runs_of_line_breaks(tmp_path: Path) -> None:
    merges = [f"{_BREAK * (n - k)} {_BREAK * k}" for n in range(5, 1, -1) for k in range(1, n)]
    metadata = gemma4([*merges, *_WORD_MERGES], [*_BREAKS, *_WORDS])
    tokenizer = assert_like_llama_cpp(metadata, tmp_path, _GEMMA_SAMPLES)
    assert plain(tokenizer, "\n\n\n") == [tokenizer.token_to_id("\n\n\n")]


def test_gemma_4_keeps_runs_of_line_breaks_that_no_merge_makes(tmp_path: Path) -> None:
    metadata = gemma4(_WORD_MERGES, [*_BREAKS, *_WORDS])
    samples = [text for text in _GEMMA_SAMPLES if "\n" * 6 not in text]
    tokenizer = assert_like_llama_cpp(metadata, tmp_path, samples)
    assert plain(tokenizer, "a\n\n\nb")[1] == tokenizer.token_to_id("\n\n\n")


def test_gemma_4_always_begins_with_bos(tmp_path: Path) -> None:
    metadata = gemma4(_WORD_MERGES, _WORDS, add_bos_token=False)
    tokenizer = assert_like_llama_cpp(metadata, tmp_path, ["a"])
    assert tokenizer.encode("a").ids[0] == 2


def test_gemma_4s_s_is_an_ordinary_word(tmp_path: Path) -> None:
    metadata = gemma4(_WORD_MERGES, [*_WORDS, *"</s>"])
    closing = add_token(metadata, "</s>")
    response = add_token(metadata, "<|tool_response>")
    tokenizer = assert_like_llama_cpp(metadata, tmp_path, ["a</s>b", "a<|tool_response>b"])
    assert closing not in plain(tokenizer, "a</s>b")
    assert response in plain(tokenizer, "a<|tool_response>b")


@pytest.mark.parametrize("pre", ["granite-embed-multi-311m", "sarvam-moe"])
def test_plain_text_merges_of_other_names(tmp_path: Path, pre: str) -> None:
    metadata = gemma4(_WORD_MERGES, [*_BREAKS, *_WORDS], model="gpt2", pre=pre)
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
    lambda c: _assigned(c) and c not in "ſ\x00"
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
    assert _all_pieces(found) == _all_pieces(wanted)


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
        for text in _SAMPLES[:40]:
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


# --------------------------------------------------------------------------------------------------
# Damage

_SPM = sentencepiece(["a", "b", "ab", "c", "bc"], [0.0, 0.0, -1.0, 0.0, -2.0])
_BPE = byte_level("gpt-2", pairs=300)


@pytest.mark.parametrize(
    ("metadata", "change", "message"),
    [
        (_BPE, {"model": None}, "have no tokenizer.ggml.model"),
        (_BPE, {"model": "bert"}, 'ggml.model is "bert", a WordPiece vocabulary'),
        (_BPE, {"model": "t5"}, 'ggml.model is "t5", a Unigram vocabulary'),
        (_BPE, {"model": "rwkv"}, "an RWKV vocabulary"),
        (_BPE, {"model": "plamo2"}, "a PLaMo 2 vocabulary"),
        (_BPE, {"model": "new"}, 'ggml.model is "new", a kind of vocabulary that is not known'),
        (_BPE, {"model": 3}, "ggml.model is 3, which is not text"),
        (_BPE, {"pre": "unheard-of"}, 'ggml.pre is "unheard-of", a pre-tokenizer that is not'),
        (_BPE, {"pre": "whitespace"}, 'ggml.pre is "whitespace"'),
        (_BPE, {"tokens": None}, "have no tokenizer.ggml.tokens"),
        (_BPE, {"tokens": []}, "have no tokenizer.ggml.tokens"),
        (_BPE, {"tokens": [1, 2]}, "ggml.tokens is .* not a list of texts"),
        (_BPE, {"tokens": ["a", "b", "a"]}, "ggml.tokens has 'a' twice, as 0 and 2"),
        (_BPE, {"tokens": ["a", "\udc80"]}, "ggml.tokens has a text that is no UTF-8"),
        (_BPE, {"token_type": [1, 1]}, "ggml.token_type has 2 entries for"),
        (_BPE, {"token_type": "1"}, "ggml.token_type is '1', which is not a list of numbers"),
        (_BPE, {"merges": None}, "have no tokenizer.ggml.merges"),
        (_BPE, {"merges": ["ab"]}, "ggml.merges has 'ab' as 0, which is not \"left right\""),
        (_BPE, {"merges": ["a "]}, "ggml.merges has 'a ' as 0"),
        (_BPE, {"merges": ["xx yy"]}, "ggml.merges has 'xx yy' as 0, whose parts are not all"),
        (_BPE, {"eos_token_id": 10**6}, "ggml.eos_token_id is 1000000, but there are"),
        (_BPE, {"eot_token_id": -2}, "ggml.eot_token_id is -2, but there are"),
        (_BPE, {"bos_token_id": "5"}, "ggml.bos_token_id is '5', which is not a whole number"),
        (_BPE, {"bos_token_id": True}, "ggml.bos_token_id is True, which is not a whole number"),
        (_BPE, {"add_bos_token": 1}, "ggml.add_bos_token is 1, which is not true or false"),
        (
            _BPE,
            {"bos_token_id": None, "add_bos_token": True},
            "ggml.bos_token_id names no token",
        ),
        (_SPM, {"scores": None}, "have no tokenizer.ggml.scores"),
        (_SPM, {"scores": [0.0]}, "ggml.scores has 1 entries for 264 tokens"),
        (_SPM, {"scores": [float("nan")] * 264}, "ggml.scores has a value that is no finite"),
        (_SPM, {"add_space_prefix": "no"}, "ggml.add_space_prefix is 'no', which is not true"),
    ],
)
def test_damaged_metadata_name_the_key_and_the_mend(
    tmp_path: Path, metadata: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    write_tokenizer(metadata, tmp_path / "sound")
    damaged = {**metadata, **{f"tokenizer.ggml.{key}": value for key, value in change.items()}}
    damaged = {key: value for key, value in damaged.items() if value is not None}
    with pytest.raises(UserError, match=message.replace(".", r"\.").replace(r" \.* ", " .* ")) as e:
        write_tokenizer(damaged, tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()
    assert_one_sentence(str(e.value))


def assert_one_sentence(said: str) -> None:
    assert re.fullmatch(r"[^\n]+: [^\n]+\.", said), said
    assert "tokenizer." in said


@pytest.mark.parametrize("seed", range(4))
def test_random_damage_is_refused_or_harmless(tmp_path: Path, seed: int) -> None:
    source = random.Random(seed)
    junk: list[Any] = [
        None,
        "",
        "x",
        "llama",
        -1,
        0,
        3,
        10**12,
        1.5,
        float("inf"),
        True,
        [],
        [1],
        ["a"],
        ["a", "b c"],
        [[1]],
        {"a": 1},
        b"bytes",
    ]
    refused = 0
    for number in range(100):
        sound = source.choice(
            [_SPM, _BPE, gemma4(_WORD_MERGES, [*_BREAKS, *_WORDS], chat_template="x")]
        )
        damaged = {**sound, "tokenizer.chat_template": "x", "general.name": "phi3"}
        for _ in range(source.choice([1, 1, 2])):
            key = source.choice(list(damaged))
            value = damaged[key]
            if isinstance(value, list) and source.random() < 0.6:
                value = list(value)
                place = source.randrange(len(value)) if value else 0
                how = source.random()
                if how < 0.3 and value:
                    del value[place]
                elif how < 0.6:
                    value.insert(place, source.choice(junk))
                elif value:
                    value[place] = source.choice(junk)
                damaged[key] = value
            else:
                damaged[key] = source.choice(junk)
        try:
            write_tokenizer(damaged, tmp_path / str(number))
        except UserError as error:
            assert_one_sentence(str(error))
            assert not (tmp_path / str(number)).exists()
            refused += 1
        else:
            tokenizer = Tokenizer.from_file(str(tmp_path / str(number) / "tokenizer.json"))
            assert tokenizer.encode("ab c").ids
    assert 40 < refused < 100
