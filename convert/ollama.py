"""A Modelfile for Ollama beside a GGUF file.

Ollama does not run Jinja: of a GGUF's own chat template it only recognises a score of well-known
ones by edit distance, and gives the model the bare prompt otherwise (ollama: template/template.go).
So the template is rendered here with marked messages, what stands around them is read off, and the
same text is written in Ollama's Go template language, if that reproduces the original.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.gguf_file import metadata
from convert.gguf_tokenizer import read_tokenizer

Message = Mapping[str, str]

_MARKS = {"system": "S7system7S", "user": "U7user7U", "assistant": "A7assistant7A"}


@dataclass(frozen=True)
class Turns:
    """A chat template as what stands around each message.

    Attributes:
        opening: before everything when there is no system message.
        system: before and after a system message; None when it belongs into the first user turn.
        system_separator: between a system message and the user's, in the latter case.
        user: before and after a user message.
        assistant: before and after a reply that is already there.
        reply: what the model continues.
    """

    opening: str
    system: tuple[str, str] | None
    system_separator: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    reply: str

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt for these messages, as `go` would render it in Ollama."""
        waiting = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
        text = self.opening
        if waiting and self.system:
            text, waiting = self.system[0] + waiting + self.system[1], ""
        for message in messages:
            content = message["content"]
            if message["role"] == "user":
                if waiting:
                    content, waiting = waiting + self.system_separator + content, ""
                text += self.user[0] + content + self.user[1]
            elif message["role"] == "assistant":
                text += self.assistant[0] + content + self.assistant[1]
        return text + self.reply

    def go(self) -> str:
        """The same in Ollama's template language."""
        parts = []
        if self.system:
            system = f"{_go(self.system[0])}{{{{ .System }}}}{_go(self.system[1])}"
            other = f"{{{{ else }}}}{_go(self.opening)}" if self.opening else ""
            parts.append(f"{{{{ if .System }}}}{system}{other}{{{{ end }}}}")
        else:
            parts.append(f"{{{{ $system := .System }}}}{_go(self.opening)}")
        parts.append('{{ range .Messages }}{{ if eq .Role "user" }}')
        parts.append(_go(self.user[0]))
        if not self.system:
            separator = _go(self.system_separator)
            clear = '{{ $system = "" }}'
            parts.append(f"{{{{ if $system }}}}{{{{ $system }}}}{separator}{clear}{{{{ end }}}}")
        parts.append(f"{{{{ .Content }}}}{_go(self.user[1])}")
        parts.append('{{ else if eq .Role "assistant" }}')
        parts.append(f"{_go(self.assistant[0])}{{{{ .Content }}}}{_go(self.assistant[1])}")
        parts.append(f"{{{{ end }}}}{{{{ end }}}}{_go(self.reply)}")
        return "".join(parts)


def modelfile(gguf: Path, folder: Path | None = None, name: str | None = None) -> str:
    """The text of a Modelfile that hands ``gguf`` to Ollama, from the same folder.

    Args:
        gguf: the file, already written.
        folder: the model folder it was made from, for its licence and every end-of-reply token.
        name: the file's name once it is in its place; None when it is there already.

    Returns:
        FROM, TEMPLATE, PARAMETER stop and LICENSE lines. Without TEMPLATE, a comment says why.

    Raises:
        UserError: when ``gguf`` is no GGUF file.
    """
    keys = metadata(gguf)
    tokens: list[str] = keys.get("tokenizer.ggml.tokens", [])
    roles = {
        role: tokens[keys[f"tokenizer.ggml.{role}_token_id"]]
        for role in ("bos", "eos", "eot", "eom")
        if f"tokenizer.ggml.{role}_token_id" in keys
    }
    lines = [f"FROM ./{name or Path(gguf).name}"]
    source = keys.get("tokenizer.chat_template")
    turns = None
    if source:
        # With add_bos_token, Ollama puts the bos token there itself.
        turns = read_turns(
            source,
            roles.get("bos", ""),
            roles.get("eos", ""),
            drop_bos=bool(keys.get("tokenizer.ggml.add_bos_token")),
        )
    if turns is not None:
        lines.append(f"TEMPLATE {_quoted(turns.go())}")
    elif source:
        lines.append(
            "# The model's chat template does more than Ollama's template language can say. Ollama"
        )
        lines.append(
            "# uses one of its own if it recognises it; otherwise add a TEMPLATE line by hand."
        )
    else:
        lines.append("# The model has no chat template: it continues text.")
    stops = [roles[role] for role in ("eos", "eot", "eom") if role in roles]
    if folder is not None:
        tokenizer = read_tokenizer(folder, len(tokens) or None, pre="default")
        stops += [tokenizer.tokens[end] for end in tokenizer.ends]
    lines += [f"PARAMETER stop {_quoted_line(stop)}" for stop in dict.fromkeys(stops)]
    licence = _licence(folder) if folder is not None else None
    if licence:
        lines.append(f"LICENSE {_quoted(licence)}")
    return "\n".join(lines) + "\n"


def read_turns(
    source: str, bos: str = "", eos: str = "", *, drop_bos: bool = False
) -> Turns | None:
    """What stands around the messages of a Jinja chat template.

    Args:
        source: the template.
        bos: the text of the bos token, as the template may write it.
        eos: the text of the eos token.
        drop_bos: leave out the bos token in front, for a runtime that adds it.

    Returns:
        None when the parts do not reproduce the template on one-turn and two-turn chats with and
        without a system message.
    """
    user = {"role": "user", "content": _MARKS["user"]}
    reply = {"role": "assistant", "content": _MARKS["assistant"]}
    system = {"role": "system", "content": _MARKS["system"]}

    def render(messages: Sequence[Message], ask: bool = True) -> str | None:
        text = _render(source, messages, bos, eos, ask)
        return text.removeprefix(bos) if text and drop_bos else text

    one, two = render([user]), render([user, reply, user])
    bare = render([user], ask=False)
    with_system = render([system, user])
    if one is None or two is None or bare is None:
        return None
    mark, answer, lead = _MARKS["user"], _MARKS["assistant"], _MARKS["system"]
    if one.count(mark) != 1 or two.count(mark) != 2 or two.count(answer) != 1:
        return None
    if not one.startswith(bare):
        # Some end the text where no reply is asked for.
        bare = bare.removesuffix(eos)
    if not one.startswith(bare):
        return None
    generation = one[len(bare) :]
    before, after = one.split(mark)
    after = after[: len(after) - len(generation)] if generation else after
    between = two.split(answer)
    first, last = between[0], between[1]
    if not first.startswith(before + mark + after):
        return None
    assistant_before = first[len(before + mark + after) :]
    # What follows the reply is its ending and then the second user turn.
    tail = last.split(mark)[0]
    found = []
    for cut in range(len(before) + 1):
        opening, user_before = before[:cut], before[cut:]
        if not tail.endswith(user_before):
            continue
        around = (assistant_before, tail[: len(tail) - len(user_before)])
        system_around, separator = None, "\n\n"
        if with_system is not None and with_system.count(lead) == 1:
            head, rest = with_system.split(lead)
            closing = user_before + mark + after + generation
            if rest.endswith(closing):
                system_around = (head, rest[: len(rest) - len(closing)])
            elif head == opening + user_before and mark in rest:
                separator = rest.split(mark)[0]
            else:
                continue
        turns = Turns(opening, system_around, separator, (user_before, after), around, generation)
        same = turns.render([user]) == one and turns.render([user, reply, user]) == two
        if same and (with_system is None or turns.render([system, user]) == with_system):
            found.append(turns)
    if not found:
        return None
    # Several cuts give the same text; take the one a person would have written.
    whole = [t for t in found if t.assistant[1] == after]
    ended = [t for t in found if eos and t.assistant[1].endswith(eos)]
    return (whole or ended or found)[0]


def _render(source: str, messages: Sequence[Message], bos: str, eos: str, ask: bool) -> str | None:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    # The same day on every run.
    environment.globals["strftime_now"] = lambda form: "01 Jan 2026"
    values: dict[str, Any] = {
        "messages": [dict(message) for message in messages],
        "add_generation_prompt": ask,
        "bos_token": bos,
        "eos_token": eos,
        "tools": None,
    }
    try:
        return environment.from_string(source).render(**values)
    except (jinja2.TemplateError, TypeError, KeyError, ValueError, AttributeError):
        return None


def _go(text: str) -> str:
    """Literal text in a Go template."""
    return text.replace("{{", '{{ "{{" }}')


def _quoted(text: str) -> str:
    # A Modelfile has no escape for three quotes.
    return '"""' + text.replace('"""', "'''") + '"""'


def _quoted_line(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'


def _licence(folder: Path) -> str | None:
    for path in sorted(Path(folder).iterdir()):
        if path.is_file() and re.fullmatch(r"(LICEN[CS]E|COPYING)(\.txt|\.md)?", path.name, re.I):
            return path.read_text(encoding="utf-8", errors="replace").strip()
    return None
