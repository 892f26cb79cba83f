"""The chat templates that a model's folder holds, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from convert.base import json_text, text_file
from convert.base.errors import UserError
from convert.base.schema import OBJECT

# Bytes of one file; the longest templates have some tens of thousands.
_LONGEST = 4 << 20


#: Templates by these names are for conversations with tools.
TOOLS = ("tool_use", "tool", "tools")

#: Templates by these names are for conversations with tools or with documents.
SPECIAL = (*TOOLS, "rag")


def plain(templates: Mapping[str, str]) -> str | None:
    """The name of the template for plain conversations; None where none is known to be it.

    It is the one called "default", or else the only one that is not for tools or documents.
    """
    others = [name for name in templates if name not in SPECIAL]
    if "default" in templates:
        return "default"
    return others[0] if len(others) == 1 else None


def for_tools(templates: Mapping[str, str]) -> str | None:
    """The name of the template for conversations with tools: its own, or that for plain ones."""
    return next((name for name in TOOLS if name in templates), plain(templates))


def of_folder(folder: Path) -> dict[str, str]:
    """`read`, with the files that name templates.

    Raises:
        UserError: a template that is no text, a file that is no JSON object.
    """
    config, older = (_object(folder / name) for name in _FILES)
    return read(folder, config, older)


def file_of(folder: Path, name: str) -> Path:
    """Where the template of this name stands."""
    own = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
    if (folder / own).is_file():
        return folder / own
    config, older = (folder / file for file in _FILES)
    return older if name in dict(_named(older, _object(older).get("chat_template"))) else config


_FILES = ("tokenizer_config.json", "chat_template.json")


def _object(path: Path) -> dict[str, Any]:
    try:
        return dict(json_text.read(path, OBJECT, infinite=True))
    except FileNotFoundError:
        return {}


def read(
    folder: Path, config: Mapping[str, Any], older: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Name -> Jinja source; the one for plain conversations is called "default".

    A file of its own goes before what tokenizer_config.json says, as in transformers.

    Args:
        config: tokenizer_config.json, whose chat_template is text, a list of named ones, or an
            object of them.
        older: chat_template.json, as processors of pictures have it.

    Raises:
        UserError: a template that is no text.
    """
    templates = dict(_named(folder / "tokenizer_config.json", config.get("chat_template")))
    templates |= dict(_named(folder / "chat_template.json", (older or {}).get("chat_template")))
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        templates["default"] = text_file.read(jinja, longest=_LONGEST)
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = text_file.read(path, longest=_LONGEST)
    return said(templates)


def said(templates: Mapping[str, str]) -> dict[str, str]:
    """Without those of nothing but white space, which llama.cpp takes for none, too."""
    return {name: source for name, source in templates.items() if source.strip()}


def _named(path: Path, stored: Any) -> Iterator[tuple[str, str]]:
    if stored is None:
        return
    if isinstance(stored, str):
        yield "default", stored
        return
    if isinstance(stored, Mapping):
        stored = [{"name": name, "template": source} for name, source in stored.items()]
    for entry in stored if isinstance(stored, list) else [None]:
        known = entry if isinstance(entry, dict) else {}
        name, source = known.get("name"), known.get("template")
        if not isinstance(name, str) or not isinstance(source, str):
            raise UserError(
                f"{path}: chat_template is neither text nor a list of a name and a template each: "
                "fetch the file again."
            )
        yield name, source
