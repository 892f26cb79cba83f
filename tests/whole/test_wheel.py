"""`tools.check_wheel`, with which CI looks into the wheel that it has built."""

from __future__ import annotations

import zipfile
from pathlib import Path

import abl_mlx
from tests.support.places import ROOT
from tools.check_wheel import FIELDS, faults, tracked_files

INFORMATION = "abl_mlx-0.1.0.dist-info"


def wheel(path: Path, files: list[str], version: str, left_out: str = "") -> Path:
    fields = {name: "x" for name in FIELDS if name != left_out} | {"Version": version}
    metadata = "".join(f"{name}: {value}\n" for name, value in fields.items())
    with zipfile.ZipFile(path, "w") as archive:
        for name in files:
            archive.writestr(name, "")
        archive.writestr(f"{INFORMATION}/METADATA", f"{metadata}\n# abl-mlx\n")
        archive.writestr(
            f"{INFORMATION}/entry_points.txt",
            "[console_scripts]\nabl-mlx = abl_mlx.cli.main:main\n",
        )
    return path


def test_a_whole_wheel_has_no_fault(tmp_path: Path) -> None:
    files = ["abl_mlx/__init__.py", "convert/__init__.py"]
    assert faults(wheel(tmp_path / "a.whl", files, abl_mlx.__version__), files) == []


def test_the_citation_has_the_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {abl_mlx.__version__}\n" in citation


def test_each_fault_is_named(tmp_path: Path) -> None:
    files = ["abl_mlx/__init__.py", "tests/__init__.py"]
    path = wheel(tmp_path / "a.whl", files, "0.0.9", left_out="Requires-Python")
    assert faults(path, ["abl_mlx/__init__.py", "convert/__init__.py"]) == [
        "convert/__init__.py is missing.",
        "tests/__init__.py does not belong there.",
        "The metadata have no Requires-Python.",
        f"Version is 0.0.9, and abl_mlx says {abl_mlx.__version__}.",
    ]


def test_what_belongs_into_a_wheel_is_more_than_code() -> None:
    found = set(tracked_files())
    assert {"abl_mlx/py.typed", "convert/py.typed"} <= found
    assert any(name.startswith("abl_mlx/reports/templates/") for name in found)
    assert any(name.startswith("abl_mlx/inputs/prompt_sets/") for name in found)
    assert any(name.startswith("abl_mlx/demo/model/") for name in found)
