"""The record of facts about one architecture, which a module in ``families`` fills in.

One entry holds everything that differs between architectures, in both directions: which of its GGUF
tensors write to the residual stream, how mlx-lm runs a GGUF of it, and how a model folder of it
becomes a GGUF. `docs/adding-an-architecture.md` walks through one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from convert.architectures.hf_keys import Config
from convert.architectures.keys import Keys
from convert.architectures.stored import Shape, Stored
from convert.architectures.weights import Names, Weight, renamed
from convert.tokenizers.to_gguf import Form

Gains = tuple[str, ...]


@dataclass(frozen=True)
class Stream:
    """Which tensors of a GGUF write to the residual stream in llama.cpp's graph.

    Attributes:
        writers: tensor name without ``blk.N.`` and ``.weight`` -> the norms between its output and
            the stream, nearest first; of "a|b" a file has one, and "a?" may be missing.
        reads: tensors that do not write to the stream, in addition to `gguf_writers.READS`.
        embeddings: tensors outside the blocks whose rows are added to the stream.
        proved: whether tests/convert/test_gguf_writers.py proves it numerically in llama.cpp.
        note: a remark for the table in docs/gguf-writers.md.
        feeds: writer -> a tensor that follows it in some files, and then is the writer instead.
        past_adapters: writers to which llama.cpp does not apply adapters, because its graphs call
            ggml_mul_mat there and not build_lora_mm. tests/outputs/test_adapter_architectures.py
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
        config: makes the keys of config.json that mlx-lm needs, from "model_type" to sizes and rope
            but without the tokenizer's ids. It raises UserError for a file that mlx-lm would not
            run as llama.cpp does.
        names: the names of its tensors and of mlx-lm's parameters.
        arranged: lists every parameter of the model with the rows and columns of the tensors from
            which it is made; `renamed` where each is a tensor as it is.
        unused: regular expressions of tensors that mlx-lm's model does not have and that the text
            model's forward pass does not use, such as those of multi-token prediction.
    """

    config: Callable[[Keys], dict[str, Any]]
    names: Names
    arranged: Callable[[Keys, Names], list[Weight]] = renamed
    unused: tuple[str, ...] = ()

    def weights(self, keys: Keys) -> list[Weight]:
        """Every parameter of the model, with the tensors from which it is made."""
        return self.arranged(keys, self.names)


def _no_keys(flat: Config) -> dict[str, Any]:
    return {}


def _usual_form(flat: Config) -> Form:
    return Form()


def _always(flat: Config) -> bool:
    return True


def _as_named(named: dict[str, Shape], others: dict[str, Shape]) -> dict[str, Shape]:
    return named


@dataclass(frozen=True)
class FromFolder:
    """How a Hugging Face or MLX folder of the architecture becomes a GGUF.

    `InMlx` says which tensors of a GGUF make up each parameter of mlx-lm's model, and is read
    backwards; this record has what is left. ``flat`` is the result of `folder_config.text_config`.

    Attributes:
        model_types: values of model_type in config.json.
        keys: makes from ``flat`` the metadata that not every architecture has, without the
            architecture's prefix; None takes out a usual key. It raises UserError for what
            llama.cpp cannot represent.
        stored: how tensors lie in a publisher's folder.
        when: whether the entry is for this config.json, where several share a model_type.
        names, arranged: take the place of those of `InMlx`, where a GGUF is written in another
            form than every one that is read.
        tensors: from the tensors that parameters come from by name, and the parameters without a
            name (both with shapes), makes the tensors of the GGUF.
        drafting: whether blocks for multi-token prediction are written or left out; None where
            there are none.
        says_head: whether files give the size of a head where config.json leaves it out.
        always_tied: whether llama.cpp has no separate output head for it.
        tied_by_default: the value of tie_word_embeddings where config.json has none.
        longrope: whether llama.cpp has two tables of rotary factors for it.
        reads_betas: whether llama.cpp reads yarn's beta_fast and beta_slow for it.
        scalings: methods of rope_scaling that ``keys`` takes care of.
        tokenizer: what is particular to its tokenizers.
        made: makes tensors from ``flat``, in place of the usual tables of rotary factors.
        rescaled: the parameter that is multiplied so that llama.cpp's fixed divisor of the queries
            has the effect of config.json's query_pre_attn_scalar; None where no divisor is fixed.
        largest: the number of layers of the one model in which llama.cpp divides by hidden / heads
            instead of the head size.
        defaults: the values that transformers uses for keys missing in config.json.
    """

    model_types: tuple[str, ...]
    keys: Callable[[Config], dict[str, Any]] = _no_keys
    stored: Stored = field(default_factory=Stored)
    when: Callable[[Config], bool] = _always
    names: Names | None = None
    arranged: Callable[[Keys, Names], list[Weight]] | None = None
    tensors: Callable[[dict[str, Shape], dict[str, Shape]], dict[str, Shape]] = _as_named
    drafting: bool | None = None
    says_head: bool = False
    always_tied: bool = False
    tied_by_default: bool = False
    longrope: bool = False
    reads_betas: bool = False
    scalings: tuple[str, ...] = ()
    tokenizer: Callable[[Config], Form] = _usual_form
    made: Callable[[Config], dict[str, np.ndarray]] | None = None
    rescaled: str | None = None
    largest: int = 0
    defaults: Config = field(default_factory=dict)


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        name: general.architecture in a GGUF, also the prefix of its metadata keys.
        stream: which tensors write to the residual stream; None where the architecture is refused.
        in_mlx: how mlx-lm runs its GGUFs; None where it cannot.
        from_folder: how its folders become GGUFs, for each kind of folder that does; empty where
            only llama.cpp's converter can do it.
        refused: why its weights cannot be edited exactly, in one sentence; empty where they can.
    """

    name: str
    stream: Stream | None = None
    in_mlx: InMlx | None = None
    from_folder: tuple[FromFolder, ...] = ()
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
    """The `Stream` of pre-norm blocks, whose outputs are added to the stream without a norm.

    Args:
        more: further writers. Like ``reads``, ``embeddings`` and ``past_adapters`` this is a list
            of names separated by spaces.
        reads, embeddings, proved, note, feeds, past_adapters: as in `Stream`.
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
    """The `Stream` of blocks with a norm between each output and the stream.

    Args:
        attention: the norm behind the attention's output.
        feed_forward: the norm behind the feed-forward network's output.
        more: further writers and the norms behind them.
        reads, note: as in `Stream`.
    """
    writers: dict[str, Gains] = {"attn_output": (attention,)}
    for name in ("ffn_down", "ffn_down_exps", "ffn_down_shexp"):
        writers[name] = (feed_forward,)
    return Stream({**writers, **(more or {})}, words(reads), note=note)


def edited(names: str, stream: Stream) -> tuple[Architecture, ...]:
    """Entries for architectures of which only the residual writers are known.

    GGUFs of them can be edited, but neither run by mlx-lm nor written from a folder.
    """
    return tuple(Architecture(name, stream) for name in names.split())


def refused(names: str, reason: str) -> tuple[Architecture, ...]:
    """Entries for architectures whose GGUFs are not edited, with the reason in one sentence."""
    return tuple(Architecture(name, refused=reason) for name in names.split())


def words(text: str) -> frozenset[str]:
    """The words of a text, which are separated by spaces."""
    return frozenset(text.split())
