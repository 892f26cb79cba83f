"""Base class of objects that hold files or a process until the end of a ``with`` block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeVar

Self = TypeVar("Self", bound="Closing")  # typing.Self is of Python 3.11


class Closing(ABC):
    """A context manager whose end, normal or by an exception, calls `close`."""

    @abstractmethod
    def close(self) -> None:
        """Release what the object holds; a second call does nothing."""

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
