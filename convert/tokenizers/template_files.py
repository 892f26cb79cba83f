"""The chat templates that a model's folder holds, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from convert.base import text_file
from convert.base.errors import UserError

# Bytes of one file; the longest templates have some tens of thousands.
_LONGEST = 4 << 20


def read(
    folder: Path, config: Mapping[str, Any], older: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Name -> Jinja source; the one for plain conversations is called "default".

    A file of its own goes before what tokenizer_config.json says, as in transformers.

    Args:
        config: tokenizer_config.json, whose chat_template is text or a list of named ones.
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
    return templates


def _named(path: Path, stored: Any) -> Iterator[tuple[str, str]]:
    if stored is None:
        return
    if isinstance(stored, str):
        yield "default", stored
        return
    for entry in stored if isinstance(stored, list) else [None]:
        known = entry if isinstance(entry, dict) else {}
        name, source = known.get("name"), known.get("template")
        if not isinstance(name, str) or not isinstance(source, str):
            raise UserError(
                f"{path}: chat_template is neither text nor a list of a name and a template each: "
                "fetch the file again."
            )
        yield name, source
