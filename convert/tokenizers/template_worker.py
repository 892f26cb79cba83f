"""A program that renders chat templates, within limits: started by `template_process`.

A chat template is code from a stranger. It runs in this process, in Jinja's sandbox, so that
nothing it does reaches the tool: its time is bounded by a timer of the operating system, its memory
by a limit of the process (and by checks of what a single operation would make), its output by
counting.

It reads requests from its standard input and writes answers to its standard output, one JSON object
a line. The environment is the one of transformers' `apply_chat_template`, so the text is the same.

The file stands alone: it imports the standard library and Jinja only.
"""

from __future__ import annotations

import functools
import json
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.sandbox import ImmutableSandboxedEnvironment

# CPU seconds for one request. A template of a real model needs a few thousandths.
SECONDS = 2.0

# Bytes above what the process has when it starts.
MEMORY = 192 << 20

# Characters of a template; the longest of a real model has some tens of thousands.
LONGEST_SOURCE = 1 << 20

# Characters that a template may write beside what the messages hold.
LONGEST_OUTPUT = 1 << 16

# Characters, items or bits that one operation may make, and numbers that it may be given.
LARGEST = 1 << 20

# A width or a precision of seven digits or more, in either language of format strings.
_WIDE = re.compile(r"%[^%a-zA-Z]*\d{7}|\{[^{}]*:[^{}]*\d{7}")

# One that is among the arguments.
_GIVEN = re.compile(r"%[-+ #0-9.]*\*|\{[^{}]*\{")


class Excess(Exception):
    """A template went beyond a limit; the message says which."""


class Refused(jinja2.TemplateError):
    """The template called raise_exception."""


class _Generator(CodeGenerator):
    """Jinja's compiler, but for ``~``, whose operands are not otherwise seen before they join."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.join_texts((")
        for one in node.nodes:
            self.visit(one, frame)
            self.write(", ")
        self.write("))")


class Environment(ImmutableSandboxedEnvironment):
    """The sandbox of transformers, which also bounds what a single operation makes."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, today: str | None) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
            optimized=False,
        )
        self.filters = {name: _checked(filter) for name, filter in self.filters.items()}
        self.filters["tojson"] = _checked(_to_json)
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _clock(today)
        self.globals["dict"] = _Dict()
        self.globals["namespace"] = _Namespace

    def join_texts(self, values: tuple[Any, ...]) -> str:
        """What ``~`` makes."""
        texts = [str(value) for value in values]
        _check(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _check_format(left, right if isinstance(right, tuple) else (right,))
        elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            _check(len(left) + len(right))
        elif operator == "*":
            _check(_size(left) * _size(right) if _has_length(left, right) else _bits(left, right))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check(left.bit_length() * abs(right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # The names are Jinja's, so that a template may call with any keyword.
        text = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if isinstance(text, str):
            values = (*args, *kwargs.values())
            if getattr(__obj, "__name__", "") in ("format", "format_map"):
                _check_format(text, values)
            else:
                _check_arguments(values)
        made = super().call(__context, __obj, *args, **kwargs)
        if isinstance(made, str):
            _check(len(made))
        return made


def _check(size: int | float) -> None:
    if size > LARGEST:
        raise Excess(f"makes more than {LARGEST:,} characters, items or bits in one step")


def _check_arguments(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, (int, float)):
            _check(abs(value))


def _check_format(form: str, values: Iterable[Any]) -> None:
    if _WIDE.search(form):
        raise Excess("formats a text to an absurd width")
    if _GIVEN.search(form):
        _check_arguments(values)


def _has_length(*values: Any) -> bool:
    return any(hasattr(value, "__len__") for value in values)


def _size(value: Any) -> int:
    if isinstance(value, int):
        return max(0, value)
    return len(value) if hasattr(value, "__len__") else 0


def _bits(*values: Any) -> int:
    return sum(value.bit_length() for value in values if isinstance(value, int))


def _checked(filter: Callable[..., Any]) -> Callable[..., Any]:
    """The same filter, which refuses absurd arguments (not values) before it works."""
    skipped = 1 + hasattr(filter, "jinja_pass_arg")

    @functools.wraps(filter)
    def checked(*args: Any, **kwargs: Any) -> Any:
        more = (*args[skipped:], *kwargs.values())
        if filter.__name__ == "do_format":
            _check_format(str(args[skipped - 1]), more)
        else:
            _check_arguments(more)
        return filter(*args, **kwargs)

    return checked


def _to_json(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: Any) -> None:
    raise Refused(str(message))


def _clock(today: str | None) -> Callable[[str], str]:
    def strftime_now(format: str) -> str:
        return today if today is not None else datetime.now().strftime(format)

    return strftime_now


class _Dict:
    """``dict`` as a function, without its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """``namespace`` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` is a name that a template may use
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _Namespace._check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check_name(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check_name(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(
                f"a namespace has no attributes that begin with an underscore, as {name!r} does"
            )


class _Generation(jinja2.ext.Extension):
    """``{% generation %}``: marks what an assistant said, for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Callable[[], str]) -> str:
        return caller()


@functools.lru_cache(maxsize=16)
def _compiled(source: str, today: str | None) -> jinja2.Template:
    if len(source) > LONGEST_SOURCE:
        raise Excess(f"has {len(source):,} characters, more than any template")
    return Environment(today).from_string(source)


def _render(request: dict[str, Any]) -> str:
    values = request["values"]
    given = [values["messages"], values.get("tools")]
    most = LONGEST_OUTPUT + 4 * len(json.dumps(given, ensure_ascii=False))
    pieces, length = [], 0
    for piece in _compiled(request["source"], request["today"]).generate(**values):
        pieces.append(piece)
        length += len(piece)
        if length > most:
            raise Excess(f"writes more than {LONGEST_OUTPUT:,} characters around the messages")
    return "".join(pieces)


def _kind(error: BaseException) -> str:
    """What sort of failure it is, for a sentence."""
    if isinstance(error, Excess):
        return "excess"
    if isinstance(error, Refused):
        return "refused"
    if isinstance(error, (jinja2.TemplateSyntaxError, SyntaxError)):
        return "syntax"
    return "failed"


def answer(request: dict[str, Any]) -> dict[str, str]:
    """The text of a request's template, or what is wrong with it."""
    try:
        return {"text": _render(request)}
    except MemoryError:
        return {"kind": "excess", "said": f"needs more than {MEMORY >> 20} MB of memory"}
    except RecursionError:
        return {"kind": "excess", "said": "calls itself, or nests, without end"}
    except Exception as error:
        return {"kind": _kind(error), "said": _words(error)}


def _words(error: Exception) -> str:
    """What an error says, with the line of the template or the error's name where that helps."""
    said = str(error.args[0] if isinstance(error, SyntaxError) else error)[:500]
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"line {error.lineno}: {error.message}"
    if said and isinstance(error, jinja2.TemplateError | Excess):
        return said
    return f"{type(error).__name__}: {said}"


def _limit_memory() -> None:
    """As far as the operating system has such a limit (macOS has none that it keeps)."""
    try:
        with open("/proc/self/statm") as stream:
            most = int(stream.read().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    except (OSError, ValueError):
        pass


def serve() -> None:
    """Answer requests until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _limit_memory()
    for line in sys.stdin.buffer:
        # The timer ends this process, whatever it is doing then; whoever asked reads it off.
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        said = json.dumps(answer(json.loads(line))).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(said + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve()
