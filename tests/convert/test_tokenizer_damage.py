"""Damaged vocabularies of GGUFs are refused in one sentence, or harmless."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from convert.base.errors import UserError
from convert.tokenizers.from_gguf import write_tokenizer
from tests.convert.test_gguf_to_tokenizer import BREAKS, WORD_MERGES, WORDS
from tests.support.vocabularies import byte_level, gemma4, sentencepiece

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
            [_SPM, _BPE, gemma4(WORD_MERGES, [*BREAKS, *WORDS], chat_template="x")]
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
