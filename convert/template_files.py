"""The chat templates that a model's folder holds, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from convert.errors import UserError

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
        templates["default"] = _text(jinja)
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = _text(path)
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


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _LONGEST:
            raise UserError(f"{path} is far too long for a chat template: fetch the file again.")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8: fetch the file again.") from None
    except OSError as error:
        raise UserError(f"{path} could not be read ({error.strerror}).") from None
