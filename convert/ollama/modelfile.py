"""Writing a Modelfile so that Ollama reads every text exactly as it was.

Ollama strips one pair of quotes around a value, single or triple, and has no escapes. A
triple-quoted text ends at the first line that ends in three quotes; elsewhere three quotes are
text. Ollama drops characters that do not print, except newlines and tabs (ollama:
parser/parser.go).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from convert.ollama.go_template import ACTION

# Roles of the messages that a Modelfile may hold.
ROLES = ("system", "user", "assistant")

# Parameters that manifests of older models set, but that `ollama create` now refuses.
_FORMER_PARAMETERS = {
    "cache",
    "embedding_only",
    "num_gqa",
    "numa",
    "rope_frequency_base",
    "rope_frequency_scale",
    "stop_conditions",
    "tfs_z",
}

# Three quotes at the end of a line that is not the last one, which would end a triple-quoted text.
_ENDING = re.compile(r'"""(?=[ \t]*[\r\n])')


def _each_unsayable(text: str, instead: Callable[[str], str]) -> str:
    """``text`` with ``instead(c)`` for each character c that Ollama drops from a Modelfile."""
    if text.isprintable():
        return text
    kept = (c if c.isprintable() or c in "\n\r\t" else instead(c) for c in text)
    return "".join(kept)


def _in_action(character: str) -> str:
    """An action of a Go template that prints this character."""
    code = ord(character)
    return '{{ "' + (f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}") + '" }}'


class Modelfile:
    """A Modelfile that is being written; for what it cannot hold, a comment says so.

    Args:
        file: the name of the GGUF, which lies beside the Modelfile.
    """

    def __init__(self, file: str) -> None:
        self._lines: list[str] = []
        self.file("FROM", file)

    def __str__(self) -> str:
        return "\n".join(self._lines) + "\n"

    def add(self, line: str) -> None:
        self._lines.append(line)

    def file(self, word: str, name: str) -> None:
        """Add a FROM or DRAFT line for a file in the Modelfile's folder."""
        path = f"./{name}"
        self.add(f"{word} {path}" if path.strip() == path else f'{word} "{path}"')

    def comment(self, *lines: str) -> None:
        self._lines += [f"# {line}" for line in lines]

    def parameter(self, key: str, value: str | int | float) -> None:
        """Add a PARAMETER line, or a comment if Ollama no longer accepts the parameter."""
        if isinstance(value, bool):
            said = "true" if value else "false"
        elif isinstance(value, str):
            said = self._sayable(key, value)
            # Single quotes are enough for a line, unless it begins with a quote.
            quotes = '"""' if re.search(r'^"|[\r\n]', said) else '"'
            said = f"{quotes}{said}{quotes}"
        else:
            # Where Ollama wants a whole number it does not accept 4096.0.
            whole = isinstance(value, int) or value.is_integer()
            said = str(int(value)) if whole else repr(value)
        if key in _FORMER_PARAMETERS:
            self.comment(f"Ollama has no PARAMETER {key} any more; it was {said.splitlines()[0]}")
        else:
            self.add(f"PARAMETER {key} {said}")

    def text(self, word: str, text: str) -> None:
        """Add a SYSTEM, MESSAGE or LICENSE text of any number of lines."""
        self.add(f'{word} """{self._sayable(word, text)}"""')

    def template(self, text: str) -> None:
        """Add a TEMPLATE; actions of its language stand for what a Modelfile cannot hold."""
        pieces = []
        # Outside of actions, an action such as {{ "\u00a0" }} can print any character.
        for piece in ACTION.split(text):
            if not piece.startswith("{{"):
                piece = _each_unsayable(_ENDING.sub('"""{{ "" }}', piece), _in_action)
            pieces.append(piece)
        self.text("TEMPLATE", "".join(pieces))

    def _sayable(self, word: str, text: str) -> str:
        """``text`` without what a Modelfile cannot hold; a comment is added where that is lost."""
        new = _each_unsayable(text, lambda c: " " if unicodedata.category(c) == "Zs" else "")
        lost = new != text and word != "LICENSE"
        ended = _ENDING.search(new)
        new = _ENDING.sub("'''", new)
        word = word.split()[0]
        if lost:
            self.comment(f"The {word} below lost characters that do not print: Ollama drops them.")
        if ended:
            self.comment(
                f"The {word} below had \"\"\" where it has ''': it would have ended there."
            )
        return new
