"""The result of a search: the direction file with the chosen edit and with all that was tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from abl_mlx.behaviour import kept_refusals
from abl_mlx.directions import measuring
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.directions.variants import KINDS
from abl_mlx.search.screening import Trial
from abl_mlx.search.space import DEFAULT, Parameters, Space
from abl_mlx.search.survivors import Asked
from abl_mlx.support.console import say


def file_of(
    found: DirectionFile,
    trials: Sequence[Trial],
    space: Space,
    asked: Sequence[Asked],
    chosen: Asked,
    figures: Mapping[str, Any],
) -> DirectionFile:
    """The direction file with the chosen edit, and with all that was tried.

    Args:
        found: the choice before the search.
        trials: all that were tried.
        space: the parameters of edits.
        asked: the trials that generated replies.
        chosen: the one of them that was chosen.
        figures: of the search as a whole, for its record.
    """
    screened = chosen.trial.screened
    edited = with_edit(found, space, chosen.trial.parameters)
    default = next(trial for trial in trials if trial.screened.whole)
    by_default = {"refusal_score_default": default.screened.refusal}
    if "figure" in figures:
        by_default = {}
        figures = {**figures, "figure": {**figures["figure"], "default": default.screened.refusal}}
    summary = edited.metadata["summary"] | {
        "chosen_by": "search: lowest KL of those whose replies meet the target"
        if chosen.meets
        else "search: fewest refusals among the replies"
        if "figure" not in figures
        else "search: nearest to --target-figure",
        "search": {
            "trials": len(trials),
            **figures,
            "kl": screened.kl,
            "kl_default": default.screened.kl,
            **by_default,
            "forward_tokens": sum(trial.screened.tokens for trial in trials),
        },
    }
    if chosen.kept:
        summary["kept"] = {name: one.json for name, one in chosen.kept.items()}
        for name, kept in chosen.kept.items():
            say(f"  {'' if kept.enough else 'warning: '}{kept_refusals.sentence(name, kept)}")
    metadata = edited.metadata | {
        "summary": summary,
        "search": {
            "front": [one.record() for one in asked],
            "trials": [trial.record() for trial in trials],
        },
    }
    return replace(edited, metadata=metadata)


def with_edit(found: DirectionFile, space: Space, parameters: Parameters) -> DirectionFile:
    """The direction file with the edit of some parameters in place of its own."""
    selected = space.directions(parameters)
    summary = _summary(found, parameters, int(selected.shape[-2]))
    metadata = {key: value for key, value in found.metadata.items() if key != "pins"}
    metadata |= {
        "method": summary["method"], "summary": summary, "recipe": space.recipe(parameters),
    }  # fmt: skip
    return replace(found, selected=selected, metadata=metadata)


def _summary(found: DirectionFile, parameters: Parameters, rank: int) -> dict[str, Any]:
    """Where the directions of an edit come from, as in `records.directions.Selection`.

    Args:
        found: the choice before the search.
        parameters: of the edit.
        rank: the number of its directions.
    """
    before, name = found.metadata.get("summary", {}), parameters["method"]
    if name == DEFAULT:
        return dict(before)
    summary: dict[str, Any] = {"method": name}
    if name in KINDS:
        assert found.candidates is not None
        summary |= {"method": found.candidates.method, "orthogonal_to": name}
    if rank > 1:
        summary["rank"] = rank
    if "position" in before:
        summary["position"] = before["position"]
    if name.startswith("layers-rank"):
        return summary | {"method": measuring.METHOD, "across": "layers"}
    if parameters["per_layer"]:
        return summary | {"per_layer": True}
    return summary | {"layer": round(parameters["index"], 3)}
