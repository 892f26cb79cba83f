"""Replies that are asked for once and cut afterwards, in MLX, in llama.cpp and of servers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from abl_mlx.behaviour import evaluate, llamacpp, whole_reply
from abl_mlx.behaviour.endpoint import Endpoint
from abl_mlx.behaviour.llamacpp import LlamaCpp
from abl_mlx.behaviour.target import Target
from abl_mlx.behaviour.whole_reply import SPREAD, TOKENS, WORDS
from abl_mlx.cli.main import cli
from abl_mlx.eval_choices import Asking
from abl_mlx.inputs import prompts, sources
from abl_mlx.models import chat_model
from abl_mlx.models.chat_model import ChatModel
from tests.support.servers import ANSWER, Handler, Server

#: Replies of the demo have 10 to 20 tokens.
LENGTHS = (1, 4, 9, 24)


@pytest.fixture(scope="module")
def demo() -> ChatModel:
    return chat_model.load(sources.resolve("demo").path)


@pytest.fixture(scope="module")
def asked() -> tuple[str, ...]:
    sets = prompts.load_demo()
    return (*sets.harmful.test.take(4).texts, *sets.harmless.test.take(4).texts)


def test_a_cut_reply_in_mlx_is_the_reply_that_is_asked_for_with_fewer_tokens(
    demo: ChatModel, asked: Sequence[str]
) -> None:
    wholes = dict(evaluate.wholes_in_mlx(demo)(asked, 24))
    assert {one.unit for one in wholes.values()} == {TOKENS}
    assert min(one.tokens for one in wholes.values()) > 9
    for length in LENGTHS:
        expected = evaluate.in_mlx(demo)(asked, length)
        assert [wholes[n].cut(length) for n in range(len(asked))] == expected


def test_a_cut_reply_in_llama_cpp_is_the_reply_that_is_asked_for_with_fewer_tokens(
    gguf: Path, asked: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llamacpp, "LlamaCpp", partial(LlamaCpp, n_threads=1))
    runtime = evaluate.InLlamaCpp(gguf)
    wholes = dict(runtime.wholes(asked, 24))
    assert {one.unit for one in wholes.values()} == {TOKENS}
    for length in LENGTHS:
        expected = runtime(asked, length)
        assert [wholes[n].cut(length) for n in range(len(asked))] == expected


def test_a_llama_server_is_asked_once_and_its_tokenizer_cuts(
    gguf: Path, asked: Sequence[str]
) -> None:
    with LlamaCpp(gguf, n_ctx=512, lean=True, n_threads=1) as runtime:
        endpoint = Endpoint(runtime.address, None, Asking())
        wholes = dict(endpoint.wholes(asked, 24))
        assert {one.unit for one in wholes.values()} == {TOKENS}
        for length in LENGTHS:
            expected = dict(endpoint.ask(asked, length))
            assert {number: one.cut(length) for number, one in wholes.items()} == expected


# --- servers that tell more or less of their tokens ----------------------------------------------

PIECES = ["Take", " two", " eggs", ", beat", " them well", ", and fry", " them in a little butter."]


def answering(**more: Any) -> Any:
    def script(handler: Handler, request: dict[str, Any], number: int) -> None:
        message = {"role": "assistant", "content": ANSWER}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        choice |= {name: value for name, value in more.items() if name == "logprobs"}
        rest = {name: value for name, value in more.items() if name != "logprobs"}
        handler.send(200, json.dumps({"choices": [choice], **rest}))

    return script


def cut(server: Server, length: int) -> tuple[str, str, int]:
    with server:
        (((_, whole)),) = Endpoint(server.url, None, Asking()).wholes(["How?"], 64)
    assert whole.text == whole.cut(64) == ANSWER
    return whole.cut(length), whole.unit, whole.tokens


def test_the_tokens_that_a_server_names_cut_its_reply() -> None:
    assert "".join(PIECES) == ANSWER
    told = {"content": [{"token": piece, "logprob": -0.1} for piece in PIECES]}
    server = Server(answering(logprobs=told, usage={"completion_tokens": 8}))
    assert cut(server, 4) == ("Take two eggs, beat", TOKENS, 7)
    (_, _, request) = server.posts[0]
    assert request["logprobs"] is True
    assert request["max_tokens"] == 64


def test_the_number_of_tokens_that_a_server_reports_is_spread_over_its_reply() -> None:
    text, unit, tokens = cut(Server(answering(usage={"completion_tokens": 16})), 4)
    assert (unit, tokens) == (SPREAD, 16)
    assert text == ANSWER[: round(len(ANSWER) / 4)]


def test_tokens_without_their_texts_are_counted() -> None:
    told = {"content": [{"id": number, "logprob": -0.1} for number in range(16)]}  # mlx_lm.server
    text, unit, tokens = cut(Server(answering(logprobs=told)), 4)
    assert (unit, tokens, text) == (SPREAD, 16, ANSWER[: round(len(ANSWER) / 4)])


def test_words_cut_the_reply_of_a_server_that_tells_nothing() -> None:
    # Three words for four tokens.
    assert cut(Server(answering()), 8) == ("Take two eggs, beat them well,", WORDS, 17)


def test_a_server_that_refuses_to_tell_tokens_is_asked_without_and_not_told_again() -> None:
    def script(handler: Handler, request: dict[str, Any], number: int) -> None:
        if "logprobs" in request:
            handler.send(400, json.dumps({"error": {"message": "logprobs is not supported"}}))
        else:
            assert "cache_prompt" in request  # what it does take is not left out with it
            handler.say(ANSWER)

    with Server(script) as server:
        endpoint = Endpoint(server.url, None, Asking(concurrency=1))
        found = dict(endpoint.wholes(["a", "b", "c"], 8))
        assert [one.text for one in found.values()] == [ANSWER] * 3
        assert sum("logprobs" in request for _, _, request in server.posts) <= 2


def test_a_target_of_which_nothing_is_known_is_cut_by_words() -> None:
    target = Target("m", "server", {}, lambda asked, n: iter([(0, "one two three four five")]))
    ((_, whole),) = target.ask_wholes(["?"], 32)
    assert [whole.cut(n) for n in (1, 2, 4, 7, 32)] == [
        "", "one", "one two three", "one two three four five", "one two three four five",
    ]  # fmt: skip
    assert whole.unit == WORDS
    ((_, chinese),) = Target(
        "m", "server", {}, lambda asked, n: iter([(0, "我不能帮助你做这件事")])
    ).ask_wholes(["?"], 32)
    assert chinese.cut(4) == "我不能"


# --- pieces --------------------------------------------------------------------------------------


def test_a_character_of_which_a_token_has_but_a_part_is_left_out() -> None:
    text = "Gern, süß!"
    pieces = [b"Gern", b", s", b"\xc3", b"\xbc", "ß!".encode()]
    whole = whole_reply.of_pieces(text, pieces)
    assert [whole.cut(n) for n in range(6)] == ["", "Gern", "Gern, s", "Gern, s", "Gern, sü", text]


def test_what_the_prompt_opened_a_reply_with_is_no_token_of_it() -> None:
    whole = whole_reply.of_pieces(
        "<think>\nWell.</think> No.", [b"Well", b".", b"</think>", b" No."]
    )
    assert whole.cut(1) == "<think>\nWell"
    assert whole.cut(3) == "<think>\nWell.</think>"
    assert whole.unit == TOKENS


def test_white_space_that_the_runtime_took_off_does_not_move_the_cut() -> None:
    whole = whole_reply.of_pieces("Well, no.", [b" Well", b",", b" no", b".", b"\n"])
    assert [whole.cut(n) for n in (1, 2, 3)] == ["Well", "Well,", "Well, no"]


def test_pieces_of_another_text_only_count() -> None:
    whole = whole_reply.of_pieces("abcdefgh", [b"xy", b"z", b"!", b"?"])
    assert (whole.unit, whole.tokens, whole.cut(2)) == (SPREAD, 4, "abcd")


def test_one_prompt_at_a_time_where_batches_are_of_one(
    gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--batch-size` holds for llama.cpp as well."""
    found = []

    class Slots(LlamaCpp):
        def __init__(self, *given: Any, n_parallel: int, **named: Any) -> None:
            found.append(n_parallel)
            super().__init__(*given, n_parallel=n_parallel, n_threads=1, **named)

    monkeypatch.setattr(llamacpp, "LlamaCpp", Slots)
    for size in ("1", "3"):
        result = CliRunner().invoke(
            cli, ["eval", str(gguf), "--limit", "4", "--max-tokens", "4", "--batch-size", size]
        )
        assert result.exit_code == 0, result.output
    assert found == [1, 3]
