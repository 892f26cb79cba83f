"""Records: JSON and back, their schema, and the versions that are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest

from abl_mlx.cli.main import cli
from abl_mlx.records.looks import EditShare, InspectRecord
from abl_mlx.records.reading import check_version
from abl_mlx.records.record import FORMAT_VERSION
from abl_mlx.records.schema import COMMANDS, schema
from convert.base.errors import UserError
from tests.support.command import abl_mlx

SCHEMA = Path(__file__).parents[2] / "docs" / "records.schema.json"


def test_the_schema_is_what_the_classes_say() -> None:
    written = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(written)
    assert written == schema(), "run: python -m tools.record_schema > docs/records.schema.json"


def test_every_command_that_prints_a_record_has_a_class() -> None:
    printing = {
        name
        for name, command in cli.commands.items()
        if any(one.name == "as_json" for one in command.params)
    }
    assert printing == {name.split(" --")[0] for name in COMMANDS}


def test_a_record_comes_back_from_its_json(tiny_folder: Callable[..., Path]) -> None:
    printed = abl_mlx("inspect", tiny_folder("llama"))
    assert printed["format_version"] == FORMAT_VERSION
    record = InspectRecord.of(printed)
    assert record.json == printed
    assert record["edit"]["share"] == record.edit.share
    # An earlier record, which says no version, is read alike.
    del printed["format_version"]
    assert InspectRecord.of(printed) == record


def test_keys_that_are_not_known_are_kept_and_fail_the_schema() -> None:
    values = {"tensors": 1, "parameters": 2, "share": 0.5, "added": [1]}
    share = EditShare.of(values)
    assert (share.share, share.more) == (0.5, {"added": [1]})
    assert share.json == values
    part = {**schema(), "$ref": "#/$defs/EditShare"}
    with pytest.raises(jsonschema.ValidationError, match="'added' was unexpected"):
        jsonschema.validate(share.json, part)


def test_null_and_left_out_are_two_things(tiny_folder: Callable[..., Path]) -> None:
    printed = abl_mlx("inspect", tiny_folder("llama"))
    assert "folder" in printed
    assert "file" not in printed
    assert printed["quantization"] is None


@pytest.mark.parametrize("version", [2, -1, "1", True, None, 1.5])
def test_a_version_that_is_not_known_is_refused(version: object) -> None:
    with pytest.raises(UserError, match=r"r\.json cannot be used: its format_version is .*anew"):
        check_version({"format_version": version}, Path("r.json"), "make the record anew")


@pytest.mark.parametrize("values", [{}, {"format_version": 0}, {"format_version": FORMAT_VERSION}])
def test_earlier_versions_are_read(values: dict[str, int]) -> None:
    check_version(values, Path("r.json"), "make the record anew")
