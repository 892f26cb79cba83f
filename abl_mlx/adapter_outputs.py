"""Adapters as outputs: an MLX folder beside a model, a GGUF LoRA beside a GGUF."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from abl_mlx import gguf_model
from abl_mlx.adapters import (
    attached,
    bias_leak,
    change,
    check_module,
    components,
    leak_of,
    module_parts,
    module_shape,
    tensor_parts,
)
from abl_mlx.apply import LeakReport
from abl_mlx.edits import Edit, Leak
from abl_mlx.gguf_edit import TensorPlan
from abl_mlx.models import ChatModel, progress
from abl_mlx.outputs import Output, Written
from abl_mlx.sources import Source
from abl_mlx.writers import Writer
from convert import adapters, gguf_writers
from convert.adapters import Adapter, LowRank
from convert.errors import UserError
from convert.gguf_file import GgufSource
from convert.gguf_to_mlx import Layout

Record = dict[str, Any]


def label_of(label: Mapping[str, Any]) -> Record:
    """What an adapter says of itself, from what an edited model would say."""
    return {**label, "edited": "this adapter removes the refusal direction from its base model"}


def biases_note(leaks: Mapping[str, Leak], biases: Sequence[str]) -> str | None:
    """What to say of biases, which a LoRA cannot hold; None where they hold nothing."""
    share = _share(leaks, biases)
    if not share:
        return None
    return (
        f"{len(biases)} biases write to the stream and cannot be in a LoRA: they keep {share:.2g} "
        "of the component"
    )


def _share(leaks: Mapping[str, Leak], names: Sequence[str]) -> float:
    """How much of the whole edit is missing in some of its parameters."""
    wanted = sum(one.wanted for one in leaks.values())
    missing = sum(leaks[name].missing for name in names)
    return float((missing / wanted) ** 0.5) if wanted else 0.0


def check_leak(
    output: Path, leaks: Mapping[str, Leak], biases: Sequence[str], limit: float
) -> None:
    """Refuse an adapter that is not the whole edit.

    Raises:
        UserError: above ``limit``, which only biases bring about.
    """
    total = LeakReport(dict(leaks)).total
    if total <= limit:
        return
    why = f"{_share(leaks, biases):.1%} of it is in biases, which a LoRA cannot hold"
    raise UserError(
        f"{output} would leave {total:.1%} of the component, and --max-leak is {limit:g}: {why}; "
        "write an edited model instead, or raise --max-leak."
    )


# --- MLX ---------------------------------------------------------------------------------------


def write_mlx(
    chat: ChatModel,
    edit: Edit,
    writers: Sequence[Writer],
    output: Output,
    label: Mapping[str, Any],
    max_leak: float,
) -> Written:
    """Write an mlx-lm adapter to the output's staged folder; its leak is that of the written bytes.

    Args:
        chat: the model it is for, as loaded: float or quantized.
        label: what an edited model would say of the edit.

    Raises:
        UserError: when mlx-lm has no LoRA for a writer, or biases keep more than ``max_leak``.
    """
    chosen = edit.chosen(writers)
    for writer in chosen:
        check_module(writer)
    found, changes = {}, {}
    with progress(len(chosen), f"write {output.path.name}", "tensor") as bar:
        for writer in chosen:
            module = writer.module
            found[writer.path] = components(
                edit, writer, module_shape(module), module_parts(module)
            )
            changes[writer.path] = change(edit, writer, found[writer.path].along)
            bar.update()
    adapters.write_mlx(output.staged, Adapter(edit.strength, changes), label_of(label))
    written = adapters.read_mlx(output.staged, {writer.path: writer.kind for writer in chosen})
    leaks: dict[str, Leak] = {}
    biases = []
    for writer in chosen:
        one = written.changes[writer.path]
        leaks[f"{writer.path}.weight"] = leak_of(
            edit, writer, found[writer.path], written.scale, one
        )
        if writer.has_bias:
            biases.append(f"{writer.path}.bias")
            leaks[biases[-1]] = bias_leak(edit, writer, writer.module["bias"])
    check_leak(output.path, leaks, biases, max_leak)

    def read_back(name: str) -> mx.array:
        raise UserError(f"{name} is not in {output.path}: an adapter holds no weights.")

    return Written(
        output,
        LeakReport(leaks),
        read_back,
        (f"rank {written.rank}",),
        note=biases_note(leaks, biases),
    )


# --- GGUF --------------------------------------------------------------------------------------


def check_gguf(gguf: GgufSource, writers: Sequence[gguf_writers.GgufWriter]) -> None:
    """Refuse a GGUF for which llama.cpp does not apply adapters as it should.

    Raises:
        UserError: naming the tensor.
    """
    check_applied(gguf, [one.name for one in writers])


def check_applied(gguf: GgufSource, names: Iterable[str]) -> None:
    """The same for the tensors of these names."""
    names = list(names)
    ignored = adapters.ignored(gguf.architecture, names)
    if ignored:
        raise UserError(
            f"llama.cpp applies no adapter to {ignored[0]} of {gguf.architecture} models: write an "
            "edited GGUF instead."
        )
    for name in names:
        scale = f"{name.removesuffix('.weight')}.scale"
        if scale in gguf.tensors:
            raise UserError(
                f"{scale} in {gguf.parts[0]} scales what the tensor puts out, which llama.cpp does "
                "not do to an adapter: write an edited GGUF instead."
            )


def write_gguf(
    gguf: GgufSource,
    source: Source,
    path: Path,
    named: Path,
    plans: Mapping[str, TensorPlan],
    label: Mapping[str, Any],
    max_leak: float,
) -> Record:
    """Write a LoRA for llama.cpp; its leak is that of the written bytes.

    Embeddings that llama.cpp applies no adapter to are left out: tied ones, at which it would end
    (its head multiplies with the factors as they lie for looking up rows), and those of positions.

    Args:
        path: where it is written.
        named: what it will be called, for messages.
        plans: of the edit, from `abl_mlx.gguf_edit.plan`.
        label: what an edited model would say of the edit.

    Returns:
        What is known of it, as JSON values.
    """
    weights = {name: one for name, one in plans.items() if one.parameter == "weight"}
    left_out = [
        name
        for name, one in weights.items()
        if one.writer.kind == "embedding" and (one.writer.tied or not adapters.is_embedding(name))
    ]
    if len(left_out) == len(weights):
        raise UserError(
            f"{named} would be empty: llama.cpp applies no adapter to {left_out[0]}; choose layers "
            "that the model has (--layers)."
        )
    found, changes = {}, {}
    total = sum(gguf.tensors[name].nbytes for name in weights)
    with progress(total, f"write {named.name}", "B") as bar:
        for name, one in weights.items():
            if name not in left_out:
                shape = gguf.tensors[name].shape
                found[name] = components(one.edit, one.writer, shape, tensor_parts(gguf, one))
                changes[name] = change(one.edit, one.writer, found[name].along)
            bar.update(gguf.tensors[name].nbytes)
    strength = next(iter(weights.values())).edit.strength
    adapters.write_gguf(
        path, gguf.architecture, Adapter(strength, changes), _metadata(gguf, source, label)
    )
    written = adapters.read_gguf(path)
    leaks = {
        name: leak_of(weights[name].edit, weights[name].writer, found[name], written.scale, one)
        for name, one in written.changes.items()
    }
    biases = [name for name, one in plans.items() if one.parameter == "bias"]
    for name in biases:
        leaks[name] = bias_leak(plans[name].edit, plans[name].writer, mx.array(gguf.values(name)))
    check_leak(named, leaks, biases, max_leak)
    notes = [biases_note(leaks, biases)]
    if left_out:
        tied = any(weights[name].writer.tied for name in left_out)
        why = ", which is the output head as well" if tied else ""
        notes.append(f"llama.cpp applies no adapter to {', '.join(left_out)}{why}: left as it is")
    report = LeakReport(leaks)
    return {
        "output": str(named),
        "format": "GGUF LoRA",
        "files": [path.name],
        "types": [f"rank {written.rank}"],
        "leak": report.record(),
        "weight_error": sum(leaks.values(), start=Leak()).error,
        "left_out": left_out,
        **({"note": "; ".join(filter(None, notes))} if any(notes) else {}),
    }


def _metadata(gguf: GgufSource, source: Source, label: Mapping[str, Any]) -> Record:
    base = gguf.metadata.get("general.name", source.title)
    keys: Record = {
        "general.name": f"{base}-abliterated",
        "general.tags": ["abliterated", "abl-mlx"],
        "general.base_model.count": 1,
        "general.base_model.0.name": base,
    }
    return keys | {f"abl_mlx.{key}": value for key, value in label_of(label).items()}


@contextmanager
def in_mlx(gguf: GgufSource, lora: Path) -> Iterator[ChatModel]:
    """A GGUF as a model in MLX, with a LoRA of llama.cpp's applied."""
    chat, layout = gguf_model.load(gguf)
    adapter = adapters.read_gguf(lora)
    places, modules = layout.places(), dict(chat.model.named_modules())
    pairs = []
    for name, one in adapter.changes.items():
        path = places[name][0]
        module = modules[path.removesuffix(".weight")]
        pairs.append((module, _in_layout(layout, path, one)))
    with attached(pairs, adapter.scale):
        yield chat


def _in_layout(layout: Layout, path: str, one: LowRank) -> LowRank:
    """A change with its columns in MLX's order."""
    columns = layout.weights[path].pieces[0].columns
    return one if columns is None else LowRank(one.kind, one.left, one.right[..., columns])
