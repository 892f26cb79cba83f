"""Into how many files a GGUF output is written."""

from __future__ import annotations

from pathlib import Path

from abl_mlx.choices import Writing
from convert.base.atomic import check_new
from convert.base.errors import UserError
from convert.gguf.parts import part_paths, parts_there
from convert.gguf.regroup import NewParts


def new_parts(split_max_size: int | None, *, join: bool) -> NewParts | None:
    """The parts that flags ask for; None for those of the source.

    Raises:
        UserError: when the flags contradict each other.
    """
    if split_max_size is not None and join:
        raise UserError("--split-max-size and --join contradict each other: leave one out.")
    if split_max_size is not None:
        return NewParts(split_max_size)
    return NewParts() if join else None


def of(writing: Writing) -> NewParts | None:
    """The parts of GGUF outputs; Ollama takes one file.

    Raises:
        UserError: when the flags contradict each other.
    """
    if writing.ollama_create is not None and writing.split_max_size is not None:
        raise UserError("--split-max-size: Ollama takes one file; leave it or --ollama-create out.")
    return new_parts(writing.split_max_size, join=writing.join or writing.ollama_create is not None)


def check(path: Path, parts: NewParts | None, count: int) -> None:
    """Check that no file is in the way of an output.

    Args:
        path: the output, NAME.gguf.
        parts: the parts that are asked for.
        count: the number of the source's parts.

    Raises:
        UserError: when one exists.
    """
    check_new(path)
    places = part_paths(path, count) if parts is None else []
    if parts is not None and parts.largest is not None:
        places = parts_there(path)
    for place in places:
        check_new(place)
