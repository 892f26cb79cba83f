"""Addresses of servers, the models on them and their keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from abl_mlx.behaviour.http_call import key
from tests.support.asked_servers import ALL, evaluate, record_of, sentence, well_behaved
from tests.support.servers import REFUSAL, Handler, Server

pytestmark = pytest.mark.usefixtures("cache")


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
