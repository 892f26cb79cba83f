"""Writes the output of `abl-mlx run --induce`: a model with a constant added to its stream.

In an MLX folder or a GGUF the constant is added to the bias of the MLP's output in one layer, if
the architecture and the format have such a bias. A control vector (NAME.cvec.gguf), which llama.cpp
adds at runtime, works for every model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx.behaviour import evaluate
from abl_mlx.choices import RunOptions, Writing
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.edits.steering import Induction, steering
from abl_mlx.inputs.sources import Source
from abl_mlx.models import chat_model
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.loaded_model import LoadedModel
from abl_mlx.models.writers import Writer
from abl_mlx.outputs import folder_outputs, further_files, gguf_outputs, new_parts
from abl_mlx.outputs.provenance import gguf_metadata, label
from abl_mlx.outputs.staging import (
    ADAPTERS,
    COMPANIONS,
    FOLDER,
    GGUF,
    VECTOR,
    Output,
    Written,
    format_of,
)
from abl_mlx.records.edits import WrittenEdit
from abl_mlx.support import notes
from abl_mlx.support.arrays import numbers, numpy_of, parameters
from abl_mlx.support.clock import Clock
from abl_mlx.support.flags import first_given
from convert.base.errors import UserError
from convert.base.scratch import scratch
from convert.gguf import control_vector
from convert.gguf.extend import extend
from convert.gguf.file import GgufSource
from convert.gguf.file_types import FLOATS
from convert.gguf.quantize import Quantization
from convert.gguf.rewrite import rewrite
from convert.mlx.folder import rewrite_folder
from convert.mlx.safetensors_files import TensorFiles
from convert.mlx_to_gguf import write_gguf
from convert.ollama.description import lost_of_template

TAGS = ["induced-refusal", "abl-mlx"]

#: Keys of config.json that give architectures of mlx-lm biases in their MLPs.
BIAS_KEYS = ("mlp_bias", "use_mlp_bias", "use_bias")

#: general.architecture of GGUFs in which llama.cpp and MLX use a tensor ffn_down.bias if it exists.
GGUF_BIASES = ("llama", "mistral3", "granite")

_ADDED_TO = "this model was made to refuse: a constant is added to its residual stream"

_INDEX = "model.safetensors.index.json"
_ADDED = "model-induced.safetensors"


def check(paths: Sequence[Path], options: RunOptions) -> None:
    """Refuse, before anything is loaded, outputs and options that only a removal can have.

    Raises:
        UserError: naming the output or the flag.
    """
    for path in paths:
        if format_of(path) in ADAPTERS:
            raise UserError(
                f"{path}: a constant is no low-rank change of a weight, so no adapter holds it: "
                f"write -o NAME{control_vector.SUFFIX}, a folder or a GGUF."
            )
    finding, editing, writing = options.finding, options.editing, options.writing
    flag = first_given((
        ("--pin", editing.pin),
        ("--norm", editing.norm != "none"),
        ("--heads", editing.heads),
        ("--experts", editing.experts),
        ("--edit", editing.edit != "writers"),
        ("--kind", editing.kind != "project"),
        ("--layers", editing.layers),
        ("--mtp", writing.mtp),
        ("--keep-undo", writing.keep_undo),
        ("--gguf", options.gguf),
        ("--tensor", options.given.tensor),
        ("--sae", finding.sae),
        ("--keep", options.prompting.keep),
        ("--keep-system", options.prompting.keep_system),
        ("--method", finding.method),
        ("--search", options.searching.searches),
        ("--writer-bits", writing.writer_bits),
        ("--plain-rounding", writing.plain_rounding),
        ("--no-embedding", not editing.embedding),
    ))  # fmt: skip
    if flag is not None:
        raise UserError(f"{flag} says how a direction is removed: leave it out with --induce.")
    flag = first_given((
        ("--imatrix", writing.imatrix),
        ("--keep-types", writing.keep_types),
        ("--split-max-size", writing.split_max_size),
    ))  # fmt: skip
    if flag is not None:
        raise UserError(f"{flag} is not done with --induce: use `abl-mlx convert` afterwards.")
    if writing.ollama_create is not None:
        raise UserError(
            "--ollama-create is not done with --induce: give the Modelfile that is written to "
            "`ollama create`."
        )


# --- where a constant can be -------------------------------------------------------------------


def _place(chat: ChatModel, writers: Sequence[Writer], layer: int) -> Writer:
    """The writer of a layer to whose bias a constant can be added: its MLP's last weight.

    Raises:
        UserError: when the layer has no plain MLP.
    """
    for writer in writers:
        if writer.layer == layer and writer.component == "mlp" and writer.kind == "linear":
            return writer
    raise UserError(
        f"layer {layer} of this {chat.model_type} has no MLP whose bias could hold a constant: "
        f"write a control vector, -o NAME{control_vector.SUFFIX}."
    )


def biased_config(chat: ChatModel, writer: Writer) -> tuple[str, list[tuple[str, mx.array]]]:
    """How to give a writer a bias: the key of config.json, and the parameters that it adds.

    It is found by making mlx-lm's model without weights, with each of the keys.

    Returns:
        The key of config.json (empty if the writer already has a bias), and (path, zeros) of all
        parameters that the key adds.

    Raises:
        UserError: when mlx-lm's architecture can have no such bias.
    """
    if writer.has_bias:
        return "", []
    now = dict(parameters(chat_model.skeleton(dict(chat.config))))
    for key in BIAS_KEYS:
        try:
            then = dict(parameters(chat_model.skeleton({**chat.config, key: True})))
        except (TypeError, ValueError, KeyError, NotImplementedError):
            continue
        if f"{writer.path}.bias" in then:
            return key, [
                (name, mx.zeros(value.shape)) for name, value in then.items() if name not in now
            ]
    raise UserError(
        f"mlx-lm's {chat.model_type} has no bias in {writer.path}, so a folder cannot hold a "
        f"constant: write a control vector, -o NAME{control_vector.SUFFIX}."
    )


def check_gguf(path: Path, gguf: GgufSource) -> None:
    """Check that an output with a constant can be made from a GGUF.

    Raises:
        UserError: naming the output, when it cannot.
    """
    if format_of(path) == FOLDER:
        raise UserError(
            f"{path}: a folder with a constant is made from a folder: convert "
            f"{gguf.parts[0].name} first, or write a GGUF."
        )
    _check_taken(path, gguf.architecture)


def check_place(path: Path, loaded: LoadedModel) -> None:
    """Check, before any long work, that an output has a bias for a constant.

    Raises:
        UserError: naming the output, when it has none.
    """
    chat = loaded.chat
    biased_config(chat, _place(chat, loaded.writers, len(chat.layers) // 2))
    if format_of(path) == GGUF:
        _check_taken(path, chat.model_type)


def _check_taken(path: Path, architecture: str) -> None:
    if architecture not in GGUF_BIASES:
        raise UserError(
            f"{path}: llama.cpp takes no bias of ffn_down in {architecture} models: write a "
            f"control vector, -o {path.stem}{control_vector.SUFFIX}."
        )


def _bias(writer: Writer, vector: mx.array) -> mx.array:
    """What must be added to the writer's bias so that ``vector`` is added to the stream."""
    return vector if writer.gain is None else vector / writer.gain


# --- writing -----------------------------------------------------------------------------------


@dataclass
class ConstantEdit:
    """A constant for a model, ready to be written; a `abl_mlx.outputs.model_file.PlannedEdit`.

    Attributes:
        source: where the model is.
        loaded: the model.
        found: the constant.
        direction: the constant as a direction file.
        writing: the options of writing.
    """

    source: Source
    loaded: LoadedModel
    found: Induction
    direction: DirectionFile
    writing: Writing

    needs_model = True

    @property
    def architecture(self) -> str:
        """The model's general.architecture in llama.cpp."""
        raise NotImplementedError

    @property
    def label(self) -> dict[str, Any]:
        """The written model's label."""
        return {
            **label(_ADDED_TO, self.direction.sha256, self.source),
            "layer": self.found.layer,
            "multiple": float(self.found.summary["multiple"]),
        }

    @property
    def original(self) -> evaluate.InLlamaCpp | None:
        return None

    def predicting(self) -> None:
        return None

    def let_go(self) -> None:
        self.loaded.let_go()

    def write(self, output: Output, clock: Clock) -> Written:
        write = {VECTOR: self._write_vector, GGUF: self._write_gguf, FOLDER: self._write_folder}
        with clock.step(f"write {output.path.name}"):
            return write[output.format](output)

    @property
    def _place(self) -> Writer:
        return _place(self.loaded.chat, self.loaded.writers, self.found.layer)

    def _write_vector(self, output: Output) -> Written:
        what = "this control vector makes its base model refuse"
        keys = {f"abl_mlx.{key}": value for key, value in {**self.label, "edited": what}.items()}
        vector = control_vector.ControlVector(
            {self.found.layer: np.array(numbers(self.found.vector), np.float32)},
            self.architecture,
            len(self.loaded.chat.layers),
            {"general.tags": TAGS, **keys},
        )
        control_vector.write(output.staged, vector)

        @contextmanager
        def opened(streamed: bool) -> Iterator[ChatModel]:
            [(layer, values)] = control_vector.read(output.staged).layers.items()
            chat = self.loaded.chat
            with steering(chat, Induction(mx.array(values), layer, {}).intervention):
                yield chat

        note = "added at runtime in MLX, as llama.cpp's --control-vector does"
        return Written(output, _facts(output), opened, on_loaded=True, notes=(note, None))

    def _write_folder(self, output: Output) -> Written:
        raise NotImplementedError

    def _write_gguf(self, output: Output) -> Written:
        raise NotImplementedError

    def _written_gguf(self, output: Output, note: str | None = None) -> Written:
        if self.source.ollama is None:
            note = notes.joined(note, notes.modelfile(lost_of_template(output.staged)))
        return Written(
            output,
            _facts(output, note),
            partial(gguf_outputs.opened, output.staged),
            llamacpp=evaluate.InLlamaCpp(output.staged),
        )


def _facts(output: Output, note: str | None = None) -> WrittenEdit:
    return WrittenEdit(output=str(output.path), format=output.format, note=note)


class FolderConstant(ConstantEdit):
    """A constant for the model in a folder."""

    @property
    def architecture(self) -> str:
        return self.loaded.chat.model_type

    def _write_folder(self, output: Output) -> Written:
        write_folder(
            self.source, output.staged, self.loaded.chat, self._place, self.found, self.label
        )
        return Written(
            output,
            _facts(output),
            lambda streamed: nullcontext(
                chat_model.load(output.staged, check=False, streamed=streamed)
            ),
        )

    def _write_gguf(self, output: Output) -> Written:
        metadata = gguf_metadata(self.source, self.label, None, suffix="refusing", tags=TAGS)
        with scratch() as folder:
            chat = self.loaded.chat
            write_folder(self.source, folder, chat, self._place, self.found, self.label)
            write_gguf(folder, output.staged, file_type=self.writing.quantize, metadata=metadata)
        tower = further_files.write_tower(self.source.path, output.staged)
        return self._written_gguf(output, tower)


@dataclass
class GgufConstant(ConstantEdit):
    """A constant for the model in a GGUF.

    Attributes:
        gguf: the open file.
        quantization: the type of every tensor in GGUF outputs.
    """

    gguf: GgufSource
    quantization: Quantization

    @property
    def architecture(self) -> str:
        return self.gguf.architecture

    def _write_gguf(self, output: Output) -> Written:
        gguf, layer = self.gguf, self.found.layer
        metadata = gguf_metadata(
            self.source, self.label, gguf.metadata, suffix="refusing", tags=TAGS
        )
        bias = numpy_of(_bias(self._place, self.found.vector))
        own = f"blk.{layer}.ffn_down.bias"
        tensors: dict[str, np.ndarray] = {}
        if own in gguf.tensors:
            bias = bias + gguf.values(own).reshape(-1)
        else:
            # llama.cpp would accept this bias alone; MLX has biases in all MLPs or in none.
            for number in range(len(self.loaded.chat.layers)):
                for role in ("ffn_gate", "ffn_up", "ffn_down"):
                    entry = gguf.tensors.get(f"blk.{number}.{role}.weight")
                    if entry is not None:
                        rows = np.zeros(entry.shape[0], np.float32)
                        tensors[f"blk.{number}.{role}.bias"] = rows
        tensors[own] = bias
        chosen = self.quantization
        if chosen.file_type is None:
            extend(gguf, output.staged, tensors, metadata)
            return self._written_gguf(output)
        changed = chosen.replacements(gguf)
        with scratch() as folder:
            [file] = rewrite(
                gguf, folder / "new.gguf", tensors=changed, metadata=chosen.metadata(),
                parts=new_parts.new_parts(None, join=True),
            )  # fmt: skip
            with GgufSource(file) as new:
                extend(new, output.staged, tensors, metadata)
        again = sum(gguf.tensors[name].type not in FLOATS for name in changed)
        return self._written_gguf(output, notes.quantized_again(again))


def write_folder(
    source: Source,
    out: Path,
    chat: ChatModel,
    writer: Writer,
    found: Induction,
    label: Mapping[str, Any],
) -> None:
    """Write the folder with the constant in a bias; every other tensor keeps its bytes.

    Args:
        out: an existing, empty folder.
    """
    key, added = biased_config(chat, writer)
    name = f"{writer.path}.bias"
    bias = _bias(writer, found.vector)
    with TensorFiles(source.path) as files:
        if f"{writer.path}.weight" not in files.names:
            raise UserError(
                f"{source.path} stores {writer.path} under another name: write a control vector, "
                f"-o NAME{control_vector.SUFFIX}."
            )
        config = folder_outputs.edited_config(source.path, chat.config, label, {})
        if key:
            config[key] = True
        edits = {} if key else {name: lambda old: old.astype(mx.float32) + bias.astype(mx.float32)}
        rewrite_folder(
            source.path,
            files,
            out,
            edits,
            config=config,
            skip=COMPANIONS,
        )
        if not key:
            return
        kinds = [files.info(one).dtype for one in files.names if "norm" in one]
        dtype = {"F16": mx.float16, "BF16": mx.bfloat16}.get(kinds[0] if kinds else "", mx.float32)
        tensors = {path: value.astype(dtype) for path, value in added}
        tensors[name] = bias.astype(dtype)
        mx.save_safetensors(str(out / _ADDED), tensors, {"format": "mlx"})
        index = {one: files.info(one).file.name for one in files.names}
        index.update(dict.fromkeys(tensors, _ADDED))
        size = sum(file.stat().st_size for file in out.glob("model*.safetensors"))
        (out / _INDEX).write_text(
            json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=2) + "\n",
            encoding="utf-8",
        )
