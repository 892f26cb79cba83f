"""Reads a SentencePiece model file (tokenizer.model) without the protocol buffers library."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from convert.base.errors import UserError


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    kind: int


def read_sentencepiece(path: Path) -> tuple[list[Piece], bool]:
    """The pieces and add_dummy_prefix of a SentencePiece model.

    The file is one protocol buffer message (sentencepiece_model.proto): field 1, repeated, is a
    piece {1 text, 2 score, 3 type}; field 2 is the trainer {3 model type}; field 3 is the
    normalizer {3 dummy prefix}.

    Raises:
        UserError: when the file is no SentencePiece model, or not of its BPE type.
    """
    pieces: list[Piece] = []
    model_type, dummy_prefix = 1, True
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                text, score, kind = "", 0.0, 1
                for inner, content in _fields(value):
                    if inner == 1:
                        text = bytes(memoryview(content)).decode("utf-8")
                    elif inner == 2:
                        score = struct.unpack("<f", content)[0]
                    elif inner == 3:
                        kind = TokenType(content)
                pieces.append(Piece(text, score, kind))
            elif number == 2:
                model_type = next((int(v) for n, v in _fields(value) if n == 3), 1)
            elif number == 3:
                dummy_prefix = next((bool(v) for n, v in _fields(value) if n == 3), True)
    except (IndexError, ValueError, TypeError, struct.error):
        raise UserError(f"{path} is no SentencePiece model: download it again.") from None
    if not pieces:
        raise UserError(f"{path} is no SentencePiece model: download it again.")
    if model_type != 2:
        raise UserError(
            f"{path} is not of SentencePiece's BPE type, the only one llama.cpp reads as such: "
            f"write this model with llama.cpp's convert_hf_to_gguf.py."
        )
    return pieces, dummy_prefix


def _fields(message: Any) -> Iterator[tuple[int, Any]]:
    view = memoryview(message)
    at = 0

    def varint() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            byte = view[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if shift > 70:
                raise ValueError("a number of more than 64 bits")
            if byte < 0x80:
                return value

    while at < len(view):
        key = varint()
        wire = key & 7
        if wire == 0:
            yield key >> 3, varint()
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            yield key >> 3, view[at : at + size]
            at += size
        elif wire == 2:
            size = varint()
            if at + size > len(view):
                raise ValueError("truncated")
            yield key >> 3, view[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {wire}")
