"""The text of a Modelfile, said so that Ollama reads it back as it was.

Ollama strips one pair of quotes around a value, single or triple, and undoes no escape. A
triple-quoted text ends where the first line ends in three quotes; within a line they are text.
Characters that do not print, other than newlines and tabs, are dropped (ollama: parser/parser.go).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

# Whose messages a Modelfile may hold.
ROLES = ("system", "user", "assistant")

# Parameters that manifests of older models set, and `ollama create` refuses today.
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

# An action of a Go template. Its texts may hold braces, and a comment anything.
_ACTION = re.compile(
    r"""(
    \{\{-?\s*/\*.*?\*/\s*-?\}\}                # a comment
    | \{\{ (?: "(?:\\.|[^"\\\n])*"              # a text,
             | `[^`]*` | '(?:\\.|[^'\\\n])*'      # a raw text, a character,
             | [^"`'}] | \}(?!\}) )* \}\}         # or anything but the end
    )""",
    re.DOTALL | re.VERBOSE,
)

# Three quotes at the end of a line that is not the last: there a triple-quoted text would end.
_ENDING = re.compile(r'"""(?=[ \t]*[\r\n])')


def _each_unsayable(text: str, instead: Callable[[str], str]) -> str:
    """``text`` with something else for each character that Ollama drops from a Modelfile."""
    if text.isprintable():
        return text
    kept = (c if c.isprintable() or c in "\n\r\t" else instead(c) for c in text)
    return "".join(kept)


def _in_action(character: str) -> str:
    """A character as a Go template writes it."""
    code = ord(character)
    return '{{ "' + (f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}") + '" }}'


class Modelfile:
    """A Modelfile being written, a line after the other; what cannot be said becomes a comment.

    Args:
        file: the GGUF's name, beside the Modelfile.
    """

    def __init__(self, file: str) -> None:
        path = f"./{file}"
        self._lines = [f"FROM {path}" if path.strip() == path else f'FROM "{path}"']

    def __str__(self) -> str:
        return "\n".join(self._lines) + "\n"

    def add(self, line: str) -> None:
        self._lines.append(line)

    def comment(self, *lines: str) -> None:
        self._lines += [f"# {line}" for line in lines]

    def parameter(self, key: str, value: str | int | float) -> None:
        """One PARAMETER line; a comment if Ollama has dropped the parameter and would refuse it."""
        if isinstance(value, bool):
            said = "true" if value else "false"
        elif isinstance(value, str):
            said = self._sayable(key, value)
            # One quote is enough for a line, but not before two others.
            quotes = '"""' if re.search(r'^"|[\r\n]', said) else '"'
            said = f"{quotes}{said}{quotes}"
        else:
            # Where Ollama wants a whole number it does not take 4096.0.
            whole = isinstance(value, int) or value.is_integer()
            said = str(int(value)) if whole else repr(value)
        if key in _FORMER_PARAMETERS:
            self.comment(f"Ollama has no PARAMETER {key} any more; it was {said.splitlines()[0]}")
        else:
            self.add(f"PARAMETER {key} {said}")

    def text(self, word: str, text: str) -> None:
        """SYSTEM, MESSAGE or LICENSE, of any number of lines."""
        self.add(f'{word} """{self._sayable(word, text)}"""')

    def template(self, text: str) -> None:
        """TEMPLATE, whose own language can say what a Modelfile's cannot."""
        pieces = []
        # Outside of actions everything can be said in an action: {{ "\u00a0" }}.
        for piece in _ACTION.split(text):
            if not piece.startswith("{{"):
                piece = _each_unsayable(_ENDING.sub('"""{{ "" }}', piece), _in_action)
            pieces.append(piece)
        self.text("TEMPLATE", "".join(pieces))

    def _sayable(self, word: str, text: str) -> str:
        """``text`` without what a Modelfile cannot say, which a comment above it admits."""
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
