"""Which tensors of a GGUF file write to the residual stream, architecture by architecture.

A GGUF file names its tensors but does not say what its architecture does with them, and the same
name plays different parts: post_attention_norm stands between the attention and the stream in
gemma2, and in front of the feed-forward network in qwen35. So the writers are facts about each
architecture, read off llama.cpp's graphs (src/models/*.cpp) and proved in llama.cpp itself: the
tests let it build a random model of each architecture with every tensor its loader knows, remove a
direction from the writers found here, and see that nothing of it is left in the final hidden state.

The facts stand in each architecture's entry (`convert.architectures.table`);
`docs/adding-an-architecture.md` says how to add one.

A gain is used as it stands in the file: GGUF holds Gemma's 1 + w already added.
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
        name: of the tensor, such as ``blk.3.ffn_down.weight``.
        kind: ``linear`` ((d, n) in NumPy's order), ``experts`` ((E, d, n)) or ``embedding``
            ((V, d), whose rows live in the stream).
        layer: the block it stands in; -1 for an embedding.
        gain: name of the norm weight g (d,) whose elements stand between the tensor's output and
            the stream, so that normalize(g ⊙ r) is to be projected out; None without one.
        bias: name of the bias added to its output, (d,) or (E, d), edited along with it.
        tied: an embedding that is the output head as well, because the file has no output.weight.
        more_gains: further norm weights behind ``gain``, where two norms follow one another
            (gemma4's experts); an edit multiplies all of `gains`.
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


# The norms behind a writer, the nearest first: "a|b" is the one of the two that the file has, "a?"
# may be missing.
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

# What writes in one architecture or another: for the message about an unknown one.
_CANDIDATES = re.compile(
    r"(attn_output|attn_out|ffn_down\w*|\w*down_proj|ssm_out|out_proj|time_mix_output|"
    r"channel_mix_value|proj|o_proj|\w*_embd|token_types|ffn_latent_up)$"
)


@dataclass(frozen=True)
class _Name:
    """A tensor's name in its parts: ``blk.3.ffn_down.weight`` -> 3, "ffn_down", "weight"."""

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
        architecture: general.architecture.
        names: every tensor's name. With a mapping name -> shape in NumPy's order (the reverse of
            the file's), kinds are checked against the shapes.
        metadata: the file's keys and values; embedding_length is checked against the shapes.
        pattern: a regular expression searched for anywhere in a name. Exactly the weights of two
            or three dimensions with a match are the writers then, whatever the architecture; their
            biases come with them, gains are not taken into account.

    Raises:
        UserError: when the architecture is unknown or refused, when a tensor of the file has no
            known role in it, or when ``pattern`` is no regular expression or matches no weight.
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
        # A bias of a norm behind a writer would be added to the stream by itself.
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
    """Blocks that draft further tokens (multi-token prediction), outside the forward pass."""
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
            # PLaMo's norms have no suffix.
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
