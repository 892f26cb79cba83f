"""The command line that repeats a command with the same choices."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

#: What says where something is written or found, not what is done.
_PLACES = {"report", "save_replies", "resume", "junit", "search_journal"}


def command_line(
    words: Sequence[str],
    chosen: Mapping[str, Any],
    defaults: Mapping[str, Any],
    outputs: Sequence[str] = (),
) -> str:
    """The command with every choice that is not the default, quoted for a shell.

    Args:
        words: the command and its arguments, without the program's name.
        chosen, defaults: option -> value.
        outputs: the values of ``-o``.
    """
    parts = ["abl-mlx", *words]
    for output in outputs:
        parts += ["-o", output]
    for name, value in chosen.items():
        if name not in defaults or value == defaults[name] or name in _PLACES:
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            parts.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list | tuple | set | frozenset):
            parts += [flag, ",".join(map(str, sorted(value)))]
        elif value is not None:
            # All digits are needed: 0.1234567 is not 0.123457.
            value = repr(value).removesuffix(".0") if isinstance(value, float) else value
            # A value that starts with a dash would be read as a flag.
            parts += [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]
    return shlex.join(parts)
