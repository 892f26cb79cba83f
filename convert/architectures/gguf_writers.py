"""Finds the tensors of a GGUF file that write to the residual stream.

A GGUF file names its tensors but does not say how its architecture uses them, and the same name has
different roles: post_attention_norm stands between the attention and the stream in gemma2, but in
front of the feed-forward network in qwen35. So the writers of each architecture are listed, as read
from llama.cpp's graphs (src/models/*.cpp), and proved in llama.cpp: the tests make it build a
random model of each architecture with every tensor that its loader accepts, remove a direction from
the writers found here, and check that nothing of it is left in the final hidden state.

The lists are in each architecture's entry (`convert.architectures.table`);
`docs/adding-an-architecture.md` says how to add one.

Gains are used as they are stored: for Gemma a GGUF stores 1 + w, not w.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from convert.architectures.architecture import Stream, words
from convert.architectures.table import REFUSED, STREAMS
from convert.base.errors import OPTION, UserError

_SHOWN = 8


@dataclass(frozen=True)
class GgufWriter:
    """A tensor of a GGUF file that writes to the residual stream.

    Attributes:
        name: the tensor's name, such as ``blk.3.ffn_down.weight``.
        kind: ``linear`` ((d, n) in NumPy's order), ``experts`` ((E, d, n)) or ``embedding``
            ((V, d), whose rows are added to the stream).
        layer: its block; -1 for an embedding.
        gain: name of the norm weight g, shape (d,), by which the tensor's output is multiplied
            before it is added to the stream, so that an edit projects out normalize(g ⊙ r); None
            where there is no norm.
        bias: name of the bias added to its output, (d,) or (E, d), which is edited as well.
        tied: whether the embedding is the output head as well (the file has no output.weight).
        more_gains: further norm weights, where several norms follow one another (gemma4's experts);
            an edit multiplies all of `gains`.
    """

    name: str
    kind: str
    layer: int
    gain: str | None = None
    bias: str | None = None
    tied: bool = False
    more_gains: tuple[str, ...] = ()

    @property
    def gains(self) -> tuple[str, ...]:
        """All norm weights between the tensor and the stream; their product is the gain."""
        return (() if self.gain is None else (self.gain,)) + self.more_gains

    @property
    def parameters(self) -> list[str]:
        """The tensors that an edit changes."""
        return [self.name] + ([self.bias] if self.bias else [])


READS = words(
    # Outside the blocks.
    "output output_norm rope_freqs rope_factors_long rope_factors_short "
    # In front of the attention, and inside it.
    "attn_norm attn_norm_2 attn_q attn_k attn_v attn_qkv attn_q_norm attn_k_norm attn_gate "
    "attn_sinks attn_rot_embd attn_q_a attn_q_a_norm attn_q_b attn_kv_a_mqa attn_kv_a_norm "
    "attn_kv_b attn_k_b attn_v_b indexer.k_norm indexer.proj indexer.attn_k indexer.attn_q_b "
    "indexer.q_proj indexer.k_proj indexer.q_norm "
    # In front of the feed-forward network, and inside it.
    "ffn_norm ffn_gate ffn_up ffn_gate_inp ffn_gate_exps ffn_up_exps ffn_gate_up_exps "
    "ffn_gate_shexp ffn_up_shexp ffn_gate_inp_shexp exp_probs_b exp_probs_b_vl "
    # Inside a state-space or linear-attention block.
    "ssm_in ssm_conv1d ssm_conv1d_q ssm_conv1d_k ssm_conv1d_v ssm_x ssm_dt ssm_dt_norm "
    "ssm_b_norm ssm_c_norm ssm_a ssm_d ssm_norm ssm_ba ssm_alpha ssm_beta ssm_f_a ssm_f_b "
    "ssm_g_a ssm_g_b ssm_g"
)
"""Tensors that write to the stream in no architecture of the table."""


# --------------------------------------------------------------------------------------------------
# Finding


_BLOCK = re.compile(r"blk\.(\d+)\.(.+)$")
_SUFFIX = re.compile(r"\.(weight|bias|scale|input_scale)$")

# Names of writers in any architecture, for the message about an architecture that is not known.
_CANDIDATES = re.compile(
    r"(attn_output|attn_out|ffn_down\w*|\w*down_proj|ssm_out|out_proj|time_mix_output|"
    r"channel_mix_value|proj|o_proj|\w*_embd|token_types|ffn_latent_up)$"
)


@dataclass(frozen=True)
class _Name:
    """A tensor's name and its parts: ``blk.3.ffn_down.weight`` -> 3, "ffn_down", "weight"."""

    full: str
    layer: int = field(init=False, default=-1)
    role: str = field(init=False, default="")
    suffix: str = field(init=False, default="")

    def __post_init__(self) -> None:
        block = _BLOCK.match(self.full)
        rest = block[2] if block else self.full
        suffix = _SUFFIX.search(rest)
        object.__setattr__(self, "layer", int(block[1]) if block else -1)
        object.__setattr__(self, "role", rest[: suffix.start()] if suffix else rest)
        object.__setattr__(self, "suffix", suffix[1] if suffix else "")


def find(
    architecture: str,
    names: Collection[str],
    metadata: Mapping[str, Any] | None = None,
    pattern: str | None = None,
) -> list[GgufWriter]:
    """All residual writers of a GGUF file: embeddings first, then block by block.

    Args:
        architecture: the file's general.architecture.
        names: every tensor's name. If it is a mapping name -> shape in NumPy's order (the reverse
            of the file's), the shapes are checked as well.
        metadata: the file's keys and values; embedding_length is checked against the shapes.
        pattern: a regular expression, searched for anywhere in a name. If it is given, the writers
            are exactly the weights of two or three dimensions whose name matches, with their
            biases and without gains, whatever the architecture.

    Raises:
        UserError: when the architecture is unknown or refused, the role of a tensor in it is not
            known, or ``pattern`` is no regular expression or matches no weight.
    """
    ordered = sorted((_Name(name) for name in names), key=lambda name: (name.layer, name.full))
    if pattern is not None:
        writers = _matching(pattern, ordered, names)
    else:
        if architecture in REFUSED:
            raise UserError(
                f"GGUF files of architecture {architecture} are not edited: "
                f"{REFUSED[architecture]} {_way_out()}",
                option="tensors",
            )
        if architecture not in STREAMS:
            likely = [n.full for n in ordered if n.suffix == "weight" and _CANDIDATES.match(n.role)]
            shown = f": {_listed(likely)}" if likely else ", and no tensor looks like one"
            raise UserError(
                f"the architecture {architecture} is not known, so its residual writers have to be "
                f"guessed{shown}. {_way_out()}",
                option="tensors",
            )
        writers = _placed(architecture, ordered, metadata or {})
    if isinstance(names, Mapping):
        _check_shapes(architecture, writers, names, metadata or {})
    return writers


def _way_out() -> str:
    return f"Use {OPTION} REGEX to name the tensors to edit yourself."


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    more = len(every) - _SHOWN
    return ", ".join(every[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _placed(
    architecture: str, ordered: list[_Name], metadata: Mapping[str, Any]
) -> list[GgufWriter]:
    facts = STREAMS[architecture]
    present = {name.full for name in ordered}
    aside = _predicting(architecture, ordered, metadata)
    tied = "output.weight" not in present
    writers: list[GgufWriter] = []
    norms = _norms(facts)
    lost: list[str] = []
    for name in ordered:
        if name.layer >= 0 and name.layer in aside:
            continue
        if name.layer < 0 and name.role in facts.embeddings and name.suffix == "weight":
            head = tied and name.role == "token_embd"
            writers.append(GgufWriter(name.full, "embedding", -1, tied=head))
        elif name.layer >= 0 and name.role in facts.writers:
            behind = facts.feeds.get(name.role)
            if behind and f"blk.{name.layer}.{behind}.weight" in present:
                continue
            if name.suffix == "weight":
                writers.append(_writer(architecture, name, facts, present))
            elif name.suffix not in ("bias", "scale", "input_scale") or (
                f"{name.full[: -len(name.suffix)]}weight" not in present
            ):
                lost.append(name.full)
        # A bias of a norm behind a writer would itself be added to the stream.
        elif name.role not in READS | facts.reads | norms or (
            name.role in norms and name.suffix == "bias"
        ):
            lost.append(name.full)
    if lost:
        raise UserError(
            f"the file holds tensors whose part in a model of architecture {architecture} is not "
            f"known: {_listed(lost)}. They may write to the residual stream. {_way_out()}",
            option="tensors",
        )
    if not any(writer.name == "token_embd.weight" for writer in writers):
        raise UserError(
            "the file has no token_embd.weight: it is not a whole language model, or one part of a "
            "split file."
        )
    return writers


def _predicting(architecture: str, ordered: list[_Name], metadata: Mapping[str, Any]) -> set[int]:
    """Numbers of the blocks for multi-token prediction, which the forward pass does not run."""
    aside = {name.layer for name in ordered if name.role.startswith("nextn.")}
    count = int(metadata.get(f"{architecture}.nextn_predict_layers", 0))
    blocks = int(metadata.get(f"{architecture}.block_count", 0))
    return aside | set(range(blocks - count, blocks))


def _norms(facts: Stream) -> frozenset[str]:
    return frozenset(
        one
        for gains in facts.writers.values()
        for gain in gains
        for one in gain.rstrip("?").split("|")
    )


def _writer(architecture: str, name: _Name, facts: Stream, present: Collection[str]) -> GgufWriter:
    gains = []
    for gain in facts.writers[name.role]:
        choices = [
            full
            for role in gain.rstrip("?").split("|")
            # In PLaMo the names of norms have no suffix ".weight".
            for full in (f"blk.{name.layer}.{role}.weight", f"blk.{name.layer}.{role}")
            if full in present
        ]
        if choices:
            gains.append(choices[0])
        elif not gain.endswith("?"):
            raise UserError(
                f"{name.full} writes to the residual stream through a norm in every {architecture} "
                f"model, but the file has no blk.{name.layer}.{gain.split('|')[0]}.weight: it is "
                f"damaged. {_way_out()}",
                option="tensors",
            )
    kind = _kind(name)
    return GgufWriter(
        name.full,
        kind,
        name.layer,
        gains[0] if gains else None,
        _bias(name, present),
        more_gains=tuple(gains[1:]),
    )


def _kind(name: _Name) -> str:
    if name.layer < 0 and name.role.endswith("_embd"):
        return "embedding"
    return "experts" if name.role.endswith("exps") else "linear"


def _bias(name: _Name, present: Collection[str]) -> str | None:
    bias = f"{name.full.removesuffix('weight')}bias"
    return bias if name.suffix == "weight" and bias in present else None


def _matching(pattern: str, ordered: list[_Name], names: Collection[str]) -> list[GgufWriter]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"{OPTION} {pattern} is no regular expression: {error}.", option="tensors"
        ) from None
    writers = []
    for name in ordered:
        if not expression.search(name.full) or name.suffix in ("bias", "scale", "input_scale"):
            continue
        if isinstance(names, Mapping):
            if len(names[name.full]) not in (2, 3):
                continue
            kind = "experts" if len(names[name.full]) == 3 else _kind(name)
        elif name.role.endswith("norm") or name.suffix != "weight":
            continue
        else:
            kind = _kind(name)
        tied = name.full == "token_embd.weight" and "output.weight" not in names
        writers.append(GgufWriter(name.full, kind, name.layer, None, _bias(name, names), tied))
    if not writers:
        raise UserError(
            f"{OPTION} {pattern} matches no weight of two or three dimensions; the file's look "
            f"like {_listed(n.full for n in ordered if n.suffix == 'weight')}.",
            option="tensors",
        )
    return writers


def _check_shapes(
    architecture: str,
    writers: Iterable[GgufWriter],
    shapes: Mapping[str, Any],
    metadata: Mapping[str, Any],
) -> None:
    width = metadata.get(f"{architecture}.embedding_length")
    if width is None and "token_embd.weight" in shapes:
        width = shapes["token_embd.weight"][-1]
    for writer in writers:
        shape = tuple(int(size) for size in shapes[writer.name])
        ranks = {"linear": 2, "experts": 3, "embedding": 2}
        axis = -1 if writer.kind == "embedding" else -2
        if len(shape) != ranks[writer.kind] or (width is not None and shape[axis] != int(width)):
            raise UserError(
                f"{writer.name} has the shape {shape}, which does not write to a residual stream "
                f"of {width} dimensions: the file is damaged, or {OPTION} names what is no writer.",
                option="tensors",
            )
