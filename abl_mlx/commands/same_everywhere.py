"""Whether all processes of ``mlx.launch`` work on the same model, prompts and versions."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from abl_mlx import __version__
from abl_mlx.inputs.sets import PromptSets, prompt_hashes
from abl_mlx.outputs.model_file import ModelFile
from abl_mlx.outputs.record_parts import combined_hash
from abl_mlx.support import ranks
from abl_mlx.support.clock import Clock


def check_same(
    clock: Clock, sets: PromptSets | None, model: ModelFile, base: ModelFile | None = None
) -> None:
    """Compare what every process has, before any of them works on it.

    Args:
        clock: times the reading of the files.
        sets: the prompts; None where none are asked.
        model: the model.
        base: the one of ``--gguf``, if there is one.

    Raises:
        UserError: naming what differs, and the process that has something else.
    """
    if ranks.everyone() == 1:
        return
    facts = {
        "the version of abl-mlx": __version__,
        **{f"the version of {name}": version(name) for name in ("mlx", "mlx-lm")},
    }
    if sets is not None:
        facts["the set of prompts"] = combined_hash(_all_prompts(sets))
    with clock.step("compare the files of all processes"):
        facts["the model"] = combined_hash(model.hashes())
        if base is not None:
            facts["the model of --gguf"] = combined_hash(base.hashes())
    ranks.check_same(facts)


def _all_prompts(sets: PromptSets) -> Mapping[str, Any]:
    test = {"harmful": sets.harmful, "harmless": sets.harmless, **sets.staying}
    return {
        **prompt_hashes(sets),
        **{f"{name} test": one.test.sha256 for name, one in test.items()},
    }
