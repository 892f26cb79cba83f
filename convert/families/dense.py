"""dense in mlx-lm."""

from __future__ import annotations

from convert.families.family import Family

FAMILIES: tuple[Family, ...] = ()
