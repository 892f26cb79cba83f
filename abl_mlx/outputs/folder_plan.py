"""Plans an edit of the tensors of a folder, and measures its leak in written files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from abl_mlx.edits.edit import Leak, leak, rounded, target
from abl_mlx.edits.leak import LeakReport
from abl_mlx.edits.weight_edit import WeightEdit
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
    """The edit of one tensor in a file: a function of its values in the file's layout.

    Attributes:
        edit: the edit.
        writer: the writer to which the tensor belongs.
        parameter: ``weight`` or ``bias``.
        transposed: whether the last two axes are swapped in the file.
    """

    edit: WeightEdit
    writer: Writer
    parameter: str
    transposed: bool = False

    def __call__(self, values: mx.array) -> mx.array:
        """The exact edited values, float32, in the file's layout."""
        edited = target(self.edit, self.writer, self.parameter, self.turn(values))
        return self.turn(edited)

    def rounded(self, values: mx.array, dtype: mx.Dtype) -> mx.array:
        """Edited values rounded to a float dtype so that the edit is preserved.

        Args:
            values: the result of a call of this edit: exact, float32, in the file's layout.
            dtype: the float dtype.
        """
        kept = rounded(self.edit, self.writer, self.parameter, self.turn(values), dtype)
        return self.turn(kept)

    def leak(self, source: mx.array, written: mx.array) -> Leak:
        """The leak of this tensor, from its values before the edit and as read back."""
        return leak(self.edit, self.writer, self.parameter, self.turn(source), self.turn(written))

    def turn(self, values: mx.array) -> mx.array:
        """Values turned from the file's layout to the model's, or back."""
        return mx.swapaxes(values, -1, -2) if self.transposed else values


@dataclass(frozen=True)
class Plan:
    """The edit of each tensor of the source's files.

    Attributes:
        edits: name of a float tensor -> its edit, in the model's order.
        places: path of a float parameter in the model -> the tensors in which it is stored.
        matrices: name of the tensor with a quantized matrix's codes -> its edit, in the model's
            order.
        copies: name of a tensor that is a copy of a tied head, and is edited as well -> name of the
            embedding. A GGUF has none.
    """

    edits: dict[str, TensorEdit]
    places: dict[str, Stored]
    matrices: dict[str, MatrixEdit] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)

    @property
    def edits_of_gguf(self) -> dict[str, TensorEdit]:
        """The edits of the tensors that a GGUF of this model has, also of quantized matrices."""
        of_matrices = {
            name: TensorEdit(one.edit, one.writer, one.parameter)
            for name, one in self.matrices.items()
        }
        edits = self.edits | of_matrices
        return {name: edit for name, edit in edits.items() if name not in self.copies}

    def load_into_model(self, read_back: Callable[[str], mx.array]) -> None:
        """Set the loaded model's parameters to values read back from an output.

        Args:
            read_back: from a tensor's name to its values in the output, float32, in the source's
                layout.
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
            if "weight" in module:  # mlx-lm uses the copy as the head
                module["weight"] = read_back(embedding).astype(module["weight"].dtype)
                mx.eval(module["weight"])


def plan(
    chat: ChatModel,
    files: TensorFiles,
    edit: WeightEdit,
    writers: Sequence[Writer],
    *,
    writer_bits: str | None = None,
    mtp: bool = False,
) -> Plan:
    """Find the tensors of the files that an edit changes.

    Args:
        chat: the model.
        files: the folder's tensors.
        edit: the edit.
        writers: the model's writers.
        writer_bits: the precision in which edited matrices of a quantized model are written (one of
            `folder_quantized.WRITER_BITS`); None keeps every matrix's own mode.
        mtp: whether blocks for multi-token prediction are edited as well, like the last layer.

    Raises:
        UserError: when the edit changes nothing, a parameter is not stored as it is used,
            ``writer_bits`` is given but nothing is quantized, or ``mtp`` is given but there are no
            such blocks in a known form.
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
        name: str, writer: Writer, parameter: str, transposed: bool, row: int, module: str = "",
        edit: WeightEdit = edit,
    ) -> bool:  # fmt: skip
        plain = TensorEdit(edit, writer, parameter, transposed)
        matrix = _in_matrix(files, name, plain, row, module, writer_bits)
        if matrix is None:
            edits[name] = plain
        else:
            matrices[name] = matrix
        return matrix is not None

    for writer in chosen:
        for parameter in edit.parameters(writer):
            path = f"{writer.path}.{parameter}"
            stored = places[path]
            row, alone = widths.get(writer.path, 0), len(stored.tensors) == 1
            for index, name in enumerate(stored.tensors):
                one = edit if alone else edit.of_expert(index)
                if not add(name, writer, parameter, stored.transposed, row, edit=one):
                    floats[path] = stored
    for part in _prediction_parts(chat, files, edit, writers, places) if mtp else []:
        module = part.name.removesuffix(".weight")
        add(part.name, part.writer, part.parameter, part.transposed, part.row, module)
    if writer_bits and not matrices:
        raise UserError(
            f"--writer-bits {writer_bits}: nothing that is edited in {files.folder} is quantized; "
            "leave the flag out."
        )
    embedding = next((writer for writer in chosen if writer.kind == "embedding"), None)
    copies = {}
    if embedding is not None:
        for name in head_copy.find(files, chat.config, writers):
            copies[name] = places[f"{embedding.path}.weight"].tensors[0]
            copy, module = head_copy.as_writer(name, embedding, chat), name.removesuffix(".weight")
            add(name, copy, "weight", False, chat.width, module)
    return Plan(edits, floats, matrices, copies)


def _in_matrix(
    files: TensorFiles,
    name: str,
    one: TensorEdit,
    row: int,
    module: str,
    writer_bits: str | None,
) -> MatrixEdit | None:
    """The edit of a tensor as that of a quantized matrix; None if it is not quantized.

    Args:
        files: the folder's tensors.
        name: the tensor's name.
        one: its edit, if it is not quantized.
        row: the number of its columns.
        module: its name in config.json's "quantization"; empty if that is the writer's path.
        writer_bits: as for `plan`.
    """
    if one.parameter != "weight" or one.transposed:
        return None
    matrix = find_matrix(files, name, row)
    if matrix is None:
        return None
    kind = _float_type(files, matrix.dtype)
    kept = MatrixEdit(one.edit, one.writer, matrix, matrix, kind, module)
    return promoted(kept, writer_bits) if writer_bits else kept


def _prediction_parts(
    chat: ChatModel,
    files: TensorFiles,
    edit: WeightEdit,
    writers: Sequence[Writer],
    places: Mapping[str, Stored],
) -> list[prediction.Part]:
    """The tensors of blocks for multi-token prediction that an edit changes.

    Raises:
        UserError: when the edit does not change the last layer, like which they are edited.
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
    """The 16-bit float type of the model's other tensors: F16 if one has it, else BF16."""
    if scales == "U8":
        kinds = [files.info(name).dtype for name in files.names if name.endswith("norm.weight")]
        scales = kinds[0] if kinds else "BF16"
    return "F16" if scales == "F16" else "BF16"


def measure_leak(
    source: Callable[[str], mx.array],
    edits: Mapping[str, TensorEdit],
    read_back: Callable[[str], mx.array],
    *,
    limit: float,
    output: str,
    others: Mapping[str, Callable[[], Leak]] | None = None,
) -> LeakReport:
    """Measure the leak of an output by comparing it with the exact edit, tensor by tensor.

    Args:
        source: from a tensor's name to its values in the source, of any float type.
        edits: tensor name -> its edit.
        read_back: from a tensor's name to its values in the output, of any float type, in the
            source's layout.
        limit: the largest allowed total leak.
        output: the output's name, for the message.
        others: tensor name -> a function that measures its leak, for tensors not in ``edits``.

    Raises:
        UserError: when the total is above ``limit``, or the edit changed nothing.
    """
    tensors = {}
    for name, edit in edits.items():
        tensors[name] = edit.leak(source(name), read_back(name))
    tensors.update((name, measured()) for name, measured in (others or {}).items())
    report = LeakReport(tensors)
    report.check(output, limit, "write a finer type")
    return report
