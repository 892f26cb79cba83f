"""Audit models: make an edited copy, and show that its weights reveal the edit.

    python examples/audit_models.py            # the demo, and an edited copy of it
    python examples/audit_models.py MODEL...   # any models: nothing is written

A verdict is ``edited``, ``not edited`` or ``cannot tell``, from the weights alone.
"""

# %% Which models
import sys
import tempfile
from pathlib import Path

import abl_mlx

with tempfile.TemporaryDirectory() as place:
    models = sys.argv[1:]
    if not models:
        edited = Path(place) / "edited"
        model = abl_mlx.load("demo")
        direction = abl_mlx.choose(model, abl_mlx.load_prompts(model=model))
        record = abl_mlx.apply(direction, "demo", edited)
        print(f"written: {edited.name}, leak {record['leak']['total']:.1e}")
        models = ["demo", str(edited)]

    # %% The verdicts
    for name in models:
        found = abl_mlx.audit(name)
        print(f"{Path(name).name}: {found['verdict']}")
