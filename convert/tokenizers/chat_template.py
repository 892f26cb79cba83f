"""A chat template: the one place where messages become the text of a prompt.

Templates are written in Jinja by whoever publishes a model. They run in a process of their own,
bounded in time, memory and output (`convert.tokenizers.template_worker`), and whatever goes wrong
in one is told in a sentence that names the file and quotes the template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from convert.base import escape
from convert.base.errors import UserError
from convert.base.suffixes import is_gguf_name
from convert.tokenizers import template_process

Message = Mapping[str, str]

# A message by which a template shows what it does with one.
_PROBE = "Name seven rivers"
_SYSTEM = "Answer within eleven words"
_TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": "river_length",
        "description": "The length of a river",
        "parameters": {
            "type": "object",
            "properties": {"river": {"type": "string", "description": "Name of the river"}},
            "required": ["river"],
        },
    },
}

# What a template sees where there are no tools: None, as transformers has it. Some count them, or
# ask only whether there is such a name.
_NO_TOOLS: tuple[Mapping[str, Any], ...] = (
    {"tools": None, "documents": None},
    {},
    {"tools": [], "documents": []},
)


class TemplateError(UserError):
    """A chat template that does not render; its sentence names the file."""


class TemplateExcess(TemplateError):
    """Beyond a limit of time, memory or length, which no other form of the messages would mend."""


@dataclass(frozen=True)
class ChatTemplate:
    """One template, ready to render.

    Attributes:
        source: in Jinja.
        file: where it came from, for messages.
        values: what else it sees by name: bos_token, eos_token.
        today: what it is told when it asks for the date; None for the date of today.
        ends: the text at which a reply ends, where the model may not know it; "" for none.
    """

    source: str
    file: Path
    values: Mapping[str, Any] = field(default_factory=dict)
    today: str | None = None
    ends: str = ""

    def render(
        self,
        messages: Sequence[Message],
        values: Mapping[str, Any] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        ask: bool = True,
    ) -> str:
        """The prompt of these messages.

        Args:
            values: what the template sees by name for this prompt alone, such as enable_thinking.
            tools: functions that the model may call, in OpenAI's form.
            ask: end where the reply begins.

        Raises:
            TemplateError: a damaged template, one that raises, uses what is not there, renders
                nothing or leaves the messages out, and one beyond the limits.
        """
        text = self._text(messages, ask, parts=self._wants_parts, values=values, tools=tools)
        if not text.strip():
            raise self._error("renders nothing at all for this conversation")
        return text

    def check(self) -> None:
        """Try it on one message.

        Raises:
            TemplateError: as `render` does.
        """
        self._form  # noqa: B018 - found out once

    @cached_property
    def takes_system(self) -> bool:
        """Whether a system message before the user's comes through, and both are in the prompt.

        Raises:
            TemplateExcess: beyond a limit of time, memory or length.
        """
        probe = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _PROBE}]
        try:
            text = self._text(probe, True, parts=self._wants_parts).lower()
        except TemplateExcess:
            raise
        except TemplateError:
            return False
        return _SYSTEM.lower() in text and _PROBE.lower() in text

    @cached_property
    def takes_tools(self) -> bool:
        """Whether the description of a tool comes through, and what the user says with it.

        Raises:
            TemplateExcess: beyond a limit of time, memory or length.
        """
        probe = [{"role": "user", "content": _PROBE}]
        try:
            text = self._text(probe, True, parts=self._wants_parts, tools=[_TOOL])
        except TemplateExcess:
            raise
        except TemplateError:
            return False
        return _TOOL["function"]["name"] in text and _PROBE.lower() in text.lower()

    @property
    def _wants_parts(self) -> bool:
        """Whether content has to be a list of parts: the text as it is does not come through."""
        return self._form[0]

    @cached_property
    def _form(self) -> tuple[bool, Mapping[str, Any]]:
        """Whether content is given in parts, and how it is said that there are no tools.

        It is the first form in which a message comes through.
        """
        probe = [{"role": "user", "content": _PROBE}]
        failures: list[TemplateError] = []
        for absent in _NO_TOOLS:
            for parts in (False, True):
                try:
                    text = self._text(probe, True, parts=parts, absent=absent)
                except TemplateExcess:
                    raise
                except TemplateError as error:
                    failures.append(error)
                    continue
                if _PROBE.lower() in text.lower():
                    return parts, absent
                what = "leaves out what the user says" if text.strip() else "renders nothing at all"
                failures.append(self._error(what))
        raise failures[0]

    def _text(
        self,
        messages: Sequence[Message],
        ask: bool,
        *,
        parts: bool,
        values: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        absent: Mapping[str, Any] | None = None,
    ) -> str:
        given: list[dict[str, Any]] = [dict(message) for message in messages]
        if parts:
            for message in given:
                message["content"] = [{"type": "text", "text": message["content"]}]
        seen = {
            **(self._form[1] if absent is None else absent),
            **self.values,
            **(values or {}),
            "messages": given,
            **({"tools": [dict(tool) for tool in tools]} if tools else {}),
            "add_generation_prompt": ask,
        }
        try:
            answer = template_process.render(self.source, seen, self.today)
        except template_process.Ended as ended:
            what = "takes too long to render" if ended.late else "ends the process that renders it"
            raise self._error(what, TemplateExcess) from None
        if "text" in answer:
            try:
                answer["text"].encode()
            except UnicodeEncodeError:
                raise self._error("writes half of a character (a lone surrogate)") from None
            return answer["text"]
        kind, said = answer["kind"], _quoted(answer["said"])
        if kind == "excess":
            raise self._error(answer["said"], TemplateExcess)
        if kind == "syntax":
            raise self._error(f"is damaged ({said})")
        if kind == "refused":
            raise self._error(f"refuses the conversation with the words {said}")
        raise self._error(f"fails on the conversation ({said})")

    def _error(self, what: str, kind: type[TemplateError] = TemplateError) -> TemplateError:
        mend = (
            "take a newer GGUF of the model, or its folder with another chat_template.jinja"
            if is_gguf_name(self.file)
            else "replace it by the template of the model's publisher"
        )
        return kind(f"{self.file}: the chat template {what}: {mend}.")


def _quoted(text: str) -> str:
    """The template's own words, on one line and fit for a terminal."""
    return f'"{escape.shortened(" ".join(text.split()).rstrip("."), 300)}"'
