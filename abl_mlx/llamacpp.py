"""The real llama.cpp as a runtime, in process, through xllamacpp."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from convert.errors import UserError

# llama.cpp's log levels: below 1 it says nothing at all, at 2 errors and warnings.
_SILENT, _WARNINGS = -1, 2


class LlamaCpp:
    """A GGUF file loaded by llama.cpp, answering greedily.

    A context manager; the model is unloaded at its end. With ``n_parallel`` above 1, requests share
    batches, and llama.cpp's results may then differ in the last bits from run to run.
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
    ) -> None:
        """Load ``path``.

        Args:
            path: a .gguf file; of a split one, the first part.
            n_ctx: tokens per request, prompt and reply together.
            n_parallel: requests answered at the same time.
            n_threads: of the processor; None for those of LLAMA_ARG_THREADS, the variable that
                llama.cpp's own programs read, or else what llama.cpp thinks best.
            lean: keep no second copy of the weights in an order that suits the processor better.
            lora: an adapter for this file, applied as ``--lora`` does.

        Raises:
            UserError: when xllamacpp is not installed, or with llama.cpp's own words when the
                model does not load.
        """
        self.path = Path(path)
        self.n_parallel = n_parallel
        if not self.path.is_file():
            raise UserError(f"{self.path} is no file: give the path of a .gguf file.")
        try:
            import xllamacpp
        except ImportError as error:
            raise UserError(
                f"running a GGUF file needs llama.cpp ({error}): pip install 'abl-mlx[llamacpp]'."
            ) from None
        self.n_ctx = n_ctx
        asked = os.environ.get("LLAMA_ARG_THREADS", "")
        self.n_threads = n_threads or (int(asked) if asked.isdigit() else 0) or None
        self.lean = lean
        self.lora = lora
        if lora is not None and not lora.is_file():
            raise UserError(f"{lora} is no file: give the path of a .lora.gguf file.")
        try:
            self._server: Any = xllamacpp.Server(self._params(xllamacpp, _SILENT))
            # Its loop begins in a thread of its own, and would never end if it began only after it
            # was told to: whatever it answers says that it has begun.
            self._server.handle_metrics()
        except (RuntimeError, ValueError) as error:
            said = self._load_again(xllamacpp) or str(error)
            what = f"{self.path} with {lora}" if lora is not None else str(self.path)
            raise UserError(f"llama.cpp cannot load {what}: {said}") from None

    def _params(self, xllamacpp: Any, verbosity: int) -> Any:
        params = xllamacpp.CommonParams()
        params.model.path = str(self.path)
        params.n_parallel = self.n_parallel
        params.n_ctx = self.n_ctx * self.n_parallel
        params.kv_unified = False
        params.warmup = False
        params.verbosity = verbosity
        params.use_jinja = True
        params.endpoint_metrics = True
        params.no_extra_bufts = self.lean
        if self.lora is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(self.lora), 1.0)]
        # Replies as the model wrote them, thoughts included.
        params.reasoning_format = xllamacpp.common_reasoning_format.COMMON_REASONING_FORMAT_NONE
        if self.n_threads is not None:
            params.cpuparams.n_threads = self.n_threads
            params.cpuparams_batch.n_threads = self.n_threads
        return params

    def _load_again(self, xllamacpp: Any) -> str:
        """Fail once more, with the log on, and return the lines that say why."""
        with _captured_output() as log:
            try:
                xllamacpp.Server(self._params(xllamacpp, _WARNINGS))
            except (RuntimeError, ValueError):
                # The log is written by a thread of its own.
                time.sleep(0.2)
            return reason(log.read_text(encoding="utf-8", errors="replace"))

    def chat(
        self,
        prompts: Sequence[str],
        max_tokens: int = 64,
        system: str | None = None,
        enable_thinking: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Greedy replies, one per prompt, through the file's own chat template.

        Args:
            prompts: one user message each.
            max_tokens: longest reply.
            system: a system message before every prompt; where the template knows no such role,
                llama.cpp puts it in front of the user's message.
            enable_thinking: told to templates that know the word.
            progress: called with (replies so far, prompts).

        Raises:
            UserError: when the template refuses the messages or a prompt is longer than n_ctx.
        """
        replies = [""] * len(prompts)
        asked = self.stream(prompts, max_tokens, system, enable_thinking)
        for done, (number, reply) in enumerate(asked, start=1):
            replies[number] = reply
            if progress:
                progress(done, len(prompts))
        return replies

    def stream(
        self,
        prompts: Sequence[str],
        max_tokens: int = 64,
        system: str | None = None,
        enable_thinking: bool = False,
    ) -> Iterator[tuple[int, str]]:
        """The replies of `chat` as they come: (number of the prompt, reply)."""

        def answer(prompt: str) -> str:
            messages = [{"role": "user", "content": prompt}]
            if system is not None:
                messages.insert(0, {"role": "system", "content": system})
            reply = self._ask(
                self._server.handle_chat_completions,
                {
                    "messages": messages,
                    "max_tokens": max_tokens,
                    "temperature": 0,
                    # A reply should not depend on which slot answered what before.
                    "cache_prompt": False,
                    "chat_template_kwargs": {"enable_thinking": enable_thinking},
                },
            )
            return str(reply["choices"][0]["message"].get("content") or "")

        pool = ThreadPoolExecutor(self.n_parallel)
        try:
            numbers = {pool.submit(answer, prompt): n for n, prompt in enumerate(prompts)}
            for future in as_completed(numbers):
                yield numbers[future], future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

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
        """What llama.cpp expects before each token of ``reply``, the earlier ones given.

        Args:
            prompt: token ids, at least one.
            reply: token ids that follow.
            k: how many candidates per token.
            cached: compute the tokens before only once, which may move the last bits.

        Returns:
            For each token of ``reply``: {candidate id: natural log-probability over the whole
            vocabulary}, the ``k`` likeliest.
        """
        # llama.cpp leaves out the candidates of a token that is part of a character, so it is made
        # to choose an unsuspicious one; the candidates are from before that choice.
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
            add_special: with the bos and eos the file asks for.
            parse_special: special tokens in the text count as such.
        """
        reply = self._post(
            "/tokenize",
            {"content": text, "add_special": add_special, "parse_special": parse_special},
        )
        return [int(token) for token in reply["tokens"]]

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text that token ids make."""
        return str(self._post("/detokenize", {"tokens": list(tokens)})["content"])

    def render(
        self, messages: Sequence[Mapping[str, str]], *, enable_thinking: bool = False
    ) -> str:
        """The file's chat template applied by llama.cpp, without the bos it adds on tokenizing."""
        reply = self._post(
            "/apply-template",
            {
                "messages": [dict(message) for message in messages],
                "chat_template_kwargs": {"enable_thinking": enable_thinking},
            },
        )
        return str(reply["prompt"])

    def close(self) -> None:
        """Unload the model."""
        self._server = None

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, handle: Callable[..., None], request: dict[str, Any]) -> dict[str, Any]:
        replies: list[Any] = []
        try:
            handle(request, replies.append)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"llama.cpp refuses a request to {self.path}: {error}") from None
        reply = replies[-1] if replies else {"message": "no reply"}
        if isinstance(reply, (str, bytes)):
            reply = json.loads(reply)
        if "choices" not in reply:
            problem = reply.get("error", reply)
            said = problem.get("message", problem) if isinstance(problem, Mapping) else problem
            raise UserError(f"llama.cpp refuses a request to {self.path}: {said}")
        return dict(reply)

    def _post(self, route: str, request: dict[str, Any]) -> dict[str, Any]:
        # The server listens on the loopback interface; a proxy has no business here.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        call = urllib.request.Request(
            self._server.listening_address + route,
            json.dumps(request).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with opener.open(call) as reply:
                return dict(json.loads(reply.read()))
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            raise UserError(f"llama.cpp refuses a request to {self.path}: {said}") from None


def _request(prompt: Sequence[int] | str, n: int) -> dict[str, Any]:
    return {
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "n_predict": n,
        "temperature": 0,
        "cache_prompt": False,
    }


def reason(log: str) -> str:
    """The part of llama.cpp's log that says why a model does not load."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    marks = ("error loading model", "failed to", "error:", "invalid", "unknown", "missing")
    telling = [line for line in lines if any(mark in line.lower() for mark in marks)]
    first = telling[0] if telling else ""
    # Drop "0.00.012.345 E llama_model_load: " in front.
    return first.split(": ", 1)[-1] if first else " ".join(lines[-2:])


@contextmanager
def _captured_output() -> Iterator[Path]:
    """Send what the process writes to file descriptors 1 and 2 into a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with open(log, "wb") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        try:
            yield log
        finally:
            for number, descriptor in enumerate(saved, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)
