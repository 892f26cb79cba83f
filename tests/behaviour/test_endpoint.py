"""Servers that `eval` asks, over real HTTP: replies, verdicts, and going on after a stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from abl_mlx.behaviour.endpoint import Endpoint
from abl_mlx.eval_choices import Asking
from abl_mlx.inputs import prompts
from abl_mlx.inputs.sets import split
from tests.support.asked_servers import (
    ALL,
    HARMFUL,
    LIMIT,
    evaluate,
    record_of,
    sentence,
    well_behaved,
)
from tests.support.servers import ANSWER, REFUSAL, Handler, Server

pytestmark = pytest.mark.usefixtures("cache")


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
            time.sleep(90)

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
        out, err = process.communicate(timeout=60)
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
