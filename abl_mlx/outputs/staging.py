"""Output paths: formats, temporary (staged) places, and companion files beside a model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from abl_mlx.behaviour.evaluate import InLlamaCpp
from abl_mlx.inputs.sources import Source
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.writers import Writer
from abl_mlx.records.edits import WrittenEdit
from abl_mlx.support import ranks
from abl_mlx.support.units import in_bytes
from convert import adapters
from convert.base.atomic import check_new, claim, new_files, new_folder
from convert.base.errors import UserError
from convert.base.suffixes import ends_in, is_gguf_name, without
from convert.gguf import control_vector

#: Names of the output formats.
FOLDER, GGUF, ADAPTER, LORA, VECTOR = "MLX", "GGUF", "MLX adapter", "GGUF LoRA", "control vector"

#: What an output's name begins with if it is a place in an app: Ollama's store, LM Studio's models.
APPS = OLLAMA, LM_STUDIO = "ollama:", "lmstudio:"

#: Formats of whole models, and formats of adapters that a runtime adds to a model.
MODELS, ADAPTERS = (FOLDER, GGUF), (ADAPTER, LORA)


def format_of(path: Path) -> str:
    """The format of an output by its name: an MLX folder, unless its suffix says otherwise."""
    if adapters.is_mlx(path):
        return ADAPTER
    if not is_gguf_name(path):
        return FOLDER
    if adapters.is_lora(path):
        return LORA
    return VECTOR if control_vector.is_control_vector(path) else GGUF


def is_file(path: Path) -> bool:
    """Whether an output is a file, with companion files beside it, rather than a folder."""
    return format_of(path) not in (FOLDER, ADAPTER)


@dataclass(frozen=True)
class Output:
    """An output of a run.

    Attributes:
        path: its final path, whose name says the format.
        staged: its temporary path until the run is complete: a folder, or a file in a temporary
            folder that holds only this file and its companions.
    """

    path: Path
    staged: Path

    @property
    def format(self) -> str:
        """The name of its format."""
        return format_of(self.path)


@dataclass(frozen=True)
class Written:
    """An output after its weights were written.

    Attributes:
        output: which.
        facts: what a record says of it.
        opened: gives the output as a model in MLX, read back from the bytes written; its argument
            says whether the model is streamed.
        on_loaded: whether `opened` uses the model that was loaded for the run.
        llamacpp: the output in llama.cpp; None if llama.cpp does not run it.
        notes: notes on its figures if MLX gave the replies, and if llama.cpp did.
        limit: the largest component of the direction that a complete edit may leave in the stream;
            None if the edit need not be exact.
        writers_in: finds the writers of the model from `opened`; None to find them by probing.
    """

    output: Output
    facts: WrittenEdit
    opened: Callable[[bool], AbstractContextManager[ChatModel]]
    on_loaded: bool = False
    llamacpp: InLlamaCpp | None = None
    notes: tuple[str | None, str | None] = (None, None)
    limit: float | None = None
    writers_in: Callable[[ChatModel], Sequence[Writer] | None] = lambda chat: None


# --- before anything is written ----------------------------------------------------------------


#: Files that are written beside the model in an output's folder, and not copied from the source.
COMPANIONS = ("README.md", "abl.json", "report.html")


def companions(path: Path) -> dict[str, Path]:
    """The paths of an output's record, card and Modelfile.

    Inside a folder they are abl.json and README.md; beside NAME.gguf they are NAME.abl.json,
    NAME.README.md and NAME.Modelfile, so that several GGUFs may share a folder.
    """
    if is_file(path):
        beside = {
            "record": path.with_name(f"{path.stem}.abl.json"),
            "card": path.with_name(f"{path.stem}.README.md"),
        }
        if format_of(path) != GGUF:  # Ollama imports only GGUFs
            return beside
        return {**beside, "modelfile": path.with_name(f"{path.stem}.Modelfile")}
    return {"record": path / "abl.json", "card": path / "README.md"}


def report_place(path: Path) -> Path:
    """The path of a run's report: inside an output's folder, or beside NAME.gguf."""
    if is_file(path):
        return path.with_name(f"{path.stem}.report.html")
    return path / "report.html"


def check_reports(paths: Sequence[Path], wanted: Path | None) -> None:
    """Refuse reports that exist or cannot be written.

    Args:
        paths: the outputs.
        wanted: the path of the report, if the user gave one.

    Raises:
        UserError: naming the report.
    """
    if wanted is not None:
        check_report(wanted)
        return
    for path in paths:
        if is_file(path):
            check_new(report_place(path))


def check_report(path: Path) -> None:
    """Refuse a report that exists, cannot be written, or does not end in .html.

    Raises:
        UserError: naming the report.
    """
    if not ends_in(path, ".html", ".htm"):
        raise UserError(f"{path}: the name of a report ends in .html.")
    check_new(path)


def check(paths: Sequence[Path], source: Source, adapter: str, *, vectors: bool = False) -> None:
    """Refuse outputs that exist, repeat, cannot be written, or lie inside the source.

    Args:
        paths: the outputs.
        source: the source model.
        adapter: the format of adapters for the source.
        vectors: whether control vectors may be among the outputs.

    Raises:
        UserError: naming the output.
    """
    if not paths:
        raise UserError("say where the edited model goes: -o FOLDER or -o FILE.gguf.")
    seen = set()
    for path in paths:
        if str(path).startswith(APPS):
            raise UserError(
                f"{path}: only `run` and `apply` write into an app; write a folder or NAME.gguf."
            )
        whole = path.absolute()
        if whole in seen:
            raise UserError(f"{path} is given twice as an output.")
        seen.add(whole)
        if source.path.resolve() in (whole.resolve(), *whole.resolve().parents):
            raise UserError(f"{path} lies inside the source {source.path}: choose another -o.")
        if ends_in(path, ".safetensors", ".npz", ".npy", ".bin"):
            raise UserError(
                f"{path}: an output is a folder (MLX) or ends in .gguf; name the folder instead."
            )
        form = format_of(path)
        if form == VECTOR and not vectors:
            raise UserError(
                f"{path} would be a control vector, which adds one vector to every token and "
                "removes nothing: `abl-mlx run --induce` writes one that makes a model refuse."
            )
        if form == ADAPTER != adapter:
            raise UserError(
                f"{path} would be an adapter for mlx-lm, but {source.name} is a GGUF: write "
                f"-o {path.stem}{adapters.GGUF_SUFFIX}, or convert the model first."
            )
        if form == LORA != adapter:
            raise UserError(
                f"{path} would be an adapter for a GGUF, and has to be computed from that very "
                f"file: name it with --gguf BASE.gguf, or write -o "
                f"{without(path.name, adapters.GGUF_SUFFIX)}{adapters.SUFFIX} for mlx-lm."
            )
        claim(path)
        if is_file(path):
            for companion in companions(path).values():
                check_new(companion)


@contextmanager
def staging(paths: Sequence[Path]) -> Iterator[list[Output]]:
    """Context manager with the staged outputs; all are renamed when the block ends well."""
    with ExitStack() as stack:
        outputs = []
        for path in paths:
            if is_file(path):
                # The file and its companions get their final names together.
                staged = stack.enter_context(new_files(path)) / path.name
            else:
                staged = stack.enter_context(new_folder(path))
            outputs.append(Output(path, staged))
        yield outputs
        ranks.agree("writing is complete")


# --- beside what is written --------------------------------------------------------------------


def check_space(paths: Sequence[Path], needed: int) -> None:
    """Check, before any long work, that the disks have space for the outputs.

    Args:
        paths: the outputs.
        needed: the bytes of one output; a GGUF of a smaller type will need less.

    Raises:
        UserError: naming a folder with too little space.
    """
    for path in paths:
        folder = path.absolute().parent
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if free < needed * len(paths):
            raise UserError(
                f"{folder} has {in_bytes(free)} free, but the output needs up to "
                f"{in_bytes(needed * len(paths))}: free some space or choose another -o."
            )
