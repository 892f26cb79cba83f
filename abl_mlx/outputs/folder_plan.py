"""An Edit applied to the tensors of model files, and its leak measured from what was written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from abl_mlx.edits.edit import Edit, Leak, leak, rounded, target
from abl_mlx.edits.leak import LeakReport
from abl_mlx.models.chat_model import ChatModel, skeleton
from abl_mlx.models.writers import Writer
from abl_mlx.outputs import head_copy
from abl_mlx.outputs import mtp as prediction
from abl_mlx.outputs.folder_quantized import MatrixEdit, promoted
from convert.base.errors import UserError
from convert.mlx.matrix import find_matrix
from convert.mlx.parameters import Stored, locate
from convert.mlx.safetensors_files import TensorFiles


@dataclass(frozen=True)
class TensorEdit:
    """The edit of one tensor in a file; a function of its float32 values in the file's layout.

    Attributes:
        edit: what is done.
        writer: the writer the tensor belongs to.
        parameter: ``weight`` or ``bias``.
        transposed: whether the file holds the last two axes swapped.
    """

    edit: Edit
    writer: Writer
    parameter: str
    transposed: bool = False

    def __call__(self, values: mx.array) -> mx.array:
        """The exact edited values, float32, in the file's layout."""
        edited = target(self.edit, self.writer, self.parameter, self.turn(values))
        return self.turn(edited)

    def rounded(self, values: mx.array, dtype: mx.Dtype) -> mx.array:
        """The edited values in a float dtype, rounded so that the edit survives.

        Args:
            values: from a call of this edit: exact, float32, in the file's layout.
        """
        kept = rounded(self.edit, self.writer, self.parameter, self.turn(values), dtype)
        return self.turn(kept)

    def leak(self, source: mx.array, written: mx.array) -> Leak:
        """Leak of this tensor from its values before the edit and as read back."""
        return leak(self.edit, self.writer, self.parameter, self.turn(source), self.turn(written))

    def turn(self, values: mx.array) -> mx.array:
        """From the file's layout to the model's, or back."""
        return mx.swapaxes(values, -1, -2) if self.transposed else values


@dataclass(frozen=True)
class Plan:
    """What is done to which tensor of the source's files.

    Attributes:
        edits: name of a float tensor -> its edit, in model order.
        places: path of a float parameter in the model -> the tensors it is stored in.
        matrices: name of the tensor with a quantized matrix's codes -> its edit, in model order.
        copies: name of the tensor with a stored copy of a tied head, which is edited too -> that of
            the embedding. A GGUF has none.
    """

    edits: dict[str, TensorEdit]
    places: dict[str, Stored]
    matrices: dict[str, MatrixEdit] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)

    @property
    def edits_of_gguf(self) -> dict[str, TensorEdit]:
        """The edits of what a GGUF holds."""
        return {name: edit for name, edit in self.edits.items() if name not in self.copies}

    def load_into_model(self, read_back: Callable[[str], mx.array]) -> None:
        """Put values read back from an output into the loaded model's parameters.

        Args:
            read_back: tensor name -> the values in the output, float32, in the source's layout.
        """
        for stored in self.places.values():
            edit = self.edits[stored.tensors[0]]
            parts = [edit.turn(read_back(name)) for name in stored.tensors]
            old = edit.writer.module[edit.parameter]
            new = (parts[0] if len(parts) == 1 else mx.stack(parts)).astype(old.dtype)
            mx.eval(new)
            edit.writer.module[edit.parameter] = new
        for name, embedding in self.copies.items():
            module = self.edits[name].writer.module if name in self.edits else {}
            if "weight" in module:  # where mlx-lm takes the copy for the head
                module["weight"] = read_back(embedding).astype(module["weight"].dtype)
                mx.eval(module["weight"])


def plan(
    chat: ChatModel,
    files: TensorFiles,
    edit: Edit,
    writers: Sequence[Writer],
    *,
    writer_bits: str | None = None,
    mtp: bool = False,
) -> Plan:
    """Work out which tensors of the files an edit changes.

    Args:
        writer_bits: of a quantized model, what the edited matrices are promoted to
            (`folder_quantized.WRITER_BITS`); None keeps every matrix's own mode.
        mtp: whether blocks of multi-token prediction are edited too, as the last layer is.

    Raises:
        UserError: an edit that touches nothing, a parameter that the files do not hold as such, or
            ``writer_bits`` where nothing is quantized, ``mtp`` where nothing is known of it.
    """
    chosen = edit.chosen(writers)
    paths = [path for writer in (writers if mtp else chosen) for path in writer.parameters]
    empty = skeleton(chat.config)
    widths = {path: module["weight"].shape[-1] for path, module in empty.named_modules()
              if "weight" in module}  # fmt: skip
    places = locate(empty, files, paths)
    edits: dict[str, TensorEdit] = {}
    matrices: dict[str, MatrixEdit] = {}
    floats: dict[str, Stored] = {}

    def add(
        name: str, writer: Writer, parameter: str, transposed: bool, row: int, module: str = ""
    ) -> bool:
        matrix = None
        if parameter == "weight" and not transposed:
            matrix = find_matrix(files, name, row)
        if matrix is None:
            edits[name] = TensorEdit(edit, writer, parameter, transposed)
            return False
        kind = _float_type(files, matrix.dtype)
        kept = MatrixEdit(edit, writer, matrix, matrix, kind, module)
        matrices[name] = promoted(kept, writer_bits) if writer_bits else kept
        return True

    for writer in chosen:
        for path in writer.parameters:
            stored = places[path]
            parameter = path.rsplit(".", 1)[1]
            for name in stored.tensors:
                if not add(name, writer, parameter, stored.transposed, widths[writer.path]):
                    floats[path] = stored
    for part in _prediction_parts(chat, files, edit, writers, places) if mtp else []:
        module = part.name.removesuffix(".weight")
        add(part.name, part.writer, part.parameter, part.transposed, part.row, module)
    if writer_bits and not matrices:
        raise UserError(
            f"--writer-bits {writer_bits}: nothing that is edited in {files.folder} is quantized; "
            "leave the flag out."
        )
    embedding = next(writer for writer in writers if writer.kind == "embedding")
    copies = {}
    for name in head_copy.find(files, chat.config, writers) if edit.touches(embedding) else []:
        copies[name] = places[f"{embedding.path}.weight"].tensors[0]
        module = name.removesuffix(".weight")
        add(name, head_copy.as_writer(name, embedding, chat), "weight", False, chat.width, module)
    return Plan(edits, floats, matrices, copies)


def _prediction_parts(
    chat: ChatModel,
    files: TensorFiles,
    edit: Edit,
    writers: Sequence[Writer],
    places: Mapping[str, Stored],
) -> list[prediction.Part]:
    """The tensors of blocks of multi-token prediction that an edit touches.

    Raises:
        UserError: when it leaves the last layer alone, as which they are edited.
    """
    parts = prediction.find_parts(files, chat.config, len(chat.layers), chat.width, writers, places)
    touched = [part for part in parts if edit.touches(part.writer)]
    if not any(part.writer.layer >= 0 for part in touched):
        raise UserError(
            "--mtp: blocks of multi-token prediction are edited as the last layer is, "
            f"{len(chat.layers) - 1}, which this edit leaves alone; leave the flag out."
        )
    return touched


def _float_type(files: TensorFiles, scales: str) -> str:
    """The 16-bit float type that a model's other tensors have; BF16 if none says F16."""
    if scales == "U8":
        kinds = [files.info(name).dtype for name in files.names if name.endswith("norm.weight")]
        scales = kinds[0] if kinds else "BF16"
    return "F16" if scales == "F16" else "BF16"


def measure_leak(
    files: TensorFiles,
    edits: Mapping[str, TensorEdit],
    read_back: Callable[[str], mx.array],
    *,
    limit: float,
    output: str,
    others: Mapping[str, Callable[[], Leak]] | None = None,
) -> LeakReport:
    """Compare what was written with what the edit wanted, tensor by tensor.

    Args:
        files: the source's tensors.
        read_back: source tensor name -> the values in the output, float32, same layout.
        limit: largest allowed total leak.
        output: the output's name, for the message.
        others: tensor name -> what measures its leak, of tensors that are not in ``edits``.

    Raises:
        UserError: when the total is above ``limit``, or the edit changed nothing.
    """
    tensors = {}
    for name, edit in edits.items():
        tensors[name] = edit.leak(files.read(name).astype(mx.float32), read_back(name))
    tensors.update((name, measured()) for name, measured in (others or {}).items())
    report = LeakReport(tensors)
    report.check(output, limit, "write a finer type")
    return report
