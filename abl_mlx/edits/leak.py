"""The leak of every edited tensor of one output, measured from the bytes written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from abl_mlx.edits.edit import Leak, total_leak
from abl_mlx.records.edits import Leaks, TensorLeak
from convert.base.errors import UserError


@dataclass(frozen=True)
class Details:
    """Facts about a written tensor besides its leak.

    Attributes:
        codes_changed: the share of codes that differ; None if the types differ.
        bytes_changed: the number of bytes that differ; None if the types differ.
        type: the type in which it was written.
    """

    codes_changed: float | None
    bytes_changed: int | None
    type: str


@dataclass(frozen=True)
class LeakReport:
    """The leak of every edited tensor of an output.

    Attributes:
        tensors: source tensor name -> Leak.
        details: source tensor name -> further facts about the written tensor.
    """

    tensors: dict[str, Leak]
    details: Mapping[str, Details] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """The leak of all edited tensors together."""
        return total_leak(list(self.tensors.values()))

    @property
    def worst(self) -> tuple[str, float]:
        """The name of the tensor with the largest leak, and that leak."""
        name = max(self.tensors, key=lambda name: self.tensors[name].value)
        return name, self.tensors[name].value

    @property
    def error(self) -> float:
        """The relative error of the weights of all edited tensors together."""
        return sum(self.tensors.values(), start=Leak()).error

    def record(self) -> Leaks:
        """The report as a part of a record."""
        tensors = {
            name: _tensor_leak(leak, self.details.get(name)) for name, leak in self.tensors.items()
        }
        return Leaks(total=self.total, max=self.worst[1], tensors=tensors)

    def check(self, output: str, limit: float, mend: str) -> None:
        """Check the total leak against a limit.

        Args:
            output: the output's name, for the message.
            limit: the largest allowed total leak.
            mend: advice for the message, besides raising the limit.

        Raises:
            UserError: when the total is above ``limit``, or the edit changed nothing.
        """
        if self.total <= limit:
            return
        worst, value = self.worst
        raise UserError(
            f"the edit did not survive in {output}: {self.total:.1%} of the component is still in "
            f"the weights (most in {worst}: {value:.1%}) and --max-leak is {limit:g}; {mend}, or "
            "raise --max-leak."
        )


def _tensor_leak(leak: Leak, details: Details | None) -> TensorLeak:
    found = TensorLeak(leak=leak.value, weight_error=leak.error)
    if details is None:
        return found
    known = vars(details)
    nulls = frozenset(name for name, value in known.items() if value is None)
    return replace(found, **known, nulls=nulls)
