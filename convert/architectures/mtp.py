"""Names and roles of the tensors for multi-token prediction (MTP) in folders and GGUFs.

An MTP block drafts further tokens: it joins the last hidden state and the next token's embedding by
a projection, runs one more layer on the result, and ends in the output head. mlx-lm drops these
tensors when it loads a model; other runtimes use them. The supported forms, by their names:

- further layers behind the last: ``model.layers.N.*`` with eh_proj, enorm, hnorm, shared_head
  (deepseek_v3, deepseek_v32, glm4_moe, glm4_moe_lite, step3p5, bailing_hybrid, bailing_moe_v3);
- ``mtp.*`` with fc and layers (qwen3_next, qwen3_5, qwen3_5_moe, exaone_moe), or with an eh_proj in
  its first layer (nemotron_h; mimo_v2_flash: ``model.mtp.*``);
- ``model.mtp_layers.N.*`` with input_proj (mimo);
- ``model.mtp_block.N.*`` with ``model.mtp_linear_proj.N`` (ernie4_5_moe).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

#: Names of these tensors in a GGUF, where all forms have the same names, ``blk.N.nextn.*``.
GGUF_INPUT = "nextn.eh_proj"
GGUF_EMBEDDING = "nextn.embed_tokens"
GGUF_READS = frozenset(
    ["nextn.enorm", "nextn.hnorm", "nextn.shared_head_norm", "nextn.shared_head_head"]
)

#: Projections that join the hidden state and the embedding; their output begins the block's stream.
INPUTS = frozenset(["eh_proj", "fc", "input_proj", "mtp_linear_proj"])

#: Copies of the model's embedding.
EMBEDDINGS = frozenset(["embed_tokens", "word_embeddings"])

#: Other modules that only MTP blocks have: norms and heads, which do not write to the stream.
READS = frozenset([
    "enorm", "hnorm", "norm", "final_layernorm", "pre_fc_norm_embedding", "pre_fc_norm_hidden",
    "token_layernorm", "hidden_layernorm", "mtp_hidden_norm", "mtp_emb_norm", "input_layernorm",
    "post_attention_layernorm", "pre_mlp_layernorm", "rotary_emb.inv_freq",
    "lm_head", "shared_head.norm", "shared_head.head", "transformer.shared_head.norm",
    "transformer.shared_head.output",
    "mlp.experts.gate_up_proj", "mlp.experts.gate_proj", "mlp.experts.up_proj",
])  # fmt: skip

_TEXT = r"^((?:(?:model|language_model|text_model|backbone|transformer)\.)*)"
_LAYER = re.compile(_TEXT + r"layers\.(\d+)\.(.+)$")
_MTP = re.compile(_TEXT + r"((?:mtp|nextn)[a-z_]*)\.(.+)$")

# Endings of names that are parts of a module; a name with another ending is a weight itself.
_PARTS = ("weight", "bias", "scales", "biases", "global_scale", "weight_scale_inv", "weight_scale")


@dataclass(frozen=True)
class Tensor:
    """A tensor of a layer or an MTP block.

    Attributes:
        name: its name in the files.
        module: that name without ``part``.
        role: the module's name inside its layer, the same for stacks of experts and single
            experts: ``mlp.experts.down_proj``.
        part: ``weight``, ``bias``, ``scales``, ...
    """

    name: str
    module: str
    role: str
    part: str


def layer_tensors(names: Iterable[str], layers: int) -> list[Tensor]:
    """The tensors of the model's ordinary layers.

    Args:
        names: all tensors of the model.
        layers: how many layers the model has.
    """
    found = ((name, _LAYER.match(name)) for name in names)
    return [_tensor(name, m.group(3)) for name, m in found if m and int(m.group(2)) < layers]


def mtp_tensors(names: Iterable[str], layers: int) -> list[Tensor]:
    """The tensors of MTP blocks, in the order of ``names``.

    Args:
        names: all tensors of the model.
        layers: how many layers the model has; layers with higher numbers are MTP blocks.
    """
    found = []
    for name in names:
        layer, block = _LAYER.match(name), _MTP.match(name)
        if layer and int(layer.group(2)) >= layers:
            found.append(_tensor(name, layer.group(3)))
        elif block:
            group, rest = block.group(2), block.group(3)
            inner = re.match(r"(?:layers\.)?\d+(?:\.|$)", rest)
            inside = rest[inner.end() :] if inner else rest
            # mtp_linear_proj.0.weight is a module; mtp_block.0.self_attn... is a layer.
            alone = inside in _PARTS
            found.append(_tensor(name, f"{group}.{inside}" if alone else inside))
    return found


def _tensor(name: str, inside: str) -> Tensor:
    head, _, part = inside.rpartition(".")
    if part not in _PARTS:
        head, part = inside, "weight"
    module = name.removesuffix(f".{part}")
    role = re.sub(r"\.(?:switch_mlp|experts)(?:\.\d+)?\.", ".experts.", f".{head}")[1:]
    return Tensor(name, module, role, part)
