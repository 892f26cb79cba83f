"""What Ollama keeps of a model beside its weights: template, parameters, texts, names of its parts.

A Modelfile says it in lines, the store in layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from convert.ollama.store import OllamaModel


@dataclass(frozen=True)
class Settings:
    """What is filed beside the weights.

    Attributes:
        template: in Ollama's template language; None for the GGUF's own template.
        params: the values of PARAMETER lines.
        system: the system message.
        licenses: licence texts.
        messages: (role, content) pairs that precede every conversation.
        renderer, parser, requires: as in Ollama's configuration of a model.
        capabilities: what the configuration names beyond what Ollama finds in the files.
    """

    template: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    licenses: Sequence[str] = ()
    messages: Sequence[tuple[str, str]] = ()
    renderer: str | None = None
    parser: str | None = None
    requires: str | None = None
    capabilities: Sequence[str] = ()


def settings_of(model: OllamaModel) -> Settings:
    """The settings of a model in the store."""
    return Settings(
        model.template, dict(model.params), model.system, model.licenses, model.messages,
        model.renderer, model.parser, model.requires, model.capabilities,
    )  # fmt: skip
