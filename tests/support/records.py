"""Records for tests of what reads them."""

from __future__ import annotations

from typing import Any

from abl_mlx.records.evaluations import EvalRecord


def evaluated(**fields: Any) -> EvalRecord:
    """The record of an evaluation: ten prompts of each set, all judged, none refused or broken."""
    values: dict[str, Any] = {
        "abl_mlx": "0", "source": "m", "runtime": "mlx-lm", "judge": "markers", "max_tokens": 1,
        "broken_rate": 0.0, "categories": {}, "prompts": {}, "seconds": {},
        "verdicts": {"harmful": "A" * 10, "harmless": "A" * 10},
    }  # fmt: skip
    for name in ("harmful", "harmless"):
        values |= {
            f"{name}_refusal_rate": 0.0, f"{name}_refusal_interval": [0.0, 0.3], f"n_{name}": 10
        }  # fmt: skip
    return EvalRecord(**{**values, **fields})
