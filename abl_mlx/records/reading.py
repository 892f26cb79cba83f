"""Records that are read back from a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abl_mlx.records.record import FORMAT_VERSION
from convert.base.errors import UserError
from convert.base.escape import shortened


def check_version(values: Mapping[str, Any], path: Path, mend: str) -> None:
    """Refuse a record of a version that is not known; one that says none is of an earlier abl-mlx.

    Args:
        mend: how the record is made anew.

    Raises:
        UserError: naming the file and its version.
    """
    version = values.get("format_version", 0)
    if isinstance(version, bool) or version not in range(FORMAT_VERSION + 1):
        said = shortened(repr(version), 40)
        raise UserError(
            f"{path} cannot be used: its format_version is {said}, and this "
            f"abl-mlx reads versions up to {FORMAT_VERSION}; {mend}, or update abl-mlx."
        )
