"""A model split into several GGUF files: the names of the parts, and whether they fit together."""

from __future__ import annotations

import re
from pathlib import Path

from convert.base.errors import UserError
from convert.base.suffixes import GGUF, without
from convert.gguf.header import broken, shown_name
from convert.gguf.layout import Part
from convert.gguf.metadata import Metadata

SPLIT_NAME = re.compile(r"(?P<name>.*)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def part_paths(path: Path, count: int) -> list[Path]:
    """The names of the parts of a model split into ``count`` files; of one file, ``path`` itself.

    Args:
        path: NAME, NAME.gguf or the path of any part.
        count: how many.
    """
    if count <= 1:
        return [path]
    named = SPLIT_NAME.fullmatch(path.name)
    name = named["name"] if named else without(path.name, GGUF)
    return [
        path.with_name(f"{name}-{index:05d}-of-{count:05d}.gguf") for index in range(1, count + 1)
    ]


def size_of(path: Path) -> int:
    """Bytes of a GGUF, all parts of it where ``path`` is one; nothing of it is read."""
    parts = re.sub(r"-\d{5}-of-(\d{5})\.gguf$", r"-*-of-\1.gguf", path.name)
    files = [path] if parts == path.name else path.parent.glob(parts)
    return sum(file.stat().st_size for file in files)


def split_number(part: Part, key: str) -> int | None:
    """A count under ``key`` in the metadata of one part; None where there is none.

    Raises:
        UserError: when it is no count.
    """
    if key not in part.fields:
        return None
    found = Metadata(part)[key]
    if type(found) is not int or found < 0:
        raise broken(part.path, f"its {key} is {str(found)[:40]!r} instead of a count")
    return found


def check_parts(parts: list[Part]) -> None:
    """Refuse parts that do not belong together.

    Raises:
        UserError: naming the part.
    """
    names: dict[str, Path] = {}
    for index, part in enumerate(parts):
        number, count = split_number(part, "split.no"), split_number(part, "split.count")
        if number not in (None, index) or count not in (None, len(parts)):
            raise UserError(
                f"{part.path} calls itself part {(number or 0) + 1} of {count or len(parts)}: give "
                f"the parts their own names back, or download them again."
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
