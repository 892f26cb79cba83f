"""Vocabularies made up for tests, texts to tokenize, and llama.cpp's own tokenizer beside them."""

from __future__ import annotations

import ctypes
import importlib.util
import random
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from convert.tokenizers.from_gguf import write_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# --------------------------------------------------------------------------------------------------
# Texts


def assigned(text: str) -> str:
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
        return assigned("".join(chr(source.randrange(32, top)) for top in points))
    pools = (source.choice(POOLS) for _ in range(source.randrange(1, 9)))
    return "".join(source.choice(p) for p in pools for _ in range(source.randrange(1, 6)))


def texts(count: int, seed: int = 0) -> list[str]:
    source = random.Random(seed)
    return ["", *SENTENCES, *(random_text(source) for _ in range(count))]


SAMPLES = texts(400, seed=7)


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

ALPHABET = sorted(ByteLevel.alphabet())


def _byte_pairs() -> list[tuple[str, str]]:
    """Every two bytes that follow each other in the samples, spelled in GPT-2's alphabet."""
    spell = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    spelled = [word for text in SAMPLES for word, _ in spell(text)]
    return sorted({(a, b) for word in spelled for a, b in pairwise(word)})


def byte_level(pre: str | None, pairs: int | None = None, **more: Any) -> dict[str, Any]:
    """A vocabulary of bytes and of pairs of bytes in a random order of merging.

    Where a text is cut decides which bytes can pair, so that a wrong cut shows.
    """
    source = random.Random(3)
    chosen = _byte_pairs()
    source.shuffle(chosen)
    chosen = chosen[:pairs]
    tokens = [*ALPHABET, *dict.fromkeys(a + b for a, b in chosen)]
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
