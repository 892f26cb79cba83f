"""Servers that `eval` asks, over real HTTP: what they do wrong ends in one sentence."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner, Result

from abl_mlx.behaviour import http_call
from abl_mlx.behaviour.endpoint import Endpoint
from abl_mlx.behaviour.http_call import key, retry_after
from abl_mlx.cli.main import cli
from abl_mlx.eval_choices import Asking
from abl_mlx.inputs import prompts
from abl_mlx.inputs.sets import split
from convert.base.errors import UserError
from tests.support.servers import ANSWER, REFUSAL, Handler, Server, dribble, headers_without_end

HARMFUL = set(prompts.bundled("harmful").texts)

#: Prompts of each of the three sets; 12 in all.
LIMIT = 4
ALL = 3 * LIMIT


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("ABL_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return tmp_path / "cache" / "abl-mlx" / "eval"


def evaluate(url: str, *arguments: Any) -> Result:
    return CliRunner().invoke(
        cli, ["eval", url, "--limit", str(LIMIT), *map(str, arguments)], catch_exceptions=False
    )


def record_of(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def sentence(result: Result) -> str:
    """What a person is told of a mistake."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    assert last.endswith(".")
    return last.removeprefix("Error: ")


def well_behaved(**options: Any) -> Server:
    return Server(refused=HARMFUL.__contains__, **options)


# --- what works ----------------------------------------------------------------------------------


def test_a_server_is_asked_every_prompt_once_and_judged() -> None:
    with well_behaved() as server:
        record = record_of(evaluate(server.url, "--max-tokens", 17, "--json"))
    assert (record["source"], record["model"], record["runtime"]) == (server.url, "tiny", "server")
    assert record["harmful_refusal_rate"] == 1
    assert record["harmless_refusal_rate"] == record["borderline_refusal_rate"] == 0
    assert record["verdicts"] == {"harmful": "RRRR", "harmless": "AAAA", "borderline": "AAAA"}
    assert {name: one["n"] for name, one in record["prompts"].items()} == {
        "harmful": 4, "harmless": 4, "borderline": 4,
    }  # fmt: skip
    counted = record["categories"]["harmful"].values()
    assert sum(one["n"] for one in counted) == sum(one["refused"] for one in counted) == 4
    assert len(set(server.asked)) == len(server.asked) == ALL
    for path, _, request in server.posts:
        assert path == "/v1/chat/completions"
        assert (request["model"], request["max_tokens"], request["temperature"]) == ("tiny", 17, 0)
        assert not request["stream"]


def test_requests_run_side_by_side() -> None:
    """Three must be under way at once, or the barrier breaks and the replies with it."""
    barrier = threading.Barrier(3)

    def together(handler: Handler, request: dict[str, Any], number: int) -> None:
        barrier.wait(20)
        handler.say(ANSWER)

    with Server(together) as server:
        record = record_of(evaluate(server.url, "--concurrency", 3, "--json"))
    assert record["verdicts"]["harmful"] == "AAAA"


def test_replies_belong_to_their_prompts_in_whatever_order_they_come() -> None:
    def last_first(handler: Handler, request: dict[str, Any], number: int) -> None:
        time.sleep(0.02 * (8 - number % 8))
        handler.say("Reply to: " + request["messages"][0]["content"])

    texts = [f"prompt {number}" for number in range(16)]
    with Server(last_first) as server:
        asked = Endpoint(server.url, asking=Asking(concurrency=8))
        replies = list(asked.ask(texts, 5))
    assert [number for number, _ in replies] != list(range(16))
    assert {texts[number]: reply for number, reply in replies} == {
        text: f"Reply to: {text}" for text in texts
    }


def test_two_models_of_one_server_are_compared_on_the_same_prompts() -> None:
    """One refuses all that is harmful, the other half of it and one harmless prompt."""
    softened = set(list(split(prompts.bundled("harmful"), 0).test.texts)[:2])

    def two(handler: Handler, request: dict[str, Any], number: int) -> None:
        prompt = request["messages"][0]["content"]
        refuses = prompt in HARMFUL
        if request["model"] == "edited":
            refuses = prompt in HARMFUL - softened
        handler.say(REFUSAL if refuses else ANSWER)

    with Server(two, models=("original", "edited")) as server:
        chosen = ["--model", "edited", "--baseline", server.url, "--baseline-model", "original"]
        record = record_of(evaluate(server.url, *chosen, "--json"))
        shown = evaluate(server.url, *chosen).stdout
    assert record["baseline"]["harmful_refusal_rate"] == 1
    assert record["harmful_refusal_rate"] == 0.5
    paired = record["paired"]["harmful"]
    assert (paired["both"], paired["lost"], paired["gained"], paired["neither"]) == (2, 2, 0, 0)
    assert paired["difference"] == -0.5
    assert paired["p"] == 0.5  # two coins that fall alike
    assert paired["interval"][0] < -0.5 < paired["interval"][1]
    assert record["paired"]["harmless"]["difference"] == 0
    assert "-50.0" in shown
    assert "original" in shown
    assert "baseline" in shown


@pytest.mark.parametrize(
    ("message", "verdict", "unfinished"),
    [
        ({"content": REFUSAL, "reasoning_content": "Shall I? Sure, here is how."}, "R", 0),
        ({"content": ANSWER, "reasoning": "I can't help with that, I think."}, "A", 0),
        ({"content": "", "reasoning_content": "Hmm, let me think about"}, "B", ALL),
        ({"content": None, "refusal": REFUSAL}, "R", 0),
        ({"content": [{"type": "text", "text": REFUSAL}]}, "R", 0),
        ({"content": f"<think>Easy.</think>{REFUSAL}"}, "R", 0),
        ({"content": "<think>Let me see"}, "B", ALL),
        ({"content": None}, "B", 0),
        ({"content": [{"type": "thinking", "thinking": "Let me see"}]}, "B", ALL),
        (
            {
                "content": [
                    {"type": "thinking", "thinking": [{"type": "text", "text": REFUSAL}]},
                    {"type": "text", "text": ANSWER},
                ]
            },
            "A",
            0,
        ),
    ],
)
def test_thoughts_are_no_answers(message: dict[str, Any], verdict: str, unfinished: int) -> None:
    def think(handler: Handler, request: dict[str, Any], number: int) -> None:
        handler.send(200, json.dumps({"choices": [{"message": message}]}))

    with Server(think) as server:
        record = record_of(evaluate(server.url, "--json"))
        shown = evaluate(server.url).stdout if unfinished else ""
    assert record["verdicts"]["harmful"] == verdict * LIMIT
    assert record.get("unfinished_thoughts", 0) == unfinished
    assert ("raise --max-tokens" in shown) == bool(unfinished)


def test_thoughts_that_a_server_opens_unseen_are_told_by_those_that_end() -> None:
    def think(handler: Handler, request: dict[str, Any], number: int) -> None:
        harmful = request["messages"][0]["content"] in HARMFUL
        # The tag stood in the prompt; half of the replies were cut before they came to its end.
        handler.say(f"Shall I?</think>{REFUSAL}" if harmful else "I can't say yet. Let me see")

    with Server(think) as server:
        record = record_of(evaluate(server.url, "--json"))
    assert record["verdicts"]["harmful"] == "R" * LIMIT
    assert record["verdicts"]["harmless"] == "B" * LIMIT
    assert record["unfinished_thoughts"] == ALL - LIMIT


@pytest.mark.parametrize("content", ["", None, " ", "<think>Hmm</think>"])
def test_what_a_servers_filter_withholds_is_refused_by_the_server(content: str | None) -> None:
    def withhold(handler: Handler, request: dict[str, Any], number: int) -> None:
        choice = {"finish_reason": "content_filter", "message": {"content": content}}
        handler.send(200, json.dumps({"choices": [choice]}))

    with Server(withhold) as server:
        record = record_of(evaluate(server.url, "--json"))
        shown = evaluate(server.url).stdout
    assert record["verdicts"]["harmful"] == "R" * LIMIT
    assert record["broken_rate"] == 0
    assert record["withheld_replies"] == ALL
    assert f"{ALL} replies were withheld by the server's content filter" in shown


@pytest.mark.parametrize(
    "error",
    [
        {"code": "content_filter", "message": "The response was filtered."},
        {"code": None, "innererror": {"code": "ResponsibleAIPolicyViolation"}},
        {"code": "data_inspection_failed"},
    ],
)
def test_a_request_that_a_filter_turns_down_is_no_failure(error: dict[str, Any]) -> None:
    def turn_down(handler: Handler, request: dict[str, Any], number: int) -> None:
        if request["messages"][0]["content"] in HARMFUL:
            handler.send(400, json.dumps({"error": error}))
        else:
            handler.say(f"{ANSWER} {'x' * number}")

    with Server(turn_down) as server:
        record = record_of(evaluate(server.url, "--json"))
        asked = len(server.posts)
    assert record["verdicts"]["harmful"] == "R" * LIMIT
    assert record["verdicts"]["harmless"] == "A" * LIMIT
    assert record["withheld_replies"] == LIMIT
    assert asked == ALL


def test_a_reply_that_was_cut_by_a_filter_is_judged_as_it_is() -> None:
    def cut(handler: Handler, request: dict[str, Any], number: int) -> None:
        choice = {"finish_reason": "content_filter", "message": {"content": ANSWER}}
        handler.send(200, json.dumps({"choices": [choice]}))

    with Server(cut) as server:
        record = record_of(evaluate(server.url, "--json"))
    assert record["verdicts"]["harmful"] == "A" * LIMIT
    assert "withheld_replies" not in record


@pytest.mark.parametrize(
    ("reply", "fixed"),
    [
        (lambda prompt, number: ANSWER, ALL),
        (lambda prompt, number: REFUSAL, ALL),
        (lambda prompt, number: f"Thank you. Your number is {number}.", ALL),
        (lambda prompt, number: f"<think>{prompt}</think>**{ANSWER.upper()}**", ALL),
        # A model that refuses in the same words but answers each prompt in its own is none of it.
        (lambda prompt, number: REFUSAL if prompt in HARMFUL else f"{prompt} {ANSWER}", 0),
        (lambda prompt, number: "", 0),
    ],
)
def test_one_fixed_reply_to_everything_is_told(reply: Any, fixed: int) -> None:
    def say(handler: Handler, request: dict[str, Any], number: int) -> None:
        handler.say(reply(request["messages"][0]["content"], number))

    with Server(say) as server:
        record = record_of(evaluate(server.url, "--json"))
        shown = evaluate(server.url).stdout
        gated = evaluate(server.url, "--max-over-refusal", "1", "--json")
    told = f"{ALL} of {ALL} replies say one and the same" in shown
    assert (record.get("fixed_reply", {}).get("n", 0), told) == (fixed, bool(fixed))
    # A limit that is kept by answering nothing is not met.
    broken = json.loads(gated.stdout)["gate"]["checks"][-1]
    assert broken["name"] == "max-broken"
    assert broken["passed"] == (not fixed and record["broken_rate"] == 0)
    assert gated.exit_code == (0 if broken["passed"] else 3)
    assert ("one and the same" in broken["sentence"]) == bool(fixed)


# --- addresses, models and keys ------------------------------------------------------------------


@pytest.mark.parametrize("given", ["", "/", "/v1/", "/v1/chat/completions", "/api", "/v1/models"])
def test_an_address_that_is_nearly_right_is_mended(given: str) -> None:
    with well_behaved() as server:
        result = evaluate(f"http://127.0.0.1:{server.port}{given}", "--json")
    assert record_of(result)["harmful_refusal_rate"] == 1
    assert ("the API is under /v1" in result.stderr) == (not given.startswith("/v1"))


def test_an_api_without_v1_is_found() -> None:
    with well_behaved(root="") as server:
        assert record_of(evaluate(server.url, "--json"))["harmful_refusal_rate"] == 1


def test_a_web_site_is_told_from_an_api() -> None:
    def page(handler: Handler) -> None:
        handler.send(200, "<!DOCTYPE html><html>Welcome</html>", "text/html")

    with Server(listing=page) as server:
        said = sentence(evaluate(server.url, "--model", "any"))
    assert "is no OpenAI-compatible API" in said
    assert "an HTML page" in said
    assert "ends in /v1" in said


def test_a_server_that_lists_no_models_is_asked_when_the_model_is_named() -> None:
    def nothing(handler: Handler) -> None:
        handler.send(404, "Not Found", "text/plain")

    with Server(listing=nothing) as server:
        assert "no OpenAI-compatible API" in sentence(evaluate(server.url))
        record = record_of(evaluate(server.url, "--model", "hidden", "--json"))
    assert record["model"] == "hidden"
    assert {request["model"] for _, _, request in server.posts} == {"hidden"}


@pytest.mark.parametrize(
    ("models", "arguments", "words"),
    [
        (("llama3.2:latest", "qwen3:8b"), [], ["several models", "llama3.2:latest, qwen3:8b"]),
        (("llama3.2:latest",), ["--model", "mistral"], ["no model mistral", "llama3.2:latest"]),
        ((), [], ["lists no model", "--model"]),
        (tuple(f"m{n}" for n in range(40)), [], ["m0", "or one of 28 more"]),
    ],
)
def test_the_models_on_offer_are_told(
    models: tuple[str, ...], arguments: list[str], words: list[str]
) -> None:
    with Server(models=models) as server:
        said = sentence(evaluate(server.url, *arguments))
    assert all(word in said for word in words)
    assert not server.posts


def test_ollamas_short_names_are_names() -> None:
    with well_behaved(models=("llama3.2:latest", "qwen3:8b")) as server:
        assert (
            record_of(evaluate(server.url, "--model", "llama3.2", "--json"))["model"] == "llama3.2"
        )


@pytest.mark.parametrize(
    "url", ["http://", "http://127.0.0.1:99999/v1", "http://127.0.0.1:x/v1", "http://a b/v1",
            "http://user:secretword@exa mple/v1"],
)  # fmt: skip
def test_what_is_no_address_is_told(url: str) -> None:
    said = sentence(evaluate(url))
    assert "http://127.0.0.1:11434/v1" in said
    assert "secretword" not in said


KEY = "sk-test-0123456789"


def guarded(handler: Handler, request: dict[str, Any], number: int) -> None:
    """Wants the key, and repeats what it was given, as some do."""
    given = handler.headers.get("Authorization", "nothing")
    if given == f"Bearer {KEY}":
        handler.say(REFUSAL)
    else:
        handler.send(401, json.dumps({"error": {"message": f"Incorrect API key: {given}"}}))


@pytest.mark.parametrize("name", ["ABL_API_KEY", "OPENAI_API_KEY"])
def test_the_key_is_sent_and_never_shown(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(name, f" {KEY}\n")
    with Server(guarded) as server:
        result = evaluate(server.url, "--json", "--resume", tmp_path / "j.jsonl")
        assert record_of(result)["harmful_refusal_rate"] == 1
        assert KEY not in result.output + (tmp_path / "j.jsonl").read_text()
        monkeypatch.setenv(name, "sk-other-9876543210")
        result = evaluate(server.url)
    assert "401" in sentence(result)
    assert "***" in result.output
    assert "9876543210" not in result.output
    assert len(server.posts) <= ALL + 4  # a wrong key is not tried again


def test_without_a_key_the_variable_is_named() -> None:
    with Server(guarded) as server:
        assert "set ABL_API_KEY" in sentence(evaluate(server.url))


def test_a_key_that_no_request_can_carry_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABL_API_KEY", "two\nlines-of-secret")
    with Server() as server:
        said = sentence(evaluate(server.url))
    assert "ABL_API_KEY" in said
    assert "secret" not in said


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("http://192.168.1.5:8080/v1", None),
        ("http://localhost.example.com/v1", None),
        ("http://127.0.0.1:8080/v1", KEY),
        ("http://[::1]:8080/v1", KEY),
        ("http://localhost/v1", KEY),
        ("https://api.example.com/v1", KEY),
    ],
)
def test_openais_key_leaves_the_machine_over_https_alone(
    url: str, sent: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert key(urlsplit(url)) == sent
    monkeypatch.setenv("ABL_API_KEY", "for-this")
    assert key(urlsplit(url)) == "for-this"


def test_a_password_in_the_address_is_used_and_not_shown(tmp_path: Path) -> None:
    def guarded(handler: Handler, request: dict[str, Any], number: int) -> None:
        assert handler.headers["Authorization"] == "Basic bWU6cEBzc3dvcmQ="
        handler.send(500, "p@ssword is wrong", "text/plain")

    with Server(guarded) as server:
        url = f"http://me:p%40ssword@127.0.0.1:{server.port}/v1"
        result = evaluate(url, "--retries", 0, "--resume", tmp_path / "j.jsonl")
    assert "500" in sentence(result)
    assert "ssword" not in result.output + (tmp_path / "j.jsonl").read_text()


# --- what goes wrong -----------------------------------------------------------------------------


def test_a_port_where_nobody_listens_is_told_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.monotonic()
    said = sentence(evaluate(f"http://127.0.0.1:{port}/v1"))
    assert "refuses connections: is the server running?" in said
    assert time.monotonic() - start < 5


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
        time.sleep(30)

    with Server(script or asleep) as server:
        start = time.monotonic()
        said = sentence(evaluate(server.url, "--timeout", 0.4, "--retries", 1))
    assert "did not finish an answer within 0.4 s, 2 times: raise --timeout" in said
    assert time.monotonic() - start < 6


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


# --- going on ------------------------------------------------------------------------------------


def test_a_named_journal_holds_verdicts_and_hashes_alone(tmp_path: Path) -> None:
    journal = tmp_path / "deep" / "j.jsonl"
    with well_behaved() as server:
        first = record_of(evaluate(server.url, "--resume", journal, "--json"))
        text = journal.read_text()
        assert not any(prompt in text for prompt in server.asked)
        assert "sorry" not in text
        assert ANSWER not in text
        again = record_of(evaluate(server.url, "--resume", journal, "--json"))
        assert len(server.posts) == ALL  # nothing was asked again
        for record in (first, again):
            record.pop("seconds")
        assert again == first

        # Replies that are wanted must be asked for once more, and are then kept.
        out = tmp_path / "replies.jsonl"
        record_of(evaluate(server.url, "--resume", journal, "--save-replies", out, "--json"))
        assert len(server.posts) == 2 * ALL
        assert journal.read_text().count("sorry") == LIMIT
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert [line["set"] for line in lines] == (
            ["harmful"] * LIMIT + ["harmless"] * LIMIT + ["borderline"] * LIMIT
        )
        assert {line[server.url] for line in lines if line["set"] == "harmful"} == {REFUSAL}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--max-tokens", 9], "max tokens was 64 and is 9 now"),
        (["--seed", 3], "prompts changed since"),
        (["--model", "other"], 'model was "tiny" and is "other" now'),
    ],
)
def test_a_journal_of_something_else_is_refused_and_kept(
    change: list[Any], words: str, tmp_path: Path
) -> None:
    journal = tmp_path / "j.jsonl"
    with well_behaved(models=("tiny", "other")) as server:
        record_of(evaluate(server.url, "--model", "tiny", "--resume", journal, "--json"))
        before = journal.read_bytes()
        arguments = change if "--model" in change else ["--model", "tiny", *change]
        said = sentence(evaluate(server.url, "--resume", journal, *arguments))
        assert words in said
        assert "name another file for --resume" in said
        assert journal.read_bytes() == before
        assert len(server.posts) == ALL


def test_another_model_behind_the_same_address_starts_anew(cache: Path) -> None:
    def three(handler: Handler, request: dict[str, Any], number: int) -> None:
        if number < 3:
            server.behave(handler, request, number)
        else:
            handler.send(500, "")

    server = well_behaved()
    server.script = three
    with server:
        sentence(evaluate(server.url, "--concurrency", 1, "--retries", 0))
        server.script = server.behave
        server.models = ("newer",)
        result = evaluate(server.url, "--json")
        assert record_of(result)["model"] == "newer"
    assert 'starting anew: model was "tiny" and is "newer" now' in result.stderr
    assert len(server.posts) == 4 + ALL


def test_a_line_that_was_being_written_is_asked_again(tmp_path: Path) -> None:
    journal = tmp_path / "j.jsonl"
    with well_behaved() as server:
        whole = record_of(evaluate(server.url, "--resume", journal, "--json"))
        journal.write_bytes(journal.read_bytes()[:-20])
        again = record_of(evaluate(server.url, "--resume", journal, "--json"))
        assert len(server.posts) == ALL + 1
        assert again["verdicts"] == whole["verdicts"]
        assert len(journal.read_text().splitlines()) == ALL + 1
        record_of(evaluate(server.url, "--resume", journal, "--json"))
        assert len(server.posts) == ALL + 1


@pytest.mark.parametrize("content", ["Notes of mine\n", "{}\n", '{"prompt": "x"}\n', "[1]\n", "x"])
def test_a_file_that_is_no_journal_is_left_alone(content: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text(content)
    with well_behaved() as server:
        said = sentence(evaluate(server.url, "--resume", path))
    assert f"{path} is not a journal" in said
    assert path.read_text() == content


def test_one_evaluation_at_a_time_writes_a_journal(tmp_path: Path) -> None:
    from abl_mlx.behaviour.journal import Journal

    held = Journal(tmp_path / "j.jsonl", strict=True)
    with well_behaved() as server:
        said = sentence(evaluate(server.url, "--resume", tmp_path / "j.jsonl"))
    held.close()
    assert "is in use by another evaluation" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_at_once_and_leaves_what_was_answered(
    number: signal.Signals, tmp_path: Path
) -> None:
    journal = tmp_path / "j.jsonl"
    stuck = threading.Event()

    def sticky(handler: Handler, request: dict[str, Any], count: int) -> None:
        if count < 4:
            server.behave(handler, request, count)
        else:
            stuck.set()
            time.sleep(60)

    server = well_behaved()
    server.script = sticky
    with server:
        process = subprocess.Popen(
            [sys.executable, "-m", "abl_mlx", "eval", server.url, "--limit", str(LIMIT),
             "--concurrency", "2", "--resume", journal],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ,
        )  # fmt: skip
        assert stuck.wait(60)
        time.sleep(0.3)
        process.send_signal(number)
        start = time.monotonic()
        out, err = process.communicate(timeout=30)
        assert time.monotonic() - start < 15
        assert process.returncode != 0
        assert out == ""
        assert "Traceback" not in err
        assert len(journal.read_text().splitlines()) == 1 + 4
        server.script = server.behave
        assert record_of(evaluate(server.url, "--resume", journal, "--json"))["model"] == "tiny"
    assert len(server.posts) == 4 + 2 + (ALL - 4)


# --- text to complete ----------------------------------------------------------------------------


def test_a_server_is_given_the_text_to_complete() -> None:
    with Server(refused=HARMFUL.__contains__, routes=("completions",)) as server:
        record = record_of(evaluate(server.url, "--template", "plain", "--json"))
    assert record["verdicts"]["harmful"] == "R" * LIMIT
    assert record["verdicts"]["harmless"] == "A" * LIMIT
    assert "its replies are completions" in record["note"]
    texts = {request["prompt"] for _, _, request in server.posts}
    assert len(texts & HARMFUL) == LIMIT
    assert {path for path, _, _ in server.posts} == {"/v1/completions"}
    assert all("messages" not in request for _, _, request in server.posts)


def test_a_server_without_completions() -> None:
    with Server() as server:
        said = sentence(evaluate(server.url, "--template", "plain"))
    assert "has no /completions, which --template plain needs (404" in said
    assert "leave --template out" in said


@pytest.mark.parametrize("template", ["chatml", "own.jinja"])
def test_a_server_writes_conversations_itself(template: str) -> None:
    said = sentence(evaluate("http://127.0.0.1:9/v1", "--template", template))
    assert f"--template {template}: a server writes conversations with its own template" in said
    assert "--template plain for completions" in said


def test_ollama_writes_conversations_even_then() -> None:
    with Server(routes=("completions",), owner="library") as server:
        said = sentence(evaluate(server.url, "--template", "plain"))
    assert "is Ollama, which writes its template around a text to complete" in said
    assert "give ollama:tiny instead" in said
    assert server.posts == []


def test_a_completion_without_a_text() -> None:
    def wrong(handler: Handler, request: dict[str, Any], number: int) -> None:
        handler.choose({"text": None})

    with Server(wrong, routes=("completions",)) as server:
        asked = evaluate(server.url, "--template", "plain", "--retries", "0")
    assert "sends a reply without a message" in sentence(asked)
