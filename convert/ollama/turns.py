"""A chat template in Jinja as turns, which Ollama's own template language can say.

The template is rendered with marked messages; the text around the marks is what surrounds each
message, if the result reproduces the original.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from convert.tokenizers.chat_template import ChatTemplate, TemplateError

Message = Mapping[str, str]

_MARKS = {"system": "S7system7S", "user": "U7user7U", "assistant": "A7assistant7A"}


@dataclass(frozen=True)
class Turns:
    """A chat template, as the texts around each message.

    Attributes:
        opening: the text before everything when there is no system message.
        system: the texts before and after a system message; None when the system message is put
            inside the first user turn.
        system_separator: the text between system and user message in a shared turn.
        user: the texts before and after a user message.
        assistant: the texts before and after an earlier reply.
        reply: the text at the end, which the model continues.
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
        """These turns in Ollama's template language."""
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


def read_turns(
    source: str, bos: str = "", eos: str = "", *, drop_bos: bool = False
) -> Turns | None:
    """The texts around the messages of a Jinja chat template.

    Args:
        source: the template.
        bos: the text of the bos token, which the template may write.
        eos: the text of the eos token.
        drop_bos: leave out the bos token at the beginning, for a runtime that adds it.

    Returns:
        The turns; None when no turns reproduce what the template renders for chats of one and two
        turns, with and without a system message.
    """
    # A fixed date, so that the result is the same on every day.
    template = ChatTemplate(
        source, Path(), {"bos_token": bos, "eos_token": eos}, today="01 Jan 2026"
    )

    def render(messages: Sequence[Message], ask: bool = True) -> str | None:
        try:
            text = template.render(messages, ask=ask)
        except TemplateError:
            return None
        return text.removeprefix(bos) if drop_bos else text

    one, two = render([_USER]), render([_USER, _REPLY, _USER])
    bare = render([_USER], ask=False)
    if one is None or two is None or bare is None:
        return None
    if not one.startswith(bare):
        # Some templates add the eos token where no reply is asked for.
        bare = bare.removesuffix(eos)
    if not one.startswith(bare):
        return None
    rendered = _Rendered(one, two, render([_SYSTEM, _USER]), one[len(bare) :])
    found = list(_cuts(rendered))
    if not found:
        return None
    # Several cuts give the same text; prefer one whose turns end alike.
    whole = [t for t in found if t.assistant[1] == t.user[1]]
    ended = [t for t in found if eos and t.assistant[1].endswith(eos)]
    return (whole or ended or found)[0]


_USER, _REPLY, _SYSTEM = (
    {"role": role, "content": _MARKS[role]} for role in ("user", "assistant", "system")
)


@dataclass(frozen=True)
class _Rendered:
    """What a template renders for chats whose messages are marks.

    Attributes:
        one: the text for a user message.
        two: the text for a user message, a reply, and the same user message again.
        with_system: the text for a system and a user message; None if the template refuses it.
        generation: the end of all these texts, which asks for a reply.
    """

    one: str
    two: str
    with_system: str | None
    generation: str

    def is_of(self, turns: Turns) -> bool:
        """Whether these turns render the same texts."""
        same = turns.render([_USER]) == self.one
        same = same and turns.render([_USER, _REPLY, _USER]) == self.two
        return same and (
            self.with_system is None or turns.render([_SYSTEM, _USER]) == self.with_system
        )


def _cuts(rendered: _Rendered) -> Iterator[Turns]:
    """Yield every way to cut the rendered texts into turns; some may not reproduce the texts."""
    one, two, generation = rendered.one, rendered.two, rendered.generation
    with_system = rendered.with_system
    mark, answer, lead = _MARKS["user"], _MARKS["assistant"], _MARKS["system"]
    if one.count(mark) != 1 or two.count(mark) != 2 or two.count(answer) != 1:
        return
    before, after = one.split(mark)
    after = after[: len(after) - len(generation)] if generation else after
    first, last = two.split(answer)
    if not first.startswith(before + mark + after):
        return
    assistant_before = first[len(before + mark + after) :]
    # The reply is followed by its turn's ending and then the second user turn.
    tail = last.split(mark)[0]
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
        if rendered.is_of(turns):
            yield turns


def _go(text: str) -> str:
    """Text as a Go template writes it literally."""
    return text.replace("{{", '{{ "{{" }}')
