"""Runs GGUFs in llama.cpp, in a separate process, through xllamacpp."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from abl_mlx.behaviour.llamacpp_process import LlamaProcess
from abl_mlx.behaviour.whole_reply import pieces_of, tokenizing
from abl_mlx.inputs.sets import Message, Prompt, prompt_of
from abl_mlx.inputs.thinking import template_values
from abl_mlx.models import gguf_template, prompt_tokens
from abl_mlx.models.given_template import GivenTemplate
from abl_mlx.models.thoughts import opened_by, resumed
from convert.base.closing import Closing
from convert.base.errors import UserError
from convert.gguf.parts import size_of
from convert.tokenizers.chat_template import ChatTemplate

#: The longest time for rendering a prompt in the chat template, in seconds; usually it is 0.01 s.
RENDERING = 20.0


class LlamaCpp(Closing):
    """A GGUF file loaded in llama.cpp, which replies greedily.

    It is a context manager, which unloads the model at its end. With ``n_parallel`` above 1,
    requests share batches, and llama.cpp's results may then differ in the last bits between runs.
    """

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int = 2048,
        n_parallel: int = 4,
        n_threads: int | None = None,
        lean: bool = False,
        lora: Path | None = None,
        given: GivenTemplate | None = None,
    ) -> None:
        """Load ``path``.

        Args:
            path: a .gguf file; for a split model, the first part.
            n_ctx: the context length in tokens, for the prompt and reply of a request.
            n_parallel: how many requests are answered at the same time.
            n_threads: the number of threads; None for LLAMA_ARG_THREADS, the environment variable
                of llama.cpp's own programs, or else llama.cpp's default.
            lean: keep no second copy of the weights in an order that suits the processor better.
            lora: an adapter for this file, applied as with llama.cpp's ``--lora``.
            given: a chat template that replaces the file's own.

        Raises:
            UserError: when xllamacpp is not installed, or with llama.cpp's own words when the
                model does not load.
        """
        self.path = Path(path)
        self.n_parallel = n_parallel
        self.n_ctx = n_ctx
        self._opened: dict[str | None, str] = {}
        for file, kind in ((self.path, ".gguf"), (lora, ".lora.gguf")):
            if file is not None and not file.is_file():
                raise UserError(f"{file} is no file: give the path of a {kind} file.")
        if importlib.util.find_spec("xllamacpp") is None:
            raise UserError(
                "running a GGUF file needs llama.cpp (there is no module xllamacpp): "
                "pip install 'abl-mlx[llamacpp]'."
            )
        given = given or gguf_template.named_template(self.path)
        self._given = None if given is None else gguf_template.given_template(self.path, given)
        template_fault = gguf_template.fault(self.path) if given is None else None
        try:
            self._process: LlamaProcess | None = self._start(n_threads, lean, lora)
        except UserError:
            if template_fault is not None:  # llama.cpp does not quote the template
                raise template_fault from None
            raise

    def _start(self, n_threads: int | None, lean: bool, lora: Path | None) -> LlamaProcess:
        asked = os.environ.get("LLAMA_ARG_THREADS", "")
        return LlamaProcess(
            f"{self.path} with {lora}" if lora is not None else str(self.path),
            {
                "path": str(self.path),
                "n_ctx": self.n_ctx,
                "n_parallel": self.n_parallel,
                "n_threads": n_threads or (int(asked) if asked.isdigit() else 0) or None,
                "lean": lean,
                "lora": None if lora is None else str(lora),
                "chat_template": "" if self._given is None else "chatml",
            },
            size_of(self.path),
        )

    def chat(
        self,
        prompts: Sequence[str | Prompt],
        max_tokens: int = 64,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Greedy replies, one per prompt, through the file's own chat template.

        Args:
            prompts: conversations, or one user message each. Where the template knows no such
                role, the system message stands at the beginning of the first user message.
            max_tokens: the longest reply, in tokens.
            progress: called with (number of replies so far, number of prompts).

        Raises:
            UserError: when the template refuses the messages or a prompt is longer than n_ctx.
        """
        replies = [""] * len(prompts)
        asked = self.stream(prompts, max_tokens)
        for done, (number, reply) in enumerate(asked, start=1):
            replies[number] = reply
            if progress:
                progress(done, len(prompts))
        return replies

    def stream(
        self, prompts: Sequence[str | Prompt], max_tokens: int = 64
    ) -> Iterator[tuple[int, str]]:
        """Yield (number of the prompt, reply) of `chat` as soon as each reply is complete."""
        asked = [prompt_of(question) for question in prompts]
        opened = {mode: self.opened(mode) for mode in {prompt.thinking for prompt in asked}}

        def answer(prompt: Prompt) -> str:
            if self._given is not None or prompt.tools:
                completed = self._completion(
                    self.encode(prompt), max_tokens, whole=bool(prompt.tools)
                )
                return resumed(opened[prompt.thinking], completed)
            # Render first: a template that never ends could not be told from a long reply later.
            self.render_prompt(prompt)
            reply = self._post(
                "/v1/chat/completions",
                {
                    "messages": self._messages(prompt),
                    "max_tokens": max_tokens,
                    "temperature": 0,
                    # With one request at a time a reply must not depend on earlier requests. With
                    # several the last bits vary anyway, and a cache saves running common tokens.
                    "cache_prompt": self.n_parallel > 1,
                    "chat_template_kwargs": template_values(prompt.thinking),
                },
            )
            message = reply["choices"][0]["message"]
            text, thought = str(message.get("content") or ""), message.get("reasoning_content")
            if thought:
                return f"<think>{thought}</think>{text}"
            return resumed(opened[prompt.thinking], text)

        pool = ThreadPoolExecutor(self.n_parallel)
        try:
            numbers = {pool.submit(answer, prompt): n for n, prompt in enumerate(asked)}
            for future in as_completed(numbers):
                yield numbers[future], future.result()
        except (KeyboardInterrupt, SystemExit):
            self.close()  # without waiting for the other replies
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _completion(self, prompt: Sequence[int], max_tokens: int, *, whole: bool = False) -> str:
        """What follows a prompt.

        Args:
            whole: with special tokens, but for the one that ends it.
        """
        request = {**_request(prompt, max_tokens), "cache_prompt": self.n_parallel > 1}
        if self._given is not None and self._given.ends:
            request["stop"] = [self._given.ends]
        reply = self._post("/completion", request | {"return_tokens": whole})
        if not whole:
            return str(reply["content"])
        tokens = [int(token) for token in reply["tokens"]]
        return self.detokenize(tokens[:-1] if reply.get("stop_type") == "eos" else tokens)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, in the template that was given or the file's own."""
        rendered = self.render_prompt(prompt)
        if self._given is None and not prompt.tools:  # llama.cpp leaves out the bos that it adds
            return self.tokenize(rendered)
        ids = self.tokenize(rendered, add_special=False)
        return ids if ids[:1] == self._opening else [*self._opening, *ids]

    @cached_property
    def _opening(self) -> list[int]:
        """The bos token, where the file's tokenizer puts it in front of a text."""
        template = self._given or self._tool_template
        bos = "" if template is None else template.values["bos_token"]
        token = self.tokenize(bos, add_special=False)
        return token if token == self.tokenize("")[:1] else []

    def opened(self, thinking: str | None) -> str:
        """What the file's template opens a thought with at the end of every prompt."""
        if thinking not in self._opened:
            self._opened[thinking] = opened_by(
                lambda text: self.render_prompt(Prompt(text, thinking=thinking))
            )
        return self._opened[thinking]

    def greedy(self, prompt: Sequence[int] | str, n: int) -> list[int]:
        """The next ``n`` token ids after ``prompt``, fewer when the model ends its reply.

        Args:
            prompt: token ids as they are, or text, tokenized with the special tokens in it parsed.
            n: at most this many, the ending token included.
        """
        reply = self._post("/completion", {**_request(prompt, n), "return_tokens": True})
        return [int(token) for token in reply["tokens"]]

    def top_logprobs(
        self, prompt: Sequence[int], reply: Sequence[int], k: int = 5, *, cached: bool = False
    ) -> list[dict[int, float]]:
        """llama.cpp's likeliest tokens in the place of each token of ``reply``.

        Args:
            prompt: token ids, at least one.
            reply: the token ids that follow.
            k: how many of the likeliest tokens.
            cached: compute earlier tokens only once, which may change the last bits.

        Returns:
            For each token of ``reply``: {candidate id: natural log-probability over the whole
            vocabulary}, the ``k`` likeliest.
        """
        # llama.cpp returns no candidates if it generates a token that is a part of a character. So
        # it is made to generate a plain one; the candidates are those before that choice.
        plain = self.tokenize("a", add_special=False)[-1]
        request = {"n_probs": k, "post_sampling_probs": False, "logit_bias": [[plain, 1e6]]}
        request["cache_prompt"] = cached
        results = []
        for at in range(len(reply)):
            answer = self._post("/completion", {**_request([*prompt, *reply[:at]], 1), **request})
            top = answer["completion_probabilities"][0]["top_logprobs"]
            results.append({int(one["id"]): float(one["logprob"]) for one in top})
        return results

    def tokenize(
        self, text: str, *, add_special: bool = True, parse_special: bool = True
    ) -> list[int]:
        """Token ids of ``text`` in llama.cpp's tokenizer.

        Args:
            text: any text.
            add_special: add bos and eos as the file says.
            parse_special: recognise special tokens in the text.
        """
        reply = self._post(
            "/tokenize",
            {"content": text, "add_special": add_special, "parse_special": parse_special},
        )
        return [int(token) for token in reply["tokens"]]

    def pieces(self, text: str) -> list[bytes]:
        """The bytes of each token of ``text``, special tokens included, without bos and eos."""
        return pieces_of(self._post("/tokenize", tokenizing(text))) or []

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        return str(self._post("/detokenize", {"tokens": list(tokens)})["content"])

    def render(self, messages: Sequence[Mapping[str, str]], *, thinking: str | None = None) -> str:
        """The file's chat template applied by llama.cpp, without the bos it adds on tokenizing.

        Where a template was given, that one is applied, by this program.

        Args:
            thinking: as of `Prompt`.
        """
        if self._given is not None:
            return self._given.render(messages, template_values(thinking))
        reply = self._post(
            "/apply-template",
            {
                "messages": [dict(message) for message in messages],
                "chat_template_kwargs": template_values(thinking),
            },
            seconds=RENDERING,
        )
        return str(reply["prompt"])

    def render_prompt(self, question: str | Prompt) -> str:
        """A prompt in the file's chat template: `render` of its messages."""
        prompt = prompt_of(question)
        if not prompt.tools:
            return self.render(self._messages(prompt), thinking=prompt.thinking)
        # By this program, as in MLX: llama.cpp's own chat would force the form of calls.
        template = self._given or self._tool_template
        if template is None:
            raise prompt_tokens.without_tools(self.path)
        return prompt_tokens.rendered(template, prompt)

    def _messages(self, prompt: Prompt) -> list[Message]:
        return prompt.messages(system_role=prompt.system is None or self._takes_system)

    @cached_property
    def _takes_system(self) -> bool:
        """Whether the file's template has a system role, as our own renderer sees it."""
        template = self._given or gguf_template.template_of(self.path)
        return template is None or template.takes_system

    @cached_property
    def _tool_template(self) -> ChatTemplate | None:
        """The file's own template for prompts with tools."""
        return gguf_template.tool_template(self.path)

    @property
    def address(self) -> str:
        """The address of llama.cpp's own server on the loopback interface."""
        if self._process is None:
            raise UserError(f"{self.path} is unloaded.")
        return self._process.address

    def close(self) -> None:
        """Unload the model."""
        process, self._process = self._process, None
        if process is not None:
            process.stop()

    def _post(
        self, route: str, request: dict[str, Any], seconds: float | None = None
    ) -> dict[str, Any]:
        """The server's answer, which may take at most ``seconds``."""
        place = urlsplit(self.address)
        # A direct connection to the loopback interface, without any proxy.
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=seconds)
        try:
            connection.request(
                "POST", route, json.dumps(request), {"Content-Type": "application/json"}
            )
            reply = connection.getresponse()
            content = reply.read()
        except TimeoutError:
            raise UserError(
                f"llama.cpp did not render a prompt in the chat template of {self.path} within "
                f"{seconds:.0f} s: the template does not end. Choose another file."
            ) from None
        except (OSError, http.client.HTTPException) as error:
            process = self._process
            if process is not None and process.died():
                raise UserError(
                    f"llama.cpp ended while it ran {self.path}: {process.ended()}"
                ) from None
            raise UserError(f"llama.cpp does not answer with {self.path}: {error}.") from None
        finally:
            connection.close()
        if reply.status == 200:
            return dict(json.loads(content))
        raise UserError(
            f"llama.cpp refuses a request to {self.path}: {_said(content.decode(errors='replace'))}"
        )


def _said(content: str) -> str:
    """The message in an error of llama.cpp's server."""
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, TypeError, KeyError):
        return content


def _request(prompt: Sequence[int] | str, n: int) -> dict[str, Any]:
    return {
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "n_predict": n,
        "temperature": 0,
        "cache_prompt": False,
    }
