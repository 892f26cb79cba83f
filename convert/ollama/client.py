"""The Modelfile that is written beside a GGUF file for Ollama.

Most versions of Ollama do not run a GGUF's chat template, which is in Jinja. They recognise about
twenty well-known templates by edit distance, and otherwise give the model the bare prompt (ollama:
template/template.go); newer versions may hand the template to llama.cpp. So this module renders the
template with marked messages, reads off the text around them, and writes that text in Ollama's Go
template language if the result reproduces the original. A model from Ollama's own store keeps the
template and settings that it had there.

Of a template with tools or thinking, only the turns are written, so Ollama offers neither. Without
a TEMPLATE line it would be worse: a model whose template Ollama does not recognise could not chat
at all. The Modelfile and the record say what is lost, and how to make Ollama try its own way.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from convert.base.errors import OPTION, UserError
from convert.gguf.file import metadata
from convert.ollama.modelfile import ROLES, Modelfile
from convert.ollama.store import OllamaModel, contains, parse_name
from convert.tokenizers.chat_template import ChatTemplate, TemplateError
from convert.tokenizers.to_gguf import read_tokenizer

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


def modelfile(
    gguf: Path,
    folder: Path | None = None,
    name: str | None = None,
    *,
    kept: OllamaModel | None = None,
) -> str:
    """The text of a Modelfile that gives ``gguf``, in the same folder, to Ollama.

    Args:
        gguf: the file, already written.
        folder: the model folder from which it was made, for its licence and end-of-reply tokens.
        name: the file's final name, if ``gguf`` is still at a temporary path.
        kept: the model in Ollama's store from which it was made. The lines are then those of that
            model, and neither ``gguf`` nor ``folder`` is read.

    Returns:
        FROM, TEMPLATE, PARAMETER, SYSTEM, MESSAGE, LICENSE, RENDERER, PARSER and REQUIRES lines,
        as many as apply. Comments say what is left out, and why.

    Raises:
        UserError: when ``gguf`` is no GGUF file.
    """
    file = name or Path(gguf).name
    return _keep(file, kept) if kept is not None else _describe(file, Path(gguf), folder)


def _describe(file: str, gguf: Path, folder: Path | None) -> str:
    """A Modelfile from the contents of the GGUF and of the folder."""
    keys = metadata(gguf)
    tokens: list[str] = keys.get("tokenizer.ggml.tokens", [])
    ids = {
        role: keys.get(f"tokenizer.ggml.{role}_token_id", -1)
        for role in ("bos", "eos", "eot", "eom")
    }
    # Some files have a number out of range, which means that there is no such token.
    roles = {role: tokens[token] for role, token in ids.items() if 0 <= token < len(tokens)}
    lines = Modelfile(file)
    source = keys.get("tokenizer.chat_template")
    turns = None
    if source:
        # With add_bos_token, Ollama adds the bos token itself.
        turns = read_turns(
            source,
            roles.get("bos", ""),
            roles.get("eos", ""),
            drop_bos=bool(keys.get("tokenizer.ggml.add_bos_token")),
        )
    if turns is not None:
        if lost := beyond_turns(str(source)):
            lines.comment(
                f"The model's chat template also has {' and '.join(lost)}, which the TEMPLATE "
                "below has not, so that",
                "Ollama does not offer them. Without the TEMPLATE line Ollama goes by the GGUF's "
                "own template",
                "where it recognises that; where it does not, the model is given the bare prompt.",
            )
        lines.template(turns.go())
    elif source:
        lines.comment(
            "The model's chat template does more than Ollama's template language can say. Ollama",
            "uses one of its own if it recognises it; otherwise add a TEMPLATE line by hand.",
        )
    else:
        lines.comment("The model has no chat template: it continues text.")
    stops = [roles[role] for role in ("eos", "eot", "eom") if role in roles]
    if folder is not None:
        tokenizer = read_tokenizer(folder, len(tokens) or None, pre="default")
        stops += [tokenizer.tokens[end] for end in tokenizer.ends]
    for stop in dict.fromkeys(stops):
        lines.parameter("stop", stop)
    licence = _licence(folder) if folder is not None else None
    if licence:
        lines.text("LICENSE", licence)
    return str(lines)


#: What a chat template may do besides turns -> a pattern that shows it in the template.
_BEYOND = {
    "tools": re.compile(r"\b(?:tools|tool_calls?|functions)\b"),
    "thinking": re.compile(
        r"\b(?:enable_thinking|thinking|reasoning_content|reasoning_effort|reasoning)\b|<think>"
    ),
}


def beyond_turns(source: str) -> list[str]:
    """What a chat template in Jinja does besides turns: a list of "tools" and "thinking"."""
    code = _COMMENT.sub("", source)
    return [what for what, sign in _BEYOND.items() if sign.search(code)]


_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)


def lost_of_template(gguf: Path, folder: Path | None = None) -> list[str]:
    """What the model's chat template does and the Modelfile's TEMPLATE does not, as `beyond_turns`.

    Args:
        gguf, folder: as for `modelfile`.
    """
    lost = beyond_turns(str(metadata(gguf).get("tokenizer.chat_template") or ""))
    if not lost or "\nTEMPLATE " not in _describe(gguf.name, gguf, folder):
        return []
    return lost


def _keep(file: str, kept: OllamaModel) -> str:
    """A Modelfile with the settings of a model in Ollama's store."""
    lines = Modelfile(file)
    lines.comment(f"The other lines are those of {kept.name} in Ollama.")
    for projector in kept.projectors:
        lines.comment(
            f"{kept.name} also takes pictures or sound. To let this model do so, add the line",
            f"FROM {projector}",
        )
    if kept.draft is not None:
        lines.comment(f"The draft model of {kept.name} is left out: it guesses for the unedited.")
    for word, value in (
        ("RENDERER", kept.renderer), ("PARSER", kept.parser), ("REQUIRES", kept.requires)
    ):  # fmt: skip
        if value is not None:
            lines.add(f"{word} {value}")
    if kept.template is not None:
        lines.template(kept.template)
    elif kept.renderer is None:
        lines.comment("It has no template of its own: Ollama goes by the GGUF's.")
    for key, value in kept.params.items():
        for one in value if isinstance(value, list) else [value]:
            lines.parameter(key, one)
    if kept.system:
        lines.text("SYSTEM", kept.system)
    for role, content in kept.messages:
        if role in ROLES:
            lines.text(f"MESSAGE {role}", content)
        else:
            lines.comment("A message is left out: a Modelfile has none of its role.")
    for licence in kept.licenses:
        lines.text("LICENSE", licence)
    return str(lines)


def check_create(name: str) -> None:
    """Check, before any long work, that `ollama create` can succeed.

    Raises:
        UserError: when Ollama would not accept the name, it has a model of this name already, or
            there is no `ollama` program.
    """
    wanted = parse_name(name)
    if contains(wanted):
        raise UserError(
            f"{OPTION} {name}: Ollama has a model {wanted} already; give another name, or "
            f"remove that one with `ollama rm {shlex.quote(name)}`.",
            option="ollama_create",
        )
    if shutil.which("ollama") is None:
        raise UserError(
            f"{OPTION} {name}: there is no program `ollama` here; install Ollama "
            "(https://ollama.com), or leave the flag out and use the Modelfile where it is.",
            option="ollama_create",
        )


def ollama_create(name: str, modelfile: Path) -> None:
    """Run `ollama create NAME -f MODELFILE`, with its output on standard error.

    Args:
        name: the new model's name in Ollama.
        modelfile: the file, beside the GGUF that it names.

    Raises:
        UserError: when there is no such file or program, or the program fails. The message has the
            program's last line and the command to repeat by hand. The written files stay.
    """
    parse_name(name)
    path = Path(modelfile).absolute()
    if not path.is_file():
        raise UserError(f"there is no {modelfile} to make {name} of: was the GGUF split?")
    arguments = ["create", name, "-f", str(path)]
    by_hand = shlex.join(["ollama", *arguments])
    program = shutil.which("ollama")
    if program is None:
        raise UserError(
            f"there is no program `ollama` here to make {name}: run `{by_hand}` where Ollama is "
            "installed."
        )
    last = ""
    try:
        with subprocess.Popen(
            [program, *arguments],
            cwd=path.parent,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", file=sys.stderr, flush=True)
                last = _TERMINAL.sub("", line).strip() or last
    except OSError as error:
        raise UserError(
            f"{program} could not be started ({error.strerror}): run `{by_hand}` by hand."
        ) from None
    if process.returncode != 0:
        why = last.removeprefix("Error: ").rstrip(".") or f"exit status {process.returncode}"
        raise UserError(f"ollama could not make {name} ({why}): mend that and run `{by_hand}`.")


# Escape sequences with which Ollama moves and hides the cursor while it shows its progress.
_TERMINAL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[@-_]")


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


def _licence(folder: Path) -> str | None:
    for path in sorted(Path(folder).iterdir()):
        if path.is_file() and re.fullmatch(r"(LICEN[CS]E|COPYING)(\.txt|\.md)?", path.name, re.I):
            return path.read_text(encoding="utf-8", errors="replace").strip()
    return None
