"""`abl-mlx undo`: restores the components that an edit removed from a float model.

The removed components come from one of three sources: a file that `--keep-undo` wrote with the
edit; the base model; or, at a strength other than 1, the edited weights, which still have the
components UᵀW' = (1 − α) UᵀW. At strength 1 one of the first two is needed.

The edit of a quantized model cannot be undone, because its rounding changed codes everywhere. An
edit of such a model can instead be written as an adapter, which is undone by not using it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from abl_mlx import __version__
from abl_mlx.directions import direction_file
from abl_mlx.edits.edit import Edit
from abl_mlx.edits.update import Update
from abl_mlx.edits.weight_edit import WeightEdit
from abl_mlx.outputs import destinations, staging
from abl_mlx.outputs.edit_label import Label, read_label
from abl_mlx.outputs.model_file import ModelFile, find_model
from abl_mlx.outputs.undo_file import Taken, kept_path, read_kept
from abl_mlx.outputs.undo_weights import quantized
from abl_mlx.records.edits import Restored, UndoRecord
from abl_mlx.support import notes
from abl_mlx.support.arrays import number
from abl_mlx.support.clock import Clock
from abl_mlx.support.console import say
from convert.base.errors import UserError
from convert.mlx.folder import FLOAT_DTYPES

#: If |1 − strength| is smaller than this, too little is left in the weights to restore them.
_LEAST_LEFT = 0.05

#: Largest relative difference between an edited weight and the edited base: rounding to bfloat16
#: and edit-preserving rounding cause some.
_MOST_OFF = 0.02


def undo(
    text: str,
    paths: Sequence[Path],
    *,
    factors: Path | None = None,
    direction: Path | None = None,
    base: str | None = None,
) -> UndoRecord:
    """Write the model as it was before the edit, or an adapter that undoes the edit.

    Args:
        text: the edited model, a folder or a GGUF with float weights.
        paths: the outputs: in the model's own format, or adapters for the edited model.
        factors: the undo file; None for the one in or beside the model, if there is one.
        direction: the edit's direction file, if there is no undo file.
        base: the model before the edit, used with ``direction``.

    Raises:
        UserError: when the removed components are not known, or a tensor is quantized.
    """
    clock = Clock()
    with find_model(text) as model:
        staging.check(paths, model.source, model.adapter)
        for path in paths:
            if staging.format_of(path) not in (model.format, model.adapter):
                raise UserError(
                    f"{path} has another format than {text}: undo writes the same one, or an "
                    "adapter."
                )
        destinations.check_further(paths, model)
        source = model.source
        if factors is None and direction is None and kept_path(source.path).is_file():
            factors = kept_path(source.path)
        with clock.step("undo"):
            label = read_label(model.label(), source.name)
            adapters = [path for path in paths if staging.format_of(path) == model.adapter]
            if label.updates and adapters:
                raise UserError(
                    f"{adapters[0]}: {source.name} was edited by --method rome, which is undone in "
                    "a model only; write that, or take the model that was edited."
                )
            found, how = _find(model, label, factors, direction, base)
            _check(model, found)
            written = [_write(model, path, found, label) for path in paths]
    return UndoRecord(
        abl_mlx=__version__,
        source=source.name,
        outputs=[str(path) for path in paths],
        from_=how,
        tensors=len(found),
        written=written,
        seconds=clock.seconds,
    )


def _write(model: ModelFile, path: Path, found: Mapping[str, Taken], label: Label) -> Restored:
    """Write the restored model, or an adapter that undoes the edit."""
    missing, form = None, staging.format_of(path)
    if form == model.adapter:
        model.restore_by_adapter(path, found, label)
    else:
        missing = model.restore(path, found)
        if form == staging.GGUF and (along := notes.came_along(model.further.place(path))):
            say(along)
    return Restored(output=str(path), format=form, missing=missing)


# --- what was taken ----------------------------------------------------------------------------


def _find(
    model: ModelFile,
    label: Label,
    factors: Path | None,
    direction: Path | None,
    base: str | None,
) -> tuple[dict[str, Taken], str]:
    """The removed components by tensor name, and the source from which they are known."""
    name = model.source.name
    if factors is not None:
        if not factors.is_file():
            raise UserError(f"{factors} is no file: give the undo file of {name}.")
        return read_kept(factors, label.direction_sha256), str(factors)
    if direction is None:
        raise UserError(
            f"{name} has lost what the edit took out, and no undo file lies with it: give one with "
            "--factors (--keep-undo writes it), or the --direction file with --base MODEL."
        )
    if not label.is_plain:
        raise UserError(
            f"{name} was edited in a way (--norm, --pin, --heads, --experts, or a strength for "
            "each layer) that only an undo file takes back: give it with --factors, or take the "
            "model it was made from."
        )
    file = direction_file.read(direction)
    if file.sha256 != label.direction_sha256:
        raise UserError(f"{direction} is not the direction that {name} was edited along.")
    edit: WeightEdit = Edit(
        file.selected, label.strength, label.layers, label.embedding, places=label.edit
    )
    if file.updates is not None:
        edit = Update(file.updates, label.strength)
    if base is None:
        found = model.taken(edit, label, model)
        return {key: _from_rest(one, name) for key, one in found.items()}, str(direction)
    with find_model(base) as before:
        if before.format != model.format:
            raise UserError(f"{base} has another format than {name}: give the very model.")
        found = model.taken(edit, label, before)
        for key, one in found.items():
            _check_base(key, base, one.put_back(model.values(key)), before.values(key))
    return found, base


def _from_rest(one: Taken, name: str) -> Taken:
    """The removed components, from those that an edit with a strength other than 1 left.

    Args:
        one: the components of the edited tensor.
        name: the tensor's name, for messages.
    """
    if one.fixed is not None:
        return replace(one, along=one.along + one.fixed)
    left = 1 - one.strength
    if abs(left) < _LEAST_LEFT:
        raise UserError(
            f"{name} was edited at strength {one.strength:g}, which leaves nothing in its weights "
            "to tell what was taken: give --base MODEL, or the undo file with --factors."
        )
    return replace(one, along=one.along / left)


def _check_base(name: str, base: str, restored: mx.array, was: mx.array) -> None:
    """Check that the base is the model that was edited.

    Raises:
        UserError: when it is another model.
    """
    off = restored - was
    share = (number((off * off).sum()) / max(number((was * was).sum()), 1e-30)) ** 0.5
    if not share <= _MOST_OFF:
        raise UserError(
            f"{name} in {base}, edited, is {share:.1%} off the edited model: give the very model "
            "that was edited."
        )


def _check(model: ModelFile, found: Mapping[str, Taken]) -> None:
    """Check that all tensors exist, are not quantized, and have the right shape.

    Raises:
        UserError: naming the tensor that does not.
    """
    source, kinds = model.source, model.kinds()
    for name, one in found.items():
        if name not in kinds:
            raise UserError(
                f"{source.name} has no tensor {name}, from which the edit took something: "
                "the undo file belongs to another model."
            )
        kind, shape = kinds[name]
        if kind not in FLOAT_DTYPES:
            raise quantized(name, source)
        if not one.fits(shape):
            raise UserError(
                f"{name} in {source.name} has the shape {shape}, from which "
                "the edit cannot have taken what the undo file holds: it is damaged, or "
                "belongs to another model."
            )
