"""Large numbers as text in a readable unit."""

from __future__ import annotations


def in_bytes(count: float) -> str:
    """A number of bytes as text: ``512 bytes``, ``48.3 kB``, ``1.2 GB``."""
    return _scaled(count, (" bytes", " kB", " MB", " GB", " TB"))


def in_words(count: float) -> str:
    """A count as text: ``512``, ``46.4 thousand``, ``2.5 million``, ``7.2 billion``."""
    return _scaled(count, ("", " thousand", " million", " billion", " trillion"))


def _scaled(count: float, units: tuple[str, ...]) -> str:
    power = 0
    # From 999.95 on, rounding to one decimal would show 1000.0 of the smaller unit.
    while power + 1 < len(units) and count >= 999.95:
        count, power = count / 1000, power + 1
    return f"{count:.1f}{units[power]}" if power else f"{count:.0f}{units[0]}"
