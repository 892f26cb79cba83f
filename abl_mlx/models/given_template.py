"""The chat template of ``--template``, which is used instead of the model's own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abl_mlx.records.evaluations import Template
from convert.base import text_file
from convert.base.errors import UserError
from convert.tokenizers.chat_template import ChatTemplate

CHATML, PLAIN = "chatml", "plain"

_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# A single message as it is; several messages with an empty line between them.
_PLAIN = "{{ messages | map(attribute='content') | join('\n\n') }}"

_BUNDLED = {CHATML: _CHATML, PLAIN: _PLAIN}

# The largest size of a template's file in bytes; the longest real ones have some 10,000 bytes.
_LONGEST = 4 << 20


@dataclass(frozen=True)
class GivenTemplate:
    """A chat template that the user chose.

    Attributes:
        name: as the user typed it: a file, ``chatml`` or ``plain``.
        source: the template in Jinja.
    """

    name: str
    source: str

    @property
    def completes(self) -> bool:
        """Whether the model is given text to complete instead of a conversation."""
        return self.name == PLAIN

    @property
    def ends(self) -> str:
        """The text that ends a reply, even if the model's files do not name it; "" for none."""
        return "<|im_end|>" if self.name == CHATML else ""

    def ready(self, values: Mapping[str, Any]) -> ChatTemplate:
        """The template, ready to be rendered.

        Args:
            values: variables of the template besides the messages, such as ``bos_token``.
        """
        file = Path(f"--template {self.name}" if self.name in _BUNDLED else self.name)
        return ChatTemplate(self.source, file, values, ends=self.ends)


def read(chosen: str | None) -> GivenTemplate | None:
    """The template that a value of ``--template`` names; None without one.

    Raises:
        UserError: when it names a file that cannot be read.
    """
    if chosen is None:
        return None
    if chosen in _BUNDLED:
        return GivenTemplate(chosen, _BUNDLED[chosen])
    path = Path(chosen).expanduser()
    if not path.is_file():
        raise UserError(
            f"--template {chosen}: there is no such file; give a Jinja file, or the word chatml or "
            "plain."
        )
    return GivenTemplate(chosen, text_file.read(path, longest=_LONGEST))


def record(given: GivenTemplate | None) -> Template | None:
    """The template's name and the hash of its source, for records."""
    if given is None:
        return None
    return Template(name=given.name, sha256=hashlib.sha256(given.source.encode()).hexdigest())


def entry(given: GivenTemplate | None) -> dict[str, dict[str, str]]:
    """The same as an entry of a JSON object; an empty object without a template."""
    found = record(given)
    return {} if found is None else {"template": found.json}


def note(given: GivenTemplate | None) -> str | None:
    """A note on figures that were measured with the template."""
    if given is None or not given.completes:
        return None
    return (
        "the model was given the prompts' text to complete, in no chat template (--template "
        "plain): its replies are completions"
    )
