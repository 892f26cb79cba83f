"""Which prompt format Ollama will use for a model, and what `ollama show` will list.

The rules are those of Ollama 0.33 (ollama: server/images.go, server/create.go, server/routes.go,
August 2026). Since 0.30 Ollama runs the GGUF's own chat template (Jinja) inside llama.cpp. A
TEMPLATE in Ollama's language comes before it, unless the GGUF's template offers more (tools,
thinking); a RENDERER or PARSER comes before both. Older versions have no Jinja: they use the
TEMPLATE, or one of about twenty of their own when the GGUF's template is nearly that one's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from convert.ollama import go_template

#: The version whose rules these are, and the first one that runs a GGUF's own chat template.
RULES_OF, JINJA_SINCE = "0.33", "0.30"

COMPLETION, TOOLS, INSERT, VISION = "completion", "tools", "insert", "vision"
AUDIO, EMBEDDING, THINKING = "audio", "embedding", "thinking"

#: Parsers that are built into Ollama -> what they understand in a reply.
PARSERS: dict[str, tuple[str, ...]] = {
    "qwen3": (TOOLS,),
    "qwen3-thinking": (TOOLS, THINKING),
    "qwen3.5": (TOOLS, THINKING),
    "ornith": (TOOLS, THINKING),
    "qwen3-coder": (TOOLS,),
    "qwen3-vl-instruct": (TOOLS,),
    "qwen3-vl-thinking": (TOOLS, THINKING),
    "ministral": (TOOLS,),
    "passthrough": (),
    "harmony": (TOOLS, THINKING),
    "cogito": (TOOLS, THINKING),
    "deepseek3": (TOOLS, THINKING),
    "olmo3": (TOOLS,),
    "olmo3-think": (THINKING,),
    "nemotron-3-nano": (TOOLS, THINKING),
    "nemotron-3.5-nano": (TOOLS, THINKING),
    "functiongemma": (TOOLS,),
    "glm-4.7": (TOOLS, THINKING),
    "gemma4": (TOOLS, THINKING),
    "gemma4-no-thinking": (TOOLS,),
    "glm-ocr": (TOOLS,),
    "lfm2": (TOOLS,),
    "lfm2-thinking": (TOOLS, THINKING),
    "laguna": (TOOLS, THINKING),
    "poolside-v1": (TOOLS, THINKING),
    "cohere": (TOOLS, THINKING),
    "glimmer": (TOOLS, THINKING),
}

#: Architectures for which `ollama create` sets a renderer and a parser by itself.
BUILT_IN = {
    "gemma4": ("gemma4", "gemma4"),
    "laguna": ("laguna", "laguna"),
    "nemotron_h": ("nemotron-3-nano", "nemotron-3-nano"),
    "nemotron_h_moe": ("nemotron-3-nano", "nemotron-3-nano"),
    "nemotron_h_omni": ("nemotron-3-nano", "nemotron-3-nano"),
}


@dataclass(frozen=True)
class Prompting:
    """What of a model in Ollama decides on its prompts.

    Attributes:
        chat_template: the GGUF's own template, in Jinja; empty if it has none.
        template: the TEMPLATE in Ollama's language, if there is one.
        renderer, parser: the names of Ollama's own ones, if the model names any.
        architecture: ``general.architecture`` of the GGUF.
    """

    chat_template: str = ""
    template: str | None = None
    renderer: str | None = None
    parser: str | None = None
    architecture: str = ""

    @property
    def by_chat_template(self) -> bool:
        """Whether Ollama 0.30 and newer run the GGUF's chat template."""
        if not self.chat_template or self.renderer or self.parser or self._harmony:
            return False
        return self.template is None or self._prefers_chat_template

    @property
    def _harmony(self) -> bool:
        text = self.template or ""
        known = self.architecture in ("gptoss", "gpt-oss")
        return known and "<|start|>" in text and "<|end|>" in text

    @property
    def _prefers_chat_template(self) -> bool:
        """Whether the GGUF's template comes before TEMPLATE: if it can do more."""
        own, other = _of_jinja(self.chat_template), _of_go(self.template)
        round_trip, other_round_trip = _jinja_round_trip(self.chat_template), self._round_trip
        if len(own) > len(other):
            return not other_round_trip or round_trip
        return set(own) == set(other) and TOOLS in own and round_trip and not other_round_trip

    @property
    def _round_trip(self) -> bool:
        """Whether TEMPLATE renders the calls of tools and their results."""
        text = self.template or ""
        if not {"tools", "toolcalls"} <= go_template.fields(text):
            return False
        return any(sign in text for sign in ('eq .Role "tool"', "tool_response", "TOOL_RESULTS"))


def listed(
    prompting: Prompting,
    keys: Mapping[str, Any],
    projectors: Iterable[Mapping[str, Any]] = (),
    config: Iterable[str] = (),
) -> tuple[str, ...]:
    """The capabilities that `ollama show` lists for a model, without order's meaning, sorted.

    Args:
        prompting: what decides on its prompts.
        keys: the metadata of its GGUF.
        projectors: the metadata of each of its projectors.
        config: capabilities that its configuration in Ollama's store names.
    """
    found = set(config)
    arch = prompting.architecture
    if prompting.by_chat_template:
        found |= set(_of_jinja(prompting.chat_template))
    elif prompting.template is not None:
        found |= set(_of_go(prompting.template))
    found.add(EMBEDDING if f"{arch}.pooling_type" in keys else COMPLETION)
    found |= {VISION} if f"{arch}.vision.block_count" in keys else set()
    found |= {AUDIO} if f"{arch}.audio.block_count" in keys else set()
    for projector in projectors:
        found.add(VISION)
        hears = any(key.endswith("has_audio_encoder") and projector[key] for key in projector)
        if hears and projector.get("clip.vision.projector_type") != "gemma3nv":
            found.add(AUDIO)
    found |= set(PARSERS.get(prompting.parser or "", ()))
    if arch in ("gptoss", "gpt-oss"):
        found.add(THINKING)
    if arch == "nemotron_h_omni":
        found.discard(AUDIO)
    return tuple(sorted(found))


def _of_jinja(source: str) -> tuple[str, ...]:
    found = []
    if "tools" in source or "tool_call" in source:
        found.append(TOOLS)
    splits = any(f"content.split({q}</think>{q})" in source for q in "'\"")
    kept = "reasoning_content" in source or "<SPECIAL_12>" in source
    if ("<think>" in source and "</think>" in source) or (splits and not kept):
        found.append(THINKING)
    return tuple(found)


def _of_go(template: str | None) -> tuple[str, ...]:
    if template is None:
        return ()
    names = go_template.fields(template)
    found = [what for name, what in (("tools", TOOLS), ("suffix", INSERT)) if name in names]
    if all(go_template.thinking_tags(template)):
        found.append(THINKING)
    return tuple(found)


def _jinja_round_trip(source: str) -> bool:
    """Whether a Jinja template renders the calls of tools and their results."""
    if TOOLS not in _of_jinja(source):
        return False
    if "tool_calls" not in source and "assistant_tool_call" not in source:
        return False
    roles = [f"role{end} == {q}tool{q}" for q in "'\"" for end in ("']", '"]')]
    roles += [f"message.role == {q}tool{q}" for q in "'\""]
    return any(s in source for s in ("tool_response", "tool_results", "ipython", *roles))
