"""docs/several-macs.md: its table of memory, from `abl_mlx.models.memory`."""

from __future__ import annotations

from pathlib import Path

from abl_mlx.models import memory
from tools import marked

PAGE = Path(__file__).resolve().parent.parent / "docs" / "several-macs.md"

#: Weights of a model, in billions.
SIZES = 1, 4, 8, 14, 32, 70

#: Type -> bits of a weight, scales included.
BITS = {"16 bits": 16.0, "8 bits, Q8_0": 8.5, "Q6_K": 6.5625, "4 bits, Q4_K": 4.5}

#: Memory of Macs, in GB.
MACS = 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512


def mac(needed: int) -> str:
    """The smallest Mac on which the GPU may have so many bytes."""
    fitting = (size for size in MACS if memory.usable(size << 30) >= needed)
    return f"{next(fitting)} GB"


def table() -> str:
    """For each type and size the memory that a run needs, and the smallest Mac that has it.

    A second table has what each of two Macs needs for a model that they split.
    """
    return f"{_table(1)}\n\nEach of two Macs that split the model:\n\n{_table(2)}"


def _table(parts: int) -> str:
    head = "".join(f" {size} billion |" for size in SIZES)
    lines = [f"| weights in |{head}", f"|---|{'---|' * len(SIZES)}"]
    for name, bits in BITS.items():
        whole = [memory.needed(round(size * 1e9 * bits / 8 / parts)) for size in SIZES]
        cells = [f" {needed / 1e9:.1f} GB: {mac(needed)} |" for needed in whole]
        lines.append(f"| {name} |{''.join(cells)}")
    return "\n".join(lines)


def document() -> str:
    """The whole of docs/several-macs.md."""
    return marked.replaced(PAGE.read_text(encoding="utf-8"), "memory", table())
