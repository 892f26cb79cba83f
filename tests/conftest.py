"""Fixtures shared by the tests: tiny models in folders, written once a session."""

from __future__ import annotations

import json
import os
import subprocess
import zlib
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import jsonschema
import pytest

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Two processes run the tests; threads of theirs would only wait for one another.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("LLAMA_ARG_THREADS", "1")  # llama.cpp's threads wait busily
# On Linux MLX compiles each fused kernel with g++ when it first meets it, and ignores SIGINT then.
os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

from abl_mlx.records.record import Record
from abl_mlx.records.schema import COMMANDS
from abl_mlx.support.strict_json import finite
from tests.support import tiny

SCHEMA = Path(__file__).parents[1] / "docs" / "records.schema.json"


def commit() -> int:
    """A number of the commit that is checked out; 0 where there is none."""
    asked = ["git", "rev-parse", "--short=7", "HEAD"]
    try:
        said = subprocess.run(asked, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return 0
    return int(said.stdout, 16) if said.returncode == 0 else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks: ``fast`` by file, and ``slow`` for what another commit runs of tests ``by_turns``.

    Of a test marked ``by_turns(n)`` each commit runs one case in n, others for every commit. Of the
    files that long.txt names, each commit runs every fourth.
    """
    here, turn = Path(__file__).parent, commit()

    def named(listing: str) -> list[Path]:
        return [here / line for line in (here / listing).read_text(encoding="utf-8").split()]

    fast, long = set(named("fast.txt")), named("long.txt")
    others = set(long) - set(long[turn % 4 :: 4])
    for item in items:
        if item.path in fast:
            item.add_marker("fast")
        turns = item.get_closest_marker("by_turns")
        another = turns and (zlib.crc32(item.name.encode()) + turn) % turns.args[0]
        if another or item.path in others:
            item.add_marker("slow")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_folder(arch, **options)``: the folder of a tiny model; never write into it."""
    made: dict[str, Path] = {}

    def folder(arch: str, **options: object) -> Path:
        key = f"{arch} {sorted(options.items())}"
        if key not in made:
            place = tmp_path_factory.mktemp(arch) / "model"
            made[key] = tiny.write_model(place, arch, **options)
        return made[key]

    return folder


@pytest.fixture(scope="session", autouse=True)
def records_keep_to_their_schema() -> Iterator[None]:
    """Every record that a command makes in a test is held against docs/records.schema.json."""
    whole = json.loads(SCHEMA.read_text())
    by_class = {
        record: jsonschema.Draft202012Validator({**whole, "$ref": f"#/$defs/{command}"})
        for command, record in COMMANDS.items()
    }
    plain = Record.__dict__["json"]

    def checked(record: Record) -> dict[str, Any]:
        made: dict[str, Any] = plain.func(record)
        by_class[type(record)].validate(finite(made))
        return made

    json_of = cached_property(checked)
    json_of.__set_name__(Record, "json")
    Record.json = json_of  # type: ignore[assignment]
    yield
    Record.json = plain
