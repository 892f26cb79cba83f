"""What an edited model says of its edit, read back from its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from convert.base import schema
from convert.base.errors import UserError
from convert.base.schema import FLAG, TEXT, Refused, check, either, one_of, record
from convert.gguf.file import GgufSource


@dataclass(frozen=True)
class Label:
    """What an edited model says of its edit."""

    direction_sha256: str
    strength: float
    layers: frozenset[int] | None
    embedding: bool
    mtp: bool = False
    tensors: str | None = None
    is_plain: bool = True


def gguf_label(source: GgufSource) -> dict[str, Any]:
    """What an edited GGUF says of its edit: its ``abl_mlx.`` keys, without that; else nothing."""
    found = source.metadata
    return {key.removeprefix("abl_mlx."): found[key] for key in found if key.startswith("abl_mlx.")}


def read_label(values: Mapping[str, Any] | None, name: str) -> Label:
    """From config.json's ``abl_mlx`` or a GGUF's ``abl_mlx.*``.

    Raises:
        UserError: when there is none: the model was not edited by abl-mlx.
    """
    if not values:
        raise UserError(f"{name} does not say that abl-mlx edited it: there is nothing to undo.")
    try:
        check(values, _LABEL)
        layers = str(values["layers"])
        return Label(
            str(values["direction_sha256"]),
            float(values["strength"]),
            None if layers == "all" else frozenset(map(int, layers.split(","))),
            str(values["embedding"]) == "True",
            str(values.get("mtp")) == "True",
            None if values.get("tensors") is None else str(values["tensors"]),
            not {"norm", "pin", "recipe"} & set(values),
        )
    except Refused as refused:
        raise UserError(
            f"{name} does not say in full how abl-mlx edited it, so there is nothing to undo by: "
            f"of its abl_mlx label, {refused}."
        ) from None


# A GGUF of an older version holds its numbers as text.
_LABEL = record(
    {
        "mtp": either(FLAG, one_of(["True", "False"])),
        "tensors": TEXT,
    },
    {
        "direction_sha256": TEXT,
        "strength": either(schema.number(), schema.text(r"-?\d{1,9}(\.\d{1,30})?", "a number")),
        "layers": schema.text(r"all|\d{1,6}(,\d{1,6}){0,9999}", '"all", or numbers of layers'),
        "embedding": either(FLAG, one_of(["True", "False"])),
    },
)
