"""Models split into several GGUF files: names of the parts, and checks that they fit together."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from convert.base.errors import UserError
from convert.base.suffixes import GGUF, without
from convert.gguf.header import broken, shown_name
from convert.gguf.layout import Part
from convert.gguf.metadata import Metadata

SPLIT_NAME = re.compile(r"(?P<name>.*)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def part_paths(path: Path, count: int) -> list[Path]:
    """The paths of the parts of a model split into ``count`` files; ``path`` itself if it is 1.

    Args:
        path: NAME, NAME.gguf or the path of any part.
        count: the number of parts.
    """
    if count <= 1:
        return [path]
    named = SPLIT_NAME.fullmatch(path.name)
    name = named["name"] if named else without(path.name, GGUF)
    return [
        path.with_name(f"{name}-{index:05d}-of-{count:05d}.gguf") for index in range(1, count + 1)
    ]


def parts_there(path: Path) -> list[Path]:
    """The parts of NAME.gguf that lie in its folder, NAME-00001-of-00003.gguf and so on, sorted."""
    return sorted(path.parent.glob(f"{glob.escape(path.stem)}-?????-of-?????.gguf"))


def whole_name(path: Path) -> Path:
    """NAME.gguf, of the path of any part; a path that is no part's stays as it is."""
    named = SPLIT_NAME.fullmatch(path.name)
    return path.with_name(f"{named['name']}.gguf") if named else path


def size_of(path: Path) -> int:
    """The size of a GGUF in bytes (all parts, if ``path`` is one of a split model)."""
    parts = re.sub(r"-\d{5}-of-(\d{5})\.gguf$", r"-*-of-\1.gguf", path.name)
    files = [path] if parts == path.name else path.parent.glob(parts)
    return sum(file.stat().st_size for file in files)


def split_number(part: Part, key: str) -> int | None:
    """The count under ``key`` in the metadata of one part; None where the key is missing.

    Raises:
        UserError: when the value is not a count.
    """
    if key not in part.fields:
        return None
    found = Metadata(part)[key]
    if type(found) is not int or found < 0:
        raise broken(part.path, f"its {key} is {str(found)[:40]!r} instead of a count")
    return found


def check_parts(parts: list[Part]) -> None:
    """Check that files are the parts of one model, in order.

    Raises:
        UserError: naming the part that does not fit.
    """
    names: dict[str, Path] = {}
    for index, part in enumerate(parts):
        number, count = split_number(part, "split.no"), split_number(part, "split.count")
        if number not in (None, index) or count not in (None, len(parts)):
            raise UserError(
                f"{part.path} calls itself part {(number or 0) + 1} of {count or len(parts)}: give "
                f"the parts their original names, or download them again."
            )
        for name in part.tensors:
            if name in names:
                raise UserError(
                    f"the tensor {shown_name(name)} is both in {names[name]} and in {part.path}: "
                    f"download the parts again."
                )
            names[name] = part.path
    total = split_number(parts[0], "split.tensors.count")
    if total not in (None, len(names)):
        raise UserError(
            f"{parts[0].path} and its other parts hold {len(names)} tensors instead of {total}: "
            f"download the parts again."
        )
