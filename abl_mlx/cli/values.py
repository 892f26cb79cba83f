"""The types of flags' values: layers, positions, paths, pins."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import click

from abl_mlx.support.flags import PARTS


class Layers(click.ParamType):
    """Layer numbers such as ``3``, ``2-5`` or ``0,4-6``."""

    name = "layers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> frozenset[int]:
        if isinstance(value, frozenset):
            return value
        chosen: set[int] = set()
        try:
            for part in value.split(","):
                first, _, last = part.strip().partition("-")
                numbers = range(int(first), int(last or first) + 1)
                if not numbers:
                    raise ValueError(part)
                chosen.update(numbers)
        except ValueError:
            self.fail(f"{value!r} is no list of layers such as 3, 2-5 or 0,4-6.", param, ctx)
        return frozenset(chosen)


class Parts(click.ParamType):
    """A number of attention heads or experts, or named ones such as ``3.0,3.5``."""

    name = "parts"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value).replace(" ", "")
        if re.fullmatch(PARTS, text):
            return text
        told = f"{value!r} is no number, and no list of LAYER.NUMBER such as 3.0,3.5."
        self.fail(told, param, ctx)


class Bytes(click.ParamType):
    """A size such as ``2G``, ``500M`` or a number of bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"([1-9][0-9]*)\s*([KMGT]?)B?", value.strip().upper())
        if found is None:
            self.fail(f"{value!r} is no size such as 2G, 500M or 2000000000.", param, ctx)
        return int(found[1]) * 1000 ** ("KMGT".find(found[2]) + 1 if found[2] else 0)


class Lengths(click.ParamType):
    """Two or more numbers of tokens, such as ``32,64,128``."""

    name = "lengths"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> frozenset[int]:
        if isinstance(value, frozenset):
            return value
        parts = [part.strip() for part in value.split(",")]
        lengths = frozenset(int(part) for part in parts if re.fullmatch("[1-9][0-9]{0,5}", part))
        if len(lengths) != len(parts) or len(parts) < 2:
            self.fail(f"{value!r} is no list of numbers of tokens such as 32,64,128.", param, ctx)
        return lengths


class Features(click.ParamType):
    """Numbers of features such as ``12`` or ``12,345``, or ``auto``."""

    name = "features"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        parts = [part.strip() for part in str(value).split(",")]
        if parts != ["auto"] and not all(re.fullmatch("[0-9]{1,9}", part) for part in parts):
            self.fail(f"{value!r} is neither auto nor numbers such as 12,345.", param, ctx)
        return ",".join(parts)


class Position(click.ParamType):
    """A negative token offset, or ``instruction-end``."""

    name = "position"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        if value == "instruction-end" or isinstance(value, int):
            return value
        try:
            if int(value) < 0:
                return int(value)
        except ValueError:
            pass
        self.fail(f"{value!r} is neither instruction-end nor a number from -1 down.", param, ctx)


class Place(click.ParamType):
    """A path on this machine, in which a leading ``~`` is the home folder even without a shell."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        try:
            return Path(value).expanduser()
        except RuntimeError:  # ~nobody/...
            return Path(value)


HERE = Place()


class PinValue(click.ParamType):
    """``harmless``, ``harmful`` or a number."""

    name = "pin"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in ("harmless", "harmful"):
            try:
                if not math.isfinite(float(value)):
                    raise ValueError(value)
            except ValueError:
                self.fail(f"{value!r} is neither harmless, harmful nor a number.", param, ctx)
        return str(value)
