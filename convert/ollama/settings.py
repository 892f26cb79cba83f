"""What Ollama keeps of a model beside its weights: template, parameters, texts, names of its parts.

A Modelfile says it in lines, the store in layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is filed beside the weights.

    Attributes:
        template: in Ollama's own template language; None when Ollama uses the GGUF's template.
        params: the values of its PARAMETER lines: numbers, booleans, texts, or lists of texts.
        system: the system message, if it has one.
        licenses: every licence text.
        messages: (role, content) pairs that precede every conversation.
        renderer: the name of a prompt renderer built into Ollama, instead of a template.
        parser: the name of a reply parser built into Ollama.
        requires: the oldest version of Ollama that runs it.
        capabilities: what its configuration says it can do, beyond what Ollama finds in its files.
    """

    template: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    licenses: tuple[str, ...] = ()
    messages: tuple[tuple[str, str], ...] = ()
    renderer: str | None = None
    parser: str | None = None
    requires: str | None = None
    capabilities: tuple[str, ...] = ()
