"""What a chat template in Ollama's template language uses: names of fields, and thinking tags.

The language is that of Go's text/template. Only what Ollama itself looks for is read here: the
names of fields such as ``.Tools``, and the texts around ``.Thinking`` (ollama: template/template.go
and thinking/template.go). Nothing is executed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

#: An action of a template. Texts inside it may contain braces, and a comment anything.
ACTION = re.compile(
    r"""(
    \{\{-?\s*/\*.*?\*/\s*-?\}\}                # a comment
    | \{\{ (?: "(?:\\.|[^"\\\n])*"              # a text,
             | `[^`]*` | '(?:\\.|[^'\\\n])*'      # a raw text, a character,
             | [^"`'}] | \}(?!\}) )* \}\}         # or anything but the end
    )""",
    re.DOTALL | re.VERBOSE,
)

_TEXT = re.compile(r'"(?:\\.|[^"\\\n])*"|`[^`]*`|\'(?:\\.|[^\'\\\n])*\'')
_FIELD = re.compile(r"(?<![\w)\]])(\$\w*)?((?:\.[A-Za-z_]\w*)+)|\$([A-Za-z_]\w*)")
_WORD = re.compile(r"\{\{-?\s*(\w+)?")


@dataclass
class _Node:
    """A text, an action, or a branch (if, range, with) with one list of nodes a part."""

    text: str = ""
    action: str = ""
    lists: list[list[_Node]] = field(default_factory=list)

    @property
    def word(self) -> str:
        """The action's first word, such as ``range``; empty for a text."""
        found = _WORD.match(self.action)
        return (found[1] or "") if found else ""


def fields(template: str) -> frozenset[str]:
    """The names of all fields and variables of a template, in lower case.

    Of a path such as ``.Function.Name`` every part is a name.
    """
    names: set[str] = set()
    for action in ACTION.findall(template):
        names |= {name.lower() for name in _names(action)}
    return frozenset(names)


def thinking_tags(template: str) -> tuple[str, str]:
    """The texts that surround a thought, as Ollama infers them; two empty texts without one.

    Ollama looks inside a range over the messages for ``.Thinking``, goes out to the nearest list
    of nodes, and takes that list's first and last texts. The last such place counts.
    """
    tags = ["", ""]
    _look(_parse(template), False, tags)
    return tags[0], tags[1]


def _look(nodes: list[_Node], in_messages: bool, tags: list[str]) -> None:
    for node in nodes:
        if in_messages and "Thinking" in _first_names(node.action):
            for place, end in ((0, nodes[0]), (1, nodes[-1])):
                if end.text:
                    tags[place] = end.text.strip()
        inside = in_messages
        if node.word == "range":
            inside = "Messages" in _first_names(node.action)
        for part in node.lists:
            _look(part, inside, tags)


def _names(action: str) -> Iterator[str]:
    if action.lstrip("{-").lstrip().startswith("/*"):
        return
    for before, path, variable in _FIELD.findall(_TEXT.sub('""', action)):
        if variable or len(before) > 1:
            yield variable or before[1:]
        yield from path.split(".")[1:]


def _first_names(action: str) -> set[str]:
    """The first part of each path of fields in an action; paths from a variable are no fields."""
    if action.lstrip("{-").lstrip().startswith("/*"):
        return set()
    found = _FIELD.findall(_TEXT.sub('""', action))
    return {path.split(".")[1] for before, path, _ in found if path and not before}


def _parse(template: str) -> list[_Node]:
    """The nodes of a template; what it leaves open ends at its end."""
    top: list[_Node] = []
    open_branches: list[_Node] = []
    pieces = ACTION.split(template)
    for number, piece in enumerate(pieces):
        here = open_branches[-1].lists[-1] if open_branches else top
        if number % 2 == 0:
            text = piece
            if number and pieces[number - 1].endswith("-}}"):
                text = text.lstrip()
            if number + 1 < len(pieces) and pieces[number + 1].startswith("{{-"):
                text = text.rstrip()
            if text:
                here.append(_Node(text=text))
            continue
        node = _Node(action=piece)
        if node.word in ("if", "range", "with", "block", "define"):
            node.lists.append([])
            here.append(node)
            open_branches.append(node)
        elif node.word == "else" and open_branches:
            open_branches[-1].lists.append([])
        elif node.word == "end":
            if open_branches:
                open_branches.pop()
        elif not piece.lstrip("{-").lstrip().startswith("/*"):
            here.append(node)
    return top
