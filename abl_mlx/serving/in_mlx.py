"""mlx-lm's server for one model whose edit each request chooses.

mlx-lm's server asks its `ModelProvider` for the model of every new batch, batches only requests for
the same model, and keeps prefixes of prompts apart by the provider's ``model_key``. Here the model
at another strength is another model: so it is edited between batches, no batch has two strengths,
and no prefix is used at a strength other than its own.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mlx_lm import server as mlx_server
from mlx_lm.models.cache import LRUPromptCache

from abl_mlx.models import generation
from abl_mlx.models.batch_masks import batch_masks
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.serving.dials import UNNAMED, Dials, UnknownModel
from abl_mlx.serving.door import Door, Front, Server
from abl_mlx.support.arrays import evaluate
from convert.base.errors import UserError


@dataclass(frozen=True)
class Served:
    """A loaded model that is edited while it runs.

    Attributes:
        chat: the model.
        dials: its names.
        edited: a context manager in which the model runs at a strength.
        met: whether the edit is made on an encoded prompt, which is asked while the model is
            unedited; None where it is made on all.
        check: raises UserError for a strength that cannot be served.
        template_values: variables that the chat template gets where a request sets none.
        max_tokens: the longest reply of a request that names no length, in tokens.
    """

    chat: ChatModel
    dials: Dials
    edited: Callable[[float], AbstractContextManager[None]]
    met: Callable[[Sequence[int]], bool] | None
    check: Callable[[float], None]
    template_values: dict[str, Any]
    max_tokens: int


def listen(served: Served, door: Door, port: int) -> tuple[Server, Generator]:
    """A bound server, which does not answer yet, and what generates its replies.

    Raises:
        OSError: when the address cannot be used.
    """
    prepare(served.chat)
    handler = type("Handler", (_Handler,), {"door": door, "dials": served.dials, "served": served})
    generator = Generator(served, door)
    try:
        fingerprint = mlx_server.get_system_fingerprint()
        answering = partial(handler, generator, system_fingerprint=fingerprint)
        server = Server(door, served.dials, port, answering)
    except BaseException:
        generator.stop_and_join()
        raise
    return server, generator


def prepare(chat: ChatModel) -> None:
    """Make a model ready to run in another thread, with the template that was given for it."""
    evaluate(chat.model)
    given = chat.given_template
    if given is None:
        return
    source, tokenizer = given.source, chat.tokenizer
    added = list(tokenizer.encode("", add_special_tokens=True))[:1]
    if added == [tokenizer.bos_token_id] and "bos_token" not in source:
        source = "{{ bos_token }}" + source
    tokenizer._tokenizer.chat_template = source
    tokenizer._chat_template, tokenizer.has_chat_template = None, True


class _Provider(mlx_server.ModelProvider):
    """Gives mlx-lm's server one loaded model, at the strength that a name says."""

    def __init__(self, served: Served, cli_args: argparse.Namespace) -> None:
        super().__init__(cli_args)
        #: The name of the model at the strength that it has now.
        self.model_key: str | None = None
        self.model, self.tokenizer = served.chat.model, served.chat.tokenizer
        self._served = served
        self._edit = ExitStack()
        ways = [served.chat.encode(text) for text in ("Why?", "Tell me about the 7 of them, now")]
        self.is_batchable = generation.way(served.chat, ways, 8) is generation.Way.BATCH

    def load_default(self) -> None:
        """Nothing: the model is loaded."""

    def load(self, name: Any, *_: Any) -> Any:
        """Edit the model as a name says; only the thread that generates calls this."""
        if name != self.model_key:
            self._edit.close()
            self.model_key = None
            self._edit.enter_context(self._served.edited(self._served.dials.of(name).strength))
            self.model_key = name
        return self.model, self.tokenizer

    def unedited(self, work: Callable[[], Any]) -> Any:
        """What ``work`` gives while the model is unedited."""
        name = self.model_key
        self._edit.close()
        self.model_key = None
        try:
            return work()
        finally:
            if name is not None:
                self.load(name)

    def reset(self) -> None:
        self._edit.close()
        super().reset()


class Generator(mlx_server.ResponseGenerator):
    """mlx-lm's generator of replies, which decides by the condition before each reply."""

    def __init__(self, served: Served, door: Door) -> None:
        self._served = served
        self._running: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._masks = ExitStack()
        self._masks.enter_context(batch_masks(served.chat.model))
        provider = _Provider(served, _arguments(served, door))
        super().__init__(provider, LRUPromptCache(provider.cli_args.prompt_cache_size))

    def _next_request(self, timeout: float | None = None) -> Any:
        found = super()._next_request(timeout)
        if found is None or self._served.met is None:
            return found
        queue, request, args = found
        dials = self._served.dials
        if dials.of(args.model.model).strength == 0:
            return found
        try:
            tokenized = self._tokenize(self._served.chat.tokenizer, request, args)
        except Exception:  # mlx-lm tokenizes again, and answers with the reason
            return found
        met = self.model_provider.unedited(partial(self._served.met, tokenized[0]))
        if met:
            return found
        return queue, request, replace(args, model=replace(args.model, model=dials.at(0).name))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        context, replies = super().generate(*args, **kwargs)
        self._running[id(context)] = context
        return context, replies

    def stop_and_join(self) -> None:
        """End all replies, and the thread that generates them."""
        for context in list(self._running.values()):
            context.stop()
        super().stop_and_join()
        self._masks.close()


class _Handler(Front, mlx_server.APIHandler):
    """mlx-lm's handler of requests, behind the door, with a strength in each request."""

    served: Served
    requested_model: str

    def do_GET(self) -> None:
        if not self.let_in():
            return
        if self.path.startswith("/v1/models"):
            self.send_models(self.path)
        else:
            super().do_GET()

    def do_POST(self) -> None:
        if not self.let_in():
            return
        try:
            super().do_POST()
        except UnknownModel as error:
            self.fail(404, str(error), "model_not_found")
        except _WrongRequest as error:
            self.fail(400, str(error))
        except UnicodeDecodeError:
            self.fail(400, "the request is not UTF-8.")

    def _set_cors_headers(self) -> None:
        self.send_cors()

    def validate_model_parameters(self) -> None:
        """Check a request, and give the model the name of its strength.

        Raises:
            UnknownModel: when another model is named.
            _WrongRequest: when a field has a wrong value.
        """
        try:
            super().validate_model_parameters()
            _check_messages(self.body.get("messages", []))
            dial = self.dials.of(self.requested_model, self.body.get("steering"))
            self.served.check(dial.strength)
        except (ValueError, UserError) as error:
            raise _WrongRequest(str(error)) from None
        if self.adapter is not None or self.requested_draft_model != UNNAMED:
            raise _WrongRequest("this server has one model: leave adapters and draft_model out.")
        self.requested_model = dial.name


class _WrongRequest(Exception):
    """A request with a field of a wrong value."""


def _check_messages(messages: Any) -> None:
    """Refuse what mlx-lm would fetch from elsewhere, or not understand."""
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise ValueError("messages must be a list of objects with role and content.")
    for message in messages:
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in parts):
            raise ValueError("a message may hold text only: leave other parts out.")


def _arguments(served: Served, door: Door) -> argparse.Namespace:
    """The arguments of mlx-lm's server: its own defaults, but for what is chosen here."""
    return argparse.Namespace(
        model=None, adapter_path=None, draft_model=None, num_draft_tokens=3,
        trust_remote_code=False, chat_template="", use_default_chat_template=False, pipeline=False,
        allowed_origins=sorted(door.origins), chat_template_args=served.template_values,
        temp=0.0, top_p=1.0, top_k=0, min_p=0.0, max_tokens=served.max_tokens,
        decode_concurrency=32, prompt_concurrency=8, prefill_step_size=2048,
        prompt_cache_size=10, prompt_cache_bytes=None,
        kv_bits=None, kv_group_size=64, quantized_kv_start=0,
    )  # fmt: skip
