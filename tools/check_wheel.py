"""Check a wheel: it holds exactly the files of the two packages, and its metadata are complete.

python -m tools.check_wheel dist/abl_mlx-0.1.0-py3-none-any.whl
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Sequence
from email.message import Message
from email.parser import BytesParser
from pathlib import Path

from abl_mlx import __version__

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("abl_mlx", "convert")

#: The metadata that the page of a package index shows.
FIELDS = (
    "Name", "Version", "Summary", "Author", "License-Expression", "License-File", "Keywords",
    "Requires-Python", "Description-Content-Type", "Classifier", "Provides-Extra", "Requires-Dist",
)  # fmt: skip


def faults(wheel: Path, tracked: Sequence[str]) -> list[str]:
    """One sentence for each fault of a wheel.

    Args:
        tracked: the files of the packages that belong into it, relative to the checkout.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata_name,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = BytesParser().parsebytes(archive.read(metadata_name))
        points = archive.read(metadata_name.replace("METADATA", "entry_points.txt")).decode()
    information = metadata_name.split("/")[0]
    packed = {name for name in names if not name.startswith(f"{information}/")}
    found = [f"{name} is missing." for name in sorted(set(tracked) - packed)]
    found += [f"{name} does not belong there." for name in sorted(packed - set(tracked))]
    return found + _of_metadata(metadata, points)


def _of_metadata(metadata: Message, points: str) -> list[str]:
    found = [f"The metadata have no {field}." for field in FIELDS if not metadata.get(field)]
    if metadata.get("Version") != __version__:
        found.append(f"Version is {metadata.get('Version')}, and abl_mlx says {__version__}.")
    described = metadata.get_payload()
    if not isinstance(described, str) or "# abl-mlx" not in described:
        found.append("The description is not the README.")
    if "abl-mlx = abl_mlx.cli.main:main" not in points:
        found.append("There is no command abl-mlx.")
    return found


def tracked_files() -> list[str]:
    """The files of the packages that git knows; without git, those that are there."""
    listed = subprocess.run(
        ["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode == 0 and listed.stdout:
        return listed.stdout.splitlines()
    return [
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]


def main() -> None:
    wrong = [fault for name in sys.argv[1:] for fault in faults(Path(name), tracked_files())]
    print("\n".join(wrong) if wrong else "The wheel is whole.", file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
