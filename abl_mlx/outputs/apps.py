"""Outputs inside the stores of apps, and the commands that open an output.

``-o ollama:NAME`` files a GGUF in Ollama's store, without its program. ``-o lmstudio:OWNER/NAME``
writes a model where LM Studio looks.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from abl_mlx.flag_values import Choices
from abl_mlx.inputs.sources import Source
from abl_mlx.outputs import staging
from abl_mlx.outputs.further_files import FurtherFiles
from abl_mlx.outputs.model_file import ModelFile
from abl_mlx.support.console import say
from convert import lmstudio
from convert.base.errors import UserError
from convert.gguf.parts import parts_there
from convert.ollama import store, store_writing
from convert.ollama.description import describe
from convert.ollama.store import OllamaName

Options = TypeVar("Options", bound=Choices)


@dataclass(frozen=True)
class Placed:
    """Where the outputs that the user named are written.

    Attributes:
        paths: the paths, in the user's order.
        in_ollama: of these the GGUFs that are filed in Ollama's store at the end -> their names.
        in_lm_studio: of these the ones that LM Studio gets -> ``OWNER/NAME``.
        imported: of these the GGUFs that its program `lms` is given at the end.
    """

    paths: tuple[Path, ...]
    in_ollama: Mapping[Path, OllamaName] = field(default_factory=dict)
    in_lm_studio: Mapping[Path, str] = field(default_factory=dict)
    imported: frozenset[Path] = frozenset()

    def joined(self, options: Options) -> Options:
        """The options of a command; with ``join`` where an output goes to Ollama, as one file."""
        return options.but(join=True) if self.in_ollama else options


def placed(outputs: Sequence[Path], source: Source, *, overwrite: bool = False) -> Placed:
    """Find the places of outputs, of which some may be ``ollama:NAME`` or ``lmstudio:OWNER/NAME``.

    A GGUF for Ollama is first written to NAME.gguf (NAME-TAG.gguf) in the working folder, where its
    record and card stay; so is one for LM Studio where its program `lms` is there to file it. In LM
    Studio the format is that of the source: a GGUF stays one, a folder becomes an MLX folder.

    Args:
        outputs: the outputs as the user named them.
        source: the source model.
        overwrite: whether models in Ollama that have a name already may be replaced.

    Raises:
        UserError: when a name is not one, is taken, or the app is not here.
    """
    if overwrite and not any(str(one).startswith(staging.OLLAMA) for one in outputs):
        raise UserError("--overwrite replaces a model in Ollama only: it needs -o ollama:NAME.")
    paths: list[Path] = []
    in_ollama: dict[Path, OllamaName] = {}
    in_lm_studio: dict[Path, str] = {}
    imported: set[Path] = set()
    for output in outputs:
        text, path = str(output), output
        if text.startswith(staging.OLLAMA):
            name = store_writing.check(
                text.removeprefix(staging.OLLAMA),
                overwrite=overwrite,
                mend=", or replace it with --overwrite",
            )
            path = Path(f"{name.title.replace(':', '-')}.gguf")
            in_ollama[path] = name
        elif text.startswith(staging.LM_STUDIO):
            owner, named = lmstudio.parse(text.removeprefix(staging.LM_STUDIO))
            path = lmstudio.models_folder() / owner / named
            if source.gguf is not None:
                path = path / f"{named}.gguf"
                if lmstudio.program() is not None:
                    lmstudio.check_import(owner, named)
                    path = Path(path.name)
                    imported.add(path)
            in_lm_studio[path] = f"{owner}/{named}"
        paths.append(path)
    return Placed(tuple(paths), in_ollama, in_lm_studio, frozenset(imported))


def deliver(places: Placed, model: ModelFile, *, overwrite: bool = False) -> None:
    """File the GGUFs that go to apps; their records, cards and reports stay where they are.

    Args:
        places: where the outputs were written.
        model: the source model.
        overwrite: whether models that have a name already are replaced.
    """
    for path, name in places.in_ollama.items():
        kept, further = model.source.ollama, model.further
        settings = describe(path, model.folder)[0] if kept is None else kept
        projectors = further.filed(path)
        taken = store.contains(name)
        store_writing.file(
            name, path, settings, projectors=projectors, draft=further.draft, overwrite=overwrite
        )
        if taken:
            say(
                f"{name} was replaced in Ollama. What it had, and no other model has, stays on the "
                "disk until Ollama starts next and removes it."
            )
        for beside in [staging.companions(path)["modelfile"], *further.places([path])]:
            beside.unlink(missing_ok=True)
    for path in places.imported:
        files = [path] if path.exists() else list(parts_there(path))
        for one in (*files, *filter(Path.exists, model.further.places([path]))):
            lmstudio.import_file(one, places.in_lm_studio[path])
        staging.companions(path)["modelfile"].unlink(missing_ok=True)


def opening(path: Path, places: Placed, model: ModelFile, *, given_to: str | None) -> list[str]:
    """The commands that open an output.

    Args:
        path: the output.
        places: where the outputs are.
        model: the source model, to which an adapter is added.
        given_to: the name in Ollama under which `ollama create` filed the output, if it did.
    """
    if path in places.in_lm_studio:
        return [f"LM Studio: My Models, {places.in_lm_studio[path]}"]
    if path in places.in_ollama:
        return [f"ollama run {shlex.quote(str(places.in_ollama[path]))}"]
    here, form = shlex.quote(str(path)), staging.format_of(path)
    whole = shlex.quote(model.source.loaded_by)
    if form == staging.FOLDER:
        return [f"mlx_lm.chat --model {here}"]
    if form == staging.ADAPTER:
        return [f"mlx_lm.chat --model {whole} --adapter-path {here}"]
    if form == staging.LORA:
        return [f"llama-server -m {whole} --lora {here}"]
    if form == staging.VECTOR:
        return [f"llama-server -m {whole} --control-vector {here}"]
    return _of_gguf(path, model.further, given_to)


def _of_gguf(path: Path, further: FurtherFiles, given_to: str | None) -> list[str]:
    first = path if path.exists() else next(iter(parts_there(path)), path)
    command = f"llama-server -m {shlex.quote(str(first))}"
    names = further.names(path).projectors
    if names and path.with_name(names[0]).is_file():
        command += f" --mmproj {shlex.quote(str(path.with_name(names[0])))}"
    modelfile = staging.companions(path)["modelfile"]
    if given_to is not None:
        return [command, f"ollama run {shlex.quote(given_to)}"]
    if modelfile.is_file():
        name = re.sub(r"[^a-z0-9._-]+", "-", path.stem.lower()).strip(".-_") or "edited"
        create = f"ollama create {name} -f {shlex.quote(str(modelfile))}"
        return [command, f"{create} && ollama run {name}"]
    return [command]
