"""Chat templates: as transformers renders them, within limits, with sentences for faults."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from abl_mlx.inputs import sources
from abl_mlx.inputs.sets import Prompt
from abl_mlx.models import prompt_tokens
from abl_mlx.models.chat_model import load_tokenizer
from convert.base.errors import UserError
from convert.tokenizers import template_files, template_process, template_worker
from convert.tokenizers.chat_template import ChatTemplate, TemplateError
from tests.support.command import abl_mlx, fails

USER = [{"role": "user", "content": "Name two  rivers?\n"}]
TURNS = [*USER, {"role": "assistant", "content": "Rhine, Po."}, {"role": "user", "content": "é 🙂"}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *TURNS]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

#: Constructs that published templates are made of, one or two in each.
FEATURES = {
    "turns": CHATML,
    "bos": "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}"
    "{% endfor %}",
    "whitespace": "{%- for m in messages -%}\n  {{- m['content'] -}}\n{%- endfor -%}\n",
    "blocks are trimmed": "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n"
    "    {% endif %}\n{% endfor %}\n",
    "system first": "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = messages[0]['content'] %}{% else %}{% set rest = messages %}"
    "{% set system = 'You help.' %}{% endif %}{{ system }}{% for m in rest %}{{ m.content }}"
    "{{ eos_token if loop.last else '' }}{% endfor %}",
    "alternating": "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles alternate') }}{% endif %}{{ m.content }}{% endfor %}",
    "namespace": "{% set ns = namespace(found=false, n=0) %}{% for m in messages %}"
    "{% set ns.n = ns.n + 1 %}{% if m.role == 'user' %}{% set ns.found = true %}{% endif %}"
    "{{ m.content }}{% endfor %}{{ ns.n }}{{ ns.found }}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{{ m.content }}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "macro": "{% macro turn(role, text) %}<{{ role }}>{{ text }}</{{ role }}>{% endmacro %}"
    "{% for m in messages %}{{ turn(m.role, m.content) }}{% endfor %}",
    "date": "{{ strftime_now('%d %b %Y') }}{{ messages[-1].content }}",
    "json": "{{ messages[-1] | tojson }}{{ {'a': [1, 2.5, none, 'é<']} | tojson(indent=4) }}",
    "no tools": "{% if tools %}tools{% elif tools is not none %}list{% endif %}"
    "{% if documents is defined %}d{% endif %}{{ messages[-1]['content'] }}",
    "thinking": "{{ messages[-1].content }}{% if enable_thinking is defined and not enable_thinking"
    " %}<think>\n\n</think>{% endif %}",
    "thought is cut": "{% for m in messages %}{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% endfor %}",
    "reversed": "{% for m in messages[::-1] %}{% set index = (messages|length - 1) - loop.index0 %}"
    "{{ index }}{{ m.content }}{% endfor %}",
    "tests": "{% for m in messages %}{% if m.content is string and m.tool_calls is not defined and "
    "m.content is not mapping %}{{ m.content | upper | replace('E', '3') }}{{ m.content }}"
    "{% endif %}{% endfor %}",
    "arithmetic": "{{ 7 // 2 ** 2 * 3 - 1 % 2 + 10 / 4 }}{{ '%s-%03d' % ('a', 7) }}"
    "{{ 'x' * 3 }}{{ messages[-1].content ~ 3 ~ none }}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "filters": "{{ messages | map(attribute='role') | join(',') }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    "{{ messages | rejectattr('role', 'eq', 'system') | map(attribute='content') | first }}"
    "{{ messages[-1].content | indent(4) }}",
    "dict": "{% set roles = dict(user='U', assistant='A', system='S') %}{% for m in messages %}"
    "{{ roles.get(m.role, '?') }}:{{ m['content'] }}{% endfor %}{% for k, v in roles.items() %}"
    "{{ k }}{% endfor %}",
    "call block": "{% macro box() %}[{{ caller() }}]{% endmacro %}{% call box() %}"
    "{{ messages[-1].content }}{% endcall %}{% filter upper %}end{% endfilter %}",
    "set block": "{% set text %}{% for m in messages %}{{ m.content }}{% endfor %}{% endset %}"
    "{{ text.strip().startswith('N') }}{{ text }}",
    "format": "{{ '**{}**{:>5}'.format(messages[-1].content, 3) }}{{ '**%s**' | format(1234567) }}"
    "{{ '{:,}'.format(12345678) }}",
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    folder = sources.resolve("demo").path
    return load_tokenizer(folder, {}, folder)


@pytest.mark.parametrize("feature", FEATURES)
def test_prompts_are_those_of_transformers(feature: str, tokenizer) -> None:
    source = FEATURES[feature]
    template = ChatTemplate(
        source,
        Path("chat_template.jinja"),
        {**tokenizer.special_tokens_map, "enable_thinking": False},
    )
    for messages in (USER, TURNS, SYSTEM):
        try:
            wanted = tokenizer.apply_chat_template(
                messages, chat_template=source, tokenize=False, add_generation_prompt=True,
                enable_thinking=False,
            )  # fmt: skip
        except Exception as error:
            with pytest.raises(TemplateError, match=str(error)):
                template.render(messages)
        else:
            assert template.render(messages) == wanted


def test_token_ids_are_those_of_transformers(tokenizer) -> None:
    folder = sources.resolve("demo").path
    template = prompt_tokens.template_of(tokenizer, folder)
    assert template is not None
    assert template.file.name in ("chat_template.jinja", "tokenizer_config.json")
    for messages in (USER, TURNS, SYSTEM):
        wanted = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=False
        )
        turns = [(message["role"], message["content"]) for message in messages]
        system = turns.pop(0)[1] if turns[0][0] == "system" else None
        prompt = Prompt(turns[-1][1], system=system, earlier=tuple(turns[:-1]))
        assert prompt_tokens.encode(tokenizer, template, prompt, folder) == list(wanted)


PARTS = (
    "{% for m in messages %}{% if m['content'] is string %}"
    "{{ raise_exception('Give content as parts.') }}{% endif %}{{ m['role'] }}:"
    "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}\n{% endfor %}"
)


@pytest.mark.parametrize(
    "source",
    [PARTS, PARTS.replace("raise_exception('Give content as parts.')", "''")],
    ids=["raises", "leaves out"],
)
def test_content_is_given_as_parts_where_the_template_wants_parts(source: str) -> None:
    template = ChatTemplate(source, Path("chat_template.jinja"))
    assert template.render(TURNS) == ("user:Name two  rivers?\nassistant:Rhine, Po.user:é 🙂")


#: source -> words of the sentence
FAULTS = {
    "": "renders nothing",
    " \n\t": "renders nothing",
    "Hello.": "leaves out what the user says",
    "{{ messages[0].content": "is damaged .*line 1",
    "{% for m in messages %}\n{{ m.content }": "is damaged .*line 2",
    "{% break %}": "is damaged",
    "{% nonsense %}": "is damaged .*unknown tag 'nonsense'",
    "{{ raise_exception('Only\x1b[31m one\nturn.') }}": r'the words "Only\\x1b\[31m one turn"',
    "{{ messages[0].content + header }}": "'header' is undefined",
    "{{ messages[7].content }}": "list object has no element 7",
    "{{ ''.__class__.__mro__ }}": "'__class__' of 'str' object is unsafe",
    "{{ [3, 'a'] | sort }}": "TypeError",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ 'a'.encode('x') }}": "LookupError: unknown encoding: x",
    "{{ '%c' % 99999999999 }}": "OverflowError",
    "{% include 'other' %}": "no loader",
    "{{ '\\ud800' ~ messages[0].content }}": "lone surrogate",
    # beyond the limits
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "too long",
    "{% for i in range(99999) %}spam and eggs {% endfor %}": "writes more than 65,536 characters",
    "{{ 'x' * 10**9 }}": "in one step",
    "{{ [1] * 10**9 }}": "in one step",
    "{{ 10**10**10 }}": "(in one step|leaves out)",
    "{{ '%999999999d' % 3 }}": "absurd width",
    "{{ '%*d' % (10**9, 3) }}": "in one step",
    "{{ '{:>999999999}'.format(1) }}": "absurd width",
    "{{ '{:>{}}'.format(1, 10**9) }}": "in one step",
    "{{ 'x'.ljust(10**9) }}": "in one step",
    "{{ 'x' | center(10**9) }}": "in one step",
    "{{ 1.5 | round(10**9, 'ceil') }}": "in one step",
    "{{ messages | tojson(indent=10**9) }}": "in one step",
    "{{ range(10**9) }}": "OverflowError: Range too big",
    "{% set n = namespace(a='ab') %}{% for i in range(99) %}{% set n.a = n.a ~ n.a %}{% endfor %}":
    "in one step",
    "{% set n = namespace(a=[1]) %}{% for i in range(64) %}{% set n.a = [n.a, n.a] %}{% endfor %}"
    "{{ n.a }}": "(too long|memory)",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}": "without end",
    "{{ " + "(" * 50_000: "without end",
    "x" * (1 << 21): "more than any template",
}  # fmt: skip


@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_faults_are_one_sentence(number: int) -> None:
    source, words = list(FAULTS.items())[number]
    with pytest.raises(TemplateError, match=words) as caught:
        ChatTemplate(source, Path("here/chat_template.jinja")).render(USER)
    message = str(caught.value)
    assert message.startswith("here/chat_template.jinja: the chat template ")
    assert message.endswith(".")
    assert message.isprintable()
    assert len(message) < 600


def test_memory_is_bounded_where_single_steps_are_small() -> None:
    source = (
        "{% set n = namespace(a=[]) %}{% for i in range(900) %}"
        "{% set n.a = n.a + ['x' * 999999 ~ i] %}{% endfor %}"
    )
    with pytest.raises(TemplateError, match="more than 192 MB of memory"):
        ChatTemplate(source, Path("chat_template.jinja")).render(USER)


def test_the_process_is_started_anew_when_it_was_killed() -> None:
    template = ChatTemplate(CHATML, Path("chat_template.jinja"))
    wanted = template.render(USER)
    assert template_process._running is not None
    os.kill(template_process._running._child.pid, signal.SIGKILL)
    assert template.render(USER) == wanted


def test_a_forked_process_has_a_renderer_of_its_own() -> None:
    template = ChatTemplate(CHATML, Path("chat_template.jinja"))
    wanted = template.render(USER)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if template.render(USER) == wanted else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert template.render(USER) == wanted


def test_the_worker_answers_whatever_the_request_raises() -> None:
    values = {"messages": [], "bos_token": ""}
    request = {"source": "{{ nothing.at.all }}", "values": values, "today": None}
    said = template_worker.answer(request)
    assert said == {"kind": "failed", "said": "'nothing' is undefined"}


# --------------------------------------------------------------------------------------------------
# In the commands

BAD = "{{ raise_exception('Not you again.') }}"


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The demo model with a template that raises, as a folder and a GGUF; a direction of it."""
    root = tmp_path_factory.mktemp("bad")
    folder, gguf, direction = root / "model", root / "model.gguf", root / "direction.safetensors"
    shutil.copytree(sources.resolve("demo").path, folder)
    (folder / "chat_template.jinja").write_text(BAD)
    abl_mlx("convert", folder, gguf)
    abl_mlx("measure", "demo", "-o", direction, "--limit", 8)
    return folder, gguf, direction


@pytest.mark.parametrize("kind", ["folder", "GGUF"])
def test_commands_that_ask_the_model_quote_the_template(
    bad: tuple[Path, Path, Path], kind: str, tmp_path: Path
) -> None:
    model, direction = bad[kind == "GGUF"], bad[2]
    for command in (
        ["run", model, "-o", tmp_path / f"out{model.suffix}"],
        ["measure", model, "-o", tmp_path / "new.safetensors"],
        ["eval", model],
        *([["eval", model, "--runtime", "mlx-lm"]] if model.suffix else []),
        ["show", model, "Hi", "--direction", direction],
    ):
        said = fails(*command)
        assert "Not you again" in said, command
        assert str(model) in said, command
    assert list(tmp_path.iterdir()) == []


def test_llama_cpp_is_not_given_a_template_without_end(
    bad: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    folder, gguf = tmp_path / "model", tmp_path / "model.gguf"
    shutil.copytree(bad[0], folder)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(endless)
    abl_mlx("convert", folder, gguf)
    assert "takes too long to render" in fails("eval", gguf, "--runtime", "llama.cpp")


@pytest.mark.parametrize("kind", ["folder", "GGUF"])
def test_commands_that_ask_nothing_need_no_template(
    bad: tuple[Path, Path, Path], kind: str, tmp_path: Path
) -> None:
    model, direction = bad[kind == "GGUF"], bad[2]
    assert abl_mlx("inspect", model)["layers"] == 4
    assert (
        abl_mlx("apply", direction, model, "-o", tmp_path / f"out{model.suffix}")["leak"]["total"]
        < 0.01
    )
    said = abl_mlx("inspect", bad[0])
    assert said["template_tail"] is None
    assert "Not you again" in said["template_fault"]


def test_a_folder_without_template_or_tokenizer_is_inspected_and_edited(
    bad: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(bad[0], folder)
    for path in folder.glob("*token*"):
        path.unlink()
    (folder / "chat_template.jinja").unlink()
    assert "tokenizer" in abl_mlx("inspect", folder)["template_fault"]
    assert abl_mlx("apply", bad[2], folder, "-o", tmp_path / "out")["leak"]["total"] < 0.01


def test_several_templates(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sources.resolve("demo").path, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    named = [{"name": "tool_use", "template": BAD}, {"name": "default", "template": CHATML}]
    path.write_text(json.dumps({**config, "chat_template": named}))
    assert abl_mlx("inspect", folder)["template_tail"] == 5
    path.write_text(json.dumps({**config, "chat_template": named[:1]}))
    said = abl_mlx("inspect", folder)["template_fault"]
    assert "'tool_use'" in said
    assert "none named default" in said


@pytest.mark.parametrize(
    "stored", [5, [5], {"default": 5}, [{"name": "default"}], [{"template": CHATML}]]
)
def test_templates_that_are_no_text(stored: object, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer_config\.json: chat_template is neither text"):
        template_files.read(tmp_path, {"chat_template": stored})


def test_template_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ '\xff\xfe' }}")
    with pytest.raises(UserError, match=r"chat_template\.jinja cannot be used: it is not UTF-8"):
        template_files.read(tmp_path, {})
    with (tmp_path / "chat_template.jinja").open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(UserError, match="is longer than"):
        template_files.read(tmp_path, {})
