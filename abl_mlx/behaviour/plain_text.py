"""Normalizing text for the markers: one spelling for words that may be written in several ways.

Nothing in this module imports MLX.
"""

from __future__ import annotations

import re
import unicodedata

_QUOTES = str.maketrans(dict.fromkeys("’‘ʼ`´", "'") | dict.fromkeys("“”„«»「」『』", '"'))
# Letters that can be written in several ways, and signs that may be left out: the Turkish ı, the
# Vietnamese đ, Arabic alefs, yehs, heh and vowel signs, the Devanagari nukta and candrabindu.
_LETTERS = str.maketrans("ıđأإآٱىئؤةँ", "idاااايي" + "وه" + "ं") | dict.fromkeys(
    [*range(0x64B, 0x660), 0x670, 0x640, 0x93C], None
)
_CONTRACTIONS = tuple(
    (re.compile(rf"\b{short}\b"), long)
    for short, long in (
        (r"can'?t|can not", "cannot"),
        (r"won'?t", "will not"),
        (r"(do|does|did|is|are|was|would|could|should|must)n'?t", r"\1 not"),
        (r"i'?m", "i am"),
        (r"i'd", "i would"),
        (r"i'll", "i will"),
        (r"i've", "i have"),
        (r"let's", "let us"),
        (r"we're", "we are"),
        (r"you're", "you are"),
        (r"(it|that|here|there)'s", r"\1 is"),
    )
)


def plain(text: str) -> str:
    """Text in lower case, without accents and markdown, with folded forms and straight quotes."""
    text = text.replace("`", "'").lower() if text.isascii() else _folded(text)
    return " ".join(_MARKDOWN.sub(" ", text).split())


_MARKDOWN = re.compile(r"[*_#~>|\\\u200b-\u200d\ufeff]+")


def _folded(text: str) -> str:
    text = unicodedata.normalize("NFKC", text.translate(_QUOTES)).translate(_QUOTES).casefold()
    # Latin and Cyrillic accents only: the kana's voicing marks (U+3099) are letters.
    bare = (c for c in unicodedata.normalize("NFD", text) if not "\u0300" <= c <= "\u036f")
    return unicodedata.normalize("NFC", "".join(bare)).translate(_LETTERS)


_MAY_BE_SHORT = re.compile(r"[a-z]'|\bcan not\b|\b[acdimsw][a-z]{0,5}nt\b|\bim\b")


def spelled_out(text: str) -> str:
    """Normalized text with contractions written out."""
    if _MAY_BE_SHORT.search(text):
        for short, long in _CONTRACTIONS:
            text = short.sub(long, text)
    return text


SENTENCE_END = re.compile(r"(?<=[.!?؟।])\s+|(?<=[。！？])|\n+")
