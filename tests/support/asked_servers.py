"""What tests of `eval` ask of servers, and what it says of their mistakes."""

from __future__ import annotations

import json
from typing import Any

from click.testing import CliRunner, Result

from abl_mlx.cli.main import cli
from abl_mlx.inputs import prompts
from tests.support.servers import Server

HARMFUL = set(prompts.bundled("harmful").texts)

#: Prompts of each of the three sets; 12 in all.
LIMIT = 4
ALL = 3 * LIMIT


def evaluate(url: str, *arguments: Any) -> Result:
    return CliRunner().invoke(
        cli, ["eval", url, "--limit", str(LIMIT), *map(str, arguments)], catch_exceptions=False
    )


def record_of(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def sentence(result: Result) -> str:
    """What a person is told of a mistake."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    assert last.endswith(".")
    return last.removeprefix("Error: ")


def well_behaved(**options: Any) -> Server:
    return Server(refused=HARMFUL.__contains__, **options)
