"""Which tensors of a GGUF file write to the residual stream, architecture by architecture.

A GGUF file names its tensors but does not say what its architecture does with them, and the same
name plays different parts: post_attention_norm stands between the attention and the stream in
gemma2, and in front of the feed-forward network in qwen35. So the writers are facts about each
architecture, read off llama.cpp's graphs (src/models/*.cpp) and proved in llama.cpp itself: the
tests let it build a random model of each architecture with every tensor its loader knows, remove a
direction from the writers found here, and see that nothing of it is left in the final hidden state.

To add an architecture:

1. Read its graph: what is added to the stream, and which norm's weight stands before the addition.
2. Write a line in `ARCHITECTURES`. ``_plain`` is the pre-norm block nearly all have; tensors of a
   name that other architectures use otherwise (``post_attention_norm``, ``ffn_sub_norm``) go into
   ``reads`` when they do not write.
3. Run ``tests/convert/test_gguf_writers.py``, which proves the line numerically, and names tensors
   of llama.cpp's loader that it leaves without a place. An architecture the test cannot build is
   given ``proved=False`` and a note that says why; one that no exact edit exists for goes into
   `REFUSED` with the reason.
4. ``python -m tools.regenerate docs/gguf-writers.md``.

A gain is used as it stands in the file: GGUF holds Gemma's 1 + w already added.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

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
_Gains = tuple[str, ...]


@dataclass(frozen=True)
class Architecture:
    """What one architecture's tensors do.

    Attributes:
        writers: tensor name without ``blk.N.`` and ``.weight`` -> the norms behind it, nearest
            first; of "a|b" the file has one, "a?" may be missing.
        reads: further tensors, beyond `READS`, that do not write to the stream.
        feeds: writer -> another that stands behind it in some files, and writes in its stead.
        embeddings: tensors outside the blocks whose rows are added to the stream.
        proved: whether the test shows it numerically in llama.cpp.
        note: what a reader of the table should know.
    """

    writers: Mapping[str, _Gains]
    reads: frozenset[str] = frozenset()
    embeddings: tuple[str, ...] = ("token_embd",)
    proved: bool = True
    note: str = ""
    feeds: Mapping[str, str] = field(default_factory=dict)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


READS = _words(
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


def _plain(
    more: str = "",
    *,
    reads: str = "",
    embeddings: str = "token_embd",
    proved: bool = True,
    note: str = "",
) -> Architecture:
    """The pre-norm block: attention and feed-forward outputs are added as they are."""
    names = f"attn_output ffn_down ffn_down_exps ffn_down_shexp {more}".split()
    return Architecture(
        dict.fromkeys(names, ()),
        _words(reads),
        tuple(embeddings.split()),
        proved,
        note,
    )


def _post_norm(
    attention: str = "post_attention_norm",
    feed_forward: str = "post_ffw_norm",
    more: Mapping[str, _Gains] | None = None,
    *,
    reads: str = "",
    note: str = "",
) -> Architecture:
    """A norm stands between each output and the stream."""
    writers: dict[str, _Gains] = {"attn_output": (attention,)}
    for name in ("ffn_down", "ffn_down_exps", "ffn_down_shexp"):
        writers[name] = (feed_forward,)
    return Architecture({**writers, **(more or {})}, _words(reads), note=note)


def _each(names: str, architecture: Architecture) -> dict[str, Architecture]:
    return dict.fromkeys(names.split(), architecture)


_DIFFUSION = "diffusion model: llama.cpp generates with it in a program of its own"

# Hyper-connections: several streams of the same dimensions, which share writers and are read, mixed
# and written to with scalars computed from them. A direction that nothing writes is in none.
_HYPER = (
    "hc_attn_fn hc_attn_base hc_attn_scale hc_ffn_fn hc_ffn_base hc_ffn_scale output_hc_fn "
    "output_hc_base output_hc_scale"
)
_STREAMS = "several streams, mixed by scalars (hyper-connections)"

ARCHITECTURES: dict[str, Architecture] = {
    **_each(
        "llama llama4 deci mistral3 mistral4 qwen qwen2 qwen2moe qwen2vl qwen3moe qwen3vlmoe "
        "gemma phi2 phi3 phimoe plamo falcon baichuan refact gptneox starcoder2 stablelm codeshell "
        "orion internlm2 minicpm minicpm3 xverse command-r cohere2 cohere2moe olmo olmoe openelm "
        "deepseek deepseek2 deepseek2-ocr deepseek32 chatglm glm-dsa jais jais2 nemotron exaone "
        "exaone-moe granite granitemoe granite_swa bailingmoe bailingmoe2 dots1 dots3note arcee "
        "laguna ernie4_5 ernie4_5-moe hunyuan-moe hunyuan-dense hunyuan_vl hy_v3 smollm3 "
        "smallthinker apertus minimax-m2 minimax-m3 pangu-embedded paddleocr mimo2 step35 "
        "spark2_5 maincoder mellum maple kimi-linear bailingmoe3",
        _plain(),
    ),
    **_each("dream llada llada-moe rnd1", _plain(note=_DIFFUSION)),
    **_each("qwen3 qwen3vl", _plain(reads="cls.output")),
    **_each("gpt2 starcoder", _plain(embeddings="token_embd position_embd")),
    "mpt": _plain(reads="ffn.act.scales", embeddings="token_embd position_embd"),
    "arctic": _plain(reads="ffn_norm_exps"),
    "bitnet": _plain(reads="attn_sub_norm ffn_sub_norm"),
    "dbrx": _plain(
        reads="attn_output_norm", note="attn_output_norm stands before the feed-forward network"
    ),
    "grovemoe": _plain("ffn_down_chexps", reads="ffn_gate_chexps ffn_up_chexps"),
    "talkie": _plain(reads="layer_output_scale", note="the embedding is added in every layer"),
    "hy_v4": _plain(reads=_HYPER, note=_STREAMS),
    "glm5-next": _plain(
        reads=f"{_HYPER} indexer_compressor_ape indexer_compressor_gate", note=_STREAMS
    ),
    "deepseek4": Architecture(
        _plain("attn_output_b").writers,
        _words(
            f"{_HYPER} attn_output_a attn_kv attn_compressor_ape attn_compressor_gate "
            "attn_compressor_kv attn_compressor_norm indexer_compressor_ape "
            "indexer_compressor_gate indexer_compressor_kv indexer_compressor_norm ffn_gate_tid2eid"
        ),
        note=f"{_STREAMS}; the attention writes through attn_output_b",
    ),
    "kimi-k3": Architecture(
        _plain("ffn_routed_up").writers,
        _words("ffn_routed_down ffn_routed_norm attn_res_score ffn_res_score output_res_score"),
        note="the experts write through ffn_routed_up; layers read earlier streams, mixed by "
        "scalars",
        feeds={"ffn_down_exps": "ffn_routed_up"},
    ),
    **_each(
        "glm4moe gpt-oss seed_oss",
        _plain(
            reads="post_attention_norm",
            note="post_attention_norm stands before the feed-forward network",
        ),
    ),
    **_each(
        "qwen3next qwen35 qwen35moe",
        _plain(
            "ssm_out",
            reads="post_attention_norm cls.output",
            note="post_attention_norm stands before the feed-forward network",
        ),
    ),
    **_each(
        "mamba mamba2 jamba falcon-h1 granitehybrid",
        _plain("ssm_out"),
    ),
    **_each(
        "nemotron_h nemotron_h_moe",
        Architecture(
            _plain("ssm_out ffn_latent_up").writers,
            _words("ffn_latent_down"),
            note="where there is an ffn_latent_up, the experts write through it",
            feeds={"ffn_down_exps": "ffn_latent_up"},
        ),
    ),
    **_each(
        "lfm2 lfm2moe",
        _plain(
            "shortconv.out_proj",
            reads="shortconv.conv shortconv.in_proj token_embd_norm dense_2",
            note="token_embd_norm is the final norm",
        ),
    ),
    **_each("gemma2 gemma3 glm4 olmo2 exaone4 afmoe muse-glimmer plamo3", _post_norm()),
    "plamo2": _post_norm(more={"ssm_out": ("post_attention_norm",)}),
    "grok": _post_norm("attn_output_norm", "layer_output_norm|post_ffw_norm"),
    "gemma4": Architecture(
        {
            "attn_output": ("post_attention_norm",),
            "ffn_down": ("post_ffw_norm_1?", "post_ffw_norm"),
            "ffn_down_exps": ("post_ffw_norm_2", "post_ffw_norm"),
            "proj": ("post_norm",),
        },
        _words(
            "inp_gate layer_output_scale per_layer_token_embd per_layer_model_proj "
            "per_layer_proj_norm pre_ffw_norm_2"
        ),
        note="per-layer inputs write through proj; experts through two norms",
    ),
}
"""general.architecture -> what its tensors do."""

_EMBEDS = "it makes embeddings and generates no text."
_NORMED = "its embedding is normalized on its way into the stream, with the mean subtracted."
_DRAFT = "it only drafts tokens for another model, from that model's hidden states."
_SPEECH = "it makes sound, not text."

REFUSED: dict[str, str] = {
    **dict.fromkeys(
        _words(
            "bert modern-bert nomic-bert nomic-bert-moe neo-bert jina-bert-v2 jina-bert-v3 "
            "eurobert gemma-embedding llama-embed t5encoder"
        ),
        _EMBEDS,
    ),
    **dict.fromkeys(("gemma4-assistant", "eagle3", "dflash"), _DRAFT),
    **dict.fromkeys(("wavtokenizer-dec", "qwen3tts", "pockettts"), _SPEECH),
    "clip": "it is the vision half of a model: give the language half.",
    "t5": "it has an encoder and a decoder, with a stream each.",
    "gptj": "there is no implementation of it in llama.cpp.",
    "bloom": _NORMED,
    "rwkv6": _NORMED,
    "rwkv7": _NORMED,
    "rwkv6qwen2": "its recurrent blocks have not been proved in llama.cpp.",
    "arwkv7": "its recurrent blocks have not been proved in llama.cpp.",
    "gemma3n": "its four streams are mixed by learned matrices (AltUp) and written to through "
    "Laurel and per-layer inputs, which no removal of one direction from weights undoes.",
    "minimax-01": "its residual is the normalized stream, so that every norm's gain turns the "
    "direction.",
    "nanbeige": "its layers may run in loops with a norm in between, whose gain turns the "
    "direction.",
    "hrm_text": "its layers run in loops on two streams, one of which starts from a learned state.",
    "chameleon": "it is implemented only in part in llama.cpp.",
    "graniteswitch": "it switches adapters inside the model, which write to the stream too.",
    "cogvlm": "image tokens run through weights of their own.",
    "plm": "it has not been proved in llama.cpp.",
    "qwen4exp": "its streams are mixed by learned maps (hyper-connections) and written to by "
    "per-layer n-gram embeddings.",
}
"""general.architecture -> why no exact edit of its weights is offered, in one sentence."""


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
        if architecture not in ARCHITECTURES:
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
    facts = ARCHITECTURES[architecture]
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


def _norms(facts: Architecture) -> frozenset[str]:
    return frozenset(
        one
        for gains in facts.writers.values()
        for gain in gains
        for one in gain.rstrip("?").split("|")
    )


def _writer(
    architecture: str, name: _Name, facts: Architecture, present: Collection[str]
) -> GgufWriter:
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
