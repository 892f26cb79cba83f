"""Models made to refuse: what `abl-mlx run --induce` writes, and asks what it wrote.

A constant is added after a layer by the bias of its MLP's output where architecture and format
have one: in an MLX folder and in a GGUF. A control vector (NAME.cvec.gguf) does it for every model,
at runtime.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx import __version__, evaluate, gguf_model, gguf_pipeline, models, notes, outputs
from abl_mlx.arrays import numbers, numpy_of, parameters
from abl_mlx.clock import Clock
from abl_mlx.directions import DirectionFile
from abl_mlx.induce import Induction, choose
from abl_mlx.induce_report import card
from abl_mlx.measurement import ask, find_reply_prefix
from abl_mlx.models import ChatModel
from abl_mlx.options import Options
from abl_mlx.outputs import Output
from abl_mlx.prompts import PromptSets
from abl_mlx.provenance import gguf_metadata, without_home
from abl_mlx.records import file_hashes, hashes, start_record
from abl_mlx.run_page import staged_run_page, write_run_page
from abl_mlx.sources import Source
from abl_mlx.steering import steering
from abl_mlx.strict_json import to_json
from abl_mlx.writers import Writer, find_writers
from convert import adapters, control_vector
from convert.atomic import check_new
from convert.errors import UserError
from convert.gguf_extend import extend
from convert.gguf_file import GgufSource
from convert.mlx_folder import rewrite_folder
from convert.ollama import lost_of_template
from convert.safetensors_files import TensorFiles
from convert.scratch import scratch
from convert.suffixes import is_gguf_name

Record = dict[str, Any]

TAGS = ["induced-refusal", "abl-mlx"]

#: Keys of config.json with which architectures of mlx-lm have biases in their MLPs.
BIAS_KEYS = ("mlp_bias", "use_mlp_bias", "use_bias")

#: general.architecture of GGUFs whose ffn_down.bias llama.cpp takes unasked, and MLX as well.
GGUF_BIASES = ("llama", "mistral3", "granite")

_INDEX = "model.safetensors.index.json"
_ADDED = "model-induced.safetensors"


def run(source: Source, paths: Sequence[Path], sets: PromptSets, options: Options) -> Record:
    """`abl-mlx run --induce`: choose a constant, write it, and ask what was written.

    Raises:
        UserError: bad input, an output that cannot hold a constant, no constant that works;
            nothing is left behind.
    """
    _check(paths, options)
    clock = Clock()
    with ExitStack() as stack:
        gguf = stack.enter_context(GgufSource(source.path)) if source.is_gguf else None
        with clock.step("load the model"):
            chat, writers = _load(source, gguf, options)
        vectors = [path for path in paths if control_vector.is_control_vector(path)]
        with clock.step("find how replies open"):
            prefix = chat.reply_prefix = find_reply_prefix(chat, sets, options.batch_size)
        for path in paths:
            if path not in vectors:
                check_place(path, chat, writers, gguf)
        with clock.step("choose a constant"):
            found = choose(chat, sets, options, first_layer=1 if vectors else 0)
        place = None if len(vectors) == len(paths) else _place(chat, writers, found.layer)
        with clock.step("evaluate before"):
            before = ask(evaluate.in_mlx(chat, batch_size=options.batch_size), sets, options)
            base = stack.enter_context(
                evaluate.baseline(
                    chat,
                    sets.harmless.test.take(evaluate.KL_PROMPTS).texts,
                    batch_size=options.batch_size,
                )
            )
        direction = DirectionFile(found.vector[None], None, {"summary": found.summary})
        record = start_record(source, paths, options, direction)
        record["induced"] = True
        label = label_of(source, direction, found)
        evaluations = []
        replies = {"before": before}
        staged = stack.enter_context(outputs.staging(paths))
        for one in staged:
            with clock.step(f"write {one.path.name}"):
                if control_vector.is_control_vector(one.path):
                    _write_vector(one, chat, gguf, found, label)
                elif not one.is_gguf:
                    assert place is not None
                    write_folder(source, one.staged, chat, place, found, label)
                else:
                    assert place is not None
                    _write_gguf(source, gguf, one, chat, place, found, label, options)
            with clock.step(f"evaluate {one.path.name}"):
                figures, after = _judge(
                    one, chat, prefix, found, base, sets, options, source.ollama is not None
                )
            replies[str(one.path)] = after
            evaluations.append(figures)
        with clock.step("hash the source"):
            if gguf is None:
                with TensorFiles(source.path) as files:
                    record["hashes"] = hashes(file_hashes(files.files), direction, options)
            else:
                record["hashes"] = gguf_pipeline.hashes(gguf, direction, options)
        record.update(
            before=before.record(),
            after=evaluations[0]["after"],
            kl=evaluations[0]["kl"],
            evaluations=evaluations,
            seconds=clock.seconds,
        )
        for one, judged in zip(staged, evaluations, strict=True):
            _write_companions(one, source, gguf, record, judged)
        if options.save_replies is not None:
            evaluate.save_replies(options.save_replies, replies, sets)
        there = staged_run_page(record, [one.staged for one in staged], options, replies, sets)
    if not there:
        write_run_page(record, paths, options, replies, sets)
    return record


def run_model(text: str, paths: Sequence[Path], options: Options) -> Record:
    """The same on what the user typed for the model.

    Args:
        paths: one or more outputs, none of which exists yet.
    """
    from abl_mlx import memory, pipeline, sources
    from abl_mlx.model_file import open_model

    source = sources.resolve(text)
    outputs.check(paths, source, vectors=True)
    if options.save_replies is not None:
        check_new(options.save_replies)
    outputs.check_reports(paths, options.report)
    with open_model(source) as model:
        sets = pipeline.load_prompts(model, options)
        memory.check(model, asked=options.memory_check)
    return run(source, paths, sets, options)


def _check(paths: Sequence[Path], options: Options) -> None:
    for path in paths:
        if adapters.is_mlx(path) or adapters.is_lora(path):
            raise UserError(
                f"{path}: a constant is no low-rank change of a weight, so no adapter holds it: "
                f"write -o NAME{control_vector.SUFFIX}, a folder or a GGUF."
            )
    for flag, given in (
        ("--pin", options.pin is not None),
        ("--norm", options.norm != "none"),
        ("--layers", options.layers is not None),
        ("--mtp", options.mtp),
        ("--keep-undo", options.keep_undo),
        ("--gguf", options.gguf is not None),
        ("--direction", options.direction is not None),
        ("--method", options.method is not None),
        ("--search", options.search is not None),
        ("--writer-bits", options.writer_bits is not None),
        ("--plain-rounding", options.plain_rounding),
        ("--no-embedding", not options.embedding),
    ):
        if given:
            raise UserError(f"{flag} says how a direction is removed: leave it out with --induce.")
    if options.ollama_create is not None:
        raise UserError(
            "--ollama-create is not done with --induce: give the Modelfile that is written to "
            "`ollama create`."
        )


def _load(
    source: Source, gguf: GgufSource | None, options: Options
) -> tuple[ChatModel, list[Writer]]:
    if gguf is None:
        chat = models.load(source.path)
        return chat, find_writers(chat)
    return gguf_pipeline.load(gguf, options)


def label_of(source: Source, direction: DirectionFile, found: Induction) -> Record:
    """What a written model says of itself in its metadata."""
    return {
        "edited": "this model was made to refuse: a constant is added to its residual stream",
        "version": __version__,
        "base_model": source.public_name,
        "direction_sha256": direction.sha256,
        "layer": found.layer,
        "multiple": float(found.summary["multiple"]),
    }


# --- where a constant can be -------------------------------------------------------------------


def _place(chat: ChatModel, writers: Sequence[Writer], layer: int) -> Writer:
    """The module whose output's bias is added to the stream last in a layer.

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
    """What config.json has to say for a bias in a writer, and all parameters this adds, zero.

    Found by making the model without its weights and looking.

    Returns:
        (the key of config.json, or an empty string where the bias is there already; parameters).

    Raises:
        UserError: when mlx-lm has no bias for it.
    """
    if writer.has_bias:
        return "", []
    now = dict(parameters(models.skeleton(dict(chat.config))))
    for key in BIAS_KEYS:
        try:
            then = dict(parameters(models.skeleton({**chat.config, key: True})))
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


def check_place(
    path: Path, chat: ChatModel, writers: Sequence[Writer], gguf: GgufSource | None
) -> None:
    """Refuse, before any long work, an output that has no place for a constant.

    Raises:
        UserError: naming the output.
    """
    if gguf is not None and not is_gguf_name(path):
        raise UserError(
            f"{path}: a folder with a constant is made from a folder: convert "
            f"{gguf.parts[0].name} first, or write a GGUF."
        )
    if gguf is not None and gguf.architecture not in GGUF_BIASES:
        raise UserError(
            f"{path}: llama.cpp takes no bias of ffn_down in {gguf.architecture} models: write a "
            f"control vector, -o {path.stem}{control_vector.SUFFIX}."
        )
    middle = _place(chat, writers, len(chat.layers) // 2)
    biased_config(chat, middle)
    if is_gguf_name(path) and chat.model_type not in GGUF_BIASES:
        raise UserError(
            f"{path}: llama.cpp takes no bias of ffn_down in {chat.model_type} models: write a "
            f"control vector, -o {path.stem}{control_vector.SUFFIX}."
        )


def _bias(writer: Writer, vector: mx.array) -> mx.array:
    """What the writer's output has to gain for the stream to gain the vector."""
    return vector if writer.gain is None else vector / writer.gain


# --- writing -----------------------------------------------------------------------------------


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
        config = outputs.edited_config(source.path, chat.config, label, {})
        if key:
            config[key] = True
        edits = {} if key else {name: lambda values: values + bias.astype(values.dtype)}
        rewrite_folder(
            source.path,
            files,
            out,
            edits,
            config=config,
            skip=outputs.COMPANIONS,
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


def _write_gguf(
    source: Source,
    gguf: GgufSource | None,
    one: Output,
    chat: ChatModel,
    writer: Writer,
    found: Induction,
    label: Mapping[str, Any],
    options: Options,
) -> None:
    known = None if gguf is None else gguf.metadata
    metadata = gguf_metadata(source, label, known, suffix="refusing", tags=TAGS)
    if gguf is None:
        from convert.mlx_to_gguf import write_gguf

        with scratch() as folder:
            write_folder(source, folder, chat, writer, found, label)
            write_gguf(folder, one.staged, file_type=options.quantize, metadata=metadata)
        return
    bias = numpy_of(_bias(writer, found.vector))
    own = f"blk.{found.layer}.ffn_down.bias"
    tensors: dict[str, np.ndarray] = {}
    if own in gguf.tensors:
        bias = bias + gguf.values(own).reshape(-1)
    else:
        # llama.cpp would take the one alone; MLX has biases in all MLPs or in none.
        for layer in range(len(chat.layers)):
            for role in ("ffn_gate", "ffn_up", "ffn_down"):
                entry = gguf.tensors.get(f"blk.{layer}.{role}.weight")
                if entry is not None:
                    rows = np.zeros(entry.shape[0], np.float32)
                    tensors[f"blk.{layer}.{role}.bias"] = rows
    tensors[own] = bias
    extend(gguf, one.staged, tensors, metadata)


def _write_vector(
    one: Output,
    chat: ChatModel,
    gguf: GgufSource | None,
    found: Induction,
    label: Mapping[str, Any],
) -> None:
    hint = gguf.architecture if gguf is not None else chat.model_type
    what = "this control vector makes its base model refuse"
    keys = {f"abl_mlx.{key}": value for key, value in {**label, "edited": what}.items()}
    vector = control_vector.ControlVector(
        {found.layer: np.array(numbers(found.vector), np.float32)}, hint, len(chat.layers),
        {"general.tags": TAGS, **keys},
    )  # fmt: skip
    control_vector.write(one.staged, vector)


# --- what was written --------------------------------------------------------------------------


@contextmanager
def _as_written(one: Output, chat: ChatModel, found: Induction) -> Iterator[ChatModel]:
    """The output as a model in MLX: read back, a control vector added at runtime."""
    if control_vector.is_control_vector(one.path):
        [(layer, values)] = control_vector.read(one.staged).layers.items()
        with steering(chat, Induction(mx.array(values), layer, {}).intervention):
            yield chat
    elif one.is_gguf:
        with GgufSource(one.staged) as written:
            yield gguf_model.load(written)[0]
    else:
        yield models.load(one.staged, check=False)


def _judge(
    one: Output,
    chat: ChatModel,
    prefix: tuple[int, ...],
    found: Induction,
    base: evaluate.Baseline,
    sets: PromptSets,
    options: Options,
    from_ollama: bool,
) -> tuple[Record, evaluate.Behaviour]:
    is_vector = control_vector.is_control_vector(one.path)
    figures: Record = {
        "output": str(one.path),
        "format": "control vector" if is_vector else one.format,
    }
    in_llamacpp = one.is_gguf and not is_vector and evaluate.llamacpp_is_there()
    with _as_written(one, chat, found) as model:
        model.reply_prefix = prefix
        figures["kl"] = evaluate.kl(model, base)
        if not in_llamacpp:
            answer = evaluate.in_mlx(model, batch_size=options.batch_size)
            after = ask(answer, sets, options)
    if in_llamacpp:
        after = ask(evaluate.in_llamacpp(one.staged), sets, options)
    figures["runtime"] = "llama.cpp" if in_llamacpp else "mlx-lm"
    if is_vector:
        figures["note"] = "added at runtime in MLX, as llama.cpp's --control-vector does"
    elif one.is_gguf and not from_ollama:
        figures |= notes.noted(notes.modelfile(lost_of_template(one.staged)))
    return figures | {"after": after.record()}, after


def _write_companions(
    one: Output,
    source: Source,
    gguf: GgufSource | None,
    record: Record,
    judged: Record,
) -> None:
    record_name = outputs.companions(one.path)["record"].name
    contents = {
        "record": to_json(without_home(record)) + "\n",
        "card": card(record, judged, source.title, record_name),
    }
    places = outputs.companions(one.staged)
    if control_vector.is_control_vector(one.path):
        places.pop("modelfile", None)
    elif one.is_gguf:
        from convert.ollama import modelfile

        folder = None if gguf is not None else source.path
        contents["modelfile"] = modelfile(one.staged, folder, one.path.name, kept=source.ollama)
    for key, place in places.items():
        place.write_text(contents[key], encoding="utf-8")
