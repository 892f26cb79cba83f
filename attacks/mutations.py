"""Random mutations of bytes, text and JSON; none changes its argument."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

# Values that a damaged or hostile file may have in place of a number.
NUMBERS: list[Any] = [
    0, 1, -1, 2, 3, 7, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1,
    2**63, 2**64 - 1, 2**64, -(2**31), -(2**63), 10**7, 10**9, 10**30, 0.0, -0.0, 0.5, 1e-45, 1e38,
    1e308, float("nan"), float("inf"), float("-inf"), -1e308, True, False,
]  # fmt: skip

# Texts that a terminal, a web page, a shell, a path or a template would interpret.
TEXTS = [
    "", " ", "\0", "\n", "a\nb", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x9b2J", "\u202eevil",
    "\u2028", "\ud800", "\ufeff", "é", "🙂", "<script>alert(1)</script>", "../../../../etc/passwd",
    "/etc/passwd", "a/b", "NaN", "Infinity", "1e999", "0x10", "-1", "1_000", "null", "{{ 1/0 }}",
    "%s%n", "$(id)", "`id`", "x" * 10_000, "llama", "gemma2", "qwen3_moe", "switch_layers", "base",
    "../llama", "model", "default", "F16", "affine", "mxfp4", "\udcff", "𝟏𝟐", "ｆｕｌｌ",
]  # fmt: skip


def number(rng: Random) -> Any:
    """A number at the limit of a type, or one of random size."""
    return rng.choice(NUMBERS) if rng.random() < 0.8 else rng.randrange(-(1 << 40), 1 << 40)


def value(rng: Random, depth: int = 2) -> Any:
    """Any JSON value."""
    what = rng.randrange(9)
    if what < 3:
        return number(rng)
    if what < 5:
        return rng.choice(TEXTS)
    if what == 5 or depth == 0:
        return None
    if what == 6:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if what == 7:
        return {rng.choice(TEXTS): value(rng, depth - 1) for _ in range(rng.randrange(3))}
    nested: Any = rng.choice([[], {}, 1])
    for _ in range(rng.choice([3, 50, 400])):
        nested = [nested] if rng.random() < 0.5 else {"a": nested}
    return nested


def near(rng: Random, old: Any) -> Any:
    """A value of another type, or one that is slightly wrong, as after a converter's mistake."""
    if isinstance(old, bool):
        return rng.choice([not old, int(old), str(old), None, [old]])
    if isinstance(old, (int, float)):
        return rng.choice(
            [
                old + 1,
                old - 1,
                -old,
                old * 2,
                old * 1000,
                old / 2,
                float(old),
                str(old),
                [old],
                None,
            ]
        )
    if isinstance(old, str):
        return rng.choice(
            [old[1:], old[:-1], old + old, old.upper(), [old], {old: old}, None, len(old),
             old + rng.choice(TEXTS), text(rng, old)]
        )  # fmt: skip
    if isinstance(old, list):
        return rng.choice([old[1:], old + old[:1], old[::-1], old[:1], {"a": old[:9]},
                           old[0] if old else 1, [], None])  # fmt: skip
    if isinstance(old, dict):
        return rng.choice([list(old.items())[:9], list(old)[:9], {}, str(old)[:99], None, [old]])
    return value(rng)


def bytes_of(rng: Random, data: bytes, times: int | None = None) -> bytes:
    """The same bytes with bits flipped and parts removed, doubled, overwritten or moved."""
    out = bytearray(data)
    for _ in range(times or rng.choice([1, 1, 1, 2, 4, 16])):
        at = rng.randrange(len(out) + 1)
        size = min(rng.choice([1, 2, 4, 8, 64, 1000]), len(out) - at)
        what = rng.randrange(8)
        if what == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            del out[at:]
        elif what == 2:
            del out[at : at + size]
        elif what == 3:
            out[at:at] = rng.randbytes(rng.choice([1, 4, 100]))
        elif what == 4:
            out[at : at + size] = rng.choice([b"\0", b"\xff", b"[", b"9", b" "]) * size
        elif what == 5:
            out[at:at] = out[at : at + size]
        elif what == 6:
            width = rng.choice([1, 2, 4, 8])
            big = int(rng.choice([n for n in NUMBERS if isinstance(n, int)])) % (1 << (8 * width))
            out[at : at + width] = big.to_bytes(width, "little")
        else:
            out[at : at + size] = rng.randbytes(size)
    return bytes(out)


def text(rng: Random, old: str) -> str:
    """The same text with words removed, doubled, inserted or swapped."""
    at = rng.randrange(len(old) + 1)
    to = min(len(old), at + rng.choice([1, 2, 5, 20, 200]))
    piece = old[at:to]
    other = rng.randrange(len(old) + 1)
    return rng.choice(
        [
            old[:at] + old[to:],
            old[:at],
            old[:at] + rng.choice(TEXTS) + old[at:],
            old[:at] + piece * rng.choice([2, 3, 50]) + old[to:],
            old[:other] + piece + old[other:],
            old[:at] + piece[::-1] + old[to:],
        ]
    )


def json_value(rng: Random, document: Any, times: int | None = None) -> Any:
    """The same JSON document with values, keys or structure changed in a few places."""
    document = copy.deepcopy(document)
    for _ in range(times or rng.choice([1, 1, 1, 2, 3, 5])):
        holder, key = _place(rng, document)
        if holder is None:
            return value(rng) if rng.random() < 0.2 else document
        what = rng.randrange(8)
        if what == 0:
            del holder[key]
        elif what in (1, 2):
            holder[key] = value(rng)
        elif what in (3, 4):
            holder[key] = near(rng, holder[key])
        elif what == 5:
            other, at = _place(rng, document)
            if other is not None:
                holder[key], other[at] = other[at], holder[key]
        elif isinstance(holder, dict):
            name = rng.choice([*TEXTS, str(key) + "x", "model_type", "quantization", "name"])
            holder[name] = holder.pop(key) if what == 6 else value(rng)
        else:
            holder.insert(key, value(rng))
        # A swap may have put a container into itself, which JSON cannot hold.
        try:
            json.dumps(document)
        except (ValueError, RecursionError):
            return value(rng)
    return document


def _place(rng: Random, document: Any) -> tuple[Any, Any]:
    """A container and a key in it; (None, None) where there is none."""
    holder, key = None, None
    here = document
    while isinstance(here, (dict, list)) and here:
        if holder is not None and rng.random() < 0.3:
            break
        holder = here
        key = rng.choice(list(here)) if isinstance(here, dict) else rng.randrange(len(here))
        here = here[key]
    return holder, key


def json_bytes(rng: Random, data: bytes) -> bytes:
    """A JSON file, changed in its structure, its spelling or its bytes."""
    what = rng.random()
    if what < 0.1:
        return bytes_of(rng, data)
    if what < 0.2:
        return _spelling(rng, data)
    try:
        document = json_value(rng, json.loads(data))
    except (ValueError, RecursionError):  # changed by an earlier mutation
        return bytes_of(rng, data)
    return json.dumps(
        document, ensure_ascii=rng.random() < 0.9, indent=rng.choice([None, 2])
    ).encode("utf-8", "surrogatepass")


def _spelling(rng: Random, data: bytes) -> bytes:
    """Documents that may break a reader of JSON, whatever the file is for."""
    at = data.find(b":", rng.randrange(len(data) + 1)) + 1
    deep = rng.choice([1000, 100_000])
    return rng.choice(
        [
            b"", b" ", b"null", b"[]", b"0", b'"text"', b"\xef\xbb\xbf" + data,
            data.decode("utf-8", "replace").encode("utf-16"), data + b"}", data + data, data[:-2],
            b"[" * deep, b'{"a":' * deep, data[:at] + b"[" * deep + b"]" * deep + b"," + data[at:],
            data[:at] + b"9" * 5000 + b"," + data[at:], data[:at] + b"1e99999," + data[at:],
            data[:at] + b"-" + data[at:], data.replace(b'"', b"'"), data.replace(b",", b",,", 1),
            data.replace(b":", b": /* */", 1), b"\0" * 100, b"\xff" + data,
            data.replace(b"{", b'{"a": 1, "a": 2, ', 1), data.replace(b'": ', b'\\ud800": ', 1),
        ]
    )  # fmt: skip
