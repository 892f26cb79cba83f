"""The models that are written: an MLX folder, a GGUF, or several of them, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from abl_mlx import mlx_edit, notes
from abl_mlx.apply import LeakReport, Plan, TensorEdit, measure_leak
from abl_mlx.models import ChatModel, progress
from abl_mlx.provenance import gguf_metadata, without_home
from abl_mlx.report import card
from abl_mlx.sources import Source
from abl_mlx.strict_json import to_json
from abl_mlx.units import in_bytes
from convert import adapters, control_vector
from convert.atomic import check_new, claim, new_files, new_folder
from convert.errors import UserError
from convert.hf_config import stored_config
from convert.mlx_folder import FLOAT_DTYPES, float_dtype, rewrite_folder
from convert.safetensors_files import TensorFiles, TensorInfo
from convert.suffixes import ends_in, is_gguf_name, without


@dataclass(frozen=True)
class Output:
    """A place where an edited model goes.

    Attributes:
        path: the final name. ``.gguf`` is a GGUF, ``.adapter`` an mlx-lm adapter, anything else an
            MLX folder.
        staged: where it is written until everything about it is known.
    """

    path: Path
    staged: Path

    @property
    def is_gguf(self) -> bool:
        """Whether a GGUF file is written, rather than an MLX folder."""
        return is_gguf_name(self.path)

    @property
    def is_adapter(self) -> bool:
        """Whether an mlx-lm adapter is written, rather than a model."""
        return adapters.is_mlx(self.path)

    @property
    def format(self) -> str:
        """What is written, in words."""
        return "GGUF" if self.is_gguf else "MLX adapter" if self.is_adapter else "MLX"


#: What is written beside the model in an output's folder, and never copied from a source's.
COMPANIONS = ("README.md", "abl.json", "report.html")


def companions(path: Path) -> dict[str, Path]:
    """Where an output's record, card and Modelfile go.

    Inside a folder they are abl.json and README.md; beside NAME.gguf they are NAME.abl.json,
    NAME.README.md and NAME.Modelfile, so that several GGUFs may share a folder.
    """
    if is_gguf_name(path):
        beside = {
            "record": path.with_name(f"{path.stem}.abl.json"),
            "card": path.with_name(f"{path.stem}.README.md"),
        }
        if adapters.is_lora(path):  # Ollama imports none
            return beside
        return {**beside, "modelfile": path.with_name(f"{path.stem}.Modelfile")}
    return {"record": path / "abl.json", "card": path / "README.md"}


def report_place(path: Path) -> Path:
    """Where the page of a run goes: inside an output's folder, or beside NAME.gguf."""
    if is_gguf_name(path):
        return path.with_name(f"{path.stem}.report.html")
    return path / "report.html"


def check_reports(paths: Sequence[Path], wanted: Path | None) -> None:
    """Refuse pages of a run that exist or cannot be written.

    Args:
        wanted: where its page goes instead, if given.

    Raises:
        UserError: naming the page.
    """
    if wanted is not None:
        check_report(wanted)
        return
    for path in paths:
        if is_gguf_name(path):
            check_new(report_place(path))


def check_report(path: Path) -> None:
    """Refuse a page that exists, cannot be written, or is called like something else.

    Raises:
        UserError: naming it.
    """
    if not ends_in(path, ".html", ".htm"):
        raise UserError(f"{path}: the name of a report ends in .html.")
    check_new(path)


def check(paths: Sequence[Path], source: Source, *, vectors: bool = False) -> None:
    """Refuse outputs that exist, repeat, cannot be written, or lie inside the source.

    Args:
        vectors: whether control vectors may be among them.

    Raises:
        UserError: naming the output.
    """
    if not paths:
        raise UserError("say where the edited model goes: -o FOLDER or -o FILE.gguf.")
    seen = set()
    for path in paths:
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
        if control_vector.is_control_vector(path) and not vectors:
            raise UserError(
                f"{path} would be a control vector, which adds one vector to every token and "
                "removes nothing: `abl-mlx run --induce` writes one that makes a model refuse."
            )
        if adapters.is_mlx(path) and source.is_gguf:
            raise UserError(
                f"{path} would be an adapter for mlx-lm, and {source.name} is a GGUF: write "
                f"-o {path.stem}{adapters.GGUF_SUFFIX}, or convert the model first."
            )
        if adapters.is_lora(path) and not source.is_gguf:
            raise UserError(
                f"{path} would be an adapter for a GGUF, and has to be computed from that very "
                f"file: name it with --gguf BASE.gguf, or write -o "
                f"{without(path.name, adapters.GGUF_SUFFIX)}{adapters.SUFFIX} for mlx-lm."
            )
        claim(path)
        if is_gguf_name(path):
            for companion in companions(path).values():
                check_new(companion)


@contextmanager
def staging(paths: Sequence[Path]) -> Iterator[list[Output]]:
    """Yield the outputs with their staged names; rename all of them when the block ends well."""
    with ExitStack() as stack:
        outputs = []
        for path in paths:
            if is_gguf_name(path):
                # With what lies beside it: all of it gets its names together.
                staged = stack.enter_context(new_files(path)) / path.name
            else:
                staged = stack.enter_context(new_folder(path))
            outputs.append(Output(path, staged))
        yield outputs


@dataclass(frozen=True)
class Written:
    """An output after its weights were written.

    Attributes:
        output: which.
        leak: measured by reading the written bytes.
        read_back: source tensor name -> its values in the output, float32, in the source's layout.
        types: how the edited tensors are stored, such as ``F16``.
        left_out: files of the source that were not copied.
        note: what a reader of the figures should know.
        embedding: whether an embedding was edited.
    """

    output: Output
    leak: LeakReport
    read_back: Callable[[str], mx.array]
    types: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    note: str | None = None
    embedding: bool = True


def write_folder(
    source: Source,
    chat: ChatModel,
    files: TensorFiles,
    plan: Plan,
    output: Output,
    label: Mapping[str, Any],
    max_leak: float,
    *,
    grid: str = "auto",
    plain: bool = False,
) -> Written:
    """Write the edited MLX folder to the output's staged name and measure its leak.

    Args:
        label: what config.json says of the edit, under the key ``abl_mlx``.
        grid: of quantized matrices: ``own``, ``fresh`` or ``auto``.
        plain: of quantized matrices: round every weight to its nearest level.
    """
    matrices = plan.matrices
    total = sum(file.stat().st_size for file in files.files)
    total += sum(files.info(name).nbytes for name in [*plan.edits, *matrices])
    with progress(total, f"write {output.path.name}", "B") as bar:
        left_out = rewrite_folder(
            source.path,
            files,
            output.staged,
            {name: _in_dtype(edit, files.info(name)) for name, edit in plan.edits.items()},
            config=edited_config(
                source.path, chat.config, label, mlx_edit.quantization_changes(matrices)
            ),
            rewrites=[
                mlx_edit.rewrite(files, one, grid=grid, plain=plain) for one in matrices.values()
            ],
            skip=COMPANIONS,
            progress=bar.update,
        )
    _keep_card(source.path, output.staged)
    with TensorFiles(output.staged) as written:

        def read_back(name: str) -> mx.array:
            if name in matrices:
                return matrices[name].values(written)
            return written.read(name).astype(mx.float32)

        leak = measure_leak(
            files,
            plan.edits,
            read_back,
            limit=max_leak,
            output=str(output.path),
            others=mlx_edit.comparisons(files, written, matrices),
        )
    types = {files.info(name).dtype for name in plan.edits}
    types |= {one.type for one in matrices.values()}
    return Written(
        output,
        leak,
        read_back,
        tuple(sorted(types)),
        tuple(left_out),
        note=notes.not_copied(left_out),
    )


def _in_dtype(edit: TensorEdit, info: TensorInfo) -> Callable[[mx.array], mx.array]:
    """The edit, its values rounded to the tensor's own dtype so that it survives there."""
    dtype = float_dtype(info)
    return lambda values: edit.rounded(edit(values), dtype)


def edited_config(
    folder: Path,
    filled: Mapping[str, Any],
    label: Mapping[str, Any],
    quantization: Mapping[str, Any],
) -> dict[str, Any]:
    """config.json as it was, with what mlx-lm needs filled in and the edit's label.

    Args:
        quantization: module path -> its new entry in the map of quantized modules.
    """
    original = stored_config(folder)
    # What mlx-lm fills in from generation_config.json stays there.
    added = {key: value for key, value in filled.items() if key != "eos_token_id"}
    config = {**added, **original, "abl_mlx": dict(label)}
    # mlx-lm writes the map under both names, and reads the first.
    for key in ("quantization", "quantization_config"):
        if quantization and isinstance(config.get(key), dict) and "bits" in config[key]:
            config[key] = {**config[key], **quantization}
    return config


def _keep_card(source: Path, out: Path) -> None:
    if (source / "README.md").is_file():
        (out / "README.source.md").write_bytes((source / "README.md").read_bytes())


def write_gguf_file(
    source: Source,
    files: TensorFiles,
    plan: Plan,
    output: Output,
    label: Mapping[str, Any],
    file_type: str,
    max_leak: float,
    plain: bool = False,
) -> Written:
    """Write the edited GGUF to the output's staged name and measure its leak."""
    from convert.mlx_to_gguf import write_gguf
    from convert.ollama import lost_of_template

    with progress(1, f"write {output.path.name}", "tensor") as bar:

        def moved(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = write_gguf(
            source.path,
            output.staged,
            file_type=file_type,
            edits=plan.edits_of_gguf,
            metadata=gguf_metadata(source, label),
            quantize=None if plain else _quantizer(plan),
            progress=moved,
        )

    read_back = _gguf_reader(output.staged, report.tensors)
    edits = plan.edits_of_gguf
    leak = measure_leak(files, edits, read_back, limit=max_leak, output=str(output.path))
    types = tuple(sorted({report.types[report.tensors[name]] for name in edits}))
    note = notes.joined(
        notes.vision(report.left_out),
        notes.modelfile(lost_of_template(output.staged, source.path)),
    )
    return Written(output, leak, read_back, types, note=note)


def _quantizer(plan: Plan) -> Callable[[str, Any, Any], Any]:
    from abl_mlx.gguf_edit import quantize, rounded_to_float
    from convert.mlx_to_gguf import encode

    def encoded(name: str, values: Any, kind: Any) -> Any:
        one = plan.edits[name]
        dtype = FLOAT_DTYPES.get(kind.name)
        if dtype is None:
            return quantize(one, values, kind)
        return encode(rounded_to_float(one, values, dtype), kind, name)

    return encoded


def _gguf_reader(path: Path, names: Mapping[str, str]) -> Callable[[str], mx.array]:
    """Read a GGUF's tensors under their source names: one expert of a stack, or the whole."""
    from convert.gguf_file import read_tensor

    sources: dict[str, list[str]] = {}
    for source, name in names.items():
        sources.setdefault(name, []).append(source)
    # A stack is decoded once for all of its experts, which follow one another.
    read = lru_cache(maxsize=1)(lambda name: mx.array(read_tensor(path, name)))

    def read_back(source: str) -> mx.array:
        stack = sources[names[source]]
        whole = read(names[source])
        return whole if len(stack) == 1 else whole[stack.index(source)]

    return read_back


def write_companions(
    written: Written,
    source: Source,
    record: Mapping[str, Any],
    described: Mapping[str, Any],
) -> None:
    """Write the record, the card and, for a GGUF, the Modelfile of an output.

    Args:
        described: what the record says of this output.
    """
    record_name = companions(written.output.path)["record"].name
    contents = {
        "record": to_json(without_home(record)) + "\n",
        "card": card(
            record, described, source.title, record_name, adapter=written.output.is_adapter
        ),
    }
    staged = written.output.staged
    if written.output.is_gguf:
        from convert.ollama import modelfile

        contents["modelfile"] = modelfile(staged, source.path, written.output.path.name)
    for key, place in companions(staged).items():
        place.write_text(contents[key], encoding="utf-8")


def check_space(paths: Sequence[Path], needed: int) -> None:
    """Refuse, before any long work, to begin what the disk cannot hold.

    Args:
        needed: bytes of one output; a GGUF of a smaller type will need less.
    """
    for path in paths:
        folder = path.absolute().parent
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if free < needed * len(paths):
            raise UserError(
                f"{folder} has {in_bytes(free)} free, and the output needs up to "
                f"{in_bytes(needed * len(paths))}: free some space or choose another -o."
            )
