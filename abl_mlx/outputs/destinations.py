"""Output paths: checked before any work, and given to apps afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from abl_mlx.choices import Editing, Replying, Writing
from abl_mlx.outputs import apps, staging, undo_file
from abl_mlx.outputs.apps import Placed
from abl_mlx.outputs.model_file import ModelFile
from abl_mlx.support.console import say
from convert.base.atomic import check_new
from convert.base.errors import UserError
from convert.ollama import client


def check(paths: Sequence[Path], model: ModelFile, editing: Editing, writing: Writing) -> None:
    """Check, before any work, that outputs are new and fit the model and the flags.

    Args:
        paths: the outputs.
        model: the model to be edited.
        editing, writing: the flags.

    Raises:
        UserError: naming the output or the flag.
    """
    staging.check(paths, model.source, model.adapter)
    adapter = next((one for one in paths if staging.format_of(one) in staging.ADAPTERS), None)
    if editing.edit == "routers" and adapter is not None:
        raise UserError(
            f"{adapter}: an adapter holds no bias of a router, which --edit routers changes: write "
            "a folder or a GGUF."
        )
    check_further(paths, model)
    if writing.keep_undo:
        undo_file.check_keep(paths, model.source.name, model.format, editing.norm)
    if writing.ollama_create is not None:
        first_gguf(paths, writing.ollama_create)


def check_reports(paths: Sequence[Path], replying: Replying) -> None:
    """Refuse files for replies and reports that exist or cannot be written."""
    if replying.save_replies is not None:
        check_new(replying.save_replies)
    staging.check_reports(paths, replying.report)


def check_further(paths: Sequence[Path], model: ModelFile) -> None:
    """Check that the further files of the source can be written beside GGUF outputs.

    Raises:
        UserError: naming a file that is in the way, or a folder with too little space.
    """
    outputs = [path for path in paths if staging.format_of(path) == staging.GGUF]
    if not outputs:
        return
    further = model.further
    for place in further.places(outputs):
        check_new(place)
    if further.size:
        staging.check_space(outputs, further.size)
    if further.undecided:
        names = ", ".join(path.name for path in further.undecided)
        say(
            f"{names} lie beside {model.source.path.name} and fit it: none is copied; for pictures "
            "or sound give llama.cpp one of them with --mmproj."
        )


def hand_over(places: Placed, model: ModelFile, writing: Writing) -> None:
    """Give the apps what they were to get, and say how each output is opened."""
    apps.deliver(places, model, overwrite=writing.overwrite)
    given: dict[Path, str] = {}
    if writing.ollama_create is not None:
        first = first_gguf(places.paths, None)
        client.ollama_create(writing.ollama_create, staging.companions(first)["modelfile"])
        given[first] = writing.ollama_create
    for path in places.paths:
        for command in apps.opening(path, places, model, given_to=given.get(path)):
            say(f"open it: {command}")


def first_gguf(paths: Sequence[Path], name: str | None) -> Path:
    """The GGUF among the outputs that Ollama is given.

    Args:
        paths: the outputs.
        name: the model's name in Ollama, which is checked unless it is None.

    Raises:
        UserError: when no output is a GGUF, or there is no program `ollama`.
    """
    found = [path for path in paths if staging.format_of(path) == staging.GGUF]
    if not found:
        raise UserError("--ollama-create needs a GGUF: add -o NAME.gguf.")
    if name is not None:
        client.check_create(name)
    return found[0]
