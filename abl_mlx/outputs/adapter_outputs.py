"""Adapters as outputs: an MLX folder beside a model, a GGUF LoRA beside a GGUF."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx.edits.edit import Leak, total_leak
from abl_mlx.edits.leak import LeakReport
from abl_mlx.edits.weight_edit import WeightEdit
from abl_mlx.inputs.sources import Source
from abl_mlx.models import from_gguf
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.module_weights import module_parts, module_shape
from abl_mlx.models.writers import Writer
from abl_mlx.outputs.adapter import (
    attached,
    bias_leak,
    change,
    check_module,
    components,
    leak_of,
    low_rank_kind,
    tensor_parts,
    untouched_leak,
)
from abl_mlx.outputs.gguf_plan import TensorPlan
from abl_mlx.outputs.provenance import gguf_metadata
from abl_mlx.outputs.staging import Output
from abl_mlx.records.edits import WrittenEdit
from abl_mlx.support.console import progress
from abl_mlx.support.notes import joined
from convert import adapters
from convert.adapters import Adapter, LowRank
from convert.architectures import gguf_writers
from convert.architectures.weights import Weight
from convert.base.errors import UserError
from convert.gguf.file import GgufSource


def label_of(label: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter's label, made from the label of an edited model."""
    return {**label, "edited": "this adapter removes the refusal direction from its base model"}


def biases_note(leaks: Mapping[str, Leak], biases: Sequence[str]) -> str | None:
    """A note about biases, which a LoRA cannot change; None when they have no share in the edit."""
    share = _share(leaks, biases)
    if not share:
        return None
    return (
        f"{len(biases)} biases write to the stream and cannot be in a LoRA: they keep {share:.2g} "
        "of the component"
    )


def _share(leaks: Mapping[str, Leak], names: Sequence[str]) -> float:
    """The share of the whole edit that is missing because of the parameters ``names``."""
    wanted = sum(one.wanted for one in leaks.values())
    missing = sum(leaks[name].missing for name in names)
    return float((missing / wanted) ** 0.5) if wanted else 0.0


def check_leak(
    output: Path, leaks: Mapping[str, Leak], biases: Sequence[str], limit: float
) -> None:
    """Check that an adapter does not leave out more of the edit than ``limit``.

    Raises:
        UserError: when it does; only biases can cause this.
    """
    total = LeakReport(dict(leaks)).total
    if total <= limit:
        return
    why = f"{_share(leaks, biases):.1%} of it is in biases, which a LoRA cannot hold"
    raise UserError(
        f"{output} would leave {total:.1%} of the component, but --max-leak is {limit:g}: {why}; "
        "write an edited model instead, or raise --max-leak."
    )


# --- MLX ---------------------------------------------------------------------------------------


def write_mlx(
    chat: ChatModel,
    edit: WeightEdit,
    writers: Sequence[Writer],
    output: Output,
    label: Mapping[str, Any],
    max_leak: float,
) -> tuple[LeakReport, list[str], str | None]:
    """Write an mlx-lm adapter to the output's staged folder; its leak is that of the written bytes.

    Args:
        chat: the model that the adapter is for, float or quantized.
        edit: the edit.
        writers: the model's writers.
        output: where the adapter goes.
        label: the label that an edited model would have.
        max_leak: the largest allowed leak.

    Returns:
        The adapter's leak, the types in which it is stored, and a note.

    Raises:
        UserError: when mlx-lm has no LoRA for a writer, or the leak exceeds ``max_leak`` because of
            biases.
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
    written = adapters.read_mlx(output.staged, {one.path: low_rank_kind(one) for one in chosen})
    leaks: dict[str, Leak] = {}
    biases = []
    for writer in chosen:
        one = written.changes[writer.path]
        leaks[f"{writer.path}.weight"] = leak_of(
            edit, writer, found[writer.path], written.scale, one
        )
        if "bias" in edit.parameters(writer):
            biases.append(f"{writer.path}.bias")
            leaks[biases[-1]] = bias_leak(edit, writer, writer.module["bias"])
    check_leak(output.path, leaks, biases, max_leak)
    return LeakReport(leaks), [f"rank {written.rank}"], biases_note(leaks, biases)


# --- GGUF --------------------------------------------------------------------------------------


def check_gguf(gguf: GgufSource, writers: Sequence[gguf_writers.GgufWriter]) -> None:
    """Check that llama.cpp applies adapters of these writers correctly.

    Raises:
        UserError: naming the tensor, when it does not.
    """
    check_applied(gguf, [one.name for one in writers])


def check_applied(gguf: GgufSource, names: Iterable[str]) -> None:
    """Check that llama.cpp applies adapters of the tensors ``names`` correctly.

    Raises:
        UserError: naming the tensor, when it does not.
    """
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


def _not_applied(weights: Mapping[str, TensorPlan], named: Path) -> list[str]:
    """The embeddings to which llama.cpp applies no adapter.

    Raises:
        UserError: when nothing else is edited.
    """
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
    return left_out


def write_gguf(
    gguf: GgufSource,
    source: Source,
    path: Path,
    named: Path,
    plans: Mapping[str, TensorPlan],
    label: Mapping[str, Any],
    max_leak: float,
) -> WrittenEdit:
    """Write a LoRA for llama.cpp; its leak is that of the written bytes.

    Tied embeddings and embeddings of positions are left out, because llama.cpp cannot apply an
    adapter to them. For a tied embedding it looks up rows with an adapter's factors, but it also
    multiplies the output head with these factors in the layout of the lookup, which ends the
    process (build_inp_embd and build_lora_mm in its src/llama-graph.cpp).

    Args:
        gguf: the open base model.
        source: where it comes from.
        path: where the LoRA is written.
        named: its final name, for messages.
        plans: the edit's plans, from `abl_mlx.outputs.gguf_plan.plan`.
        label: the label that an edited model would have.
        max_leak: the largest allowed leak.
    """
    weights = {name: one for name, one in plans.items() if one.parameter == "weight"}
    left_out = _not_applied(weights, named)
    found, changes, lost = {}, {}, {}
    total = sum(gguf.tensors[name].nbytes for name in weights)
    with progress(total, f"write {named.name}", "B") as bar:
        for name, one in weights.items():
            shape = gguf.tensors[name].shape
            found[name] = components(one.edit, one.writer, shape, tensor_parts(gguf, one))
            if name in left_out:
                lost[name] = untouched_leak(one.edit, one.writer, found[name])
            else:
                changes[name] = change(one.edit, one.writer, found[name].along)
            bar.update(gguf.tensors[name].nbytes)
    strength = next(iter(weights.values())).edit.strength
    embedding = any(one.kind == "embedding" for one in changes.values())
    label = {**label_of(label), "embedding": embedding}
    if left_out:
        label["left_out"] = ", ".join(left_out)
    known = {key: gguf.metadata[key] for key in ("general.name",) if key in gguf.metadata}
    adapters.write_gguf(
        path, gguf.architecture, Adapter(strength, changes), gguf_metadata(source, label, known)
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
    left = total_leak([*leaks.values(), *lost.values()])
    tied = any(weights[name].writer.tied for name in left_out)
    report = LeakReport(leaks)
    return WrittenEdit(
        output=str(named),
        format="GGUF LoRA",
        files=[path.name],
        types=[f"rank {written.rank}"],
        leak=replace(report.record(), with_left_out=left if left_out else None),
        weight_error=report.error,
        embedding=embedding,
        left_out=left_out,
        note=joined(biases_note(leaks, biases), _left_out_note(left_out, tied, left)),
    )


def _left_out_note(names: Sequence[str], tied: bool, leak: float) -> str | None:
    """A note about embeddings that are left out of a LoRA; None when there are none."""
    if not names:
        return None
    listed = ", ".join(names)
    why = (
        f"{listed}, which is the output head as well: left as it is, as llama.cpp would look up "
        "its rows with an adapter's factors, but end at the head"
        if tied
        else f"{listed}, to which llama.cpp applies no adapter: left as it is"
    )
    return f"left out: {why}; so {leak:.2g} of the edit is missing, which an edited GGUF has"


@contextmanager
def in_mlx(gguf: GgufSource, lora: Path, streamed: bool = False) -> Iterator[ChatModel]:
    """A GGUF as a model in MLX, with a GGUF LoRA applied."""
    chat, layout = from_gguf.load(gguf, streamed=streamed)
    adapter = adapters.read_gguf(lora)
    places, modules = layout.places(), dict(chat.model.named_modules())
    paths = dict.fromkeys(path for name in adapter.changes for path in places[name])
    pairs = [
        (modules[path.removesuffix(".weight")], _in_layout(layout.weights[path], adapter.changes))
        for path in paths
    ]
    with attached(pairs, adapter.scale):
        yield chat


def _in_layout(weight: Weight, changes: Mapping[str, LowRank]) -> LowRank:
    """The change of a parameter in MLX, with rows and columns in the parameter's order.

    Args:
        weight: the parameter.
        changes: tensor -> its change. Where several tensors are joined, their right factors are
            the same, because all of them read the stream through one norm.
    """
    lefts = []
    for piece in weight.pieces:
        left = changes[piece.tensor].left
        if piece.rows is not None:
            flat = left.reshape(-1, left.shape[-1])[piece.rows]
            left = flat.reshape(*left.shape[:-2], -1, left.shape[-1])
        lefts.append(left)
    first = changes[weight.pieces[0].tensor]
    columns = weight.pieces[0].columns
    right = first.right if columns is None else first.right[..., columns]
    return LowRank(first.kind, np.concatenate(lefts, axis=-2), right)
