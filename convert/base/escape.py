"""Text from files, servers and models, made safe for the place where it is printed.

Names, metadata, file contents and replies may hold escape sequences that a terminal obeys,
bidirectional controls that reorder the letters on the screen, invisible characters, and bytes that
are not UTF-8. All of these are replaced by visible escapes such as ``\\u202e``.
"""

from __future__ import annotations

import html as markup
import json
import re
from collections.abc import Mapping
from typing import Any

# C0 and C1 controls and DEL; invisible and bidirectional format characters; line and paragraph
# separators; tags; noncharacters; lone surrogates. Zero-width joiners stay: emoji and several
# scripts are written with them.
_UNSAFE = (
    "\\x00-\\x1f\\x7f-\\x9f\\xad\\u061c\\u180e\\u200b\\u200e\\u200f\\u2028-\\u202e\\u2060-\\u206f"
    "\\ufeff\\ufff9-\\ufffb\\ufffe\\uffff\\ud800-\\udfff\\U000e0000-\\U000e0fff"
)
_LINE = re.compile(f"[{_UNSAFE}]")
_BLOCK = re.compile(f"(?![\\n\\t])[{_UNSAFE}]")

_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def line(text: str) -> str:
    """Text for one line of a terminal: line ends are escaped as well."""
    return _LINE.sub(_escape, text)


def block(text: str) -> str:
    """Text for several lines of a terminal: line ends and tabs stay; CR LF becomes LF."""
    return _BLOCK.sub(_escape, text.replace("\r\n", "\n"))


def shortened(text: str, longest: int) -> str:
    """`line` of a text's first ``longest`` characters, with a sign where more were left out."""
    return line(text if len(text) <= longest else f"{text[: longest - 3]}...")


def record(value: Any) -> Any:
    """A JSON value with `line` applied to every string in it, names of members included."""
    if isinstance(value, str):
        return line(value)
    if isinstance(value, Mapping):
        return {record(name): record(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [record(one) for one in value]
    return value


def json_text(text: str) -> str:
    """JSON for a terminal: the same value, with unsafe characters as JSON's own escapes."""
    return _BLOCK.sub(_json_escape, text)


def json_ascii(text: str) -> str:
    """JSON with an escape for every character outside ASCII, for terminals that are not UTF-8."""
    return re.sub("[^\\x00-\\x7f]", _json_escape, text)


def _escape(found: re.Match[str]) -> str:
    char = found[0]
    if char in _SHORT:
        return _SHORT[char]
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte of a file's name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _json_escape(found: re.Match[str]) -> str:
    units = found[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))


# --- for written files ----------------------------------------------------------------------------


def html(text: str) -> str:
    """Text for an HTML or SVG page."""
    return markup.escape(block(text))


def markdown(text: str) -> str:
    """Text for a line of Markdown, with everything escaped that would be markup."""
    return _MARKUP.sub(r"\\\g<0>", line(text).replace("\\", "\\\\"))


def code(text: str) -> str:
    """Text as a code span of Markdown, between enough backticks for any backticks in the text."""
    said = line(text)
    if "`" not in said:
        return f"`{said}`"
    fence = "`" * (1 + max(map(len, re.findall("`+", said))))
    return f"{fence} {said} {fence}"


def yaml(text: str) -> str:
    """Text as a YAML scalar: unquoted where YAML reads that as the same text, else quoted."""
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    return json_text(json.dumps(text, ensure_ascii=False))


# Only punctuation that can be markup is escaped, so that "Qwen2.5-0.5B_q4 (v1)" stays readable.
_MARKUP = re.compile(r"[`*<>\[\]|~]|^[#+=-]|(?<!\w)_|_(?!\w)")
_PLAIN = re.compile(r"[A-Za-z][\w./+-]*", re.ASCII)
_WORDS = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}
