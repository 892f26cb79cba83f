"""What is to be said about one architecture: the record that its family's module fills in.

One entry holds everything that differs between architectures, in both directions: which of its GGUF
tensors write to the residual stream, how mlx-lm runs a GGUF of it, and how a model folder of it
becomes a GGUF. `docs/adding-an-architecture.md` walks through one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from convert.architectures.hf_keys import Config
from convert.architectures.keys import Keys
from convert.architectures.weights import Weight

Gains = tuple[str, ...]


@dataclass(frozen=True)
class Stream:
    """Which tensors of a GGUF write to the residual stream, as llama.cpp's graph has it.

    Attributes:
        writers: tensor name without ``blk.N.`` and ``.weight`` -> the norms behind it, nearest
            first; of "a|b" the file has one, "a?" may be missing.
        reads: further tensors, beyond `gguf_writers.READS`, that do not write to the stream.
        embeddings: tensors outside the blocks whose rows are added to the stream.
        proved: whether tests/convert/test_gguf_writers.py shows it numerically in llama.cpp.
        note: what a reader of docs/gguf-writers.md should know.
        feeds: writer -> another that stands behind it in some files, and writes in its stead.
        past_adapters: writers that llama.cpp multiplies with past all adapters. Its graphs call
            ggml_mul_mat there, not build_lora_mm. tests/outputs/test_adapter_architectures.py
            tries every writer of every architecture.
    """

    writers: Mapping[str, Gains]
    reads: frozenset[str] = frozenset()
    embeddings: tuple[str, ...] = ("token_embd",)
    proved: bool = True
    note: str = ""
    feeds: Mapping[str, str] = field(default_factory=dict)
    past_adapters: frozenset[str] = frozenset()


@dataclass(frozen=True)
class InMlx:
    """How mlx-lm runs a GGUF of the architecture.

    Attributes:
        config: the keys of config.json that mlx-lm needs, "model_type" among them; sizes, rope,
            everything but the tokenizer's ids. Refuses with UserError what mlx-lm would run
            otherwise than llama.cpp.
        weights: every parameter of the model, and the rows and columns of tensors it is made of.
        unused: regular expressions of tensors that mlx-lm's model has no place for and that do not
            belong to the text model's forward pass, such as multi-token prediction heads.
    """

    config: Callable[[Keys], dict[str, Any]]
    weights: Callable[[Keys], list[Weight]]
    unused: tuple[str, ...] = ()


def _no_keys(flat: Config) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class FromFolder:
    """How a Hugging Face or MLX folder of the architecture becomes a GGUF.

    Names of tensors are gguf-py's (its TensorNameMap); what is said here is what else llama.cpp's
    converter does. ``flat`` is `hf_keys.text_config`'s result.

    Attributes:
        model_types: of config.json.
        keys: flat -> metadata beyond what every architecture has, without the architecture's
            prefix. Refuses with UserError what llama.cpp has no place for.
        permutes: Q and K rows are reordered for llama.cpp's interleaved rotary embedding.
        norm_offset: added to every norm weight (Gemma stores the gain minus one).
        always_tied: llama.cpp has no separate output head for it.
        tied_by_default: what tie_word_embeddings is where config.json does not say.
        fixed_rope_base: llama.cpp takes a base of 10000 where the file names none, and files of
            this architecture do not name it.
        longrope: llama.cpp has two tables of rotary factors for it.
        rescaled: the parameter that takes up the difference between config.json's
            query_pre_attn_scalar and what llama.cpp divides queries by; None where it is not fixed.
        largest: the number of layers of the one model in which llama.cpp divides by hidden / heads
            instead of the head size.
        defaults: what transformers fills in where config.json leaves a key out.
    """

    model_types: tuple[str, ...]
    keys: Callable[[Config], dict[str, Any]] = _no_keys
    permutes: bool = False
    norm_offset: float = 0.0
    always_tied: bool = False
    tied_by_default: bool = False
    fixed_rope_base: bool = False
    longrope: bool = False
    rescaled: str | None = None
    largest: int = 0
    defaults: Config = field(default_factory=dict)


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        name: general.architecture in a GGUF, also the prefix of its metadata keys.
        stream: what writes to the residual stream; None where it is ``refused``.
        in_mlx: how mlx-lm runs its GGUFs; None where it cannot.
        from_folder: how its folders become GGUFs; None where that is left to llama.cpp's converter.
        refused: why no exact edit of its weights is offered, in one sentence.
    """

    name: str
    stream: Stream | None = None
    in_mlx: InMlx | None = None
    from_folder: FromFolder | None = None
    refused: str = ""


def plain(
    more: str = "",
    *,
    reads: str = "",
    embeddings: str = "token_embd",
    proved: bool = True,
    note: str = "",
    feeds: Mapping[str, str] | None = None,
    past_adapters: str = "",
) -> Stream:
    """The pre-norm block: attention and feed-forward outputs are added as they are.

    Args:
        more: further writers, separated by spaces, as are ``reads``, ``embeddings`` and
            ``past_adapters``.
    """
    names = f"attn_output ffn_down ffn_down_exps ffn_down_shexp {more}".split()
    return Stream(
        dict.fromkeys(names, ()),
        words(reads),
        tuple(embeddings.split()),
        proved,
        note,
        feeds or {},
        words(past_adapters),
    )


def post_norm(
    attention: str = "post_attention_norm",
    feed_forward: str = "post_ffw_norm",
    more: Mapping[str, Gains] | None = None,
    *,
    reads: str = "",
    note: str = "",
) -> Stream:
    """A norm stands between each output and the stream."""
    writers: dict[str, Gains] = {"attn_output": (attention,)}
    for name in ("ffn_down", "ffn_down_exps", "ffn_down_shexp"):
        writers[name] = (feed_forward,)
    return Stream({**writers, **(more or {})}, words(reads), note=note)


def edited(names: str, stream: Stream) -> tuple[Architecture, ...]:
    """Architectures of which only the residual writers are known: their GGUFs can be edited."""
    return tuple(Architecture(name, stream) for name in names.split())


def refused(names: str, reason: str) -> tuple[Architecture, ...]:
    """Architectures whose GGUFs are not edited."""
    return tuple(Architecture(name, refused=reason) for name in names.split())


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())
