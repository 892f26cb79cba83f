"""Servers that fail, over real HTTP: what may pass is tried again, what stays is one sentence."""

from __future__ import annotations

import json
import socket
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from abl_mlx.behaviour import http_call
from abl_mlx.behaviour.endpoint import Endpoint
from abl_mlx.behaviour.http_call import retry_after
from abl_mlx.eval_choices import Asking
from convert.base.errors import UserError
from tests.support.asked_servers import ALL, evaluate, record_of, sentence, well_behaved
from tests.support.servers import ANSWER, REFUSAL, Handler, Server, dribble, headers_without_end

pytestmark = pytest.mark.usefixtures("cache")


def test_a_port_where_nobody_listens_is_told_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.monotonic()
    said = sentence(evaluate(f"http://127.0.0.1:{port}/v1"))
    assert "refuses connections: is the server running?" in said
    assert time.monotonic() - start < 30  # a request's time limit is 120 s


def test_a_server_that_dies_midway_is_gone_on_with(cache: Path) -> None:
    def mortal(handler: Handler, request: dict[str, Any], number: int) -> None:
        if number == 5:
            server.die()
            handler.connection.shutdown(socket.SHUT_RDWR)
        elif number < 5:
            server.behave(handler, request, number)

    server = well_behaved()
    server.script = mortal
    with server:
        result = evaluate(server.url, "--concurrency", 1, "--retries", 1)
    said = sentence(result)
    assert "refuses connections, 2 times: is the server running?" in said
    assert f"5 of {ALL} verdicts are kept" in said
    (kept,) = cache.iterdir()
    assert str(kept) in said
    with well_behaved(port=server.port) as again:
        result = evaluate(again.url, "--json")
    record = record_of(result)
    assert f"5 of {ALL} answers are there already" in result.stderr
    assert len(again.asked) == ALL - 5
    assert not set(again.asked) & set(server.asked[:5])
    assert record["verdicts"] == {"harmful": "RRRR", "harmless": "AAAA", "borderline": "AAAA"}
    assert not list(cache.iterdir())  # all is done


def failing(number_of_failures: int, do: Any) -> Server:
    """A server whose first chat requests fail in some way."""
    server = well_behaved()

    def script(handler: Handler, request: dict[str, Any], number: int) -> None:
        if number < number_of_failures:
            do(handler)
        else:
            server.behave(handler, request, number)

    server.script = script
    return server


FAILURES: dict[str, tuple[Any, str]] = {
    "500 in JSON": (
        lambda handler: handler.send(500, json.dumps({"error": {"message": "out of memory"}})),
        "answers 500 Internal Server Error: out of memory",
    ),
    "500 in HTML": (
        lambda handler: handler.send(500, "<html><h1>Oops</h1></html>", "text/html"),
        "answers 500 Internal Server Error: an HTML page",
    ),
    "503": (
        lambda handler: handler.send(503, json.dumps({"error": "Loading model"})),
        "answers 503 Service Unavailable: Loading model",
    ),
    "error with 200": (
        lambda handler: handler.send(200, json.dumps({"error": {"message": "slot lost"}})),
        "reports: slot lost",
    ),
    "half a JSON object": (
        lambda handler: handler.send(200, '{"choices": [{"mess'),
        "no JSON object",
    ),
    "no bytes": (lambda handler: handler.send(200, b""), "no JSON object"),
    "noise": (
        lambda handler: handler.send(200, b"\xff\xfe\x00\x1b[31m\x07" * 40),
        "no JSON object",
    ),
    "a list": (lambda handler: handler.send(200, "[]"), "no JSON object"),
    "no choices": (lambda handler: handler.send(200, '{"choices": []}'), "without choices"),
    "choices of nothing": (
        lambda handler: handler.send(200, '{"choices": [null]}'),
        "without a message",
    ),
    "a cut connection": (
        lambda handler: handler.connection.shutdown(socket.SHUT_RDWR),
        "cut the connection",
    ),
    "half a body": (
        lambda handler: handler.wfile.write(
            b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n" + b'{"choices"'
        ),
        "cut the connection",
    ),
    "no HTTP": (lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH\r\n"), "cut the connection"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_may_pass_is_tried_again_and_what_stays_is_told(name: str, cache: Path) -> None:
    do, words = FAILURES[name]
    with failing(1, do) as server:
        result = evaluate(server.url, "--concurrency", 1, "--json")
    assert record_of(result)["verdicts"]["harmful"] == "RRRR"
    assert len(server.posts) == ALL + 1
    assert "another try" in result.stderr

    quick = Asking(concurrency=1, retries=2, backoff=0.01)
    with failing(100, do) as server:
        asked = Endpoint(server.url, asking=quick, say=lambda text: None)
        with pytest.raises(UserError) as caught:
            list(asked.ask(["one", "two"], 5))
    said = str(caught.value)
    assert words in said
    assert "3 times" in said
    assert said.isprintable()
    assert len(said) < 300
    assert len(server.posts) == 3


def test_a_500_that_stays_leaves_a_state_to_go_on_from(cache: Path) -> None:
    def tired(handler: Handler, request: dict[str, Any], number: int) -> None:
        if number < 3:
            server.behave(handler, request, number)
        else:
            handler.send(500, "")

    server = well_behaved()
    server.script = tired
    with server:
        said = sentence(evaluate(server.url, "--concurrency", 1, "--retries", 0))
        assert f"3 of {ALL} verdicts are kept" in said
        server.script = server.behave
        assert record_of(evaluate(server.url, "--json"))["harmful_refusal_rate"] == 1
    assert len(server.posts) == ALL + 1


@pytest.mark.parametrize("script", [dribble, headers_without_end, None])
def test_a_slow_server_has_so_many_seconds_and_no_more(script: Any, cache: Path) -> None:
    """A sleep, a byte now and then, or endless headers: the time ends all the same."""

    def asleep(handler: Handler, request: dict[str, Any], number: int) -> None:
        time.sleep(90)

    with Server(script or asleep) as server:
        start = time.monotonic()
        said = sentence(evaluate(server.url, "--timeout", 0.4, "--retries", 1))
    assert "did not finish an answer within 0.4 s, 2 times: raise --timeout" in said
    assert time.monotonic() - start < 45  # 2 s here


def test_a_reply_without_end_is_not_read_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_call, "LARGEST_REPLY", 1000)

    def flood(handler: Handler, request: dict[str, Any], number: int) -> None:
        handler.say("word " * 1000)

    with Server(flood) as server:
        asked = Endpoint(server.url, asking=Asking(retries=0))
        with pytest.raises(UserError, match="more than 16 MB"):
            asked.reply("one", 5)


def test_429_is_waited_for_as_long_as_it_says() -> None:
    def busy(handler: Handler) -> None:
        handler.send(429, json.dumps({"error": {"message": "Rate limit"}}), Retry_After="1")

    with failing(1, busy) as server:
        start = time.monotonic()
        record = record_of(evaluate(server.url, "--concurrency", 1, "--json"))
    assert record["harmful_refusal_rate"] == 1
    assert time.monotonic() - start >= 1


def test_a_wall_that_one_request_met_is_met_by_no_other() -> None:
    """While the first waits as it was told, the other two workers do not ask either."""
    met: list[float] = []

    def busy(handler: Handler, request: dict[str, Any], number: int) -> None:
        met.append(time.monotonic())
        if number == 0:
            handler.send(429, "{}", Retry_After="1")
        else:
            time.sleep(0.2)  # those under way at that moment end after it
            handler.say(ANSWER)

    with Server(busy) as server:
        asked = Endpoint(server.url, asking=Asking(concurrency=3), say=lambda text: None)
        assert len(list(asked.ask([f"prompt {n}" for n in range(9)], 5))) == 9
    assert len(met) == 10
    assert sum(when < met[0] + 0.95 for when in met) <= 3


def test_after_a_failure_nothing_more_is_asked_and_what_was_answered_is_kept() -> None:
    """The one that takes the replies is busy meanwhile."""

    def second_fails(handler: Handler, request: dict[str, Any], number: int) -> None:
        if request["messages"][0]["content"] == "second":
            time.sleep(0.2)
            handler.send(400, "no")
        else:
            handler.say(ANSWER)

    with Server(second_fails) as server:
        asked = Endpoint(server.url, asking=Asking(concurrency=1))
        replies = asked.ask(["first", "second", "third", "fourth"], 5)
        assert next(replies) == (0, ANSWER)
        time.sleep(0.5)
        with pytest.raises(UserError, match="400"):
            next(replies)
        assert set(server.asked) == {"first", "second"}

        asked = Endpoint(server.url, asking=Asking(concurrency=3))
        replies = asked.ask(["first", "second", "third"], 5)
        kept = {next(replies)[0]}
        time.sleep(0.5)  # the second has failed by now, and the other one is there
        kept.add(next(replies)[0])
        assert kept == {0, 2}
        with pytest.raises(UserError, match="400"):
            next(replies)


def test_429_that_asks_for_an_hour_is_told() -> None:
    with failing(100, lambda handler: handler.send(429, "{}", Retry_After="3600")) as server:
        said = sentence(evaluate(server.url, "--concurrency", 1))
    assert "429" in said
    assert "asks to wait 3600 s" in said
    assert len(server.posts) == 1


def test_retry_after_may_be_a_date() -> None:
    later = formatdate(time.time() + 30, usegmt=True)
    assert retry_after({"retry-after": later}) == pytest.approx(30, abs=2)
    assert retry_after({"retry-after": formatdate(0, usegmt=True)}) == 0
    assert retry_after({"retry-after": "2.5"}) == 2.5
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({}) is None


@pytest.mark.parametrize(
    ("do", "words"),
    [
        (
            lambda handler: handler.send(400, '{"error": {"message": "context too small"}}'),
            "answers 400 Bad Request: context too small",
        ),
        (
            lambda handler: handler.send(302, "", Location="http://elsewhere.example/v1"),
            "sends one on to http://elsewhere.example/v1: give that address",
        ),
        (
            lambda handler: handler.send(404, '{"error": "model not loaded"}'),
            "does not know tiny or has no chat/completions (404 Not Found: model not loaded)",
        ),
        (
            lambda handler: handler.send(200, "<!doctype html><p>Sign in</p>", "text/html"),
            "answers a chat request with an HTML page",
        ),
    ],
)
def test_what_will_not_pass_is_not_tried_again(do: Any, words: str) -> None:
    with failing(100, do) as server:
        assert words in sentence(evaluate(server.url, "--concurrency", 1))
    assert len(server.posts) <= 2


def test_a_server_that_refuses_unknown_fields_is_asked_without_them() -> None:
    def strict(handler: Handler, request: dict[str, Any], number: int) -> None:
        if set(request) - {"model", "messages", "max_tokens", "temperature", "stream"}:
            handler.send(400, '{"error": {"message": "Unrecognized request argument"}}')
        else:
            handler.say(REFUSAL)

    with Server(strict) as server:
        assert record_of(evaluate(server.url, "--concurrency", 1, "--json"))["model"] == "tiny"
    assert len(server.posts) == ALL + 1


def test_a_model_list_that_fails_for_a_moment_is_asked_again() -> None:
    server = well_behaved()

    def loading(handler: Handler) -> None:
        server.listing = None
        handler.send(503, '{"error": {"message": "Loading model"}}')

    server.listing = loading
    with server:
        assert record_of(evaluate(server.url, "--json"))["harmful_refusal_rate"] == 1
