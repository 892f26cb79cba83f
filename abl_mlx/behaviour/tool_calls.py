"""Finds the function calls in a reply, in any of the forms that models are trained to write.

Models write calls as text: JSON between tags, Python, XML. Calls that a server has moved out of a
reply are written back into it (`written`), so that replies of all runtimes are read alike.

Nothing in this module imports MLX.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from abl_mlx.inputs.tools import Tool
from abl_mlx.models.thoughts import behind_thoughts, without_thoughts
from convert.base import json_text
from convert.base.schema import Refused

# The largest number of characters in a call; a longer text is not taken for one.
_LONGEST = 1 << 16


@dataclass(frozen=True)
class Call:
    """A function call.

    Attributes:
        name: the name of the function; None if a text is marked as a call and cannot be read.
        arguments: parameter -> value; None if they cannot be read.
    """

    name: str | None
    arguments: Mapping[str, Any] | None


UNREADABLE = Call(None, None)
"""The text that stands for a call that cannot be read."""

UNREAD = "<tool_call>?</tool_call>"
"""A reply with a call that a server could not read, and did not pass on."""


def written(name: Any, arguments: Any) -> str:
    """A call as text that `calls` reads.

    Args:
        arguments: an object, or its JSON as OpenAI's API has it; damaged JSON stays as it is.
    """
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    call = f'{{"name": {json.dumps(name)}, "arguments": {text or "{}"}}}'
    return f"\n<tool_call>\n{call}\n</tool_call>"


def calls(reply: str, tools: Sequence[Tool]) -> tuple[Call, ...] | None:
    """All calls in a reply, in order; None if the reply ends inside its thoughts.

    Args:
        reply: the reply, with its special tokens as text.
        tools: the functions that the model was told of. Bare JSON or Python, without any mark of a
            call, counts as a call only if it names one of them.
    """
    if _HARMONY.search(reply):  # gpt-oss writes calls in a channel that otherwise holds thoughts
        return tuple(_harmony(reply, tools))
    text = behind_thoughts(reply)
    if text is None:
        return None
    for form, read in _FORMS:
        if form.search(text):
            return tuple(read(text, tools))
    return tuple(_bare(text, tools))


# --- JSON ----------------------------------------------------------------------------------------


def _value(text: str) -> tuple[Any, str]:
    """The JSON value with which a text begins, and the rest of the text.

    Raises:
        ValueError: when the text begins with no JSON value.
    """
    text = text.lstrip()
    _, end = json.JSONDecoder().raw_decode(text[:_LONGEST])
    return json_text.parse(text[:end], longest=_LONGEST), text[end:]


def _of_json(value: Any) -> Call:
    """The call that a JSON object describes.

    The key of its arguments is arguments, parameters or args; their value may be a string of JSON.
    """
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict):
        return UNREADABLE
    name = value.get("name", value.get("function"))
    given: Any = next((value[key] for key in _ARGUMENTS if value.get(key) is not None), {})
    return Call(name, _arguments(given)) if isinstance(name, str) else UNREADABLE


_ARGUMENTS = ("arguments", "parameters", "args")


def _arguments(given: Any) -> dict[str, Any] | None:
    if isinstance(given, str):
        try:
            given, rest = _value(given or "{}")
        except (ValueError, RecursionError):
            return None
        if rest.strip():
            return None
    return given if isinstance(given, dict) else None


def _json_calls(text: str, tools: Sequence[Tool]) -> Iterator[Call]:
    """The calls of JSON objects, or of lists of them, that follow each other in a text."""
    rest = text.strip()
    if not rest:
        yield UNREADABLE
    while rest:
        try:
            value, rest = _value(rest)
        except (ValueError, RecursionError):
            yield UNREADABLE
            return
        for one in value if isinstance(value, list) else [value]:
            yield _of_json(one)
        rest = rest.lstrip("; \n\t,")
        if rest and rest[0] not in "{[":
            return  # words follow the calls


def _named(name: str, text: str) -> Call:
    """The call of a named function; the text begins with its arguments."""
    try:
        value, _ = _value(re.sub(r"^\s*```(?:json)?", "", text))
    except (ValueError, RecursionError):
        return Call(name, None)
    return Call(name, _arguments(value))


# --- tags ----------------------------------------------------------------------------------------


def _blocks(text: str, opened: str, closed: str) -> Iterator[str]:
    """The texts between opening and closing tags; the last one may lack its closing tag."""
    for part in re.split(opened, text)[1:]:
        yield re.split(closed, part, maxsplit=1)[0].strip()


_XML_FUNCTION = re.compile(r"<function=([^>\s]+)>")
_PAIRS = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
_PARAMETERS = re.compile(r"<parameter=([^>\s]+)>(.*?)</parameter>", re.DOTALL)


def _tool_call(text: str, tools: Sequence[Tool]) -> Iterator[Call]:
    """Calls between ``<tool_call>`` tags: Hermes and Qwen (JSON), Qwen3-Coder and GLM (XML)."""
    for block in _blocks(text, "<tool_call>", "</tool_call>"):
        if _XML_FUNCTION.search(block):
            yield from _xml(block, tools)
        elif "<arg_key>" in block or block in {tool.name for tool in tools}:
            name = block.split("<arg_key>")[0].strip()
            yield Call(name, _typed(name, dict(_PAIRS.findall(block)), tools))
        else:
            yield from _json_calls(block, tools)


def _xml(text: str, tools: Sequence[Tool]) -> Iterator[Call]:
    """``<function=f>{...}</function>`` (Llama, Functionary), or tagged parameters (Qwen3-Coder)."""
    parts = _XML_FUNCTION.split(text)[1:]
    for name, rest in zip(parts[::2], parts[1::2], strict=True):
        body = rest.split("</function>")[0]
        if body.lstrip().startswith("{"):
            yield _named(name, body)
        else:
            yield Call(name, _typed(name, dict(_PARAMETERS.findall(body)), tools))


def _typed(name: str, given: Mapping[str, str], tools: Sequence[Tool]) -> dict[str, Any]:
    """Arguments that were read as text, converted to the types that the parameters have."""
    schemas = next((tool.parameters for tool in tools if tool.name == name), {})
    found: dict[str, Any] = {}
    for key, raw in given.items():
        text = raw.strip()
        found[key] = text
        if schemas.get(key, {}).get("type") != "string":
            with contextlib.suppress(Refused):
                found[key] = json_text.parse(text, longest=_LONGEST)
    return found


# --- forms of one family of models ---------------------------------------------------------------


def _after(mark: str) -> Callable[[str, Sequence[Tool]], Iterator[Call]]:
    """A reader of JSON behind a mark, which may be repeated before each call."""

    def read(text: str, tools: Sequence[Tool]) -> Iterator[Call]:
        for part in re.split(mark, text)[1:]:
            yield from _json_calls(part, tools)

    return read


def _mistral(text: str, tools: Sequence[Tool]) -> Iterator[Call]:
    """Mistral: ``[TOOL_CALLS][{...}]``, since 2025 ``[TOOL_CALLS]f[ARGS]{...}`` for each call."""
    for part in text.split("[TOOL_CALLS]")[1:]:
        name, args, rest = part.partition("[ARGS]")
        if args:
            yield _named(name.split("[CALL_ID]")[0].strip(), rest)
        else:
            yield from _json_calls(part, tools)


def _llama(text: str, tools: Sequence[Tool]) -> Iterator[Call]:
    """Llama: ``<|python_tag|>``, followed by JSON or by ``f.call(x=1)``."""
    for part in text.split("<|python_tag|>")[1:]:
        part = re.split(r"<\|eo[mt]_id\|>", part)[0].strip()
        if part.startswith(("{", "[{")):
            yield from _json_calls(part, tools)
        else:
            yield from _python(part) or [UNREADABLE]


def _deepseek(text: str, tools: Sequence[Tool]) -> Iterator[Call]:
    """DeepSeek V3 and R1: ``function<sep>f`` and fenced JSON; DeepSeek V3.1: ``f<sep>{...}``."""
    for block in _blocks(text, "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"):
        first, _, rest = block.partition("<｜tool▁sep｜>")
        if first.strip() == "function":
            first, _, rest = rest.partition("\n")
        yield _named(first.strip(), rest)


_HARMONY = re.compile(r"\bto=functions\.([\w.-]+)")


def _harmony(text: str, tools: Sequence[Tool]) -> Iterator[Call]:
    """gpt-oss: ``<|channel|>commentary to=functions.f <|constrain|>json<|message|>{...}``."""
    parts = _HARMONY.split(text)[1:]
    for name, rest in zip(parts[::2], parts[1::2], strict=True):
        at = rest.find("{")
        yield Call(name, None) if at < 0 else _named(name, rest[at:])


def _functionary(text: str, tools: Sequence[Tool]) -> Iterator[Call]:
    """Functionary 3.2: ``>>>f`` and JSON on the next line; ``>>>all`` opens plain text."""
    for part in re.split(r"(?:^|\n)>>>", text)[1:]:
        name, _, rest = part.partition("\n")
        if name.strip() != "all":
            yield _named(name.strip(), rest)


def _lfm(text: str, tools: Sequence[Tool]) -> Iterator[Call]:
    """LFM2: Python or JSON between tags."""
    for block in _blocks(text, r"<\|tool_call_start\|>", r"<\|tool_call_end\|>"):
        yield from _python(block) or _json_calls(block, tools)


def _function_gemma(text: str, tools: Sequence[Tool]) -> Iterator[Call]:
    """FunctionGemma: ``call:f{x:<escape>text<escape>,n:1}`` between tags."""
    for block in _blocks(text, "<start_function_call>", "<end_function_call>"):
        found = re.match(r"call:([\w.-]+)\{(.*)\}", block, re.DOTALL)
        if found is None:
            yield UNREADABLE
            continue
        pairs = re.findall(r"(\w+):(?:<escape>(.*?)<escape>|([^,{}]*))", found[2], re.DOTALL)
        given = {key: escaped or plain for key, escaped, plain in pairs}
        yield Call(found[1], _typed(found[1], given, tools))


_FORMS: tuple[tuple[re.Pattern[str], Callable[[str, Sequence[Tool]], Iterator[Call]]], ...] = (
    (re.compile(r"<tool_call>"), _tool_call),
    (re.compile(r"<｜tool▁call▁begin｜>"), _deepseek),
    (re.compile(r"\[TOOL_CALLS\]"), _mistral),
    (re.compile(r"<\|python_tag\|>"), _llama),
    (re.compile(r"<\|tool_call_start\|>"), _lfm),
    (re.compile(r"<start_function_call>"), _function_gemma),
    (re.compile(r"<\|tool_call\|>"), _after(r"<\|tool_call\|>")),
    (re.compile(r"\bfunctools\s*(?=\[)"), _after(r"\bfunctools\s*(?=\[)")),
    (_XML_FUNCTION, _xml),
    (re.compile(r"(?:^|\n)>>>\w"), _functionary),
)


# --- calls without any mark ----------------------------------------------------------------------

_FENCE = re.compile(
    r"```(?:json|tool_code|tool_call|python|py|xml)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL
)


def _bare(text: str, tools: Sequence[Tool]) -> Iterator[Call]:
    """Bare JSON (Llama 3) or Python (Llama 3.2 and 4, Gemma 3): a whole reply, or fenced blocks."""
    names = {tool.name for tool in tools}
    whole = without_thoughts(text) or ""  # and without special tokens
    fenced = [block.strip() for block in _FENCE.findall(whole)]
    for block in fenced or [whole]:
        found: Sequence[Call] = ()
        if block.startswith(("{", "[{")):
            found = list(_json_calls(block, tools))
        elif block.endswith((")", "]")):
            found = _python(block)
        yield from (one for one in found if one.name in names)


def _python(text: str) -> list[Call]:
    """The calls in a Python expression or in the lines of a program; none if it is neither."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of escapes that it does not know
            tree = ast.parse(text[:_LONGEST].strip())
        found = [_of_python(one) for line in tree.body for one in _expressions(line)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    known = [call for call in found if call is not None]
    return known if len(known) == len(found) else []


def _expressions(line: ast.stmt) -> list[ast.expr | None]:
    expression = line.value if isinstance(line, ast.Expr | ast.Assign) else None
    return list(expression.elts) if isinstance(expression, ast.List) else [expression]


def _of_python(node: ast.AST | None) -> Call | None:
    """A call with named arguments: of ``print(f())`` the inner one, of ``f.call()`` that of f."""
    if not isinstance(node, ast.Call):
        return None
    name = ast.unparse(node.func)
    if name == "print" and len(node.args) == 1:
        return _of_python(node.args[0])
    try:
        arguments = {str(one.arg): _literal(one.value) for one in node.keywords}
    except (ValueError, TypeError, SyntaxError):
        return Call(name.removesuffix(".call"), None)
    unnamed = bool(node.args) or "None" in arguments
    return Call(name.removesuffix(".call"), None if unnamed else arguments)


_CONSTANTS = {"true": True, "false": False, "null": None}


def _literal(node: ast.expr) -> Any:
    """The value of a literal of Python or JSON.

    Raises:
        ValueError: when the expression is no literal.
    """
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    return ast.literal_eval(node)
