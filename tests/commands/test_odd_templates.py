"""Chat templates and tokenizer files as models have them: each runs, or is refused in a sentence.

Everything is tried with a folder and with a GGUF, in MLX and in llama.cpp. Templates that run write
the demo model's own prompts, so that nothing may differ by a token.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from abl_mlx import demo
from abl_mlx.behaviour import evaluate
from abl_mlx.outputs.model_file import find_model
from convert.gguf.file import GgufSource, metadata
from convert.gguf.rewrite import rewrite
from convert.tokenizers.template_files import plain
from tests.support import tiny
from tests.support.command import abl_mlx, fails

Change = Callable[[Path], Any]

OWN = (demo.MODEL_PATH / "chat_template.jinja").read_text()
RAISES = "{{ raise_exception('Not you again.') }}"
FEW = ("--limit", 4, "--max-tokens", 8)


def config(**values: Any) -> Change:
    """Other values in tokenizer_config.json; a value of ... removes one."""

    def change(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        merged = {**json.loads(path.read_text()), **values}
        path.write_text(
            json.dumps({key: value for key, value in merged.items() if value is not ...})
        )

    return change


def stored(template: Any) -> Change:
    """A chat_template in tokenizer_config.json alone."""

    def change(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink()
        config(chat_template=template)(folder)

    return change


def jinja(source: str, **values: Any) -> Change:
    """A chat_template.jinja, and other values in tokenizer_config.json."""

    def change(folder: Path) -> None:
        (folder / "chat_template.jinja").write_text(source)
        config(chat_template=..., **values)(folder)

    return change


def files(templates: dict[str, str]) -> Change:
    """Templates in files of the folder, and nowhere else."""

    def change(folder: Path) -> None:
        stored(...)(folder)
        for name, source in templates.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(source)

    return change


def named(**templates: str) -> list[dict[str, str]]:
    return [{"name": name, "template": source} for name, source in templates.items()]


MORE = "additional_chat_templates"

#: What is asked of the messages before they are written.
ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
    "{% endfor %}"
)
USER_FIRST = (
    "{% if messages[0]['role'] != 'user' %}"
    "{{ raise_exception('Conversation must start with a user prompt') }}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
)
BUILTIN = (
    "{%- if not tools is defined %}{%- set tools = none %}{%- endif %}"
    "{%- if builtin_tools is defined or tools is not none %}{{- 'Environment: ipython\n' }}"
    "{%- endif %}{%- if not date_string is defined %}{%- set date_string = "
    "strftime_now('%d %b %Y') %}{%- endif %}{% if documents %}{{ documents }}{% endif %}"
)
PARTS = OWN.replace("message['content']", "message['content'][0]['text']")

RUN: dict[str, Change] = {
    "no system role": jinja(NO_SYSTEM + OWN),
    "alternating": jinja(ALTERNATE + OWN),
    "user first": jinja(USER_FIRST + OWN),
    "extra tokens as a list": config(extra_special_tokens=["<|im_start|>"]),
    "extra tokens as objects": config(
        extra_special_tokens=[{"content": "<|im_start|>", "special": True}]
    ),
    "extra tokens as text": config(extra_special_tokens="<|im_start|>"),
    "extra tokens by name": config(extra_special_tokens={"turn_token": "<|im_start|>"}),
    "no extra tokens": config(extra_special_tokens=[]),
    "additional tokens as objects": config(
        additional_special_tokens=[{"content": "<|im_start|>", "special": True}]
    ),
    "named": stored(named(default=OWN, tool_use=RAISES)),
    "named by an object": stored({"default": OWN, "tool_use": RAISES}),
    "named without default": stored(named(rag=RAISES, chat=OWN, tool_use=RAISES)),
    "in files": files({"chat_template.jinja": OWN, f"{MORE}/tool_use.jinja": RAISES}),
    "in files without default": files(
        {f"{MORE}/chat.jinja": OWN, f"{MORE}/tool_use.jinja": RAISES}
    ),
    "in chat_template.json": files({"chat_template.json": json.dumps({"chat_template": OWN})}),
    "bos joined to text": jinja("{{ bos_token + '' }}" + OWN, bos_token=...),
    "bos of null": jinja("{{ bos_token }}" + OWN, bos_token=None),
    "end of null": config(eos_token=None),
    "no tools": jinja("{% if tools is defined and tools %}{{ tools | tojson }}{% endif %}" + OWN),
    "tools counted": jinja("{% if tools | length > 0 %}{{ tools }}{% endif %}" + OWN),
    "tools defined": jinja("{% if tools is defined %}{{ tools | length }}{% endif %}" + OWN),
    "built-in tools": jinja(BUILTIN + OWN),
    "generation": jinja(
        "{% for message in messages %}{% generation %}{% endgeneration %}"
        + OWN.removeprefix("{% for message in messages %}")
    ),
    "parts": jinja(PARTS),
    "parts or nothing": jinja(
        "{% if messages[0].content is string %}{{ raise_exception('Parts.') }}{% endif %}" + PARTS
    ),
}  # fmt: skip

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"

REFUSED: dict[str, tuple[Change, str]] = {
    "raises": (jinja(RAISES), 'refuses the conversation with the words "Not you again"'),
    "endless": (jinja(ENDLESS), "takes too long to render"),
    "recursive": (jinja("{% macro a(x) %}{{ a(x) }}{% endmacro %}{{ a(1) }}"), "without end"),
    "long": (
        jinja(OWN + "{% for i in range(99999) %}{{ 'xxxxxxxxxx' }}{% endfor %}"),
        "writes more than 65,536 characters",
    ),
    "large": (
        jinja(
            "{% set ns = namespace(x=['a']) %}{% for i in range(40) %}"
            "{% set ns.x = ns.x + ns.x %}{% endfor %}" + OWN
        ),
        "makes more than 1,048,576 characters, items or bits",
    ),
    "for tools": (stored(named(tool_use=OWN)), "'tool_use' and none named default"),
    "two": (stored(named(one=OWN, two=OWN)), "'one', 'two' and none named default"),
    "empty": (stored(" \n"), "has no chat template"),
}


def made(place: Path, change: Change) -> tuple[Path, Path]:
    """The changed demo model, as a folder and as a GGUF made of it."""
    folder, gguf = place / "model", place / "model.gguf"
    shutil.copytree(demo.MODEL_PATH, folder)
    change(folder)
    abl_mlx("convert", folder, gguf)
    return folder, gguf


@pytest.mark.parametrize("name", RUN)
def test_what_runs(name: str, tmp_path: Path) -> None:
    folder, gguf = made(tmp_path, RUN[name])
    wanted = find_model("demo").load().encode("Name two rivers.")
    for model in (folder, gguf):
        assert find_model(str(model)).load().encode("Name two rivers.") == wanted
    assert abl_mlx("inspect", folder)["template_tail"] == 5
    if evaluate.llamacpp_is_there():
        verdicts = abl_mlx("eval", gguf, *FEW)["verdicts"]
        assert verdicts == {"harmful": "RRRR", "harmless": "AAAA"}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, tmp_path: Path) -> None:
    change, words = REFUSED[name]
    folder, gguf = made(tmp_path, change)
    for command in (["eval", folder], ["eval", gguf], ["eval", gguf, "--runtime", "mlx-lm"]):
        said = fails(*command)
        assert words in said, command
        assert str(command[1]) in said, command
    assert words in abl_mlx("inspect", folder)["template_fault"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (stored([5]), "chat_template is neither text nor a list"),
        (stored(5), "chat_template is neither text nor a list"),
        (config(extra_special_tokens=5), "extra_special_tokens is neither a list of tokens nor"),
        (config(extra_special_tokens=[[]]), "extra_special_tokens is neither a list of tokens"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("{"), "not valid JSON"),
    ],
)
def test_what_is_wrong_with_a_file(change: Change, words: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(demo.MODEL_PATH, folder)
    change(folder)
    for command in (["eval", folder], ["measure", folder, "-o", tmp_path / "r.safetensors"]):
        said = fails(*command)
        assert words in said
        assert str(folder / "tokenizer_config.json") in said


def test_all_templates_are_kept_in_both_directions(tmp_path: Path) -> None:
    """The one for plain conversations is also where llama.cpp and mlx-lm look for it."""
    change = stored(named(chat=OWN, tool_use="{{ tools }}", rag="{{ documents }}"))
    _, gguf = made(tmp_path, change)
    keys = metadata(gguf)
    assert keys["tokenizer.chat_template"] == keys["tokenizer.chat_template.chat"] == OWN
    assert keys["tokenizer.chat_templates"] == ["chat", "rag", "tool_use"]
    assert keys["tokenizer.chat_template.rag"] == "{{ documents }}"
    abl_mlx("convert", gguf, tmp_path / "back")
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == OWN
    kept = {path.stem: path.read_text() for path in (tmp_path / "back" / MORE).iterdir()}
    assert kept == {"chat": OWN, "tool_use": "{{ tools }}", "rag": "{{ documents }}"}


#: Metadata of a GGUF that no conversion of ours writes; None removes a key.
KEYS: dict[str, dict[str, Any]] = {
    "for tools too": {
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": RAISES,
    },
    "only named": {"tokenizer.chat_template": None, "tokenizer.chat_template.chat": OWN},
    "no bos, no end": {
        "tokenizer.ggml.bos_token_id": None,
        "tokenizer.chat_template": "{{ bos_token + '' }}" + OWN,
    },
}


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model."""
    path = tmp_path_factory.mktemp("demo") / "demo.gguf"
    abl_mlx("convert", "demo", path)
    return path


@pytest.mark.parametrize("name", KEYS)
def test_ggufs_of_others(name: str, gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    with GgufSource(gguf) as source:
        rewrite(source, path, metadata=KEYS[name])
    for runtime in ("mlx-lm", *(["llama.cpp"] if evaluate.llamacpp_is_there() else [])):
        verdicts = abl_mlx("eval", path, *FEW, "--runtime", runtime)["verdicts"]
        assert verdicts == {"harmful": "RRRR", "harmless": "AAAA"}


def test_a_gguf_with_a_template_that_is_no_text(gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    with GgufSource(gguf) as source:
        rewrite(source, path, metadata={"tokenizer.chat_template.tool_use": 5})
    for command in (["eval", path], ["convert", path, tmp_path / "out"]):
        assert f"{path}: tokenizer.chat_template.tool_use is 5" in fails(*command)
    assert not (tmp_path / "out").exists()


def test_which_template_is_for_plain_conversations() -> None:
    assert plain({}) is None
    assert plain({"a": "", "default": ""}) == "default"
    assert plain({"a": "", "tool_use": "", "rag": ""}) == "a"
    assert plain({"a": "", "b": ""}) is None
    assert plain({"tool_use": ""}) is None


@pytest.mark.parametrize("kind", ["spm", "spm-gemma"])
def test_a_tokenizer_model_alone(kind: str, tmp_path: Path) -> None:
    """SentencePiece's own file, without the tokenizer.json that Hugging Face makes of it."""
    arch = "llama" if kind == "spm" else "gemma2"
    folder = tiny.write_model(tmp_path / "model", arch, "float32", kind)
    wanted = find_model(str(folder)).load().encode("Hello, rain 12\n x")
    (folder / "tokenizer.json").unlink()
    assert find_model(str(folder)).load().encode("Hello, rain 12\n x") == wanted
    abl_mlx("convert", folder, tmp_path / "model.gguf", "--quantize", "F32")
    found = find_model(str(tmp_path / "model.gguf")).load()
    assert found.encode("Hello, rain 12\n x") == wanted
    assert abl_mlx("eval", folder, "--limit", 2, "--max-tokens", 2)["runtime"] == "mlx-lm"


@pytest.mark.parametrize("name", ["raises", "recursive", "for tools", "empty"])
def test_every_command_that_asks_says_so(name: str, tmp_path: Path) -> None:
    change, words = REFUSED[name]
    for model in made(tmp_path, change):
        for command in (
            ["measure", model, "-o", tmp_path / "r.safetensors"],
            ["run", model, "-o", tmp_path / f"out{model.suffix}"],
            ["show", model, "Hi"],
            ["chat", model],
        ):
            said = fails(*command)
            assert words in said, command
            assert str(model) in said, command
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.gguf"]
