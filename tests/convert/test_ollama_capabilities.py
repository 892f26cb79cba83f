"""What Ollama reads from templates and files, by the rules of its version 0.33.

The expected names and tags are what Go's text/template and Ollama's own search print for these
templates.
"""

from __future__ import annotations

from typing import Any

import pytest

from convert.ollama import go_template
from convert.ollama.capabilities import Prompting, listed

NESTED = (
    '{{- range $i, $m := .Messages }}{{ if eq .Role "assistant" }}{{ if .Thinking -}}\n'
    "<think>{{ .Thinking }}</think>\n{{ end -}}{{ .Content }}"
    "{{ range .ToolCalls }}<tool_call>{{ .Function.Name }}</tool_call>{{ end }}"
    "{{ else if $m.Thinking }}x{{ end }}{{ end }}\n"
)
TEXTS = (
    "{{ if $.Tools }}tools {{ range $.Tools }}{{ . }}{{ end }}{{ end }}"
    '{{ range .Messages }}<a>{{ "Thinking {{ .Tools }}" }}{{ .Thinking }}{{/* .Suffix */}}</a>'
    "{{ end }}{{ with .Prompt }}{{ `}} .Suffix` }}{{ end }}\n"
)
OTHER_RANGE = (
    "{{ range .Messages }}{{ .Thinking }}</t>{{ end }}"
    "{{ range .Other }}<t>{{ .Thinking }}</t>{{ end }}\n"
)
CONDITION = (
    "{{ range .Messages }}{{ if (and .Thinking (gt 1 0)) }}<think>\n{{ .Thinking }}\n</think>"
    "{{ end }}{{ .Content }} end{{ else }}<none>{{ .Thinking }}</none>{{ end }}\n"
)


@pytest.mark.parametrize(
    ("template", "names", "tags"),
    [
        (
            NESTED,
            "content function m messages name role thinking toolcalls",
            ("<think>", "</think>"),
        ),
        (TEXTS, "messages prompt thinking tools", ("<a>", "</a>")),
        (
            "{{ range $.Messages }}<t>{{ .Thinking }}</t>{{ end }}{{ .Suffix }}\n",
            "messages suffix thinking",
            ("", ""),
        ),
        (OTHER_RANGE, "messages other thinking", ("", "</t>")),
        (CONDITION, "content messages thinking", ("<none>", "</none>")),
        ("{{ .Prompt", "", ("", "")),
        ("", "", ("", "")),
    ],
)
def test_templates_are_read_as_go_reads_them(
    template: str, names: str, tags: tuple[str, str]
) -> None:
    assert go_template.fields(template) - {"i"} == set(names.split())
    assert go_template.thinking_tags(template) == tags


TURNS = "{{ range .Messages }}{{ .Role }}: {{ .Content }}\n{{ end }}"
TOOLS_TEMPLATE = "{{ if .Tools }}{{ .Tools }}{{ end }}" + NESTED
JINJA_TOOLS = "{% if tools %}{{ tools }}{% endif %}{% for m in messages %}{{ m.tool_calls }}"
JINJA_BOTH = (
    JINJA_TOOLS + "{% if m['role'] == 'tool' %}{% endif %}{% endfor %}{{ '<think></think>' }}"
)


@pytest.mark.parametrize(
    ("given", "by_jinja", "shown"),
    [
        # No template of either kind, and one of each alone.
        ({}, False, "completion"),
        ({"template": TURNS}, False, "completion"),
        ({"chat_template": "{{ messages }}"}, True, "completion"),
        ({"chat_template": JINJA_BOTH}, True, "completion thinking tools"),
        # Turns alone do not hide what the GGUF's own template offers more.
        ({"chat_template": JINJA_BOTH, "template": TURNS}, True, "completion thinking tools"),
        ({"chat_template": JINJA_TOOLS, "template": TURNS}, True, "completion tools"),
        # A template as able as the GGUF's comes first.
        ({"chat_template": "{{ messages }}", "template": TURNS}, False, "completion"),
        (
            {"chat_template": JINJA_TOOLS, "template": TOOLS_TEMPLATE},
            False,
            "completion thinking tools",
        ),
        # A renderer or parser comes before both, and the parser says what it understands.
        (
            {"chat_template": JINJA_BOTH, "template": TURNS, "parser": "qwen3-coder"},
            False,
            "completion tools",
        ),
        ({"chat_template": JINJA_BOTH, "renderer": "qwen3.5"}, False, "completion"),
        ({"parser": "unheard-of"}, False, "completion"),
        # gpt-oss with its own tags in TEMPLATE.
        (
            {
                "chat_template": JINJA_BOTH,
                "architecture": "gpt-oss",
                "template": "<|start|>{{ .Prompt }}<|end|>",
            },
            False,
            "completion thinking",
        ),
        ({"template": "{{ .Prompt }}{{ .Suffix }}"}, False, "completion insert"),
    ],
)
def test_what_ollama_lists(given: dict[str, str], by_jinja: bool, shown: str) -> None:
    prompting = Prompting(**given)
    assert prompting.by_chat_template is by_jinja
    assert listed(prompting, {}) == tuple(shown.split())


def test_files_and_configuration_add_to_it() -> None:
    sees: dict[str, Any] = {"general.architecture": "clip", "clip.has_vision_encoder": True}
    hears = {**sees, "clip.has_audio_encoder": True}
    llama = Prompting(architecture="llama")
    assert listed(llama, {}, [sees]) == ("completion", "vision")
    assert listed(llama, {}, [hears]) == ("audio", "completion", "vision")
    mute = {**hears, "clip.vision.projector_type": "gemma3nv"}
    assert listed(llama, {}, [mute]) == ("completion", "vision")
    assert listed(llama, {"llama.vision.block_count": 3}) == ("completion", "vision")
    assert listed(llama, {"llama.pooling_type": 1}) == ("embedding",)
    assert listed(llama, {}, config=["tools"]) == ("completion", "tools")
