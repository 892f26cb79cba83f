"""The label in which an edited model describes its edit, read from its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from abl_mlx.choices import PLACES
from convert.base import schema
from convert.base.errors import UserError
from convert.base.schema import FLAG, TEXT, Refused, check, either, one_of, record
from convert.gguf.file import GgufSource


@dataclass(frozen=True)
class Label:
    """The description of an edit in an edited model's files."""

    direction_sha256: str
    strength: float
    layers: frozenset[int] | None
    embedding: bool
    mtp: bool = False
    tensors: str | None = None
    is_plain: bool = True
    edit: str = "writers"
    updates: bool = False


def gguf_label(source: GgufSource) -> dict[str, Any]:
    """The values of a GGUF's ``abl_mlx.*`` keys, by the names after that prefix; may be empty."""
    found = source.metadata
    return {key.removeprefix("abl_mlx."): found[key] for key in found if key.startswith("abl_mlx.")}


def read_label(values: Mapping[str, Any] | None, name: str) -> Label:
    """The label from config.json's ``abl_mlx``, or from a GGUF's ``abl_mlx.*`` keys.

    Args:
        values: the label's values, or None.
        name: the model's name, for messages.

    Raises:
        UserError: when there is no label, because abl-mlx did not edit the model, or when the label
            is incomplete.
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
            not {"norm", "pin", "recipe", "heads", "experts"} & set(values),
            str(values.get("edit", "writers")),
            "updates" in values,
        )
    except Refused as refused:
        raise UserError(
            f"{name} does not say in full how abl-mlx edited it, so there is nothing to undo by: "
            f"of its abl_mlx label, {refused}."
        ) from None


# GGUFs written by older versions of abl-mlx hold numbers as text.
_LABEL = record(
    {
        "mtp": either(FLAG, one_of(["True", "False"])),
        "tensors": TEXT,
        "edit": one_of(PLACES),
    },
    {
        "direction_sha256": TEXT,
        "strength": either(schema.number(), schema.text(r"-?\d{1,9}(\.\d{1,30})?", "a number")),
        "layers": schema.text(r"all|\d{1,6}(,\d{1,6}){0,9999}", '"all", or numbers of layers'),
        "embedding": either(FLAG, one_of(["True", "False"])),
    },
)
