"""A model on a server that is given text to complete instead of a conversation."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from abl_mlx.behaviour.chat_answer import request_tools
from abl_mlx.behaviour.endpoint import Endpoint
from abl_mlx.behaviour.http_call import Answer, Trouble
from abl_mlx.eval_choices import Asking
from abl_mlx.inputs.sets import Prompt
from abl_mlx.models.prompt_tokens import rendered
from abl_mlx.models.thoughts import opened_by
from convert.base.errors import UserError
from convert.tokenizers.chat_template import ChatTemplate


class Completions(Endpoint):
    """One model on a server, asked at /v1/completions with prompts rendered by this program.

    Attributes:
        template: the chat template that renders prompts.
    """

    _route = "completions"

    def __init__(self, url: str, model: str | None, asking: Asking, template: ChatTemplate) -> None:
        """Take the arguments of `Endpoint`, and the template.

        Raises:
            UserError: as `Endpoint`, and for Ollama, which turns the text into a conversation.
        """
        self.template = template
        super().__init__(url, model, asking)
        self._silent = True  # /v1/completions returns tokens in another form
        if self.owner == "library":
            raise UserError(
                f"{self.name} is Ollama, which writes its template around a text to complete, too: "
                f"give ollama:{self.model} instead, which asks its file without Ollama."
            )

    def _opens(self, thinking: str | None) -> str:
        return opened_by(lambda text: self._written(Prompt(text, thinking=thinking)))

    def _written(self, prompt: Prompt) -> str:
        """The text of a prompt, without the bos token if the server adds that itself."""
        return rendered(self.template, prompt).removeprefix(self._added)

    @cached_property
    def _added(self) -> str:
        """The bos token, if llama-server adds it and the template may write it as well."""
        bos = str(self.template.values.get("bos_token", ""))
        if not bos or not self.is_llamacpp:
            return ""
        added, alone = (
            self._tokens({"content": text, "add_special": special, "parse_special": True})
            for text, special in (("", True), (bos, False))
        )
        return bos if alone and added[: len(alone)] == alone else ""

    def _tokens(self, request: Mapping[str, Any]) -> list[int]:
        root = self._base.removesuffix("/v1")
        answer = self._persist(lambda: self._exchange("POST", f"{root}/tokenize", request))
        found = answer.json() if answer.status == 200 else None
        return list(found.get("tokens") or []) if isinstance(found, dict) else []

    def _request(self, prompt: Prompt, max_tokens: int) -> dict[str, Any]:
        request = super()._request(prompt, max_tokens)
        for name in ("messages", *request_tools(prompt)):
            del request[name]
        stop = {"stop": [self.template.ends]} if self.template.ends else {}
        return request | stop | {"prompt": self._written(prompt)}

    def _refused(self, answer: Answer) -> Trouble:
        if answer.status not in (404, 405, 501):
            return super()._refused(answer)
        return Trouble(
            f"{self.name} does not know {self.model}, or has no /completions, which --template "
            f"plain needs ({self._clean(answer.said)}): leave --template out, or give the model as "
            "a folder or a .gguf file",
            again=False,
        )

    def _message(self, choice: Mapping[str, Any]) -> Any:
        text = choice.get("text")
        return {"content": text} if isinstance(text, str) else None
