"""The Modelfile that is written beside a GGUF file for Ollama.

Ollama 0.30 and newer run a GGUF's own chat template, in Jinja, unless the TEMPLATE in Ollama's
language can do as much (`capabilities`). Older versions have no Jinja: they recognise about twenty
well-known templates by edit distance, and otherwise give the model the bare prompt (ollama:
template/template.go). So the turns are read off the template (`turns`) and written in Ollama's
language if they reproduce the original. A model from Ollama's own store keeps the template and
settings that it had there.

Of a template with tools or thinking, only the turns are written. Newer versions of Ollama then
prefer the GGUF's own template, which has both; older ones offer neither, but can chat.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from convert.gguf.file import metadata
from convert.ollama import capabilities
from convert.ollama.modelfile import ROLES, Modelfile
from convert.ollama.settings import Settings
from convert.ollama.store import OllamaModel
from convert.ollama.turns import read_turns
from convert.tokenizers.to_gguf import read_tokenizer


@dataclass(frozen=True)
class Beside:
    """Names of further GGUFs beside the one that a Modelfile is for.

    Attributes:
        projectors: files that turn pictures or sound into tokens.
        draft: a small model for speculative decoding, if there is one.
    """

    projectors: tuple[str, ...] = ()
    draft: str | None = None

    @property
    def all(self) -> tuple[str, ...]:
        """All names."""
        return self.projectors if self.draft is None else (*self.projectors, self.draft)


def modelfile(
    gguf: Path,
    folder: Path | None = None,
    name: str | None = None,
    *,
    kept: OllamaModel | None = None,
    beside: Beside = Beside(),
) -> str:
    """The text of a Modelfile that gives ``gguf``, in the same folder, to Ollama.

    Args:
        gguf: the file, already written.
        folder: the model folder from which it was made, for its licence and end-of-reply tokens.
        name: the file's final name, if ``gguf`` is still at a temporary path.
        kept: the model in Ollama's store from which it was made. The lines are then those of that
            model, and neither ``gguf`` nor ``folder`` is read.
        beside: further files in the same folder that belong to the model.

    Returns:
        FROM, DRAFT, TEMPLATE, PARAMETER, SYSTEM, MESSAGE, LICENSE, RENDERER, PARSER and REQUIRES
        lines, as many as apply. Comments say what is left out, and why.

    Raises:
        UserError: when ``gguf`` is no GGUF file.
    """
    lines = Modelfile(name or Path(gguf).name)
    for projector in beside.projectors:
        lines.file("FROM", projector)
    if beside.draft is not None:
        lines.comment("DRAFT needs Ollama 0.30; remove the line for an older one.")
        lines.file("DRAFT", beside.draft)
    settings, comments = describe(Path(gguf), folder) if kept is None else (kept, _comments(kept))
    lines.comment(*comments)
    _say(lines, settings)
    return str(lines)


def describe(gguf: Path, folder: Path | None = None) -> tuple[Settings, list[str]]:
    """What the contents of a GGUF and of its folder say to Ollama, and remarks on it.

    Args:
        gguf, folder: as for `modelfile`.
    """
    keys = metadata(gguf)
    tokens: list[str] = keys.get("tokenizer.ggml.tokens", [])
    ids = {
        role: keys.get(f"tokenizer.ggml.{role}_token_id", -1)
        for role in ("bos", "eos", "eot", "eom")
    }
    # Some files have a number out of range, which means that there is no such token.
    roles = {role: tokens[token] for role, token in ids.items() if 0 <= token < len(tokens)}
    source, turns = str(keys.get("tokenizer.chat_template") or ""), None
    if source:
        # With add_bos_token, Ollama adds the bos token itself.
        turns = read_turns(
            source,
            roles.get("bos", ""),
            roles.get("eos", ""),
            drop_bos=bool(keys.get("tokenizer.ggml.add_bos_token")),
        )
    stops = [roles[role] for role in ("eos", "eot", "eom") if role in roles]
    if folder is not None:
        tokenizer = read_tokenizer(folder, len(tokens) or None, pre="default")
        stops += [tokenizer.tokens[end] for end in tokenizer.ends]
    licence = _licence(folder) if folder is not None else None
    settings = Settings(
        template=None if turns is None else turns.go(),
        params={"stop": list(dict.fromkeys(stops))} if stops else {},
        licenses=(licence,) if licence else (),
    )
    return settings, _remarks(source, settings)


def _remarks(source: str, settings: Settings) -> list[str]:
    """Remarks on the TEMPLATE that was read off a chat template in Jinja."""
    since = capabilities.JINJA_SINCE
    if not source:
        return ["The model has no chat template: it continues text."]
    if settings.template is None:
        return [
            "The model's chat template does more than Ollama's template language can say. Ollama",
            f"{since} and newer run it as it is; an older one uses one of its own if it recognises "
            "it;",
            "otherwise add a TEMPLATE line by hand.",
        ]
    if lost := beyond_turns(source):
        return [
            f"The model's chat template also has {' and '.join(lost)}. Ollama {since} and newer go "
            "by it, not by",
            "the TEMPLATE below, which is for older versions: they offer only chat.",
        ]
    return []


def _comments(kept: OllamaModel) -> list[str]:
    """Remarks on the settings of a model in Ollama's store."""
    found = [f"The other lines are those of {kept.name} in Ollama."]
    if kept.template is None and kept.renderer is None:
        found.append("It has no template of its own: Ollama goes by the GGUF's.")
    if kept.capabilities:
        found += [
            f"In Ollama, {kept.name} also names capabilities, for which a Modelfile has no line: "
            f"{', '.join(kept.capabilities)}.",
            "Ollama finds by itself what the GGUF, the projectors and the parser show.",
        ]
    return found


def _say(lines: Modelfile, settings: Settings) -> None:
    """Add the lines that say these settings."""
    for word, value in (
        ("RENDERER", settings.renderer),
        ("PARSER", settings.parser),
        ("REQUIRES", settings.requires),
    ):
        if value is not None:
            lines.add(f"{word} {value}")
    if settings.template is not None:
        lines.template(settings.template)
    for key, value in settings.params.items():
        for one in value if isinstance(value, list) else [value]:
            lines.parameter(key, one)
    if settings.system:
        lines.text("SYSTEM", settings.system)
    for role, content in settings.messages:
        if role in ROLES:
            lines.text(f"MESSAGE {role}", content)
        else:
            lines.comment("A message is left out: a Modelfile has none of its role.")
    for licence in settings.licenses:
        lines.text("LICENSE", licence)


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
    return lost if lost and describe(gguf, folder)[0].template is not None else []


def _licence(folder: Path) -> str | None:
    for path in sorted(Path(folder).iterdir()):
        if path.is_file() and re.fullmatch(r"(LICEN[CS]E|COPYING)(\.txt|\.md)?", path.name, re.I):
            return path.read_text(encoding="utf-8", errors="replace").strip()
    return None
