"""A model behind an OpenAI-compatible server: llama-server, Ollama, LM Studio, mlx_lm.server.

Every error becomes one sentence. Requests are greedy and run in parallel. A request that fails for
a temporary reason is repeated after growing pauses, and each has a time limit, however slowly the
server sends. Only the prompt is sent; a key never appears in a message.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any

from abl_mlx.behaviour.chat_answer import (
    Step,
    chosen_model,
    has_unread_call,
    is_withheld,
    listed_models,
    request_tools,
    said_and_thought,
    told_tokens,
)
from abl_mlx.behaviour.http_call import (
    Answer,
    Trouble,
    retry_after,
    said,
    what,
)
from abl_mlx.behaviour.patient_server import PatientServer, Said
from abl_mlx.behaviour.refusals import WITHHELD
from abl_mlx.behaviour.tool_calls import UNREAD
from abl_mlx.behaviour.whole_reply import WholeReply, of_answer, of_pieces, pieces_of, tokenizing
from abl_mlx.eval_choices import Asking
from abl_mlx.inputs import hub
from abl_mlx.inputs.sets import Prompt, prompt_of
from abl_mlx.inputs.thinking import request_fields, template_values
from abl_mlx.models.prompt_tokens import without_tools
from abl_mlx.models.thoughts import opened_by, resumed, without_thoughts
from abl_mlx.support.console import say
from convert.base.errors import UserError

#: A field that not every server knows: it turns off the cache, because a reply must not depend on
#: earlier requests. A server that refuses it, or the fields about thoughts, is asked without it.
_EXTRAS: Mapping[str, Any] = {"cache_prompt": False}


def is_endpoint(text: str) -> bool:
    """Whether the user's text is the address of a server, and not of a model's page."""
    return text.lower().startswith(("http://", "https://")) and not hub.is_address(text)


class Endpoint(PatientServer):
    """One model on a server, which is looked up when the object is made."""

    _route = "chat/completions"

    def __init__(
        self,
        url: str,
        model: str | None = None,
        asking: Asking | None = None,
        say: Callable[[str], None] = say,
    ) -> None:
        """Find the server's API under ``url`` and the model in it.

        Args:
            url: ``http://host:port/v1``, the root of the server, or an address below it.
            model: the model's name on the server; None if the server has only one.
            asking: how the server is asked.
            say: called with a message before a pause.

        Raises:
            UserError: when there is no server, it has no such API, or it has several models and no
                name was given.
        """
        super().__init__(url, asking or Asking(), say)
        self._extras = dict(_EXTRAS)
        self._told_of_tools = False
        self._base, listed = self._find_api(model)
        #: The model's name there.
        self.model = chosen_model(self.name, model, listed)
        self._opened: dict[str | None, str] = {}
        self._strict = False
        self._system_role = True
        self._silent = False  # whether it refuses to tell the tokens of a reply
        about = next((one for one in listed if one.get("id") == self.model), {})
        #: What the server calls itself in its list of models.
        self.owner = about.get("owned_by")
        if self.is_llamacpp:
            # Its replies as the model wrote them, behind what the template opens them with.
            self._extras["reasoning_format"] = "none"
        #: What tells this model from another, as far as the server says.
        self.identity = {
            "url": self.name,
            "model": self.model,
            **({"meta": about["meta"]} if isinstance(about.get("meta"), dict) else {}),
        }

    @property
    def is_llamacpp(self) -> bool:
        """Whether it is a llama-server, which has further functions."""
        return bool(self.owner == "llamacpp")

    # --- finding the model -----------------------------------------------------------------------

    def _find_api(self, model: str | None) -> tuple[str, list[dict[str, Any]]]:
        """The path of the API, which has chat/completions, and the models that it lists."""
        typed = re.sub(r"(/v1)?/(chat/completions|models)$", r"\1", self._server.path.rstrip("/"))
        # The last two are for users who give the root of the server, or Ollama's own /api.
        likely = [typed] if typed.endswith("/v1") else [f"{typed}/v1", typed]
        seen = []
        for base in dict.fromkeys([*likely, "/v1"]):
            answer = self._persist(partial(self._list, base))
            self._met = True
            listed = listed_models(answer)
            if listed is not None:
                if typed != base:
                    self._say(f"· {self.name}: the API is under {base or '/'}")
                return base, listed
            seen.append(f"GET {base}/models: {what(answer)}")
        if model is not None and not any("HTML" in one for one in seen):
            return likely[0], []  # a server need not list its models
        raise UserError(
            f"{self.name} is no OpenAI-compatible API ({'; '.join(seen)}): give the address that "
            "ends in /v1, such as http://127.0.0.1:11434/v1."
        )

    def _list(self, base: str) -> Answer:
        answer = self._exchange("GET", f"{base}/models")
        if answer.status in (200, 400, 404, 405, 410, 501):
            return answer
        raise self._refused(answer)

    def _opens(self, thinking: str | None) -> str:
        """What llama-server's chat template opens a thought with; "" where it does not tell."""
        if not self.is_llamacpp or self._strict:
            return ""
        if thinking not in self._opened:
            self._opened[thinking] = opened_by(
                lambda text: self.rendered(Prompt(text, thinking=thinking))
            )
        return self._opened[thinking]

    def rendered(self, prompt: Prompt) -> str:
        """The prompt that llama-server's chat template makes; "" where it does not tell."""
        request = {
            "messages": prompt.messages(),
            "chat_template_kwargs": template_values(prompt.thinking),
            **request_tools(prompt),
        }
        root = self._base.removesuffix("/v1")
        answer = self._persist(lambda: self._exchange("POST", f"{root}/apply-template", request))
        found = answer.json() if answer.status == 200 else None
        rendered = found.get("prompt") if isinstance(found, dict) else None
        return rendered if isinstance(rendered, str) else ""

    # --- asking ----------------------------------------------------------------------------------

    def ask(self, prompts: Sequence[str | Prompt], max_tokens: int) -> Iterator[tuple[int, str]]:
        """Yield (number of the prompt, greedy reply) as soon as each reply is complete.

        A thought that the server returns separately is put in front of its reply as a <think>
        block. If the iterator is left early, for instance by Ctrl-C, running requests are cut.

        Raises:
            UserError: when a request fails finally.
        """
        return self._each(prompts, lambda prompt: self.reply(prompt, max_tokens))

    def wholes(
        self, prompts: Sequence[str | Prompt], max_tokens: int
    ) -> Iterator[tuple[int, WholeReply]]:
        """Like `ask`, with replies that can be cut, by what the server tells of their tokens."""
        return self._each(prompts, lambda prompt: self.whole(prompt, max_tokens))

    def _each(
        self, prompts: Sequence[str | Prompt], answer: Callable[[Prompt], Said]
    ) -> Iterator[tuple[int, Said]]:
        """Answers as they come: (number of the prompt, answer)."""
        self._stopped.clear()
        failures: list[BaseException] = []

        asked = [prompt_of(question) for question in prompts]
        for mode in dict.fromkeys(prompt.thinking for prompt in asked):
            self._opens(mode)

        def one(prompt: Prompt) -> Said:
            try:
                self._wait(0)
                return answer(prompt)
            except BaseException as error:
                # Noted before the other requests are stopped, so that the first error is reported.
                failures.append(error)
                self._stopped.set()
                raise

        pool = ThreadPoolExecutor(self.asking.concurrency, thread_name_prefix="abl-mlx-ask")
        try:
            futures = {pool.submit(one, prompt): number for number, prompt in enumerate(asked)}
            waiting = set(futures)
            for future in as_completed(futures):
                if failures:
                    break
                waiting.remove(future)
                yield futures[future], future.result()
            if failures:
                # Replies that are already complete are yielded.
                for future in waiting:
                    if future.done() and not future.cancelled() and not future.exception():
                        yield futures[future], future.result()
                raise failures[0]
        finally:
            self._stopped.set()
            with self._lock:
                under_way = list(self._open)
            for call in under_way:
                call.cut()
            pool.shutdown(wait=True, cancel_futures=True)
            self._stopped.clear()

    def reply(self, question: str | Prompt, max_tokens: int) -> str:
        """The greedy reply to one prompt, as by `ask`.

        Raises:
            UserError: when the request fails finally.
        """
        prompt = prompt_of(question)
        self._check_tools(prompt)
        return self._persist(
            lambda: self._text(self._complete(prompt, max_tokens), self._opens(prompt.thinking))
        )

    def _check_tools(self, prompt: Prompt) -> None:
        """Refuse a prompt with tools where a llama-server's chat template has no place for them."""
        if prompt.tools and self.is_llamacpp and not self._told_of_tools:
            text = self.rendered(prompt)
            if text and prompt.tools[0].name not in text:
                raise without_tools(self.name, "to the server")
            self._told_of_tools = True

    def whole(self, prompt: Prompt, max_tokens: int) -> WholeReply:
        """The greedy reply to one prompt, which can be cut.

        Raises:
            UserError: when a request fails for good.
        """

        def attempt() -> WholeReply:
            more = None if self.is_llamacpp or self._silent else {"logprobs": True}
            answer = self._complete(prompt, max_tokens, more)
            if more and answer.status in (400, 422) and not is_withheld(answer):
                answer = self._complete(prompt, max_tokens)
                self._silent = self._silent or answer.status == 200
            opened = self._opens(prompt.thinking)
            text = self._text(answer, opened)
            pieces = self._pieces(text.removeprefix(opened)) if self.is_llamacpp else None
            return of_answer(text, answer.json()) if pieces is None else of_pieces(text, pieces)

        return self._persist(attempt)

    def likeliest(
        self, prompts: Sequence[str | Prompt], tokens: int, top: int
    ) -> Iterator[tuple[int, list[Step]]]:
        """The opening of each reply as it comes: (number of the prompt, its tokens).

        Args:
            tokens: how many of each reply.
            top: how many of the likeliest tokens in the place of each.

        Raises:
            UserError: when the server gives no log-probabilities.
        """
        more = {"logprobs": True, "top_logprobs": top}

        def attempt(prompt: Prompt) -> list[Step]:
            answer = self._complete(prompt, tokens, more)
            steps = None if answer.status in (400, 422) else told_tokens(answer.json())
            if steps is None and answer.status in (200, 400, 422):
                raise Trouble(f"{self.name} gives no log-probabilities (logprobs)", again=False)
            self._text(answer, "")
            return steps or []

        return self._each(prompts, lambda prompt: self._persist(lambda: attempt(prompt)))

    def _pieces(self, text: str) -> list[bytes] | None:
        """What each token of a text writes, by a llama-server's tokenizer; None without one."""
        place = f"{self._base.removesuffix('/v1')}/tokenize"
        answer = self._exchange("POST", place, tokenizing(text))
        return pieces_of(answer.json()) if answer.status == 200 else None

    def _complete(
        self, prompt: Prompt, max_tokens: int, more: Mapping[str, Any] | None = None
    ) -> Answer:
        """What the server answers to a chat request, with the system message where it takes it."""
        answer = self._requested(prompt, max_tokens, more or {})
        if (
            prompt.system is not None
            and self._system_role
            and answer.status in (400, 422, 500)
            and not is_withheld(answer)
        ):
            # A template without a system role raises an error, which the server returns.
            self._system_role = False
            folded = self._requested(prompt, max_tokens, more or {})
            if folded.status == 200:
                self._say(
                    f"· {self.name} takes no system message ({self._clean(answer.said)}): it "
                    "stands at the beginning of the first user message"
                )
                answer = folded
            else:
                self._system_role = True
        return answer

    def _requested(self, prompt: Prompt, max_tokens: int, more: Mapping[str, Any]) -> Answer:
        """What the server answers, asked without the fields that it refuses."""
        extras = {} if self._strict else self._extras | request_fields(prompt.thinking)
        place = f"{self._base}/{self._route}"
        request = self._request(prompt, max_tokens) | dict(more)
        answer = self._exchange("POST", place, request | extras)
        if answer.status in (400, 422) and extras and not is_withheld(answer):
            # Some servers refuse unknown fields; if that was the reason, these are not sent again.
            plain = self._exchange("POST", place, request)
            if plain.status == 200:
                self._strict = True
                if prompt.thinking is not None:
                    self._say(
                        f"warning: {self.name} does not take --thinking {prompt.thinking} "
                        f"({self._clean(answer.said)}): it is asked as it is set up"
                    )
            answer = plain
        return answer

    def _request(self, prompt: Prompt, max_tokens: int) -> dict[str, Any]:
        """The fields of a request that every server accepts."""
        return {
            "model": self.model,
            "messages": prompt.messages(system_role=self._system_role),
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": False,
            **request_tools(prompt),
        }

    def _text(self, answer: Answer, opened: str) -> str:
        if is_withheld(answer):
            return WITHHELD
        if has_unread_call(answer):
            return UNREAD
        if answer.status != 200:
            raise self._refused(answer)
        found = answer.json()
        if not isinstance(found, dict):
            what = "an HTML page" if answer.is_html else f"no JSON object ({answer.start})"
            raise Trouble(
                f"{self.name} answers a chat request with {what}", again=not answer.is_html
            )
        if found.get("error"):
            raise Trouble(f"{self.name} reports: {self._clean(said(found))}", again=True)
        choices = found.get("choices")
        if not isinstance(choices, list) or not choices:
            raise Trouble(f"{self.name} sends a reply without choices", again=True)
        choice = choices[0] if isinstance(choices[0], dict) else {}
        message = self._message(choice)
        filtered = str(choice.get("finish_reason")).startswith("content_filter")
        if not isinstance(message, dict):
            if filtered:
                return WITHHELD
            raise Trouble(f"{self.name} sends a reply without a message", again=True)
        text, thought = said_and_thought(message)
        if filtered and not without_thoughts(text):
            return WITHHELD
        return resumed(opened, text) if thought is None else f"<think>{thought}</think>{text}"

    def _message(self, choice: Mapping[str, Any]) -> Any:
        """What was said, as a chat's message."""
        return choice.get("message")

    def _refused(self, answer: Answer) -> Trouble:
        """The error for an answer with a status other than 200."""
        status, said = answer.status, self._clean(answer.said)
        if status in (401, 403):
            held = "the key of ABL_API_KEY or OPENAI_API_KEY" if self._key else "a key"
            mend = (
                "check it"
                if self._key
                else "set ABL_API_KEY (OPENAI_API_KEY is sent to this machine or over https alone)"
            )
            verb = "refuses" if self._key else "wants"
            return Trouble(f"{self.name} {verb} {held} ({said}): {mend}", again=False)
        if 300 <= status < 400:
            to = answer.headers.get("location", "elsewhere")
            return Trouble(
                f"{self.name} sends one on to {self._clean(to)}: give that address", again=False
            )
        if status in (404, 405):
            return Trouble(
                f"{self.name} does not know {self.model} or has no chat/completions ({said})",
                again=False,
            )
        again = status in (408, 409, 425, 429) or status >= 500
        return Trouble(
            f"{self.name} answers {said}", again=again, pause=retry_after(answer.headers)
        )
