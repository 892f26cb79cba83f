"""Blocks for multi-token prediction in a GGUF: their tensors, and which of them are writers.

Such a block is one of the architecture's ordinary blocks with additional tensors ``blk.N.nextn.*``:
eh_proj, which joins the last hidden state and the next token's embedding and so begins the block's
residual stream; norms; and in some models copies of the embedding (embed_tokens) and of the output
head. llama.cpp's plain generation does not run these blocks; its speculative decoding may.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from convert.architectures import gguf_writers
from convert.architectures.gguf_writers import GgufWriter
from convert.architectures.mtp import GGUF_EMBEDDING, GGUF_INPUT, GGUF_READS
from convert.architectures.table import STREAMS
from convert.base.errors import OPTION, UserError


def tensors(architecture: str, names: Collection[str], metadata: Mapping[str, Any]) -> list[str]:
    """Names of all tensors of blocks for multi-token prediction, in the file's order."""
    ordered = [gguf_writers._Name(name) for name in names]
    aside = gguf_writers._predicting(architecture, ordered, metadata)
    return [name.full for name in ordered if name.layer in aside]


def find(
    architecture: str, shapes: Mapping[str, Any], metadata: Mapping[str, Any]
) -> list[GgufWriter]:
    """The residual writers in blocks for multi-token prediction.

    Their ``layer`` is that of the model's last ordinary block.

    Args:
        architecture: one that `gguf_writers.find` supports.
        shapes: every tensor's name -> shape in NumPy's order.
        metadata: the file's keys and values.

    Raises:
        UserError: when there is no such block, or the role of one of its tensors is not known.
    """
    drafting = [gguf_writers._Name(name) for name in tensors(architecture, shapes, metadata)]
    if not any(name.role == GGUF_INPUT for name in drafting):
        raise UserError(
            f"{OPTION}: the file holds no block of multi-token prediction (blk.N.nextn.eh_proj); "
            "leave the flag out.",
            option="mtp",
        )
    facts = STREAMS[architecture]
    norms = gguf_writers._norms(facts)
    last = min(name.layer for name in drafting) - 1
    reads = gguf_writers.READS | facts.reads | norms | GGUF_READS
    # The final norm of such a block in BailingMoE; in other architectures this name is in `norms`.
    reads |= {"layer_output_norm"}
    found, lost = [], []
    for name in sorted(drafting, key=lambda name: (name.layer, name.full)):
        behind = facts.feeds.get(name.role)
        if behind and f"blk.{name.layer}.{behind}.weight" in shapes:
            continue
        if name.role == GGUF_EMBEDDING and name.suffix == "weight":
            found.append(GgufWriter(name.full, "embedding", -1))
        elif name.role == GGUF_INPUT and name.suffix == "weight":
            bias = gguf_writers._bias(name, shapes)
            found.append(GgufWriter(name.full, "linear", last, bias=bias))
        elif name.role in facts.writers and name.suffix == "weight":
            one = gguf_writers._writer(architecture, name, facts, shapes)
            found.append(replace(one, layer=last))
        elif name.suffix == "bias" and (name.role in facts.writers or name.role == GGUF_INPUT):
            continue  # edited with its weight
        elif name.role not in reads or (name.role in norms and name.suffix == "bias"):
            lost.append(name.full)
    if lost:
        raise UserError(
            f"{OPTION}: the file holds tensors of multi-token prediction whose part is not known: "
            f"{gguf_writers._listed(lost)}; leave the flag out to keep them as they are.",
            option="mtp",
        )
    gguf_writers._check_shapes(architecture, found, shapes, metadata)
    return found
