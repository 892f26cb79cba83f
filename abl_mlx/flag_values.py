"""What the groups of flags in `abl_mlx.choices` and `abl_mlx.eval_choices` have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

Self = TypeVar("Self", bound="Choices")  # typing.Self is of Python 3.11


@dataclass(frozen=True)
class Choices:
    """Values of flags: one group of them, or several groups composed."""

    @classmethod
    def of(cls: type[Self], **flags: Any) -> Self:
        """The record with these values of flags, each of which goes to the group that has it.

        Raises:
            TypeError: for a name that no group has.
        """
        return cls().but(**flags)

    def but(self: Self, **flags: Any) -> Self:
        """The same record with other values of these flags.

        Raises:
            TypeError: for a name that no group has.
        """
        if unknown := sorted(set(flags) - set(self.names())):
            raise TypeError(f"{type(self).__name__} has no {', '.join(unknown)}")
        values: dict[str, Any] = {}
        for field in fields(self):
            group = _group(field)
            if group is not None:
                mine = {name: flags[name] for name in group.names() if name in flags}
                values[field.name] = getattr(self, field.name).but(**mine)
            elif field.name in flags:
                values[field.name] = flags[field.name]
        return replace(self, **values)

    @classmethod
    def names(cls) -> Iterator[str]:
        """The names of all flags, group after group."""
        for field in fields(cls):
            group = _group(field)
            if group is None:
                yield field.name
            else:
                yield from group.names()

    @classmethod
    def kinds(cls) -> dict[str, Any]:
        """The name of each flag -> the type of its values."""
        hints = get_type_hints(cls)
        found: dict[str, Any] = {}
        for field in fields(cls):
            group = _group(field)
            found |= {field.name: hints[field.name]} if group is None else group.kinds()
        return found

    @classmethod
    def of_record(cls: type[Self], values: Mapping[str, Any]) -> Self:
        """The record with values that `record` returned; names that no group has are ignored."""
        known = {name: kind for name, kind in cls.kinds().items() if name in values}
        return cls.of(**{name: _from_json(values[name], kind) for name, kind in known.items()})

    def record(self) -> dict[str, Any]:
        """The name of each flag -> its value as a JSON value, without the groups."""
        found: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Choices):
                found |= value.record()
            elif isinstance(value, frozenset):
                found[field.name] = sorted(value)
            else:
                found[field.name] = str(value) if isinstance(value, Path) else value
        return found


def _group(field: Field[Any]) -> type[Choices] | None:
    """The class of a field that holds a group of flags; None for other fields."""
    return type(field.default) if isinstance(field.default, Choices) else None


def _from_json(value: Any, kind: Any) -> Any:
    """A flag's value from its JSON value; its type may be a union."""
    kinds = get_args(kind) or (kind,)
    if isinstance(value, str) and Path in kinds:
        return Path(value)
    return frozenset(value) if isinstance(value, list) else value
