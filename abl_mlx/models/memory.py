"""Checks before loading whether a model fits into this machine's memory."""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from abl_mlx.support import ranks
from abl_mlx.support.console import say
from abl_mlx.support.units import in_bytes
from convert.base.errors import UserError

# Bytes that a run needs besides the weights: Python, MLX, activations, an unpacked piece.
_BESIDE = 700_000_000

# A run that needs less than this many bytes is not announced.
_WORTH_SAYING = 1_000_000_000


@dataclass(frozen=True)
class Memory:
    """Amounts of memory in bytes.

    Attributes:
        total: the most that a process on this machine can have.
        free: the part of it that nothing uses at present; None where the system does not say.
    """

    total: int
    free: int | None


def machine() -> Memory:
    """The memory of this machine, or of the container or limit that this process runs in."""
    info: dict[str, Any] = dict(mx.device_info())
    pages = _sysconf("SC_PHYS_PAGES") * _sysconf("SC_PAGE_SIZE")
    limits = [int(info.get("memory_size", 0)), pages, _cgroup()]
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    limits.append(0 if soft == resource.RLIM_INFINITY else soft)
    total = min(limit for limit in limits if limit > 0)
    free = None
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        free = min(total, int(line.split()[1]) * 1024)
    return Memory(total, free)


def _sysconf(name: str) -> int:
    try:
        return os.sysconf(name)
    except (ValueError, OSError):
        return 0


def _cgroup() -> int:
    """The memory limit of the container in bytes; 0 where there is none."""
    for place in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            return int((Path("/sys/fs/cgroup") / place).read_text(encoding="ascii"))
    return 0


def needed(weights: int) -> int:
    """Bytes of memory that a run needs, given the bytes of the weights."""
    return weights + weights // 20 + _BESIDE


def usable(total: int) -> int:
    """Bytes of a Mac's memory that its GPU may have: macOS keeps a third, or a quarter, for others.

    Args:
        total: the Mac's memory in bytes.
    """
    return total * 2 // 3 if total <= 36 << 30 else total * 3 // 4


def fits(weights: int, memory: Memory | None = None) -> bool:
    """Whether this machine has the memory for a run with so many bytes of weights."""
    return weights <= (memory or machine()).total


def check(title: str, weights: int, *, asked: bool = True, memory: Memory | None = None) -> None:
    """Print on stderr how much memory a model needs, and check that the machine has it.

    Nothing is printed for models that need less than 1 GB.

    Args:
        title: the model's name.
        weights: the bytes of its weights.
        asked: False to skip the check and only print (--no-memory-check).
        memory: the machine's memory, if it is already known.

    Raises:
        UserError: when the weights alone are larger than the machine's whole memory.
    """
    if ranks.lockstep():
        weights //= ranks.everyone()
    whole = needed(weights)
    if whole < _WORTH_SAYING:
        return
    memory = memory or machine()
    if asked and weights > memory.total:
        raise UserError(
            f"{title} has {in_bytes(weights)} of weights, but this machine has "
            f"{in_bytes(memory.total)} of memory: take a smaller or a quantized model, "
            "`apply --lazy` a direction measured elsewhere, or try all the same with "
            "--no-memory-check."
        )
    free = "" if memory.free is None else f", {in_bytes(memory.free)} of it free"
    short = whole > (memory.total if memory.free is None else memory.free)
    say(
        f"{title} needs about {in_bytes(whole)} of memory; this machine has "
        f"{in_bytes(memory.total)}{free}{': expect it to be slow' if short else ''}."
    )
