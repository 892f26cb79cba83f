"""A chat model loaded through mlx-lm: its layers, sizes, dtype and chat template."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from abl_mlx.inputs.sets import Prompt, prompt_of
from abl_mlx.models import (
    context_length,
    prompt_tokens,
    split_model,
    sweeps,
    thoughts,
    tokenizer_config,
)
from abl_mlx.models.given_template import GivenTemplate
from abl_mlx.models.native_output import unheard
from abl_mlx.models.stages import OncePerFile, Stages
from abl_mlx.support import ranks
from abl_mlx.support.arrays import parameters
from abl_mlx.support.console import say
from convert.base.errors import UserError
from convert.base.foreign import foreign
from convert.base.hf_config import read_config
from convert.base.hf_counts import check_counts
from convert.mlx import on_cpu, other_quantization
from convert.mlx.finite import all_finite
from convert.mlx.gemma2_window import give_window
from convert.mlx.safetensors_files import TensorFiles
from convert.tokenizers import template_files
from convert.tokenizers.chat_template import ChatTemplate

# A model with at most this many weights becomes float32 when it is loaded, which takes 256 MB.
_WIDENED = 1 << 26


@dataclass
class ChatModel:
    """A loaded model with its tokenizer.

    Attributes:
        folder: where it was loaded from.
        model: mlx-lm's model.
        tokenizer: mlx-lm's TokenizerWrapper; None if it was not loaded.
        config: config.json with renamed keys filled in, as given to mlx-lm.
        reply_prefixes: token ids with which every reply of the model opens (a thought block that
            the template leaves to the model, say), by the prompt's thinking; appended to every
            encoded prompt.
        given_template: a chat template that replaces the model's own.
    """

    folder: Path
    model: nn.Module
    tokenizer: Any
    config: dict[str, Any]
    reply_prefixes: dict[str | None, tuple[int, ...]] = field(default_factory=dict)
    given_template: GivenTemplate | None = None
    _told: bool = field(default=False, init=False, repr=False)

    @cached_property
    def layers(self) -> list[nn.Module]:
        """The transformer blocks, in order."""
        return list(self.model.layers)

    @cached_property
    def width(self) -> int:
        """d, the number of dimensions of the residual stream."""
        text = self.config.get("text_config") or self.config
        for key in ("hidden_size", "n_embd", "d_model", "dim", "model_dim", "hidden_dim"):
            if isinstance(text.get(key), int):
                return int(text[key])
        raise UserError(f"{self.folder / 'config.json'} does not say the model's hidden_size.")

    @property
    def model_type(self) -> str:
        """The architecture's name in config.json."""
        return str(self.config["model_type"])

    def write_with(self, given: GivenTemplate | None) -> None:
        """Write prompts with a template in place of the model's own, if one is given."""
        self.given_template = given
        if given is not None and given.ends in self.tokenizer.get_vocab():
            self.tokenizer.add_eos_token(given.ends)

    @property
    def completes(self) -> bool:
        """Whether it is given text to complete, and no conversation: ``--template plain``."""
        return self.given_template is not None and self.given_template.completes

    def encode(self, question: str | Prompt) -> list[int]:
        """Token ids of a prompt in the chat template, up to where the reply begins.

        Args:
            question: a prompt, or the text of a user's message. What its replies open with,
                ``reply_prefixes``, is appended.
        """
        prompt = prompt_of(question)
        return self.encode_message(prompt) + list(self.reply_prefixes.get(prompt.thinking, ()))

    def encode_message(self, question: str | Prompt) -> list[int]:
        """Like `encode`, without what its reply opens with."""
        prompt = prompt_of(question)
        if prompt.system is not None and not self._told and self.template is not None:
            self._told = True
            if not self.template.takes_system:
                say(prompt_tokens.without_system_role(self.folder.name))
        given = self.given_template is not None
        template = self.tool_template if prompt.tools else self.template
        ids = prompt_tokens.encode(self.tokenizer, template, prompt, self.folder, given=given)
        context_length.check(len(ids), self.config, self.folder)
        return ids

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The chat template; None where the tokenizer formats prompts in code.

        Raises:
            UserError: when the model has none and none was given.
        """
        return prompt_tokens.template_of(self.tokenizer, self.folder, self.given_template)

    @cached_property
    def tool_template(self) -> ChatTemplate | None:
        """The chat template of prompts with tools; otherwise as `template`."""
        return prompt_tokens.template_of(
            self.tokenizer, self.folder, self.given_template, tools=True
        )

    def opened_thought(self, thinking: str | None = None) -> str:
        """The end of every prompt, from the tag that opens a thought; "" when none is opened.

        Args:
            thinking: as of `Prompt`.
        """
        return thoughts.opened_by(
            lambda text: self.tokenizer.decode(self.encode(Prompt(text, thinking=thinking)))
        )

    def template_tail(self, thinking: str | None = None) -> int:
        """How many tokens follow the instruction: the number that all prompts share at the end.

        The positions -1 to -template_tail come after the whole instruction and have the same
        tokens in every prompt.

        Args:
            thinking: as of `Prompt`.
        """
        return max(1, self.message_tail(thinking) + len(self.reply_prefixes.get(thinking, ())))

    def message_tail(self, thinking: str | None = None) -> int:
        """Like `template_tail`, without what replies open with; 0 where nothing follows."""
        first, second = (
            self.encode_message(Prompt(text, thinking=thinking))[::-1]
            for text in ("Why?", "Tell me 7 of them")
        )
        return _common(first, second)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count


def common_prefix(sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The longest token sequence with which all of ``sequences`` begin."""
    shortest = min(sequences, key=len)
    return tuple(shortest[: min(_common(shortest, sequence) for sequence in sequences)])


def computes_on_cpu() -> bool:
    """Whether MLX's default device is the CPU, where half-precision products are slow."""
    return bool(mx.default_device() == mx.Device(mx.cpu))


def load(
    folder: Path,
    *,
    check: bool = True,
    adapter: Path | None = None,
    encodes: bool = True,
    streamed: bool = False,
) -> ChatModel:
    """Load an MLX or Hugging Face folder.

    On the CPU it computes in float32 (exact, and about 50 times faster there than half precision),
    with matrices as `convert.mlx.packed` holds them; on Metal everything stays as stored.

    Args:
        folder: holds config.json, model*.safetensors and the tokenizer.
        check: look at every weight for NaN and infinity, one tensor at a time.
        adapter: an adapter folder, applied as `mlx_lm.generate --adapter-path` does.
        encodes: whether the tokenizer is loaded; editing weights needs none.
        streamed: whether matrices stay in the files, and are read (and looked at) layer by layer
            when the model runs.

    Raises:
        UserError: when config or weights are missing, mlx-lm does not know the architecture,
            tensors do not fit it, there is no tokenizer, or weights are not finite.
    """
    model, config = _made(folder, adapter, check and not streamed, lazy=streamed)
    if computes_on_cpu():
        on_cpu.install()
    if streamed:
        stages = Stages(
            model,
            model.layers,
            OncePerFile(
                lambda: dict(parameters(_made(folder, adapter, False, lazy=True)[0])),
                (lambda path, value: _check_value(path, value, folder)) if check else None,
            ),
        )
        for path, value in stages.staying():
            _check_value(path, value, folder)
        sweeps.stream(model, stages)
    chat = ChatModel(folder, model, None, config)
    if encodes:
        add_tokenizer(chat)
    return chat


def _made(
    folder: Path, adapter: Path | None, check: bool, *, lazy: bool
) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's model as it computes on this machine, and its config.

    Args:
        folder, adapter, check: as of `load`.
        lazy: whether to leave its weights unevaluated.
    """
    split = ranks.lockstep()
    model, config = _load_model(folder, read_config(folder), lazy=lazy or split)
    if split:
        split_model.split(model, config)
        for _, value in parameters(model):
            mx.eval(value)
    if check:
        check_finite(model, folder)
    if adapter is not None:
        from mlx_lm.tuner.utils import load_adapters

        with foreign(f"{adapter} could not be applied to {folder}"):
            load_adapters(model, str(adapter))
    if computes_on_cpu():
        from convert.mlx.packed_modules import hold

        if sum(value.size for _, value in parameters(model)) <= _WIDENED:
            model.set_dtype(mx.float32)
        hold(model, lazy=lazy)
    return model, config


def load_lazily(folder: Path) -> ChatModel:
    """Load a model lazily: a weight is read from disk when it is first used.

    This is enough to find writers and to edit file to file; running the model loads all weights.
    The model has no tokenizer, because a base model's folder may lack one (`add_tokenizer`).

    Raises:
        UserError: as `load`, but for the tokenizer and for weights that are not finite.
    """
    model, config = _load_model(folder, read_config(folder), lazy=True)
    return ChatModel(folder, model, None, config)


def add_tokenizer(chat: ChatModel) -> None:
    """Give a model the tokenizer in its folder.

    Raises:
        UserError: as `load_tokenizer`.
    """
    chat.tokenizer = load_tokenizer(chat.folder, chat.config, chat.folder)


def _load_model(
    folder: Path, config: dict[str, Any], *, lazy: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    from mlx_lm.utils import _get_classes, load_model

    if not any(folder.glob("model*.safetensors")):
        raise UserError(
            f"{folder} holds no model*.safetensors: fetch the model's weights in that format."
        )
    with TensorFiles(folder) as files:
        shapes = {name: files.info(name).shape for name in files.names}
        quantized = other_quantization.find(config, files)
    try:
        _, arguments = _get_classes(config)
    except SystemExit:  # mlx-lm's olmo exits without a package that it does not use
        raise UserError(
            f"{folder}: mlx-lm's {config['model_type']} ends without the package ai2-olmo, and "
            "does not run with it: choose another model (OLMo 2 runs), or edit a GGUF of this one."
        ) from None
    except (ValueError, AttributeError):  # AttributeError: a module that is no architecture
        raise UserError(
            f"{folder / 'config.json'}: mlx-lm has no architecture named "
            f"{config['model_type']!r}: update mlx-lm, or choose another model."
        ) from None
    check_counts(folder, config, shapes)
    if quantized is not None and quantized.bare:
        raise quantized.unreadable(folder)
    complete_for(arguments, config)
    added = {key: value for key, value in config.items() if key not in ("eos_token_id",)}
    try:
        with foreign(f"{folder} could not be loaded as {config['model_type']}"):
            # Lazily: tensors are evaluated one by one, and the peak is the model's own size.
            model, config = load_model(folder, lazy=True, model_config=added)
            for _, value in [] if lazy else parameters(model):
                mx.eval(value)
    except UserError:
        if quantized is not None:
            raise quantized.unreadable(folder) from None
        raise
    if not hasattr(model, "layers"):
        raise UserError(f"{folder}: {config['model_type']} has no list of layers to look into.")
    give_window(model, config)
    return model, config


def skeleton(config: dict[str, Any]) -> nn.Module:
    """mlx-lm's model object without weights: its parameters are never evaluated."""
    from mlx_lm.utils import _get_classes

    model_class, arguments = _get_classes(config)
    return model_class(arguments.from_dict(config))


def complete_for(arguments: type, config: dict[str, Any]) -> None:
    """Add to ``config``, in place, a ``head_dim`` that mlx-lm requires and the file leaves out.

    It is hidden_size / num_attention_heads, as in Hugging Face's own code for these models. Where
    mlx-lm has its own default, nothing is added.
    """
    if not dataclasses.is_dataclass(arguments):
        return
    required = {
        field.name
        for field in dataclasses.fields(arguments)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    if "head_dim" in required and config.get("head_dim") is None:
        heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
        if isinstance(heads, int) and heads and hidden:
            config["head_dim"] = hidden // heads


#: Files from each of which alone transformers can make a tokenizer.
_TOKENIZERS = (
    "tokenizer.json", "tokenizer.model*", "*.tiktoken", "tiktoken.model", "vocab.json", "vocab.txt",
    "tekken.json", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip


def load_tokenizer(folder: Path, config: dict[str, Any], name: Path) -> Any:
    """mlx-lm's TokenizerWrapper of the files in ``folder``.

    Args:
        name: the model's name, for messages.

    Raises:
        UserError: when it cannot be loaded.
    """
    from mlx_lm.utils import load_tokenizer as load_wrapper

    if not any(any(folder.glob(file)) for file in _TOKENIZERS):
        raise UserError(
            f"{name} has no tokenizer.json (nor a tokenizer in another form): copy it from the "
            "model's publisher."
        )
    template_files.of_folder(folder)  # raises with a clear message if a template is damaged
    more = tokenizer_config.amended(folder)
    with foreign(f"{name}: the tokenizer could not be loaded"), unheard():
        tokenizer = load_wrapper(folder, more, eos_token_ids=config.get("eos_token_id"))
    return tokenizer


def check_finite(model: nn.Module, folder: Path) -> None:
    """Check that all weights are finite.

    Raises:
        UserError: naming a parameter that is not.
    """
    for name, value in parameters(model):
        _check_value(name, value, folder)


def _check_value(name: str, value: mx.array, folder: Path) -> None:
    if mx.issubdtype(value.dtype, mx.floating) and not all_finite(value):
        raise UserError(
            f"{folder}: the weight {name} holds NaN or infinity: the file is damaged, fetch it "
            "again."
        )
