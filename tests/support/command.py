"""The command line in this process, for tests that look at what it prints."""

from __future__ import annotations

import json
from typing import Any

from click.testing import CliRunner

from abl_mlx.cli.main import cli


def abl_mlx(*arguments: object) -> Any:
    """The record of a command, which must succeed and print nothing but it."""
    result = CliRunner().invoke(cli, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def fails(*arguments: object) -> str:
    """What a command that must fail says, on its last line."""
    result = CliRunner().invoke(cli, list(map(str, arguments)))
    assert result.exit_code == 1
    return str(result.stderr.splitlines()[-1])
